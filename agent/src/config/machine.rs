//! Settings of the machine and of the agent's own process: swap, kernel settings, cgroups of the system. Pure.

use std::fmt;

use agent_core::memory_rules::SwapBehavior;
use agent_core::resources::{milli, whole};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::{Deserialize, Serialize};

use super::AgentConfig;

/// Lowest and highest score of the kernel's OOM killer.
const OOM_SCORES: std::ops::RangeInclusive<i32> = -1000..=1000;

/// Fields of `KubeletConfiguration`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "the switches are KubeletConfiguration's")]
#[serde(rename_all = "camelCase", default)]
pub struct MachineSettings {
    /// The agent does not start while swap is on.
    pub fail_swap_on: bool,
    /// What pods may swap.
    pub memory_swap: MemorySwap,
    /// The agent does not start on cgroup v1; absent: it does, unlike upstream.
    #[serde(rename = "failCgroupV1")]
    pub fail_cgroup_v1: Option<bool>,
    /// Pods at most for each processor; 0: as many as `maxPods`.
    pub pods_per_core: i64,
    /// The agent's own OOM score.
    pub oom_score_adj: i32,
    /// Files that the agent may have open.
    pub max_open_files: i64,
    /// Kernel settings that are not as they should be keep the agent from starting; else it sets them.
    pub protect_kernel_defaults: bool,
    /// The kernel ends one process of a container that has no memory left, not all; absent: all.
    #[serde(rename = "singleProcessOOMKill")]
    pub single_process_oom_kill: Option<bool>,
    /// How much of the way from request to limit a container goes before it is slowed down (feature gate MemoryQoS).
    pub memory_throttling_factor: f64,
    /// `None`, the only one so far.
    pub memory_reservation_policy: String,
    /// Local disk space is a resource that pods ask for and are held to.
    pub local_storage_capacity_isolation: bool,
    /// Classes of pods have cgroups of their own; always.
    #[serde(rename = "cgroupsPerQOS")]
    pub cgroups_per_qos: bool,
    /// The cgroup that `kubeReserved` is enforced on.
    pub kube_reserved_cgroup: String,
    /// The cgroup that `systemReserved` is enforced on.
    pub system_reserved_cgroup: String,
    /// The cgroup that the agent moves to.
    pub kubelet_cgroups: String,
    /// The cgroup that processes which are in none move to.
    pub system_cgroups: String,
}

impl Default for MachineSettings {
    fn default() -> Self {
        Self {
            fail_swap_on: true,
            memory_swap: MemorySwap::default(),
            fail_cgroup_v1: None,
            pods_per_core: 0,
            oom_score_adj: -999,
            max_open_files: 1_000_000,
            protect_kernel_defaults: false,
            single_process_oom_kill: None,
            memory_throttling_factor: 0.9,
            memory_reservation_policy: "None".to_owned(),
            local_storage_capacity_isolation: true,
            cgroups_per_qos: true,
            kube_reserved_cgroup: String::new(),
            system_reserved_cgroup: String::new(),
            kubelet_cgroups: String::new(),
            system_cgroups: String::new(),
        }
    }
}

/// `memorySwap`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MemorySwap {
    /// `NoSwap` (the default) or `LimitedSwap`.
    pub swap_behavior: String,
}

/// Whose reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserved {
    /// The system's.
    System,
    /// Kubernetes' own.
    Kube,
}

impl fmt::Display for Reserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::System => "system",
            Self::Kube => "kube",
        })
    }
}

/// A cgroup of somebody else that is held to what is reserved for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservedCgroup {
    /// Whose.
    pub whose: Reserved,
    /// Its path, from the hierarchies' roots.
    pub path: String,
    /// Thousandths of processors.
    pub milli_cpu: Option<u64>,
    /// Bytes; absent where only processors are enforced.
    pub memory: Option<u64>,
    /// Process ids; likewise.
    pub pids: Option<u64>,
}

impl AgentConfig {
    /// What containers may swap.
    pub fn swap_behavior(&self) -> SwapBehavior {
        match self.machine.memory_swap.swap_behavior.as_str() {
            "LimitedSwap" => SwapBehavior::LimitedSwap,
            _ => SwapBehavior::NoSwap,
        }
    }

    /// `memoryThrottlingFactor` in millionths, where the feature gate is on.
    pub fn memory_throttling(&self) -> Option<u32> {
        let factor = self.machine.memory_throttling_factor;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 1 was checked")]
        let millionths = (factor * 1e6).round() as u32;
        self.is_enabled("MemoryQoS").then_some(millionths)
    }

    /// Pods at most on a node with so many processors.
    pub fn pods_at_most(&self, processors: u64) -> u64 {
        let most = u64::from(self.max_pods);
        match u64::try_from(self.machine.pods_per_core) {
            Ok(per_core) if per_core > 0 => per_core.saturating_mul(processors).min(most),
            _ => most,
        }
    }

