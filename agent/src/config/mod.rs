//! The agent's configuration: `KubeletConfiguration` v1beta1 plus a `keelson:` section.
//!
//! Input: a YAML or JSON file, drop-ins, and what the command line says. Output: [`AgentConfig`], complete and checked. Unknown
//! fields are errors that name the field; fields that upstream knows and that change nothing here are accepted and listed in
//! [`AgentConfig::ignored`] with the reason, so that a stock file works. Nothing here changes the node.
//!
//! Reading order: [`AgentConfig`], then the groups of fields beside it; [`load`] is how they come about.

mod access;
mod alone;
mod clients;
mod cpus;
mod defaults;
mod duration;
mod gate_names;
pub mod gates;
mod inert;
mod keelson;
mod known;
mod load;
mod logging;
mod machine;
mod numa;
mod sections;
mod serving;
mod shutdown;
mod upkeep;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use agent_core::cgroup_tree::{CgroupDriver, CgroupTree};
use agent_core::resources::{milli, whole};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::{Deserialize, Serialize};

use crate::sources::pods::StaticSource;
use crate::sources::static_url;

pub use access::{Authentication, Authorization, Enabled, Webhook, WebhookAuthorization, X509Authentication};
pub use clients::ClientSettings;
use defaults::{
    any_address, default_cgroup_driver, default_cluster_domain, default_endpoint, default_healthz_port,
    default_lease_seconds, default_max_pods, default_pod_logs_dir, default_port, default_quota_period,
    default_resolv_conf, localhost, no_limit, root_path, ten_seconds, twenty_seconds, two_minutes, yes,
};
pub use duration::GoDuration;
pub use inert::InertSettings;
pub use keelson::{
    CniConfig, ForwardingMode, KeelsonConfig, MasqueradeConfig, NetworkSection, ProxySection, ShortcutMode,
    UnderlaySection, XdpMode,
};
pub use load::{ConfigError, Ignored, Source};
pub use logging::LoggingSettings;
pub use machine::{MachineSettings, Reserved, ReservedCgroup};
pub use numa::MemoryReservation;
pub use sections::{CrashLoopBackOff, UserNamespaces};
pub use serving::{ServingSettings, TlsRules};
pub use shutdown::ShutdownGroup;
pub use upkeep::{EvictionConfig, ImageGcConfig, LogRotationConfig};

/// The other value of `cgroupDriver`.
const SYSTEMD: &str = "systemd";

