//! The specification of a sandbox's pause process: the namespaces and sysctls of the pod, and nothing to attack.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use cri_shim_api::v1::{NamespaceMode, NamespaceOption, PodSandboxConfig};
use oci_spec::runtime::{
    LinuxBuilder, LinuxCpuBuilder, LinuxResourcesBuilder, ProcessBuilder, RootBuilder, Spec, SpecBuilder,
    UserBuilder,
};

use super::seccomp::Profile;
use super::userns::IdMaps;
use super::{
    NodeFacts, OCI_VERSION, SANDBOX_ID_ANNOTATION, SpecError, TYPE_ANNOTATION, caps, devices, mounts,
    namespaces, resources, seccomp,
};
use crate::sysctls::{self, SharedWithNode};

/// Path of the pause program in its root file system.
pub const PAUSE: &str = "/pause";
/// Nobody in particular: the pause process owns nothing.
const PAUSE_USER: u32 = 65_535;
/// The smallest weight: pause only waits.
const PAUSE_CPU_SHARES: u64 = 2;
/// Killed last, since its end ends the pod.
const PAUSE_OOM_SCORE: i64 = -998;

/// The kernel's limit.
const LONGEST_HOSTNAME: usize = 64;

/// Everything the specification of a sandbox is made from.
#[derive(Clone, Debug)]
pub struct SandboxSpec<'a> {
    /// Its id.
    pub id: &'a str,
    /// What CRI asked for.
    pub config: &'a PodSandboxConfig,
    /// The pinned network namespace; nothing on the host's network.
    pub netns: Option<PathBuf>,
    /// Its cgroup.
    pub cgroup: &'a str,
    /// What the node can do.
    pub node: &'a NodeFacts,
}

/// The specification; its root is the bundle's `rootfs`, which the shim mounts.
pub fn spec(wanted: &SandboxSpec<'_>) -> Result<Spec, SpecError> {
    let linux_config = wanted.config.linux.clone().unwrap_or_default();
    let security = linux_config.security_context.unwrap_or_default();
    let options = namespaces::options(security.namespace_options.as_ref())?;
    check(wanted, &options)?;
    let users = IdMaps::of(security.namespace_options.as_ref())?;
    let no_capabilities = BTreeSet::new();
    let filter = seccomp::filter(&Profile::RuntimeDefault, &no_capabilities, wanted.node)?;
    let (_, rules) = devices::nodes_and_rules(&[], false)?;
    let cpu = LinuxCpuBuilder::default().shares(PAUSE_CPU_SHARES).build()?;
    let limits = LinuxResourcesBuilder::default().cpu(cpu).devices(rules).build()?;
    let mut linux = LinuxBuilder::default()
        .cgroups_path(wanted.cgroup)
        .namespaces(namespaces::for_sandbox(&options, wanted.netns.clone(), users.is_some())?)
        .resources(limits)
        .sysctl(parameters(wanted, users.is_some()))
        .masked_paths(Vec::<String>::new())
        .readonly_paths(Vec::<String>::new())
        .build()?;
    linux.set_seccomp(filter);
    if let Some(users) = &users {
        let (uids, gids) = users.to_oci()?;
        linux.set_uid_mappings(Some(uids));
        linux.set_gid_mappings(Some(gids));
    }
    // Who is not mapped cannot be; then root of the pod, who is nobody on the node.
    let mapped = users
        .as_ref()
        .is_none_or(|users| users.host_uid(PAUSE_USER).is_some() && users.host_gid(PAUSE_USER).is_some());
    let id = if mapped { PAUSE_USER } else { 0 };
    let user = UserBuilder::default().uid(id).gid(id).build()?;
    let mut process = ProcessBuilder::default()
        .args(vec![PAUSE.to_owned()])
        .env(Vec::<String>::new())
        .cwd("/")
        .user(user)
        .capabilities(caps::sets(&no_capabilities, None)?)
        .no_new_privileges(true)
        .oom_score_adj(resources::oom_score(PAUSE_OOM_SCORE, wanted.node))
        .build()?;
    // The type's default would limit open files.
    process.set_rlimits(None);
    let mut spec = SpecBuilder::default()
        .version(OCI_VERSION)
        .root(RootBuilder::default().path("rootfs").readonly(true).build()?)
        .process(process)
        .mounts(mounts::for_sandbox()?)
        .linux(linux)
        .annotations(annotations(wanted.id, wanted.config, "sandbox"))
        .build()?;
    let named = wanted.netns.is_some() && !wanted.config.hostname.is_empty();
    spec.set_hostname(named.then(|| wanted.config.hostname.clone()));
    Ok(spec)
}

