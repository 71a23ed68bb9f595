//! The specification of a container.

use std::collections::BTreeSet;

use cri_shim_api::v1::{ContainerConfig, LinuxContainerSecurityContext, PodSandboxConfig};
use oci_spec::runtime::{
    Linux, LinuxBuilder, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};

use super::devices::HostDevice;
use super::mounts::{HostMount, SandboxFiles};
use super::namespaces::SandboxNamespaces;
use super::process::ImageDefaults;
use super::sandbox::annotations;
use super::seccomp::Profile;
use super::{
    NodeFacts, OCI_VERSION, SpecError, caps, devices, mounts, namespaces, process, resources, seccomp,
};
use crate::users::Identity;

/// Everything the specification of a container is made from.
#[derive(Clone, Debug)]
pub struct ContainerSpec<'a> {
    /// Its sandbox.
    pub sandbox_id: &'a str,
    /// What CRI asked for the sandbox.
    pub sandbox: &'a PodSandboxConfig,
    /// What CRI asked for the container.
    pub config: &'a ContainerConfig,
    /// What the image says.
    pub image: &'a ImageDefaults,
    /// Who its first process is.
    pub identity: &'a Identity,
    /// The namespaces it joins.
    pub namespaces: SandboxNamespaces,
    /// Its mounts, found on the host.
    pub mounts: &'a [HostMount],
    /// Files of the sandbox.
    pub files: &'a SandboxFiles,
    /// Devices asked for; all of the host's when privileged.
    pub devices: &'a [HostDevice],
    /// The system call filter.
    pub seccomp: Profile,
    /// Name of the host for the environment.
    pub hostname: &'a str,
    /// Its cgroup.
    pub cgroup: &'a str,
    /// What the node can do.
    pub node: &'a NodeFacts,
}

/// The specification; its root is the bundle's `rootfs`, which the shim mounts.
pub fn spec(wanted: &ContainerSpec<'_>) -> Result<Spec, SpecError> {
    let linux_config = wanted.config.linux.clone().unwrap_or_default();
    let security = linux_config.security_context.clone().unwrap_or_default();
    check(wanted, &security)?;
    let capabilities = caps::effective(security.capabilities.as_ref(), security.privileged, wanted.node)?;
    let (mounts, root_propagation) = mounts::for_container(
        wanted.mounts,
        wanted.files,
        security.privileged,
        security.readonly_rootfs,
        wanted.node,
    )?;
    let mut linux = linux(wanted, &security, &capabilities)?;
    linux.set_rootfs_propagation(root_propagation);
    let mut annotations = annotations(wanted.sandbox_id, wanted.sandbox, "container");
    let metadata = wanted.config.metadata.clone().unwrap_or_default();
    annotations.insert("io.kubernetes.cri.container-name".to_owned(), metadata.name);
    let image = wanted.config.image.clone().unwrap_or_default();
    annotations.insert("io.kubernetes.cri.image-name".to_owned(), image.user_specified_image);
    let mut spec = SpecBuilder::default()
        .version(OCI_VERSION)
        .root(RootBuilder::default().path("rootfs").readonly(security.readonly_rootfs).build()?)
        .process(process_of(wanted, &security, &capabilities)?)
        .mounts(mounts)
        .linux(linux)
        .annotations(annotations)
        .build()?;
    // The name is the sandbox's, with its UTS namespace.
    spec.set_hostname(None);
    Ok(spec)
}

/// Refuses what would otherwise be dropped silently.
fn check(wanted: &ContainerSpec<'_>, security: &LinuxContainerSecurityContext) -> Result<(), SpecError> {
    let refuse = |field, problem: &str| Err(SpecError::Unsupported { field, problem: problem.to_owned() });
    let sandbox_security = wanted.sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if security.privileged && !sandbox_security.is_some_and(|security| security.privileged) {
        return Err(SpecError::PrivilegedInPlainSandbox);
    }
    if !wanted.config.cdi_devices.is_empty() {
        return refuse("CDI_devices", "this runtime does not offer CDI");
    }
    if wanted.config.mounts.iter().any(|mount| mount.image.is_some()) {
        return refuse("mounts.image", "this runtime does not offer image volumes");
    }
    namespaces::options(security.namespace_options.as_ref()).map(drop)
}

fn process_of(
    wanted: &ContainerSpec<'_>,
    security: &LinuxContainerSecurityContext,
    capabilities: &BTreeSet<String>,
) -> Result<Process, SpecError> {
    let user = UserBuilder::default()
        .uid(wanted.identity.uid)
        .gid(wanted.identity.gid)
        .additional_gids(wanted.identity.groups.clone())
        .build()?;
    let oom_score = wanted
        .config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref())
        .map_or(0, |resources| resources.oom_score_adj);
    let mut process = ProcessBuilder::default()
        .terminal(wanted.config.tty)
        .args(process::arguments(wanted.config, wanted.image)?)
        .env(process::environment(wanted.config, wanted.image, wanted.hostname))
        .cwd(process::working_dir(wanted.config, wanted.image))
        .user(user)
        .capabilities(caps::sets(capabilities, security.capabilities.as_ref())?)
        .no_new_privileges(security.no_new_privs)
        .oom_score_adj(resources::oom_score(oom_score, wanted.node))
        .build()?;
    // What the shim has is what a container gets; the type's default would limit open files.
    process.set_rlimits(None);
    process.set_apparmor_profile(apparmor(security, wanted.node)?);
    Ok(process)
}

