//! Watches what is left of memory, disk and process ids, and has pods ended before there is nothing left.
//!
//! Looks every ten seconds, and at once when tasks stall for memory. A decision of `agent_core::eviction` becomes, in this
//! order: the node's pressures; for the disk, removal of unused images and ended containers; else the eviction of one pod,
//! whose end is waited for before the next look, so that never more pods go than must.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_core::eviction::{
    ContainerUse, Observation, PodUse, Pressure, Signal, State, Threshold, for_container_fs, is_critical,
    message, rank,
};
use cri_shim_api::v1;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::images::{ImageGc, figures};
use crate::config::EvictionConfig;
use crate::events::{EventRecorder, EventType};
use crate::host::cgroups;
use crate::host::cgroups::usage::CgroupUse;
use crate::host::stall::MemoryStall;
use crate::host::stats::{self, NodeFigures};
use crate::host::usage::{TreeUse, share_file_system, tree};
use crate::host::volumes::is_remote;
use crate::pods::directory::{PodDirectory, PodView};
use crate::pods::manager::Eviction;
use crate::runtime::cri::{Cri, CriError};
use crate::runtime::labels;
use crate::runtime::sandbox_config::log_directory;
use crate::sources::node::NodeWatch;

/// Pause between looks.
const PERIOD: Duration = Duration::from_secs(10);
/// How long the end of an evicted pod is waited for.
const POD_END: Duration = Duration::from_secs(30);
/// How often that is looked at.
const END_CHECK: Duration = Duration::from_millis(200);
/// Grace of a pod that is evicted for a hard threshold, as upstream.
pub(super) const HARD_GRACE: i64 = 1;

/// What the loop works with.
pub struct Evictor {
    /// Thresholds.
    pub config: EvictionConfig,
    /// Statistics, ended containers.
    pub cri: Cri,
    /// The pods there are.
    pub pods: PodDirectory,
    /// Frees disk space.
    pub images: Arc<ImageGc>,
    /// Told which pod has to go.
    pub evictions: mpsc::Sender<Eviction>,
    /// Told what the node runs short of.
    pub pressures: watch::Sender<BTreeSet<Pressure>>,
    /// Events about the node.
    pub events: EventRecorder,
    /// The node.
    pub node: NodeWatch,
    /// The kubelet's directory, on the node's file system.
    pub root_dir: PathBuf,
    /// Directory of the pods' logs.
    pub pod_logs_dir: PathBuf,
    /// The cgroup of all pods.
    pub pods_cgroup: String,
    /// What all pods together may use, where they are held to it.
    pub pods_memory: Option<u64>,
}

/// Watches until `cancel`.
pub async fn run(evictor: Evictor, cancel: CancellationToken) {
    let mut state = State::default();
    let mut stall = MemoryStall::new();
    loop {
        // Cancel-safe: a pass only reads, sends, and removes what nobody uses.
        let wake_at = tokio::select! {
            () = cancel.cancelled() => return,
            wake_at = Box::pin(evictor.pass(&mut state)) => wake_at,
        };
        // A time that has passed means: at once.
        let until_due =
            wake_at.map(|at| Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default());
        tokio::select! {
            () = cancel.cancelled() => return,
            () = stall.wait() => {}
            () = tokio::time::sleep(until_due.unwrap_or(PERIOD).min(PERIOD)) => {}
        }
    }
}

impl Evictor {
    /// One look, and what follows from it; when to look again at the latest.
    async fn pass(&self, state: &mut State) -> Option<Timestamp> {
        let (observed, thresholds) = self.observe().await?;
        let decision = state.decide(&thresholds, &observed, self.config.transition, Timestamp::now());
        self.tell(&decision.pressures);
        let mut due = decision.due;
        let first = due.first()?.clone();
        warn!(signal = first.signal.as_str(), "the node runs short of {}", first.signal.resource());
        if let Some(node) = self.node.borrow().as_ref() {
            let text = format!("Attempting to reclaim {}", first.signal.resource());
            self.events.node(node, EventType::Warning, "EvictionThresholdMet", text);
        }
        if due.iter().any(|threshold| threshold.signal.pressure() == Pressure::Disk) {
            self.free_disk().await;
            let (again, thresholds) = self.observe().await?;
            let mut after = state.clone();
            let decision = after.decide(&thresholds, &again, self.config.transition, Timestamp::now());
            *state = after;
            due = decision.due;
            let Some(threshold) = due.first() else {
                info!("enough disk space was freed without ending a pod");
                return decision.wake_at;
            };
            return self.evict_one(threshold, &again).await.then(Timestamp::now);
        }
        // Freed memory shows at once: whether the next pod must go is decided on fresh figures. Where nobody could go, the
        // next look has time.
        self.evict_one(&first, &observed).await.then(Timestamp::now)
    }

    fn tell(&self, pressures: &BTreeSet<Pressure>) {
        self.pressures.send_if_modified(|known| {
            let changed = known != pressures;
            known.clone_from(pressures);
            changed
        });
    }

