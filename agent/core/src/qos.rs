//! QoS class, cgroup values and oom scores of pods and containers. Pure.
//!
//! Formulas: <https://kubernetes.io/docs/concepts/workloads/pods/pod-qos/> and the kubelet's cm package as observed.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use crate::cgroup_tree::CgroupTree;
use crate::memory_rules::{ContainerMemory, MemoryRules};
use crate::resources::{Side, amount, pod_limit, pod_request, request};

/// A pod's quality of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum QosClass {
    /// Limits equal requests for cpu and memory everywhere.
    Guaranteed,
    /// Something is requested or limited.
    Burstable,
    /// Nothing is.
    BestEffort,
}

/// Settings of the node that cgroup values depend on.
#[derive(Debug, Clone, PartialEq)]
pub struct CgroupSettings {
    /// Where the pods' cgroups are.
    pub tree: CgroupTree,
    /// Whether limits become quotas.
    pub cfs_quota: bool,
    /// CFS period.
    pub cfs_period: Duration,
    /// `podPidsLimit`; `None`: open.
    pub pids_limit: Option<u64>,
    /// Node memory in bytes, for oom scores.
    pub memory_capacity: u64,
    /// What containers' memory gets beside its limit.
    pub memory: MemoryRules,
}

/// A pod's cgroup and its values; `None` means unlimited or unset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCgroup {
    /// As [`CgroupTree::pod`] says, relative to the hierarchy's root.
    pub path: String,
    /// v1 cpu.shares; v2 weight by [`weight_from_shares`].
    pub cpu_shares: u64,
    /// CFS quota and period in microseconds.
    pub cpu_quota: Option<(u64, u64)>,
    /// memory.max in bytes.
    pub memory_max: Option<u64>,
    /// pids.max.
    pub pids_max: Option<u64>,
}

/// Values of one container, for CRI's `LinuxContainerResources`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContainerCgroup {
    /// cpu.shares.
    pub cpu_shares: u64,
    /// CFS quota and period in microseconds.
    pub cpu_quota: Option<(u64, u64)>,
    /// memory.max in bytes.
    pub memory_max: Option<u64>,
    /// oom_score_adj.
    pub oom_score_adj: i32,
    /// Swap, throttling, and how the kernel ends it.
    pub memory: ContainerMemory,
}

impl QosClass {
    /// As the API spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }

    /// The class of a pod spec; init containers count, as upstream.
    pub fn of(spec: &PodSpec) -> Self {
        let mut anything = false;
        let mut guaranteed = true;
        let pod_level = spec.resources.as_ref();
        let pod_level_given = ["cpu", "memory"].into_iter().any(|name| {
            amount(pod_level, Side::Requests, name).is_some()
                || amount(pod_level, Side::Limits, name).is_some()
        });
        let lists: Vec<_> = if pod_level_given {
            vec![pod_level]
        } else {
            spec.containers
                .iter()
                .chain(spec.init_containers.iter().flatten())
                .map(|container| container.resources.as_ref())
                .collect()
        };
        for resources in lists {
            for name in ["cpu", "memory"] {
                let limit = amount(resources, Side::Limits, name).filter(|value| *value > 0);
                let wanted = amount(resources, Side::Requests, name).filter(|value| *value > 0).or(limit);
                anything |= limit.is_some() || wanted.is_some();
                guaranteed &= limit.is_some() && limit == wanted;
            }
        }
        match (anything, guaranteed) {
            (false, _) => Self::BestEffort,
            (true, true) => Self::Guaranteed,
            (true, false) => Self::Burstable,
        }
    }
}

impl PodCgroup {
    /// Path and values for `pod`.
    pub fn of(pod: &Pod, settings: &CgroupSettings) -> Self {
        let default = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&default);
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let class = QosClass::of(spec);
        let cpu_limit = pod_limit(spec, "cpu").filter(|milli| *milli > 0);
        Self {
            path: settings.tree.pod(class, uid),
            cpu_shares: if class == QosClass::BestEffort {
                MIN_SHARES
            } else {
                shares(pod_request(spec, "cpu"))
            },
            cpu_quota: cpu_limit.and_then(|milli| quota(milli, settings)),
            memory_max: pod_limit(spec, "memory")
                .filter(|bytes| *bytes > 0)
                .and_then(|b| u64::try_from(b).ok()),
            pids_max: settings.pids_limit,
        }
    }
}