fn linux(
    wanted: &ContainerSpec<'_>,
    security: &LinuxContainerSecurityContext,
    capabilities: &BTreeSet<String>,
) -> Result<Linux, SpecError> {
    let limits = wanted.config.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
    let mut limits = resources::limits(&limits, wanted.node)?;
    let (nodes, rules) = devices::nodes_and_rules(wanted.devices, security.privileged)?;
    limits.set_devices(Some(rules));
    let own_cgroup_view = wanted.node.cgroup_v2 && !security.privileged;
    let (masked, readonly) = if security.privileged {
        (Vec::new(), Vec::new())
    } else {
        (security.masked_paths.clone(), security.readonly_paths.clone())
    };
    let mut linux = LinuxBuilder::default()
        .cgroups_path(wanted.cgroup)
        .namespaces(namespaces::for_container(wanted.namespaces.clone(), own_cgroup_view)?)
        .resources(limits)
        .devices(nodes)
        .masked_paths(masked)
        .readonly_paths(readonly)
        .build()?;
    if !security.privileged {
        linux.set_seccomp(seccomp::filter(&wanted.seccomp, capabilities, wanted.node)?);
    }
    Ok(linux)
}

/// The AppArmor profile to name: only one of the node; the runtime brings none of its own.
fn apparmor(security: &LinuxContainerSecurityContext, node: &NodeFacts) -> Result<Option<String>, SpecError> {
    let Some(profile) = seccomp::localhost_path(security.apparmor.as_ref()).filter(|_| !security.privileged)
    else {
        return Ok(None);
    };
    if !node.apparmor {
        let problem = format!("profile {profile}: AppArmor is not enabled on this node");
        return Err(SpecError::Unsupported { field: "apparmor", problem });
    }
    Ok(Some(profile.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cri_shim_api::v1::{LinuxContainerConfig, LinuxContainerResources, LinuxSandboxSecurityContext};

    fn node() -> NodeFacts {
        NodeFacts {
            seccomp: true,
            capabilities: vec!["SYS_ADMIN".into(), "CHOWN".into()],
            ..NodeFacts::default()
        }
    }

    fn build(
        config: &ContainerConfig,
        sandbox: &PodSandboxConfig,
        node: &NodeFacts,
    ) -> Result<serde_json::Value, SpecError> {
        let wanted = ContainerSpec {
            sandbox_id: "s1",
            sandbox,
            config,
            image: &ImageDefaults { cmd: vec!["sh".into()], ..ImageDefaults::default() },
            identity: &Identity { uid: 5, gid: 6, groups: vec![6, 7] },
            namespaces: SandboxNamespaces::default(),
            mounts: &[],
            files: &SandboxFiles::default(),
            devices: &[],
            seccomp: Profile::RuntimeDefault,
            hostname: "web-0",
            cgroup: "/kubepods/c1",
            node,
        };
        Ok(serde_json::to_value(spec(&wanted)?).unwrap())
    }

    fn privileged() -> ContainerConfig {
        let security =
            LinuxContainerSecurityContext { privileged: true, ..LinuxContainerSecurityContext::default() };
        let linux =
            LinuxContainerConfig { security_context: Some(security), ..LinuxContainerConfig::default() };
        ContainerConfig { linux: Some(linux), ..ContainerConfig::default() }
    }

    #[test]
    fn a_plain_container_is_confined() {
        let resources = LinuxContainerResources { memory_limit_in_bytes: 1 << 20, ..Default::default() };
        let linux = LinuxContainerConfig { resources: Some(resources), ..LinuxContainerConfig::default() };
        let config = ContainerConfig { linux: Some(linux), ..ContainerConfig::default() };
        let spec = build(&config, &PodSandboxConfig::default(), &node()).unwrap();
        assert_eq!(spec["process"]["user"]["additionalGids"], serde_json::json!([6, 7]));
        assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 1 << 20);
        assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], false);
        assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/c1");
        assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 14);
    }

    #[test]
    fn a_privileged_container_needs_a_privileged_sandbox() {
        let refused = build(&privileged(), &PodSandboxConfig::default(), &node()).unwrap_err();
        assert!(matches!(refused, SpecError::PrivilegedInPlainSandbox));
        let mut sandbox = PodSandboxConfig::default();
        sandbox.linux.get_or_insert_default().security_context =
            Some(LinuxSandboxSecurityContext { privileged: true, ..LinuxSandboxSecurityContext::default() });
        let spec = build(&privileged(), &sandbox, &node()).unwrap();
        assert!(spec["linux"].get("seccomp").is_none());
        assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], true);
        let sysfs = spec["mounts"].as_array().unwrap().iter().find(|mount| mount["destination"] == "/sys");
        assert!(sysfs.unwrap()["options"].as_array().unwrap().contains(&"rw".into()));
    }

    #[test]
    fn an_unsupported_wish_is_refused_by_name() {
        let config = ContainerConfig {
            cdi_devices: vec![cri_shim_api::v1::CdiDevice { name: "gpu".into() }],
            ..ContainerConfig::default()
        };
        let error = build(&config, &PodSandboxConfig::default(), &node()).unwrap_err();
        assert!(error.to_string().starts_with("CDI_devices"), "{error}");
    }
}
