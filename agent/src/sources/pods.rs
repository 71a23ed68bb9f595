//! The pods bound to this node, from the API server.

use std::sync::Arc;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::follow;
use super::mirrors::MIRROR;
use crate::chain::chain;

/// The annotation that says where a pod comes from.
const SOURCE: &str = "kubernetes.io/config.source";

/// What happened to the set of pods.
#[derive(Debug, Clone)]
pub enum PodEvent {
    /// The pod is new or changed.
    Apply(Arc<Pod>),
    /// The API object is gone.
    Delete(Arc<Pod>),
    /// This is all there is in the API (after each list).
    Synced(Vec<Arc<Pod>>),
    /// These are all static pods of one source.
    Static(StaticSource, Vec<Arc<Pod>>),
}

/// Where static pods come from. Of two pods with one name that of the first source counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StaticSource {
    /// `staticPodPath`.
    File,
    /// `staticPodURL`.
    Url,
}

/// Sends pod events until `cancel`. A full queue holds the watch back, which the API server can bear.
pub async fn run(
    client: Client,
    node_name: String,
    events: mpsc::Sender<PodEvent>,
    cancel: CancellationToken,
) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node_name}"));
    let pods: Api<Pod> = Api::all(client);
    let mut stream = std::pin::pin!(follow(pods, config));
    let mut listing = Vec::new();
    loop {
        // Cancel-safe: a stream and a token.
        let event = tokio::select! {
            () = cancel.cancelled() => return,
            event = stream.next() => event,
        };
        let message = match event {
            None => return,
            Some(Err(error)) => {
                warn!(error = %chain(&error), "watch of pods interrupted");
                continue;
            }
            Some(Ok(watcher::Event::Init)) => {
                listing.clear();
                continue;
            }
            Some(Ok(watcher::Event::InitApply(pod))) => {
                listing.push(trimmed(pod));
                continue;
            }
            Some(Ok(watcher::Event::InitDone)) => {
                info!(pods = listing.len(), "pods listed");
                PodEvent::Synced(std::mem::take(&mut listing))
            }
            Some(Ok(watcher::Event::Apply(pod))) => PodEvent::Apply(trimmed(pod)),
            Some(Ok(watcher::Event::Delete(pod))) => PodEvent::Delete(trimmed(pod)),
        };
        if events.send(message).await.is_err() {
            return;
        }
    }
}

/// Without what no part of the agent reads, and with its source as it is: whoever writes pods could else call one static,
/// which is never evicted.
fn trimmed(mut pod: Pod) -> Arc<Pod> {
    pod.metadata.managed_fields = None;
    if let Some(annotations) = pod.metadata.annotations.as_mut().filter(|all| !all.contains_key(MIRROR))
        && let Some(source) = annotations.get_mut(SOURCE)
    {
        "api".clone_into(source);
    }
    Arc::new(pod)
}

#[cfg(test)]
mod tests {
    use agent_core::model::is_static;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    use super::*;

    #[test]
    fn an_annotation_makes_no_pod_static() {
        let with = |keys: &[&str]| {
            let annotations = keys.iter().map(|key| ((*key).to_owned(), "file".to_owned())).collect();
            let metadata = ObjectMeta { annotations: Some(annotations), ..ObjectMeta::default() };
            is_static(&trimmed(Pod { metadata, ..Pod::default() }))
        };
        assert!(!with(&[SOURCE]));
        assert!(with(&[SOURCE, MIRROR]), "a mirror is shown as what it is");
    }
}
