//! Who goes first, what it is told, and who may come while the node is short of something.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use super::{Observation, Pressure, Signal, Threshold};
use crate::admission::Rejection;
use crate::model::{containers, is_static};
use crate::qos::QosClass;
use crate::resources::{pod_request, request};

/// Priority of `system-cluster-critical`; higher ones are never evicted.
const CRITICAL: i32 = 2_000_000_000;
/// The taint of a node under memory pressure.
const MEMORY_TAINT: &str = "node.kubernetes.io/memory-pressure";

/// What a pod uses.
#[derive(Debug, Clone)]
pub struct PodUse {
    /// The pod.
    pub pod: Arc<Pod>,
    /// By container name.
    pub containers: BTreeMap<String, ContainerUse>,
    /// Bytes of volumes that belong to no single container.
    pub volumes: u64,
    /// Inodes of writable layers and volumes.
    pub inodes: u64,
    /// Processes.
    pub processes: u64,
}

/// What a container uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ContainerUse {
    /// Working set in bytes.
    pub memory: u64,
    /// Writable layer and logs in bytes.
    pub disk: u64,
}

impl PodUse {
    fn memory(&self) -> u64 {
        self.containers.values().map(|container| container.memory).sum()
    }

    fn disk(&self) -> u64 {
        self.containers.values().map(|container| container.disk).sum::<u64>().saturating_add(self.volumes)
    }

    fn requested(&self, resource: &str) -> u64 {
        let spec = self.pod.spec.as_ref();
        spec.map_or(0, |spec| u64::try_from(pod_request(spec, resource)).unwrap_or(0))
    }

    fn priority(&self) -> i32 {
        self.pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
    }

    fn is_above_request(&self, used: u64, resource: &str) -> bool {
        used > self.requested(resource)
    }
}

/// Pods that the node keeps whatever happens: its own, and those that the cluster cannot do without.
pub fn is_critical(pod: &Pod) -> bool {
    let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
    is_static(pod) || priority >= CRITICAL
}

/// Puts the pods into the order in which they go: those above their request first, then by priority, then by what they
/// use beyond their request.
pub fn rank(signal: Signal, pods: &mut [PodUse]) {
    let key = |pod: &PodUse| {
        let (above, excess) = match signal {
            Signal::MemoryAvailable | Signal::AllocatableMemoryAvailable => {
                let used = pod.memory();
                (pod.is_above_request(used, "memory"), excess(used, pod.requested("memory")))
            }
            Signal::NodeFsAvailable | Signal::ImageFsAvailable | Signal::ContainerFsAvailable => {
                let (used, name) = (pod.disk(), "ephemeral-storage");
                (pod.is_above_request(used, name), excess(used, pod.requested(name)))
            }
            Signal::NodeFsInodesFree | Signal::ImageFsInodesFree | Signal::ContainerFsInodesFree => {
                (false, i128::from(pod.inodes))
            }
            Signal::PidAvailable => (false, i128::from(pod.processes)),
        };
        let uid = pod.pod.metadata.uid.clone().unwrap_or_default();
        (!above, pod.priority(), -excess, uid)
    };
    pods.sort_by_cached_key(key);
}

fn excess(used: u64, requested: u64) -> i128 {
    i128::from(used) - i128::from(requested)
}

/// What the evicted pod is told, in upstream's words.
pub fn message(threshold: &Threshold, observed: Observation, victim: &PodUse) -> String {
    let signal = threshold.signal;
    let resource = signal.resource();
    let shown = |amount: u64| if signal.is_in_bytes() { binary(amount) } else { decimal(amount) };
    let mut text = format!(
        "The node was low on resource: {resource}. Threshold quantity: {}, available: {}. ",
        shown(threshold.value.of(observed.capacity)),
        shown(observed.available)
    );
    let spec = victim.pod.spec.as_ref();
    for entry in spec.into_iter().flat_map(containers) {
        let Some(used) = victim.containers.get(&entry.container.name) else { continue };
        let used = match resource {
            "memory" => used.memory,
            "ephemeral-storage" => used.disk,
            _ => continue,
        };
        let requested = u64::try_from(request(entry.container, resource)).unwrap_or(0);
        if used > requested {
            // Writing to a String cannot fail.
            write!(
                text,
                "Container {} was using {}, request is {}, has larger consumption of {resource}. ",
                entry.container.name,
                binary(used),
                binary(requested)
            )
            .ok();
        }
    }
    text
}

/// Whether a pod may start on a node under these pressures.
pub fn admit(pod: &Pod, pressures: &BTreeSet<Pressure>) -> Result<(), Rejection> {
    if pressures.is_empty() || is_critical(pod) {
        return Ok(());
    }
    let only_memory = pressures.iter().all(|pressure| *pressure == Pressure::Memory);
    let spec = pod.spec.as_ref();
    if only_memory {
        let best_effort = spec.is_none_or(|spec| QosClass::of(spec) == QosClass::BestEffort);
        let tolerates =
            spec.into_iter().flat_map(|spec| spec.tolerations.iter().flatten()).any(|toleration| {
                let key = toleration.key.as_deref().unwrap_or_default();
                let effect = toleration.effect.as_deref().unwrap_or_default();
                (key == MEMORY_TAINT || key.is_empty()) && matches!(effect, "" | "NoSchedule")
            });
        if !best_effort || tolerates {
            return Ok(());
        }
    }
    let names: Vec<&str> = pressures.iter().map(|pressure| pressure.as_str()).collect();
    Err(Rejection {
        reason: "Evicted".to_owned(),
        message: format!("The node had condition: [{}]. ", names.join(" ")),
    })
}

/// `100Mi`: the largest unit that divides it.
pub(super) fn binary(amount: u64) -> String {
    scaled(amount, 1024, &["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"])
}

/// `20k`.
fn decimal(amount: u64) -> String {
    scaled(amount, 1000, &["", "k", "M", "G", "T", "P", "E"])
}

fn scaled(amount: u64, base: u64, units: &[&str]) -> String {
    let (mut amount, mut step) = (amount, 0);
    while amount > 0 && amount.is_multiple_of(base) && step + 1 < units.len() {
        amount /= base;
        step += 1;
    }
    format!("{amount}{}", units.get(step).copied().unwrap_or_default())
}