/// Everything the agent is told from outside.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "the switches are KubeletConfiguration's")]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentConfig {
    /// `kubelet.config.k8s.io/v1beta1`.
    pub api_version: String,
    /// `KubeletConfiguration`.
    pub kind: String,
    /// Address of the kubelet API.
    #[serde(default = "any_address")]
    pub address: IpAddr,
    /// Port of the kubelet API.
    #[serde(default = "default_port")]
    pub port: u16,
    /// CRI socket, `unix://…`.
    #[serde(default = "default_endpoint")]
    pub container_runtime_endpoint: String,
    /// Image service socket when it differs.
    #[serde(default)]
    pub image_service_endpoint: String,
    /// Who may call the kubelet API.
    #[serde(default)]
    pub authentication: Authentication,
    /// How callers are authorized.
    #[serde(default)]
    pub authorization: Authorization,
    /// Serving certificate.
    #[serde(default)]
    pub tls_cert_file: PathBuf,
    /// Serving key.
    #[serde(default)]
    pub tls_private_key_file: PathBuf,
    /// The agent renews its client certificate before it ends.
    #[serde(default)]
    pub rotate_certificates: bool,
    /// The API server issues the serving certificate, where no files are given.
    #[serde(default, rename = "serverTLSBootstrap")]
    pub server_tls_bootstrap: bool,
    /// Cgroup below which `kubepods` is made.
    #[serde(default = "root_path")]
    pub cgroup_root: String,
    /// `cgroupfs` (the only driver so far).
    #[serde(default = "default_cgroup_driver")]
    pub cgroup_driver: String,
    /// DNS domain.
    #[serde(default = "default_cluster_domain")]
    pub cluster_domain: String,
    /// Cluster DNS servers; empty: ClusterFirst pods use the node's resolv.conf.
    #[serde(default, rename = "clusterDNS")]
    pub cluster_dns: Vec<IpAddr>,
    /// Source of the node's resolver settings.
    #[serde(default = "default_resolv_conf")]
    pub resolv_conf: PathBuf,
    /// Port of healthz and metrics; 0 switches it off.
    #[serde(default = "default_healthz_port")]
    pub healthz_port: u16,
    /// Address of healthz and metrics.
    #[serde(default = "localhost")]
    pub healthz_bind_address: IpAddr,
    /// Pod log directories.
    #[serde(default = "default_pod_logs_dir")]
    pub pod_logs_dir: PathBuf,
    /// Pods at most.
    #[serde(default = "default_max_pods")]
    pub max_pods: u32,
    /// pids.max of pods; -1 leaves it open.
    #[serde(default = "no_limit")]
    pub pod_pids_limit: i64,
    /// Whether CPU limits become CFS quotas.
    #[serde(default = "yes", rename = "cpuCFSQuota")]
    pub cpu_cfs_quota: bool,
    /// CFS period.
    #[serde(default = "default_quota_period", rename = "cpuCFSQuotaPeriod")]
    pub cpu_cfs_quota_period: GoDuration,
    /// Deadline of ordinary CRI calls.
    #[serde(default = "two_minutes")]
    pub runtime_request_timeout: GoDuration,
    /// One pull at a time.
    #[serde(default)]
    pub serialize_image_pulls: bool,
    /// Parallel pulls at most.
    #[serde(default)]
    pub max_parallel_image_pulls: Option<u32>,
    /// How often the node's status is computed.
    #[serde(default = "ten_seconds")]
    pub node_status_update_frequency: GoDuration,
    /// Lease duration.
    #[serde(default = "default_lease_seconds")]
    pub node_lease_duration_seconds: u32,
    /// Register this node with the API server.
    #[serde(default = "yes")]
    pub register_node: bool,
    /// Taints to register with.
    #[serde(default)]
    pub register_with_taints: Vec<k8s_openapi::api::core::v1::Taint>,
    /// Reserved for the system, subtracted from capacity.
    #[serde(default)]
    pub system_reserved: BTreeMap<String, String>,
    /// Reserved for Kubernetes, subtracted from capacity.
    #[serde(default)]
    pub kube_reserved: BTreeMap<String, String>,
    /// Processors kept for the system, as `0-1`; they replace `cpu` of the two above.
    #[serde(default, rename = "reservedSystemCPUs")]
    pub reserved_system_cpus: String,
    /// `none` or `static`.
    #[serde(default)]
    pub cpu_manager_policy: String,
    /// Options of the policy `static`.
    #[serde(default)]
    pub cpu_manager_policy_options: BTreeMap<String, String>,
    /// `none`, `best-effort`, `restricted` or `single-numa-node`.
    #[serde(default)]
    pub topology_manager_policy: String,
    /// `container` or `pod`.
    #[serde(default)]
    pub topology_manager_scope: String,
    /// Options of the policy.
    #[serde(default)]
    pub topology_manager_policy_options: BTreeMap<String, String>,
    /// `None` or `Static`.
    #[serde(default)]
    pub memory_manager_policy: String,
    /// What pods cannot have of each NUMA node's memory.
    #[serde(default)]
    pub reserved_memory: Vec<MemoryReservation>,
    /// Pods with users of their own.
    #[serde(default)]
    pub user_namespaces: UserNamespaces,
    /// How often containers' processors are looked after, beside at changes.
    #[serde(default = "ten_seconds")]
    pub cpu_manager_reconcile_period: GoDuration,
    /// What is held to its share of the node; absent: `pods`.
    #[serde(default)]
    pub enforce_node_allocatable: Option<Vec<String>>,
    /// RuntimeDefault seccomp for containers that say nothing.
    #[serde(default)]
    pub seccomp_default: bool,
    /// Sysctls beyond the safe ones, `kernel.msg*` patterns.
    #[serde(default)]
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Restart back-off.
    #[serde(default)]
    pub crash_loop_back_off: CrashLoopBackOff,
    /// A container's log is rotated at this size.
    #[serde(default = "defaults::log_size")]
    pub container_log_max_size: String,
    /// Files of one container's log, the current one included.
    #[serde(default = "defaults::log_files")]
    pub container_log_max_files: i64,
    /// Logs rotated at the same time.
    #[serde(default = "defaults::log_workers")]
    pub container_log_max_workers: i64,
    /// How often log sizes are looked at.
    #[serde(default = "ten_seconds")]
    pub container_log_monitor_interval: GoDuration,
    /// Images are removed from this use of their file system on.
    #[serde(default = "defaults::image_high", rename = "imageGCHighThresholdPercent")]
    pub image_gc_high_threshold_percent: i64,
    /// … down to this one.
    #[serde(default = "defaults::image_low", rename = "imageGCLowThresholdPercent")]
    pub image_gc_low_threshold_percent: i64,
    /// Younger images stay.
    #[serde(default = "two_minutes", rename = "imageMinimumGCAge")]
    pub image_minimum_gc_age: GoDuration,
    /// Images unused for this long are removed whatever the disk says; 0 switches it off.
    #[serde(default, rename = "imageMaximumGCAge")]
    pub image_maximum_gc_age: GoDuration,
    /// Signals below which pods are evicted at once; absent: upstream's defaults.
    #[serde(default)]
    pub eviction_hard: Option<BTreeMap<String, String>>,
    /// Signals below which pods are evicted after a grace period.
    #[serde(default)]
    pub eviction_soft: BTreeMap<String, String>,
    /// The grace period of each soft signal.
    #[serde(default)]
    pub eviction_soft_grace_period: BTreeMap<String, GoDuration>,
    /// What is freed beyond the threshold.
    #[serde(default)]
    pub eviction_minimum_reclaim: BTreeMap<String, String>,
    /// How long a pressure is reported after it was last seen.
    #[serde(default = "defaults::transition_period")]
    pub eviction_pressure_transition_period: GoDuration,
    /// Longest grace of a pod that is evicted for a soft signal, in seconds.
    #[serde(default)]
    pub eviction_max_pod_grace_period: i64,
    /// Hard signals that are not named keep upstream's defaults.
    #[serde(default)]
    pub merge_default_eviction_settings: bool,
    /// Directory (or file) of static pods; empty: there are none.
    #[serde(default)]
    pub static_pod_path: PathBuf,
    /// The directory is looked at this often, beside being watched.
    #[serde(default = "twenty_seconds")]
    pub file_check_frequency: GoDuration,
    /// Address of a list of static pods; empty: there is none.
    #[serde(default, rename = "staticPodURL")]
    pub static_pod_url: String,
    /// Headers of requests for it, each with its values.
    #[serde(default, rename = "staticPodURLHeader")]
    pub static_pod_url_header: BTreeMap<String, Vec<String>>,
    /// It is asked this often.
    #[serde(default = "twenty_seconds")]
    pub http_check_frequency: GoDuration,
    /// Addresses of pods where there is no API server to tell.
    #[serde(default, rename = "podCIDR")]
    pub pod_cidr: String,
    /// How long pods may take when the node goes down; 0: they are not waited for.
    #[serde(default)]
    pub shutdown_grace_period: GoDuration,
    /// How much of it is kept for critical pods.
    #[serde(default)]
    pub shutdown_grace_period_critical_pods: GoDuration,
    /// How long pods from each priority on may take, instead of the two above.
    #[serde(default)]
    pub shutdown_grace_period_by_pod_priority: Vec<ShutdownGroup>,
    /// Images in the node's status at most; -1: all.
    #[serde(default = "defaults::status_images")]
    pub node_status_max_images: i64,
    /// The node's status is written at least this often; absent: 5 minutes.
    #[serde(default)]
    pub node_status_report_frequency: Option<GoDuration>,
    /// Unique name of this machine at its provider.
    #[serde(default, rename = "providerID")]
    pub provider_id: String,
    /// exec, attach, port-forward, logs and run are served.
    #[serde(default = "yes")]
    pub enable_debugging_handlers: bool,
    /// Features of Kubernetes, on or off.
    #[serde(default)]
    pub feature_gates: BTreeMap<String, bool>,
    /// What goes to the log.
    #[serde(default)]
    pub logging: LoggingSettings,
    /// The machine and the agent's own process.
    #[serde(flatten)]
    pub machine: MachineSettings,
    /// The server of the kubelet API.
    #[serde(flatten)]
    pub serving: ServingSettings,
    /// Requests that the agent makes.
    #[serde(flatten)]
    pub clients: ClientSettings,
    /// What changes nothing here.
    #[serde(flatten)]
    pub inert: InertSettings,
    /// Keelson's own settings.
    #[serde(skip_serializing)]
    pub keelson: KeelsonConfig,
    /// Fields of the file that are known and change nothing.
    #[serde(skip)]
    pub ignored: Vec<Ignored>,
}

