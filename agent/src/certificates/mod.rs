//! The agent's own certificates: the one it serves, and the one by which the API server knows it.
//!
//! Inputs: the configuration, PEM files, and certificate signing requests. Outputs: files below `<rootDir>/pki`, and
//! [`crate::server::Serving`]. Nothing here answers requests.

mod bootstrap;
mod client;
mod follow;
mod renewal;
mod request;
mod self_signed;
mod store;

use std::path::PathBuf;

use anyhow::Context as _;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use kube::Client;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use self::bootstrap::join;
pub use self::client::Credentials;
pub use self::renewal::client as renew_client;

use crate::config::AgentConfig;
use crate::server::Serving;

/// A certificate to serve, and what keeps it up to date.
pub struct Served {
    /// For the server.
    pub certificate: Serving,
    /// Runs until the agent ends.
    pub follow: BoxFuture<'static, ()>,
}

/// Directory of certificates that the agent makes or is given.
pub fn directory(config: &AgentConfig) -> PathBuf {
    config.keelson.cert_dir.clone().unwrap_or_else(|| config.keelson.root_dir.join("pki"))
}

/// The serving certificate: of the configured files, read again when they change; else, with `serverTLSBootstrap`, one that
/// the API server issues, renewed before it ends; else (and until then) one that the agent signs itself.
pub fn serving(config: &AgentConfig, client: &Client, cancel: &CancellationToken) -> anyhow::Result<Served> {
    let (cert, key) = (config.tls_cert_file.clone(), config.tls_private_key_file.clone());
    let (issued, names) = (renewal::serving_store(config), renewal::serving_names(config));
    if cert.as_os_str().is_empty() && config.server_tls_bootstrap && !config.is_standalone() {
        let known = issued.current().filter(|pair| renewal::serves(pair, &names));
        let certificate = if let Some(pair) = known {
            Serving::from_pem(&pair.pem)?
        } else {
            let (cert, key) = self_signed::ensure(&directory(config), &names, jiff::Timestamp::now())?;
            Serving::from_files(&cert, &key)?
        };
        let renewed = renewal::serving(config.clone(), client.clone(), certificate.clone(), cancel.clone());
        return Ok(Served { certificate, follow: renewed.boxed() });
    }
    if cert.as_os_str().is_empty() {
        let (cert, key) = self_signed::ensure(&directory(config), &names, jiff::Timestamp::now())?;
        let certificate = Serving::from_files(&cert, &key)?;
        let cancel = cancel.clone();
        return Ok(Served { certificate, follow: async move { cancel.cancelled().await }.boxed() });
    }
    let seen = follow::Seen::of(&[cert.clone(), key.clone()]);
    let certificate = Serving::from_files(&cert, &key).context("the serving certificate cannot be used")?;
    let follow = follow_files(certificate.clone(), cert, key, seen, cancel.clone()).boxed();
    Ok(Served { certificate, follow })
}

/// Serves what the files hold whenever they change, until `cancel`.
async fn follow_files(
    certificate: Serving,
    cert: PathBuf,
    key: PathBuf,
    seen: follow::Seen,
    cancel: CancellationToken,
) {
    let files = || vec![cert.clone(), key.clone()];
    let reload = || {
        let read = certificate.reload(&cert, &key);
        match &read {
            Ok(()) => info!(file = %cert.display(), "serving certificate read again"),
            Err(error) => warn!("the former serving certificate stays: {error:#}"),
        }
        std::future::ready(read.is_ok())
    };
    follow::follow(files, seen, reload, cancel).await;
}

#[cfg(test)]
mod tests;
