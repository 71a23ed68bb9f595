//! A control plane with one node, for the agents that a test starts on it one after the other.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use k8s_openapi::api::core::v1::{Node, Pod};
use keelson_agent::sources::objects::{Objects, Wake, keys_of};
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::ControlPlane;

/// The control plane, the node `a`, and a directory for its agents.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
    pub(crate) plane: ControlPlane,
    /// With the rights of the node.
    pub(crate) node: Client,
}

impl Bench {
    pub(crate) async fn start() -> Self {
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("control")).unwrap();
        let plane = ControlPlane::start(&dir.path().join("control")).await;
        let node = plane.node("a").await;
        let nodes: Api<Node> = Api::all(node.clone());
        let object = serde_json::from_value(json!({"metadata": {"name": "a"}})).unwrap();
        nodes.create(&PostParams::default(), &object).await.unwrap();
        Self { dir, plane, node }
    }

    /// The kubelet's root directory.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("kubelet")
    }

    /// Ends the agent, then everything.
    pub(crate) async fn stop(self, agent: &CancellationToken) {
        agent.cancel();
        self.plane.stop().await;
    }
}

/// Counts how often pods were woken because of objects that they use.
#[derive(Default)]
pub(crate) struct Wakes(Arc<AtomicUsize>);

impl Wakes {
    /// Counts those of this pod, too.
    pub(crate) fn follow(&self, objects: &Objects, pod: &Pod) {
        let count = Arc::clone(&self.0);
        let wake: Wake = Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        objects.register(pod.metadata.uid.as_deref().unwrap(), &keys_of(pod), &wake);
    }

    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}