impl AgentConfig {
    /// Socket path of the CRI runtime service.
    pub fn runtime_socket(&self) -> PathBuf {
        socket_path(&self.container_runtime_endpoint)
    }

    /// Socket path of the CRI image service.
    pub fn image_socket(&self) -> PathBuf {
        if self.image_service_endpoint.is_empty() {
            return self.runtime_socket();
        }
        socket_path(&self.image_service_endpoint)
    }

    /// Pulls that may run at the same time.
    pub fn parallel_pulls(&self) -> usize {
        match (self.max_parallel_image_pulls, self.serialize_image_pulls) {
            (Some(limit), _) => limit.max(1) as usize,
            (None, true) => 1,
            (None, false) => 5,
        }
    }

    /// What is reserved of a resource for the system and for Kubernetes; thousandths of `cpu`.
    pub fn reserved(&self, name: &str) -> u64 {
        if let Some(named) = self.reserved_by_name().filter(|_| name == "cpu") {
            return named;
        }
        let amount = |reserved: &BTreeMap<String, String>| {
            let quantity = Quantity(reserved.get(name)?.clone());
            let amount = if name == "cpu" { milli(&quantity) } else { whole(&quantity) };
            u64::try_from(amount?).ok()
        };
        [&self.system_reserved, &self.kube_reserved].into_iter().filter_map(amount).sum()
    }

