//! The agent's own certificates: the one it serves, and the one by which the API server knows it.
//!
//! Inputs: the configuration, PEM files, and certificate signing requests. Outputs: files below `<rootDir>/pki`, and
//! [`crate::server::Serving`]. Nothing here answers requests.

mod files;
mod self_signed;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt as _;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use inotify::{Inotify, WatchMask};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

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

/// The serving certificate: of the configured files, read again when they change; else one that the agent signs itself.
pub fn serving(config: &AgentConfig, cancel: &CancellationToken) -> anyhow::Result<Served> {
    let (cert, key) = (config.tls_cert_file.clone(), config.tls_private_key_file.clone());
    if cert.as_os_str().is_empty() {
        let names = [config.keelson.node_name.clone(), config.keelson.node_ip.to_string()];
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
        let changed = changed(&cert, &key);
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
async fn changed(cert: &Path, key: &Path) -> bool {
    let watch = || -> std::io::Result<_> {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::CREATE;
        for directory in [cert, key].into_iter().filter_map(Path::parent) {
            inotify.watches().add(directory, mask)?;
        }
        inotify.into_event_stream([0; 4096])
    };
    match watch() {
        Ok(mut events) => events.next().await.is_some(),
        Err(error) => {
            warn!(%error, "changes of the serving certificate's files are not seen");
            false
        }
    }
}

#[cfg(test)]
mod tests;
