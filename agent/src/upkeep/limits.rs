//! Ends pods that use more of the disk than they said they would: `emptyDir.sizeLimit`, limits of `ephemeral-storage`.
//!
//! A loop of its own, because walks through directories take as long as they take and eviction must not wait for them. One
//! pod at a time; after a round the loop rests [`REST`] times as long as the round took, so that however many files there are,
//! a small share of one processor goes into it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_core::eviction::{PodUse, has_disk_limits, limited_volumes, over_limit};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::eviction::{HARD_GRACE, add_files, candidates, runtime_use};
use crate::host::usage::tree_up_to;
use crate::pods::directory::PodDirectory;
use crate::pods::manager::Eviction;
use crate::runtime::cri::Cri;

/// Shortest pause between rounds.
const PERIOD: Duration = Duration::from_secs(10);
/// Longest pause, however long a round took.
const LONGEST: Duration = Duration::from_secs(300);
/// Pause after a round, in lengths of it.
const REST: u32 = 50;

/// A larger volume counts as it was seen so far.
const MAX_ENTRIES: u64 = 10_000_000;

/// What the loop works with.
pub struct Limits {
    /// Writable layers of containers.
    pub cri: Cri,
    /// The pods there are.
    pub pods: PodDirectory,
    /// Told which pod has to go.
    pub evictions: mpsc::Sender<Eviction>,
    /// The kubelet's directory.
    pub root_dir: PathBuf,
    /// Directory of the pods' logs.
    pub pod_logs_dir: PathBuf,
}

/// Looks until `cancel`.
pub async fn run(limits: Limits, cancel: CancellationToken) {
    loop {
        let begin = Instant::now();
        // Cancel-safe: a round only reads and sends.
        tokio::select! {
            () = cancel.cancelled() => return,
            () = limits.round() => {}
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause_after(begin.elapsed())) => {}
        }
    }
}

fn pause_after(round: Duration) -> Duration {
    round.saturating_mul(REST).clamp(PERIOD, LONGEST)
}

impl Limits {
    async fn round(&self) {
        let mut views = candidates(&self.pods);
        views.retain(|view| has_disk_limits(&view.pod));
        if views.is_empty() {
            return;
        }
        let uses = match runtime_use(&self.cri, &views).await {
            Ok(uses) => uses,
            Err(error) => {
                debug!(%error, "limits of the disk are not looked at");
                return;
            }
        };
        for (uid, used) in uses {
            let (root, logs) = (self.root_dir.clone(), self.pod_logs_dir.clone());
            let found = tokio::task::spawn_blocking(move || excess(used, &root, &logs)).await;
            if let Ok(Some(message)) = found {
                let eviction = Eviction { uid, reason: "Evicted", message, grace: HARD_GRACE };
                // The manager is gone only when the agent is.
                drop(self.evictions.send(eviction).await);
            }
        }
    }
}

/// Which limit the pod is over. A limited volume is walked twice only where the pod's whole counts too.
fn excess(mut used: PodUse, root: &Path, logs: &Path) -> Option<String> {
    let volumes = volumes_use(&used.pod, root);
    if let Some(message) = over_limit(&used, &volumes) {
        return Some(message);
    }
    let limits_containers = used.pod.spec.iter().flat_map(|spec| &spec.containers).any(|container| {
        let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
        limits.is_some_and(|limits| limits.contains_key("ephemeral-storage"))
    });
    if !limits_containers {
        return None;
    }
    add_files(&mut used, root, logs);
    over_limit(&used, &volumes)
}

/// Bytes of the pod's limited volumes.
fn volumes_use(pod: &Arc<Pod>, root: &Path) -> BTreeMap<String, u64> {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let directory = root.join("pods").join(uid).join("volumes/kubernetes.io~empty-dir");
    let names = pod.spec.iter().flat_map(limited_volumes);
    names.map(|name| (name.to_owned(), tree_up_to(&directory.join(name), MAX_ENTRIES).bytes)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_rest_grows_with_the_work() {
        assert_eq!(pause_after(Duration::from_millis(20)), PERIOD);
        assert_eq!(pause_after(Duration::from_secs(2)), Duration::from_secs(100));
        assert_eq!(pause_after(Duration::from_secs(60)), LONGEST);
    }

    #[test]
    fn volumes_and_containers_are_held_to_their_limits() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("pods/u/volumes/kubernetes.io~empty-dir/v");
        std::fs::create_dir_all(&volume).unwrap();
        std::fs::write(volume.join("file"), vec![1; 1 << 20]).unwrap();
        let check = |volume_limit: &str, container_limit: &str| {
            let pod: Pod = serde_json::from_value(json!({
                "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
                "spec": {"volumes": [{"name": "v", "emptyDir": {"sizeLimit": volume_limit}}],
                    "containers": [{"name": "a",
                        "resources": {"limits": {"ephemeral-storage": container_limit}}}]}}))
            .unwrap();
            let containers =
                BTreeMap::from([("a".to_owned(), agent_core::eviction::ContainerUse::default())]);
            let used = PodUse { pod: Arc::new(pod), containers, volumes: 0, inodes: 0, processes: 0 };
            excess(used, dir.path(), &dir.path().join("logs"))
        };
        assert_eq!(check("2Mi", "2Mi"), None);
        assert!(check("512Ki", "2Mi").is_some_and(|why| why.contains("EmptyDir volume \"v\"")));
        assert!(check("2Mi", "512Ki").is_some_and(|why| why.contains("total limit of containers 512Ki")));
    }
}
