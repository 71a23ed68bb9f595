//! Sizes of the pods' logs and volumes, for `/stats/summary`.
//!
//! Walking directories takes as long as it takes: a pod is walked at most once in `volumeStatsAggPeriod`, only while somebody asks, one
//! after the other, and whoever asks waits for [`PATIENCE`] and then takes what is known. No pod waits for another's walk for
//! longer than [`LONGEST`], and no file system is asked that may never answer.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ServerConfig;
use crate::host::mount_table;
use crate::host::stats::{FsFigures, file_system};
use crate::host::usage::{TreeUse, share_file_system, tree};
use crate::host::volumes::is_remote;
use crate::runtime::sandbox_config::log_directory;

/// How long a request waits for a walk.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the next pod waits for the walk of one, which then goes on beside.
const LONGEST: Duration = Duration::from_secs(10);

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
    state: Arc<Mutex<State>>,
    walks: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct State {
    known: BTreeMap<String, (Instant, PodSizes)>,
    /// Pods that are walked.
    busy: BTreeSet<String>,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { state: Arc::default(), walks: Arc::new(Semaphore::new(1)) }
    }
}

impl Sizes {
    /// Sizes by uid, as far as they are known in time.
    pub(super) async fn of(&self, pods: &[Arc<Pod>], config: &ServerConfig) -> BTreeMap<String, PodSizes> {
        let old: Vec<Arc<Pod>> = {
            let mut state = self.state();
            state.known.retain(|uid, _| pods.iter().any(|pod| pod.metadata.uid.as_ref() == Some(uid)));
            let is_old = |pod: &&Arc<Pod>| {
                let uid = pod.metadata.uid.as_deref().unwrap_or_default();
                state.known.get(uid).is_none_or(|(at, _)| at.elapsed() >= config.settings.sizes_age)
            };
            pods.iter().filter(is_old).cloned().collect()
        };
        if !old.is_empty()
            && let Ok(walk) = Arc::clone(&self.walks).try_acquire_owned()
        {
            let places = (config.root_dir.clone(), config.pod_logs_dir.clone());
            let walking = tokio::spawn(self.clone().walk(old, places, walk));
            // Late or not: the walk goes on, and the next request sees what it finds.
            drop(tokio::time::timeout(PATIENCE, walking).await);
        }
        let state = self.state();
        state.known.iter().map(|(uid, (_, sizes))| (uid.clone(), sizes.clone())).collect()
    }

    /// Walks one pod after the other.
    async fn walk(self, pods: Vec<Arc<Pod>>, places: (PathBuf, PathBuf), walk: OwnedSemaphorePermit) {
        for pod in pods {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            if !self.state().busy.insert(uid.clone()) {
                continue;
            }
            let (this, (root, logs)) = (self.clone(), places.clone());
            let measuring = tokio::task::spawn_blocking(move || {
                let sizes = measure(&pod, &root, &logs);
                let mut state = this.state();
                state.busy.remove(&uid);
                state.known.insert(uid, (Instant::now(), sizes));
            });
            // Late: it goes on.
            drop(tokio::time::timeout(LONGEST, measuring).await);
        }
        drop(walk);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Walks one pod's directories.
fn measure(pod: &Pod, root: &Path, logs: &Path) -> PodSizes {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let logs = log_directory(logs, pod);
    let containers = pod.spec.iter().flat_map(agent_core::model::containers);
    let logs =
        containers.map(|entry| &entry.container.name).map(|name| (name.clone(), tree(&logs.join(name))));
    let node_fs = file_system(root).unwrap_or_default();
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
            if share_file_system(&path, root) {
                volumes.push(VolumeSize { name, used: tree(&path), fs: node_fs, on_node_disk: true });
            } else if let Some(fs) = in_memory(&path) {
                let used = TreeUse { bytes: fs.used, inodes: fs.inodes.saturating_sub(fs.inodes_free) };
                volumes.push(VolumeSize { name, used, fs, on_node_disk: false });
            }
        }
    }
    volumes.sort_by(|one, other| one.name.cmp(&other.name));
    PodSizes { logs: logs.collect(), volumes }
}

/// The volume's memory, where it is one of memory. What a container mounted over its volume may never answer.
fn in_memory(path: &Path) -> Option<FsFigures> {
    let found = mount_table::type_at(path).ok()??;
    if matches!(found.as_str(), "tmpfs" | "hugetlbfs") { file_system(path).ok() } else { None }
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
