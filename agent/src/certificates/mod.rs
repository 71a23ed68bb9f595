//! The agent's own certificates: the one it serves, and the one by which the API server knows it.
//!
//! Inputs: the configuration, PEM files, and certificate signing requests. Outputs: files below `<rootDir>/pki`, and
//! [`crate::server::Serving`]. Nothing here answers requests.

mod bootstrap;
mod client;
mod files;
mod renewal;
mod request;
mod self_signed;
mod store;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt as _;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use inotify::{Inotify, WatchMask};
use kube::Client;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use self::bootstrap::join;
pub use self::client::Credentials;
pub(crate) use self::files::write_private;
pub use self::renewal::client as renew_client;

use crate::config::AgentConfig;
use crate::server::Serving;

/// Files of a pair are written one after the other: they are read together.
const SETTLE: Duration = Duration::from_millis(200);

/// A certificate to serve, and what keeps it up to date.
pub struct Served {
    /// For the server.
    pub certificate: Serving,
    /// Runs until the agent ends.
    pub follow: BoxFuture<'static, ()>,
}

/// Directory of certificates that the agent makes or is given.
pub fn directory(config: &AgentConfig) -> PathBuf {
    config.keelson.root_dir.join("pki")
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
    let certificate = Serving::from_files(&cert, &key).context("the serving certificate cannot be used")?;
    let follow = follow_files(certificate.clone(), cert, key, cancel.clone()).boxed();
    Ok(Served { certificate, follow })
}

/// Serves what the files hold whenever they change, until `cancel`.
async fn follow_files(certificate: Serving, cert: PathBuf, key: PathBuf, cancel: CancellationToken) {
    loop {
        let files = [cert.clone(), key.clone()];
        let changed = changed(&files);
        // Cancel-safe: a token, and a watch that is made anew.
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = changed => if !changed {
                return cancel.cancelled().await;
            },
        }
        tokio::time::sleep(SETTLE).await;
        match certificate.reload(&cert, &key) {
            Ok(()) => info!(file = %cert.display(), "serving certificate read again"),
            Err(error) => warn!("the former serving certificate stays: {error:#}"),
        }
    }
}

/// Waits until something happens in the files' directories; false where that cannot be seen.
async fn changed(files: &[PathBuf]) -> bool {
    let watch = || -> std::io::Result<_> {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::CREATE;
        for directory in files.iter().filter_map(|file| file.parent()) {
            inotify.watches().add(directory, mask)?;
        }
        inotify.into_event_stream([0; 4096])
    };
    match watch() {
        Ok(mut events) => events.next().await.is_some(),
        Err(error) => {
            warn!(%error, "changes of certificates' files are not seen");
            false
        }
    }
}

#[cfg(test)]
mod tests;
