//! What all pod loops share: clients, host side, sources and settings. Read-only.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_core::eviction::Pressure;
use agent_core::identity::{ClusterDns, Resolver, parse_resolv_conf};
use agent_core::memory_rules::MemoryRules;
use agent_core::plan::PlanSettings;
use agent_core::qos::{CgroupSettings, PodCgroup};
use agent_core::resources::{ResourceList, whole};
use agent_core::status::NodeIdentity;
use cri_shim_api::v1;
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Client;
use tokio::sync::{Semaphore, watch};

use super::clock::Clock;
use crate::config::AgentConfig;
use crate::contracts::{Host, RuntimeHealth};
use crate::devices::Devices;
use crate::dra::Dra;
use crate::events::EventRecorder;
use crate::host::kernel_memory::KernelMemory;
use crate::numa::Numa;
use crate::probes::Prober;
use crate::runtime::cri::Cri;
use crate::runtime::images::Images;
use crate::runtime::sandbox_config::{SandboxInput, sandbox_config};
use crate::runtime::security::SecuritySettings;
use crate::sources::objects::Objects;
use crate::sources::services::Services;
use crate::users::UserRanges;

/// Status writes that may wait for the API server at the same time.
pub const STATUS_WRITES: usize = 16;

/// Dependencies of a pod loop.
pub struct PodContext {
    /// CRI.
    pub cri: Cri,
    /// Image pulls.
    pub images: Images,
    /// Cgroups, volumes, log links.
    pub host: Host,
    /// ConfigMaps and Secrets.
    pub objects: Objects,
    /// Services, for variables.
    pub services: Services,
    /// Events.
    pub events: EventRecorder,
    /// Processors, memory and devices for one container each.
    pub numa: Numa,
    /// Ids for pods with users of their own.
    pub users: UserRanges,
    /// Devices of plugins.
    pub devices: Devices,
    /// ResourceClaims.
    pub claims: Dra,
    /// API server.
    pub client: Client,
    /// Configuration.
    pub config: Arc<AgentConfig>,
    /// This node's object.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    /// Runtime's name and state.
    pub health: watch::Receiver<RuntimeHealth>,
    /// Probes.
    pub prober: Prober,
    /// Bounds status writes.
    pub status_slots: Arc<Semaphore>,
    /// Node memory in bytes.
    pub memory_capacity: u64,
    /// What the kernel can do for containers' memory.
    pub kernel_memory: KernelMemory,
    /// What the node runs short of.
    pub pressures: watch::Receiver<BTreeSet<Pressure>>,
    /// The node is going down.
    pub going_down: watch::Receiver<bool>,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

impl PodContext {
    /// `<rootDir>/pods/<uid>`.
    pub fn pod_dir(&self, uid: &str) -> PathBuf {
        self.config.keelson.root_dir.join("pods").join(uid)
    }

    /// Directory of Localhost seccomp profiles.
    pub fn seccomp_root(&self) -> PathBuf {
        self.config.keelson.root_dir.join("seccomp")
    }

    /// Settings of plans.
    pub fn plan_settings(&self) -> PlanSettings {
        let mut settings = PlanSettings::default();
        let configured = self.config.crash_loop_back_off.max_container_restart_period;
        if let Some(max) = configured.and_then(|max| SignedDuration::try_from(max.0).ok()) {
            settings.max_restart_delay = max;
        }
        // Ended containers take disk space.
        if self.pressures.borrow().contains(&Pressure::Disk) {
            settings.kept_instances = 0;
        }
        settings
    }

    /// Settings of cgroup values.
    pub fn cgroup_settings(&self) -> CgroupSettings {
        CgroupSettings {
            tree: self.config.cgroup_tree(),
            cfs_quota: self.config.cpu_cfs_quota,
            cfs_period: self.config.cpu_cfs_quota_period.0,
            pids_limit: u64::try_from(self.config.pod_pids_limit).ok().filter(|limit| *limit > 0),
            memory_capacity: self.memory_capacity,
            memory: self.memory_rules(),
        }
    }

    /// What containers' memory gets beside its limit.
    fn memory_rules(&self) -> MemoryRules {
        let KernelMemory { unified, swap_controller, swap_capacity } = self.kernel_memory;
        let allocatable = self.allocatable().get("memory").and_then(whole);
        MemoryRules {
            unified,
            swap_controller,
            swap: self.config.swap_behavior(),
            swap_capacity,
            kill_together: !self.config.machine.single_process_oom_kill.unwrap_or(false),
            throttling: self.config.memory_throttling(),
            allocatable: allocatable.and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0),
        }
    }

    /// Node facts in statuses.
    pub fn identity(&self) -> NodeIdentity {
        let runtime_name = self.health.borrow().runtime_name.clone();
        NodeIdentity {
            host_ip: self.config.keelson.node_ip.to_string(),
            runtime_name: if runtime_name.is_empty() { "containerd".to_owned() } else { runtime_name },
        }
    }

    /// Node's allocatable, empty until the node is known.
    pub fn allocatable(&self) -> ResourceList {
        let node = self.node.borrow();
        let status = node.as_ref().and_then(|node| node.status.as_ref());
        status.and_then(|status| status.allocatable.clone()).unwrap_or_default()
    }

    /// The CRI configuration of the pod's sandbox.
    pub async fn sandbox_config(&self, pod: &Pod, attempt: u32) -> v1::PodSandboxConfig {
        let cgroup = PodCgroup::of(pod, &self.cgroup_settings());
        let node_resolver = node_resolver(&self.config.resolv_conf).await;
        let seccomp_root = self.seccomp_root();
        sandbox_config(&SandboxInput {
            pod,
            attempt,
            cgroup: &cgroup,
            pod_logs_dir: &self.config.pod_logs_dir,
            dns: ClusterDns { servers: &self.config.cluster_dns, domain: &self.config.cluster_domain },
            node_resolver: &node_resolver,
            security: self.security(pod, &seccomp_root),
        })
    }

    /// What security contexts of the pod depend on beside its spec.
    pub fn security<'a>(&self, pod: &Pod, seccomp_root: &'a Path) -> SecuritySettings<'a> {
        let users = self.users.of(pod);
        SecuritySettings { seccomp_default: self.config.seccomp_default, seccomp_root, users }
    }

    /// Deadline of writes to the API server.
    pub const API_DEADLINE: Duration = Duration::from_secs(10);
}

/// Read anew for each sandbox: the node may have changed networks since.
async fn node_resolver(path: &Path) -> Resolver {
    tokio::fs::read_to_string(path).await.map(|text| parse_resolv_conf(&text)).unwrap_or_default()
}
