//! The sandbox that a pod asks for, as CRI's `PodSandboxConfig`. Pure.

use std::path::Path;

use agent_core::identity::{ClusterDns, Resolver, hostname, resolver};
use agent_core::qos::PodCgroup;
use cri_shim_api::v1;
use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::labels;
use super::security::{SecuritySettings, sandbox_context};

/// What a sandbox depends on beside its pod.
#[derive(Debug, Clone)]
pub struct SandboxInput<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Attempt number.
    pub attempt: u32,
    /// The pod's cgroup.
    pub cgroup: &'a PodCgroup,
    /// `podLogsDir`.
    pub pod_logs_dir: &'a Path,
    /// Cluster DNS.
    pub dns: ClusterDns<'a>,
    /// The node's resolver settings.
    pub node_resolver: &'a Resolver,
    /// Security settings of the node.
    pub security: SecuritySettings<'a>,
}

/// `<podLogsDir>/<namespace>_<name>_<uid>`.
pub fn log_directory(pod_logs_dir: &Path, pod: &Pod) -> std::path::PathBuf {
    let metadata = &pod.metadata;
    pod_logs_dir.join(format!(
        "{}_{}_{}",
        metadata.namespace.as_deref().unwrap_or_default(),
        metadata.name.as_deref().unwrap_or_default(),
        metadata.uid.as_deref().unwrap_or_default()
    ))
}

/// The configuration for RunPodSandbox, and for each CreateContainer in it.
pub fn sandbox_config(input: &SandboxInput<'_>) -> v1::PodSandboxConfig {
    let default = PodSpec::default();
    let spec = input.pod.spec.as_ref().unwrap_or(&default);
    let metadata = &input.pod.metadata;
    let host_network = spec.host_network.unwrap_or(false);
    let dns = resolver(input.pod, input.dns, input.node_resolver);
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: metadata.name.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            namespace: metadata.namespace.clone().unwrap_or_default(),
            attempt: input.attempt,
        }),
        // A pod in the host network keeps the node's hostname.
        hostname: if host_network { String::new() } else { hostname(input.pod, input.dns.domain) },
        log_directory: log_directory(input.pod_logs_dir, input.pod).to_string_lossy().into_owned(),
        dns_config: Some(v1::DnsConfig {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        port_mappings: if host_network { Vec::new() } else { port_mappings(spec) },
        labels: labels::sandbox_labels(input.pod),
        annotations: metadata.annotations.clone().unwrap_or_default(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: input.cgroup.path.clone(),
            security_context: Some(sandbox_context(spec, &input.security)),
            sysctls: sysctls(spec),
            resources: Some(resources(input.cgroup)),
            overhead: None,
        }),
        windows: None,
    }
}

fn sysctls(spec: &PodSpec) -> std::collections::BTreeMap<String, String> {
    let wanted = spec.security_context.as_ref().and_then(|context| context.sysctls.as_deref());
    wanted
        .unwrap_or_default()
        .iter()
        .map(|sysctl| (sysctl.name.replace('/', "."), sysctl.value.clone()))
        .collect()
}

fn resources(cgroup: &PodCgroup) -> v1::LinuxContainerResources {
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    v1::LinuxContainerResources {
        cpu_shares: signed(cgroup.cpu_shares),
        cpu_quota: cgroup.cpu_quota.map_or(0, |(quota, _)| signed(quota)),
        cpu_period: cgroup.cpu_quota.map_or(0, |(_, period)| signed(period)),
        memory_limit_in_bytes: cgroup.memory_max.map_or(0, signed),
        ..v1::LinuxContainerResources::default()
    }
}

/// Ports of all containers that ask for one on the host; CNI takes those, the others are for information.
fn port_mappings(spec: &PodSpec) -> Vec<v1::PortMapping> {
    spec.init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
        .flat_map(|container| container.ports.iter().flatten())
        .map(|port| v1::PortMapping {
            protocol: match port.protocol.as_deref() {
                Some("UDP") => v1::Protocol::Udp as i32,
                Some("SCTP") => v1::Protocol::Sctp as i32,
                _ => v1::Protocol::Tcp as i32,
            },
            container_port: port.container_port,
            host_port: port.host_port.unwrap_or(0),
            host_ip: port.host_ip.clone().unwrap_or_default(),
        })
        .collect()
}