    /// What is left, and the thresholds for it; `None` when the node cannot be read.
    async fn observe(&self) -> Option<(BTreeMap<Signal, Observation>, Vec<Threshold>)> {
        let (root_dir, pods_cgroup) = (self.root_dir.clone(), self.pods_cgroup.clone());
        let node = tokio::task::spawn_blocking(move || {
            stats::read(&root_dir).map(|node| (node, cgroups::usage::read(&pods_cgroup)))
        });
        let node = node.await;
        let (node, pods) = match node.map_err(std::io::Error::other).and_then(|read| read) {
            Ok((node, pods)) => (node, pods),
            Err(error) => {
                warn!(%error, "cannot read what is left of the node's resources");
                return None;
            }
        };
        let mut observations = of_node(&node);
        let mut thresholds = self.config.thresholds.clone();
        if let Some(left) = allocatable_memory(&pods, self.pods_memory) {
            observations.insert(Signal::AllocatableMemoryAvailable, left);
        }
        // A runtime that does not answer says nothing about the disk.
        let (images, containers) = self.cri.file_systems().await.unwrap_or_default();
        if let Some(path) = &images
            && let Ok(fs) = figures(path).await
        {
            insert(&mut observations, Signal::ImageFsAvailable, fs.available, fs.capacity);
            insert(&mut observations, Signal::ImageFsInodesFree, fs.inodes_free, fs.inodes);
        }
        // Where images and containers are on one file system, one of the two signals says it all.
        if let Some(path) = containers.filter(|path| Some(path) != images.as_ref())
            && let Ok(fs) = figures(&path).await
        {
            insert(&mut observations, Signal::ContainerFsAvailable, fs.available, fs.capacity);
            insert(&mut observations, Signal::ContainerFsInodesFree, fs.inodes_free, fs.inodes);
            let on_node_fs = share_file_system(&path, &self.root_dir);
            thresholds.extend(for_container_fs(&self.config.thresholds, on_node_fs));
        }
        Some((observations, thresholds))
    }

    /// Ended containers go by the pods' loops, which see the pressure; here the images.
    async fn free_disk(&self) {
        self.pods.wake_all();
        match self.images.free_all().await {
            Ok(freed) => info!(freed, "unused images removed"),
            Err(error) => warn!(%error, "no images removed"),
        }
    }

    /// Ends the least important pod; false when there is none that may go.
    async fn evict_one(&self, threshold: &Threshold, observed: &BTreeMap<Signal, Observation>) -> bool {
        let views = candidates(&self.pods);
        let mut pods = match self.pods_use(&views, threshold.signal).await {
            Ok(pods) => pods,
            Err(error) => {
                warn!(%error, "the pods' use is not known: the least important one goes");
                views.iter().map(|view| unknown_use(Arc::clone(&view.pod))).collect()
            }
        };
        rank(threshold.signal, &mut pods);
        let Some(victim) = pods.first() else {
            warn!("no pod can be evicted");
            return false;
        };
        let observed = observed.get(&threshold.signal).copied().unwrap_or_default();
        let uid = victim.pod.metadata.uid.clone().unwrap_or_default();
        let own = victim.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
        let grace = match threshold.grace {
            None => HARD_GRACE,
            Some(_) => own.unwrap_or(self.config.max_pod_grace).min(self.config.max_pod_grace),
        };
        let eviction = Eviction {
            uid: uid.clone(),
            reason: "Evicted",
            message: message(threshold, observed, victim),
            grace,
        };
        // The manager is gone only when the agent is.
        let sent = self.evictions.send(eviction).await.is_ok();
        if sent {
            self.wait_for_end(&uid).await;
        }
        sent
    }

    async fn wait_for_end(&self, uid: &str) {
        let ended = async {
            loop {
                let views = self.pods.views();
                let view = views.iter().find(|view| view.pod.metadata.uid.as_deref() == Some(uid));
                if view.is_none_or(|view| {
                    view.status.phase.as_deref() == Some("Failed") && view.observed.alive().next().is_none()
                }) {
                    return;
                }
                tokio::time::sleep(END_CHECK).await;
            }
        };
        if tokio::time::timeout(POD_END, ended).await.is_err() {
            warn!(uid, "an evicted pod has not ended yet");
        }
    }

    async fn pods_use(&self, views: &[PodView], signal: Signal) -> Result<Vec<PodUse>, CriError> {
        let mut uses = runtime_use(&self.cri, views).await?;
        if signal.pressure() == Pressure::Disk {
            let (root, logs) = (self.root_dir.clone(), self.pod_logs_dir.clone());
            let walked = tokio::task::spawn_blocking(move || {
                for used in uses.values_mut() {
                    add_files(used, &root, &logs);
                }
                uses
            });
            uses = walked.await.unwrap_or_default();
        }
        Ok(uses.into_values().collect())
    }
}

/// Pods that run and may be ended.
pub(super) fn candidates(pods: &PodDirectory) -> Vec<PodView> {
    let mut views = pods.views();
    views.retain(|view| {
        let is_over = matches!(view.status.phase.as_deref(), Some("Succeeded" | "Failed"));
        !is_over && view.pod.metadata.deletion_timestamp.is_none() && !is_critical(&view.pod)
    });
    views
}