impl ContainerCgroup {
    /// Values for one container of `pod`.
    pub fn of(pod: &Pod, container: &Container, settings: &CgroupSettings) -> Self {
        let default = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&default);
        let resources = container.resources.as_ref();
        let cpu_limit = amount(resources, Side::Limits, "cpu").filter(|milli| *milli > 0);
        let memory = amount(resources, Side::Limits, "memory").filter(|bytes| *bytes > 0);
        Self {
            cpu_shares: shares(request(container, "cpu")),
            cpu_quota: cpu_limit.and_then(|milli| quota(milli, settings)),
            memory_max: memory.and_then(|bytes| u64::try_from(bytes).ok()),
            oom_score_adj: oom_score(spec, container, settings.memory_capacity),
            memory: ContainerMemory::of(pod, container, &settings.memory, settings.memory_capacity),
        }
    }
}

/// cgroup v2's cpu.weight for v1's cpu.shares: 1 + ((shares − 2) × 9999) / 262142.
pub fn weight_from_shares(shares: u64) -> u64 {
    1 + (shares.clamp(MIN_SHARES, MAX_SHARES) - 2) * 9999 / 262_142
}

const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;
/// The kernel refuses shorter quotas.
const MIN_QUOTA_MICROS: u64 = 1000;

/// cpu.shares for thousandths of processors.
pub fn shares(milli_cpu: i64) -> u64 {
    let milli_cpu = u64::try_from(milli_cpu).unwrap_or(0);
    (milli_cpu.saturating_mul(1024) / 1000).clamp(MIN_SHARES, MAX_SHARES)
}

fn quota(milli_cpu: i64, settings: &CgroupSettings) -> Option<(u64, u64)> {
    if !settings.cfs_quota {
        return None;
    }
    let period = u64::try_from(settings.cfs_period.as_micros()).ok()?;
    let quota = u64::try_from(milli_cpu).ok()?.saturating_mul(period) / 1000;
    Some((quota.max(MIN_QUOTA_MICROS), period))
}

fn oom_score(spec: &PodSpec, container: &Container, capacity: u64) -> i32 {
    /// `system-node-critical`'s value; such pods are protected as Guaranteed ones.
    const NODE_CRITICAL: i32 = 2_000_001_000;
    if spec.priority.is_some_and(|priority| priority >= NODE_CRITICAL) {
        return -997;
    }
    match QosClass::of(spec) {
        QosClass::Guaranteed => -997,
        QosClass::BestEffort => 1000,
        QosClass::Burstable => {
            let requested = i128::from(request(container, "memory"));
            let capacity = i128::from(capacity.max(1));
            let score = 1000 - 1000 * requested / capacity;
            i32::try_from(score.clamp(3, 999)).unwrap_or(999)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cgroup_tree::CgroupDriver;

    fn pod(containers: &serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"uid": "u1"}, "spec": {"containers": containers}}))
            .expect("a pod")
    }

    fn settings() -> CgroupSettings {
        CgroupSettings {
            tree: CgroupTree::new("/keelson/up", CgroupDriver::Cgroupfs),
            cfs_quota: true,
            cfs_period: Duration::from_millis(100),
            pids_limit: None,
            memory_capacity: 1 << 30,
            memory: MemoryRules::default(),
        }
    }

    #[test]
    fn classes_and_paths() {
        let cases = [
            (json!([{"name": "a"}]), "/keelson/up/kubepods/besteffort/podu1"),
            (
                json!([{"name": "a", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}]),
                "/keelson/up/kubepods/podu1",
            ),
            (
                json!([{"name": "a", "resources": {"requests": {"cpu": "100m"}}}, {"name": "b"}]),
                "/keelson/up/kubepods/burstable/podu1",
            ),
        ];
        for (containers, path) in cases {
            assert_eq!(PodCgroup::of(&pod(&containers), &settings()).path, path);
        }
    }

    #[test]
    fn values_follow_requests_and_limits() {
        let pod = pod(&json!([{"name": "a", "resources": {
            "requests": {"cpu": "250m", "memory": "256Mi"}, "limits": {"cpu": "500m", "memory": "512Mi"}}}]));
        let values = PodCgroup::of(&pod, &settings());
        assert_eq!(values.cpu_shares, 256);
        assert_eq!(values.cpu_quota, Some((50_000, 100_000)));
        assert_eq!(values.memory_max, Some(512 << 20));
        let container = &pod.spec.as_ref().expect("spec").containers[0];
        assert_eq!(ContainerCgroup::of(&pod, container, &settings()).oom_score_adj, 750);
    }

    #[test]
    fn weights_span_the_range() {
        assert_eq!(
            (weight_from_shares(2), weight_from_shares(1024), weight_from_shares(262_144)),
            (1, 39, 10_000)
        );
    }
}