/// Refuses what the kernel would refuse halfway, or what would change the node.
fn check(wanted: &SandboxSpec<'_>, options: &NamespaceOption) -> Result<(), SpecError> {
    let hostname = &wanted.config.hostname;
    if hostname.len() > LONGEST_HOSTNAME || hostname.contains(['\0', '/', '\n']) {
        let problem = format!("{hostname:?} is longer than {LONGEST_HOSTNAME} bytes or no name");
        return Err(SpecError::Unsupported { field: "hostname", problem });
    }
    let shared =
        SharedWithNode { network: wanted.netns.is_none(), ipc: options.ipc() == NamespaceMode::Node };
    let names = wanted.config.linux.iter().flat_map(|linux| linux.sysctls.keys());
    for name in names {
        sysctls::check(name, shared)
            .map_err(|error| SpecError::Unsupported { field: "linux.sysctls", problem: error.to_string() })?;
    }
    Ok(())
}

/// What the shim and people who look at a bundle need to know.
pub(super) fn annotations(
    sandbox_id: &str,
    config: &PodSandboxConfig,
    kind: &str,
) -> HashMap<String, String> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let pairs = [
        (SANDBOX_ID_ANNOTATION, sandbox_id),
        (TYPE_ANNOTATION, kind),
        ("io.kubernetes.cri.sandbox-name", &metadata.name),
        ("io.kubernetes.cri.sandbox-namespace", &metadata.namespace),
        ("io.kubernetes.cri.sandbox-uid", &metadata.uid),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// The pod's sysctls, over two defaults that let an unprivileged container ping and listen on any port.
fn parameters(wanted: &SandboxSpec<'_>, own_users: bool) -> HashMap<String, String> {
    let mut all = HashMap::new();
    if wanted.netns.is_some() {
        all.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned());
        if !own_users {
            // Groups that are not mapped cannot be named there.
            all.insert("net.ipv4.ping_group_range".to_owned(), "0 2147483647".to_owned());
        }
    }
    if let Some(linux) = &wanted.config.linux {
        all.extend(linux.sysctls.clone());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(netns: Option<&str>) -> serde_json::Value {
        let mut config = PodSandboxConfig { hostname: "web-0".into(), ..PodSandboxConfig::default() };
        config.linux.get_or_insert_default().sysctls.insert("kernel.shmmax".into(), "1".into());
        let node = NodeFacts::default();
        let wanted = SandboxSpec {
            id: "s1",
            config: &config,
            netns: netns.map(PathBuf::from),
            cgroup: "/kubepods/s1",
            node: &node,
        };
        serde_json::to_value(spec(&wanted).unwrap()).unwrap()
    }

    #[test]
    fn a_pods_pause_is_unprivileged_and_named() {
        let spec = json(Some("/run/netns/x"));
        assert_eq!(spec["hostname"], "web-0");
        assert_eq!(spec["process"]["user"]["uid"], 65535);
        assert_eq!(spec["process"]["capabilities"]["bounding"], serde_json::json!([]));
        assert_eq!(spec["root"]["readonly"], true);
        assert_eq!(spec["annotations"]["io.kubernetes.cri.sandbox-id"], "s1");
        assert_eq!(spec["linux"]["sysctl"]["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(spec["linux"]["sysctl"]["kernel.shmmax"], "1");
    }

    #[test]
    fn on_the_hosts_network_nothing_of_the_host_is_changed() {
        let spec = json(None);
        assert!(spec.get("hostname").is_none());
        assert!(spec["linux"]["sysctl"].get("net.ipv4.ip_unprivileged_port_start").is_none());
    }
}
