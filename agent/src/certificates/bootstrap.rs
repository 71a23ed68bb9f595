//! How a node joins with nothing but a bootstrap token: by it, it asks for a client certificate, and writes its kubeconfig.
//!
//! Input: `keelson.bootstrapKubeconfig`. Output: `<rootDir>/pki/kubelet-client-current.pem` and `keelson.kubeconfig`, in this
//! order. Where both are there and valid nothing happens.

use std::path::Path;

use agent_core::certificates::retry_after;
use anyhow::Context as _;
use kube::config::{Cluster, Kubeconfig};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::client::{client_store, of_kubeconfig, read_kubeconfig, usable};
use super::request::{CLIENT_SIGNER, Wanted, obtain};
use super::store::Store;
use crate::config::AgentConfig;
use crate::files;

/// Sees to it that the node has a client certificate and a kubeconfig. Goes on trying until `cancel`: a token may be made,
/// or a request approved, at any time.
pub async fn join(config: &AgentConfig, cancel: &CancellationToken) -> anyhow::Result<()> {
    if !config.bootstraps() || is_joined(config) {
        return Ok(());
    }
    let mut failures = 0;
    loop {
        // Cancel-safe: an attempt that is cut off is taken up by the next one.
        let outcome = tokio::select! {
            () = cancel.cancelled() => anyhow::bail!("stopped before the node had a certificate"),
            outcome = attempt(config) => outcome,
        };
        let Err(error) = outcome else { return Ok(()) };
        let wait = retry_after(failures);
        warn!(again_in = %wait, "the node has no certificate yet: {error:#}");
        failures += 1;
        tokio::select! {
            () = cancel.cancelled() => {}
            () = tokio::time::sleep(wait.unsigned_abs()) => {}
        }
    }
}

/// Whether the kubeconfig can be used as it is.
fn is_joined(config: &AgentConfig) -> bool {
    let store = client_store(config);
    let path = &config.keelson.kubeconfig;
    let Ok(kubeconfig) = read_kubeconfig(path) else { return false };
    let link = store.current_path().display().to_string();
    let is_ours = kubeconfig
        .auth_infos
        .iter()
        .filter_map(|info| info.auth_info.as_ref())
        .any(|info| info.client_certificate.as_deref() == Some(link.as_str()));
    // Somebody else's kubeconfig has credentials of its own.
    !is_ours || usable(&store).is_some()
}

async fn attempt(config: &AgentConfig) -> anyhow::Result<()> {
    let bootstrap = read_kubeconfig(&config.keelson.bootstrap_kubeconfig)?;
    let store = client_store(config);
    if usable(&store).is_none() {
        by_token(config, &store).await?;
    }
    write_kubeconfig(&config.keelson.kubeconfig, &bootstrap, &store)?;
    info!(kubeconfig = %config.keelson.kubeconfig.display(), "the node has its certificate");
    Ok(())
}

/// Asks for a client certificate with the credentials of the bootstrap kubeconfig.
pub(super) async fn by_token(config: &AgentConfig, store: &Store) -> anyhow::Result<()> {
    let path = &config.keelson.bootstrap_kubeconfig;
    let client = of_kubeconfig(read_kubeconfig(path)?)
        .await
        .with_context(|| format!("keelson.bootstrapKubeconfig {} cannot be used", path.display()))?;
    obtain(&client, &wanted(config), store).await
}

/// The client certificate of this node.
pub(super) fn wanted(config: &AgentConfig) -> Wanted {
    Wanted { node_name: config.keelson.node_name.clone(), signer: CLIENT_SIGNER, names: Vec::new() }
}

/// The kubeconfig of the node, with upstream's names: the server of the bootstrap one, the certificate by its link.
fn write_kubeconfig(path: &Path, bootstrap: &Kubeconfig, store: &Store) -> anyhow::Result<()> {
    let link = store.current_path().display().to_string();
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "default-cluster", "cluster": cluster_of(bootstrap)?}],
        "users": [{"name": "default-auth", "user": {"client-certificate": link, "client-key": link}}],
        "contexts": [{
            "name": "default-context",
            "context": {"cluster": "default-cluster", "user": "default-auth", "namespace": "default"},
        }],
        "current-context": "default-context",
    });
    let text = serde_norway::to_string(&kubeconfig).context("the kubeconfig cannot be written down")?;
    files::write_private(path, &text)
        .with_context(|| format!("keelson.kubeconfig {} cannot be written", path.display()))
}

/// The cluster of the current context.
fn cluster_of(kubeconfig: &Kubeconfig) -> anyhow::Result<Cluster> {
    let current = kubeconfig.current_context.as_deref().unwrap_or_default();
    let context = kubeconfig.contexts.iter().find(|context| context.name == current);
    let name = context.and_then(|context| context.context.as_ref()).map(|context| context.cluster.as_str());
    let cluster = kubeconfig.clusters.iter().find(|cluster| Some(cluster.name.as_str()) == name);
    cluster
        .and_then(|cluster| cluster.cluster.clone())
        .context("keelson.bootstrapKubeconfig names no cluster in its current-context")
}
