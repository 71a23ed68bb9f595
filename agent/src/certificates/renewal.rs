//! Certificates are renewed before they end: the client's with `rotateCertificates`, the server's with `serverTLSBootstrap`.
//!
//! A failure is told and tried again after a growing wait; what is there is used as long as it is valid. A client certificate
//! that has ended (the node was away) is replaced by way of the bootstrap kubeconfig, where there is one.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use agent_core::certificates::retry_after;
use anyhow::Context as _;
use jiff::Timestamp;
use kube::Client;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::bootstrap;
use super::client::{Credentials, client_store};
use super::directory;
use super::request::{SERVING_SIGNER, Wanted, obtain};
use super::store::{Pair, Store};
use crate::config::AgentConfig;
use crate::server::Serving;

/// Clocks jump, machines sleep: a wait is never longer than this before the clock is looked at again.
const LOOK: Duration = Duration::from_secs(600);

/// Renews the client certificate until `cancel`.
pub async fn client(config: Arc<AgentConfig>, credentials: Credentials, cancel: CancellationToken) {
    let store = client_store(&config);
    let renew = async {
        let mut failures = 0;
        loop {
            let current = credentials.current().unwrap_or_else(|error| {
                warn!("the client certificate cannot be read: {error:#}");
                None
            });
            // Without a certificate (a token, an exec plugin) there is nothing to renew.
            let Some(pair) = current else { return std::future::pending().await };
            wait_until(renewal(&pair)).await;
            let outcome = renew_client(&config, &credentials, &store, &pair).await;
            failures = settle(outcome, failures, "client certificate").await;
        }
    };
    // Cancel-safe: a renewal that is cut off is taken up after the next start.
    tokio::select! {
        () = cancel.cancelled() => {}
        () = renew => {}
    }
}

async fn renew_client(
    config: &AgentConfig,
    credentials: &Credentials,
    store: &Store,
    pair: &Pair,
) -> anyhow::Result<()> {
    if config.bootstraps() && !pair.validity.holds(Timestamp::now()) {
        bootstrap::by_token(config, store).await?;
    } else {
        obtain(&credentials.client(), &bootstrap::wanted(config), store).await?;
    }
    credentials.reload().await.context("the new client certificate cannot be used")?;
    info!("client certificate renewed");
    Ok(())
}

/// Where the serving certificates that the API server issued are.
pub(super) fn serving_store(config: &AgentConfig) -> Store {
    Store::new(directory(config), "kubelet-server")
}

/// What a serving certificate must be valid for.
pub(super) fn serving_names(config: &AgentConfig) -> Vec<String> {
    let mut names = vec![config.keelson.node_name.clone(), config.keelson.node_ip.to_string()];
    names.dedup();
    names
}

/// Whether a serving certificate is valid, for these names.
pub(super) fn serves(pair: &Pair, names: &[String]) -> bool {
    pair.validity.holds(Timestamp::now()) && names.iter().all(|name| pair.names.contains(name))
}

/// Asks for a serving certificate and renews it until `cancel`.
pub(super) async fn serving(
    config: AgentConfig,
    client: Client,
    certificate: Serving,
    cancel: CancellationToken,
) {
    let (store, names) = (serving_store(&config), serving_names(&config));
    let wanted =
        Wanted { node_name: config.keelson.node_name.clone(), signer: SERVING_SIGNER, names: names.clone() };
    let renew = async {
        let mut failures = 0;
        loop {
            if let Some(pair) = store.current().filter(|pair| serves(pair, &names)) {
                wait_until(renewal(&pair)).await;
            }
            let outcome = renew_serving(&client, &wanted, &store, &certificate).await;
            failures = settle(outcome, failures, "serving certificate").await;
        }
    };
    // Cancel-safe: a renewal that is cut off is taken up after the next start.
    tokio::select! {
        () = cancel.cancelled() => {}
        () = renew => {}
    }
}

async fn renew_serving(
    client: &Client,
    wanted: &Wanted,
    store: &Store,
    certificate: &Serving,
) -> anyhow::Result<()> {
    obtain(client, wanted, store).await?;
    let pair = store.current().context("the new serving certificate is not there")?;
    certificate.replace(&pair.pem).context("the new serving certificate cannot be used")?;
    info!(names = %wanted.names.join(","), "serving certificate issued");
    Ok(())
}

/// When the next one is asked for; for one certificate always the same moment in one run of the agent.
fn renewal(pair: &Pair) -> Timestamp {
    pair.validity.renewal_due(RandomState::new().hash_one(&pair.pem))
}

/// Tells a failure and waits for its turn; how many there were in a row.
async fn settle(outcome: anyhow::Result<()>, failures: u32, what: &str) -> u32 {
    let Err(error) = outcome else { return 0 };
    let wait = retry_after(failures);
    warn!(again_in = %wait, "{what} not renewed: {error:#}");
    tokio::time::sleep(wait.unsigned_abs()).await;
    failures.saturating_add(1)
}

async fn wait_until(due: Timestamp) {
    loop {
        let left = due.duration_since(Timestamp::now());
        if left.is_zero() || left.is_negative() {
            return;
        }
        tokio::time::sleep(left.unsigned_abs().min(LOOK)).await;
    }
}