    /// The cgroup of all pods, relative to the hierarchies' roots.
    pub fn pods_cgroup(&self) -> String {
        self.cgroup_tree().pods()
    }

    /// Where the pods' cgroups are.
    pub fn cgroup_tree(&self) -> CgroupTree {
        let driver =
            if self.cgroup_driver == SYSTEMD { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs };
        CgroupTree::new(&self.cgroup_root, driver)
    }

    /// Whether pods together are held to what the reservations leave.
    pub fn enforces_pods(&self) -> bool {
        self.enforce_node_allocatable.as_ref().is_none_or(|list| list.iter().any(|name| name == "pods"))
    }

    /// Whether the node has no API server: its pods are the static ones.
    pub fn is_standalone(&self) -> bool {
        self.keelson.kubeconfig.as_os_str().is_empty()
    }

    /// Whether the node may join by a bootstrap kubeconfig.
    pub fn bootstraps(&self) -> bool {
        !self.keelson.bootstrap_kubeconfig.as_os_str().is_empty()
    }

    /// Places of static pods that are configured.
    pub fn static_sources(&self) -> BTreeSet<StaticSource> {
        let file = (!self.static_pod_path.as_os_str().is_empty()).then_some(StaticSource::File);
        let url = (!self.static_pod_url.is_empty()).then_some(StaticSource::Url);
        file.into_iter().chain(url).collect()
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.api_version != "kubelet.config.k8s.io/v1beta1" || self.kind != "KubeletConfiguration" {
            problems.push(format!(
                "expected kubelet.config.k8s.io/v1beta1 KubeletConfiguration, found {} {}",
                self.api_version, self.kind
            ));
        }
        if self.cgroup_driver != "cgroupfs" && self.cgroup_driver != SYSTEMD {
            problems.push(format!("cgroupDriver {:?}: expected cgroupfs or systemd", self.cgroup_driver));
        }
        for endpoint in [&self.container_runtime_endpoint, &self.image_service_endpoint] {
            if !endpoint.is_empty() && !endpoint.starts_with("unix://") && !endpoint.starts_with('/') {
                problems.push(format!("endpoint {endpoint:?} is not a unix:// socket"));
            }
        }
        if !self.cgroup_root.starts_with('/') {
            problems.push(format!("cgroupRoot {:?} is not absolute", self.cgroup_root));
        }
        let half_tls =
            self.tls_cert_file.as_os_str().is_empty() != self.tls_private_key_file.as_os_str().is_empty();
        if half_tls {
            problems.push("tlsCertFile and tlsPrivateKeyFile must be given both, or neither".to_owned());
        }
        if !self.static_pod_url.is_empty()
            && let Err(problem) = static_url::check(&self.static_pod_url, &self.static_pod_url_header)
        {
            problems.push(problem);
        }
        if self.is_standalone() {
            problems.extend(self.standalone_problems());
        }
        problems.extend(self.machine_problems());
        problems.extend(self.serving.problems(self));
        problems.extend(self.client_problems());
        problems.extend(self.inert.problems(self));
        problems.extend(self.logging.problems(self));
        problems.extend(self.gate_problems());
        problems.extend(self.shutdown_problems());
        problems.extend(self.cpu_problems());
        problems.extend(self.numa_problems());
        problems.extend(self.user_namespaces.problem());
        problems.extend(LogRotationConfig::of(self).err().into_iter().flatten());
        problems.extend(ImageGcConfig::of(self).err().into_iter().flatten());
        problems.extend(EvictionConfig::of(self).err().into_iter().flatten());
        if !self.static_pod_path.as_os_str().is_empty() && !self.static_pod_path.is_absolute() {
            problems.push(format!("staticPodPath {} is not absolute", self.static_pod_path.display()));
        }
        if !matches!(self.keelson.cloud_provider.as_str(), "" | "external") {
            let given = &self.keelson.cloud_provider;
            problems.push(format!("keelson.cloudProvider {given:?}: expected external, or nothing"));
        }
        for (field, dir) in [("podLogsDir", &self.pod_logs_dir), ("keelson.rootDir", &self.keelson.root_dir)]
        {
            if !dir.is_absolute() {
                problems.push(format!("{field} {} is not absolute", dir.display()));
            }
        }
        problems
    }
}

fn socket_path(endpoint: &str) -> PathBuf {
    PathBuf::from(endpoint.strip_prefix("unix://").unwrap_or(endpoint))
}

#[cfg(test)]
mod tests;
