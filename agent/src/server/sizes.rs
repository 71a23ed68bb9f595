//! Sizes of the pods' logs and volumes, for `/stats/summary`.
//!
//! Walking directories takes as long as it takes: a pod is walked at most once in `volumeStatsAggPeriod`, only while somebody asks, one walk
//! at a time, and whoever asks waits for [`PATIENCE`] and then takes what is known.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::Semaphore;

use super::ServerConfig;
use crate::host::stats::{FsFigures, file_system, same_file_system};
use crate::host::usage::{TreeUse, tree};
use crate::host::volumes::is_remote;
use crate::runtime::sandbox_config::log_directory;

/// How long a request waits for a walk.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a pod has on disks.
#[derive(Debug, Clone, Default)]
pub(super) struct PodSizes {
    /// By container.
    pub(super) logs: BTreeMap<String, TreeUse>,
    /// Those that the agent made, by name.
    pub(super) volumes: Vec<VolumeSize>,
}

/// One volume.
#[derive(Debug, Clone)]
pub(super) struct VolumeSize {
    pub(super) name: String,
    pub(super) used: TreeUse,
    /// The file system that it is on, or is.
    pub(super) fs: FsFigures,
    /// It takes room from the node's file system.
    pub(super) on_node_disk: bool,
}

/// The cache. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Sizes {
    known: Arc<Mutex<BTreeMap<String, (Instant, PodSizes)>>>,
    walks: Arc<Semaphore>,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { known: Arc::default(), walks: Arc::new(Semaphore::new(1)) }
    }
}

impl Sizes {
    /// Sizes by uid, as far as they are known in time.
    pub(super) async fn of(&self, pods: &[Arc<Pod>], config: &ServerConfig) -> BTreeMap<String, PodSizes> {
        let old: Vec<Arc<Pod>> = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|uid, _| pods.iter().any(|pod| pod.metadata.uid.as_ref() == Some(uid)));
            let is_old = |pod: &&Arc<Pod>| {
                let uid = pod.metadata.uid.as_deref().unwrap_or_default();
                known.get(uid).is_none_or(|(at, _)| at.elapsed() >= config.settings.sizes_age)
            };
            pods.iter().filter(is_old).cloned().collect()
        };
        if !old.is_empty()
            && let Ok(walk) = Arc::clone(&self.walks).try_acquire_owned()
        {
            let (known, root) = (Arc::clone(&self.known), config.root_dir.clone());
            let logs = config.pod_logs_dir.clone();
            let walking = tokio::task::spawn_blocking(move || {
                for pod in old {
                    let sizes = measure(&pod, &root, &logs);
                    let uid = pod.metadata.uid.clone().unwrap_or_default();
                    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
                    known.insert(uid, (Instant::now(), sizes));
                }
                drop(walk);
            });
            // Late or not: the walk goes on, and the next request sees what it finds.
            drop(tokio::time::timeout(PATIENCE, walking).await);
        }
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().map(|(uid, (_, sizes))| (uid.clone(), sizes.clone())).collect()
    }
}

/// Walks one pod's directories.
fn measure(pod: &Pod, root: &Path, logs: &Path) -> PodSizes {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let logs = log_directory(logs, pod);
    let containers = pod.spec.iter().flat_map(agent_core::model::containers);
    let logs =
        containers.map(|entry| &entry.container.name).map(|name| (name.clone(), tree(&logs.join(name))));
    let mut volumes = Vec::new();
    let directory = root.join("pods").join(uid).join("volumes");
    for plugin in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
        // A driver's file system may never answer (the driver is asked instead), and a server's neither.
        if plugin.file_name() == "kubernetes.io~csi" || is_remote(&plugin.file_name()) {
            continue;
        }
        for volume in std::fs::read_dir(plugin.path()).into_iter().flatten().flatten() {
            let path = volume.path();
            let name = volume.file_name().to_string_lossy().into_owned();
            let Ok(fs) = file_system(&path) else { continue };
            let on_node_disk = same_file_system(&path, root);
            let used = if on_node_disk {
                tree(&path)
            } else {
                TreeUse { bytes: fs.used, inodes: fs.inodes.saturating_sub(fs.inodes_free) }
            };
            volumes.push(VolumeSize { name, used, fs, on_node_disk });
        }
    }
    volumes.sort_by(|one, other| one.name.cmp(&other.name));
    PodSizes { logs: logs.collect(), volumes }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn logs_and_volumes_are_measured() {
        let directory = tempfile::tempdir().unwrap();
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {"containers": [{"name": "a"}]}}))
        .unwrap();
        let volume = directory.path().join("pods/u/volumes/kubernetes.io~empty-dir/cache");
        let logs = directory.path().join("logs");
        std::fs::create_dir_all(&volume).unwrap();
        std::fs::write(volume.join("file"), vec![1; 100_000]).unwrap();
        std::fs::create_dir_all(log_directory(&logs, &pod).join("a")).unwrap();
        std::fs::write(log_directory(&logs, &pod).join("a/0.log"), vec![1; 10_000]).unwrap();
        let sizes = measure(&pod, directory.path(), &logs);
        assert!(sizes.logs["a"].bytes >= 10_000);
        assert_eq!(sizes.volumes.len(), 1);
        let cache = &sizes.volumes[0];
        assert!(cache.name == "cache" && cache.used.bytes >= 100_000 && cache.on_node_disk, "{cache:?}");
        assert_eq!(measure(&Pod::default(), directory.path(), &logs).volumes.len(), 0);
    }
}