/// What the runtime says that the pods use, by uid.
pub(super) async fn runtime_use(cri: &Cri, views: &[PodView]) -> Result<BTreeMap<String, PodUse>, CriError> {
    let uid = |view: &PodView| view.pod.metadata.uid.clone().unwrap_or_default();
    let mut uses: BTreeMap<String, PodUse> =
        views.iter().map(|view| (uid(view), unknown_use(Arc::clone(&view.pod)))).collect();
    for stats in cri.sandbox_stats().await? {
        let Some(attributes) = &stats.attributes else { continue };
        let uid = attributes.labels.get(labels::POD_UID).cloned().unwrap_or_default();
        let (Some(used), Some(linux)) = (uses.get_mut(&uid), stats.linux) else { continue };
        used.processes =
            linux.process.and_then(|process| process.process_count).map_or(0, |count| count.value);
        for container in linux.containers {
            let (name, figures, inodes) = container_use(&container);
            used.containers.insert(name, figures);
            used.inodes = used.inodes.saturating_add(inodes);
        }
    }
    Ok(uses)
}

fn of_node(node: &NodeFigures) -> BTreeMap<Signal, Observation> {
    let mut observations = BTreeMap::new();
    insert(&mut observations, Signal::MemoryAvailable, node.memory.available(), node.memory.total);
    insert(&mut observations, Signal::NodeFsAvailable, node.node_fs.available, node.node_fs.capacity);
    insert(&mut observations, Signal::NodeFsInodesFree, node.node_fs.inodes_free, node.node_fs.inodes);
    let left = node.pids.max.saturating_sub(node.pids.current);
    insert(&mut observations, Signal::PidAvailable, left, node.pids.max);
    observations
}

/// What pods can still get of what all of them may use: the limit of their cgroup, or what the reservations leave.
fn allocatable_memory(pods: &CgroupUse, configured: Option<u64>) -> Option<Observation> {
    let capacity = pods.memory_limit.or(configured)?;
    Some(Observation { available: capacity.saturating_sub(pods.working_set?), capacity })
}

/// Not where there is no fixed number of it.
fn insert(observations: &mut BTreeMap<Signal, Observation>, signal: Signal, available: u64, capacity: u64) {
    if capacity > 0 {
        observations.insert(signal, Observation { available, capacity });
    }
}

fn unknown_use(pod: Arc<Pod>) -> PodUse {
    PodUse { pod, containers: BTreeMap::new(), volumes: 0, inodes: 0, processes: 0 }
}

fn container_use(stats: &v1::ContainerStats) -> (String, ContainerUse, u64) {
    let number = |value: Option<&v1::UInt64Value>| value.map_or(0, |value| value.value);
    let name = stats
        .attributes
        .as_ref()
        .and_then(|attributes| attributes.labels.get(labels::CONTAINER_NAME).cloned())
        .unwrap_or_default();
    let memory = stats.memory.as_ref().map_or(0, |memory| number(memory.working_set_bytes.as_ref()));
    let layer = stats.writable_layer.as_ref();
    let disk = layer.map_or(0, |layer| number(layer.used_bytes.as_ref()));
    let inodes = layer.map_or(0, |layer| number(layer.inodes_used.as_ref()));
    (name, ContainerUse { memory, disk }, inodes)
}

/// Logs count for their container, volumes on the node's disk for the pod.
pub(super) fn add_files(used: &mut PodUse, root: &Path, logs: &Path) {
    let uid = used.pod.metadata.uid.as_deref().unwrap_or_default();
    let logs = log_directory(logs, &used.pod);
    for (name, container) in &mut used.containers {
        container.disk = container.disk.saturating_add(tree(&logs.join(name)).bytes);
    }
    let plugins =
        std::fs::read_dir(root.join("pods").join(uid).join("volumes")).into_iter().flatten().flatten();
    used.volumes = 0;
    // A server's file system is not on the node's disk, and may never answer.
    for plugin in plugins.filter(|plugin| !is_remote(&plugin.file_name())) {
        let volumes: TreeUse = tree(&plugin.path());
        used.volumes = used.volumes.saturating_add(volumes.bytes);
        used.inodes = used.inodes.saturating_add(volumes.inodes.saturating_add(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_measured_by_what_they_may_use_together() {
        let used = CgroupUse { working_set: Some(700), memory_limit: Some(1000), ..CgroupUse::default() };
        let left = |used: &CgroupUse| allocatable_memory(used, Some(2000));
        assert_eq!(left(&used), Some(Observation { available: 300, capacity: 1000 }));
        let unlimited = CgroupUse { memory_limit: None, ..used };
        assert_eq!(left(&unlimited), Some(Observation { available: 1300, capacity: 2000 }));
        let over = CgroupUse { working_set: Some(1200), ..used };
        assert_eq!(left(&over), Some(Observation { available: 0, capacity: 1000 }));
        assert_eq!(left(&CgroupUse::default()), None, "the cgroup is not there");
    }
}