    /// Cgroups that `enforceNodeAllocatable` names.
    pub fn reserved_cgroups(&self) -> Vec<ReservedCgroup> {
        let mut cgroups = Vec::new();
        for name in self.enforce_node_allocatable.iter().flatten() {
            let (whose, compressible) = match name.as_str() {
                "system-reserved" => (Reserved::System, false),
                "system-reserved-compressible" => (Reserved::System, true),
                "kube-reserved" => (Reserved::Kube, false),
                "kube-reserved-compressible" => (Reserved::Kube, true),
                _ => continue,
            };
            let (path, amounts) = match whose {
                Reserved::System => (&self.machine.system_reserved_cgroup, &self.system_reserved),
                Reserved::Kube => (&self.machine.kube_reserved_cgroup, &self.kube_reserved),
            };
            let amount = |name: &str, read: fn(&Quantity) -> Option<i64>| {
                u64::try_from(read(&Quantity(amounts.get(name)?.clone()))?).ok()
            };
            cgroups.push(ReservedCgroup {
                whose,
                path: path.clone(),
                milli_cpu: amount("cpu", milli),
                memory: amount("memory", whole).filter(|_| !compressible),
                pids: amount("pid", whole).filter(|_| !compressible),
            });
        }
        cgroups
    }

    pub(super) fn machine_problems(&self) -> Vec<String> {
        let machine = &self.machine;
        let mut problems = self.enforcement_problems();
        if !matches!(machine.memory_swap.swap_behavior.as_str(), "" | "NoSwap" | "LimitedSwap") {
            let given = &machine.memory_swap.swap_behavior;
            problems.push(format!(
                "memorySwap.swapBehavior {given:?} must be one of: \"\", \"LimitedSwap\" or \"NoSwap\""
            ));
        }
        for (field, value) in
            [("podsPerCore", machine.pods_per_core), ("maxOpenFiles", machine.max_open_files)]
        {
            if value < 0 {
                problems.push(format!("{field} {value} must not be a negative number"));
            }
        }
        if !OOM_SCORES.contains(&machine.oom_score_adj) {
            let given = machine.oom_score_adj;
            problems.push(format!("oomScoreAdj {given} must be between -1000 and 1000, inclusive"));
        }
        let factor = machine.memory_throttling_factor;
        if !(factor > 0.0 && factor <= 1.0) {
            problems.push(format!(
                "memoryThrottlingFactor {factor} must be greater than 0 and less than or equal to 1.0"
            ));
        }
        match machine.memory_reservation_policy.as_str() {
            "None" => {}
            "TieredReservation" => problems.push(
                "memoryReservationPolicy \"TieredReservation\" is not supported: memory is not kept for pods beforehand"
                    .to_owned(),
            ),
            other => problems.push(format!(
                "option {other:?} specified for memoryReservationPolicy. Valid options are \"None\" or \"TieredReservation\""
            )),
        }
        if !machine.cgroups_per_qos {
            problems
                .push("cgroupsPerQOS false is not supported: classes of pods always have cgroups".to_owned());
        }
        for (field, path) in [
            ("kubeReservedCgroup", &machine.kube_reserved_cgroup),
            ("systemReservedCgroup", &machine.system_reserved_cgroup),
            ("kubeletCgroups", &machine.kubelet_cgroups),
            ("systemCgroups", &machine.system_cgroups),
        ] {
            let climbs = path.split('/').any(|part| part == "..");
            if !path.is_empty() && (!path.starts_with('/') || climbs) {
                problems.push(format!("{field} {path:?} is not the absolute name of a cgroup"));
            }
        }
        if machine.system_cgroups.trim_end_matches('/').is_empty() && !machine.system_cgroups.is_empty() {
            problems.push("systemCgroups cannot be root (\"/\")".to_owned());
        }
        problems
    }

    /// What `enforceNodeAllocatable` asks for and cannot have.
    fn enforcement_problems(&self) -> Vec<String> {
        const FIELD: &str = "enforceNodeAllocatable";
        let list = self.enforce_node_allocatable.as_deref().unwrap_or_default();
        let has = |name: &str| list.iter().any(|given| given == name);
        let mut problems = Vec::new();
        for (place, name) in list.iter().enumerate() {
            if list.iter().take(place).any(|other| other == name) {
                problems.push(format!("duplicated enforcements {name:?} in {FIELD}"));
                continue;
            }
            match name.as_str() {
                "none" if list.len() > 1 => problems
                    .push(format!("{FIELD} may not contain additional enforcements when \"none\" is specified")),
                "pods" | "none" | "" | "system-reserved" | "system-reserved-compressible" | "kube-reserved"
                | "kube-reserved-compressible" => {}
                _ => problems.push(format!(
                    "option {name:?} specified for {FIELD}. Valid options are \"pods\", \"system-reserved\", \
                     \"system-reserved-compressible\", \"kube-reserved\", \"kube-reserved-compressible\" or \"none\""
                )),
            }
        }
        let machine = &self.machine;
        for (whose, field, cgroup) in [
            ("system", "systemReservedCgroup", &machine.system_reserved_cgroup),
            ("kube", "kubeReservedCgroup", &machine.kube_reserved_cgroup),
        ] {
            let (full, part) = (format!("{whose}-reserved"), format!("{whose}-reserved-compressible"));
            if has(&full) && has(&part) {
                problems.push(format!("both {full:?} and {part:?} cannot be specified together in {FIELD}"));
            }
            if (has(&full) || has(&part)) && cgroup.is_empty() {
                problems
                    .push(format!("{field} must be specified when {full:?} or {part:?} included in {FIELD}"));
            }
            if !self.reserved_system_cpus.is_empty() && !cgroup.is_empty() {
                problems.push(format!("can't use reservedSystemCPUs with {field}"));
            }
        }
        problems
    }
}
