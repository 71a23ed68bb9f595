//! The specification of a container.

use std::collections::BTreeSet;

use cri_shim_api::v1::{ContainerConfig, LinuxContainerSecurityContext, Mount, PodSandboxConfig};
use oci_spec::runtime::{
    Hook, HookBuilder, Hooks, HooksBuilder, Linux, LinuxBuilder, Process, ProcessBuilder, RootBuilder, Spec,
    SpecBuilder, UserBuilder,
};

use super::devices::HostDevice;
use super::mounts::{HostMount, Layout, SandboxFiles};
use super::namespaces::SandboxNamespaces;
use super::process::ImageDefaults;
use super::sandbox::annotations;
use super::seccomp::Profile;
use super::userns::IdMaps;
use super::{
    NodeFacts, OCI_VERSION, SpecError, caps, cdi, devices, labels, namespaces, process, resources, seccomp,
    userns,
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
    /// Devices asked for, those of CDI among them; all of the host's when privileged.
    pub devices: &'a [HostDevice],
    /// What CDI devices add besides device nodes.
    pub cdi: &'a cdi::Edits,
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
    let id_maps = check(wanted.config, wanted.sandbox)?;
    let capabilities = caps::effective(security.capabilities.as_ref(), security.privileged, wanted.node)?;
    let layout = Layout {
        host_mounts: wanted.mounts,
        cdi_mounts: &wanted.cdi.mounts,
        files: wanted.files,
        privileged: security.privileged,
        readonly_root: security.readonly_rootfs,
        host_network: wanted.namespaces.network.is_none(),
        id_maps: id_maps.as_ref(),
        node: wanted.node,
    };
    let (mounts, root_propagation) = layout.build()?;
    let mut linux = linux(wanted, &security, &capabilities)?;
    linux.set_rootfs_propagation(root_propagation);
    if let Some(maps) = &id_maps {
        let (uids, gids) = maps.to_oci()?;
        linux.set_uid_mappings(Some(uids));
        linux.set_gid_mappings(Some(gids));
    }
    let mut process = process_of(wanted, &security, &capabilities)?;
    let selinux = labels::selinux(security.selinux_options.as_ref(), security.privileged, wanted.node)?;
    if let Some((of_process, of_mounts)) = selinux {
        process.set_selinux_label(Some(of_process));
        linux.set_mount_label(Some(of_mounts));
    }
    let mut annotations = annotations(wanted.sandbox_id, wanted.sandbox, "container");
    let metadata = wanted.config.metadata.clone().unwrap_or_default();
    annotations.insert("io.kubernetes.cri.container-name".to_owned(), metadata.name);
    let image = wanted.config.image.clone().unwrap_or_default();
    annotations.insert("io.kubernetes.cri.image-name".to_owned(), image.user_specified_image);
    let mut spec = SpecBuilder::default()
        .version(OCI_VERSION)
        .root(RootBuilder::default().path("rootfs").readonly(security.readonly_rootfs).build()?)
        .process(process)
        .mounts(mounts)
        .linux(linux)
        .annotations(annotations)
        .build()?;
    // The name is the sandbox's, with its UTS namespace.
    spec.set_hostname(None);
    if !wanted.cdi.hooks.is_empty() {
        spec.set_hooks(Some(hooks(&wanted.cdi.hooks)?));
    }
    Ok(spec)
}

/// Refuses what can be refused without a look at the node or the image, so that nothing is made first; gives the maps of
/// the pod's user namespace.
pub fn check(config: &ContainerConfig, sandbox: &PodSandboxConfig) -> Result<Option<IdMaps>, SpecError> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.clone()).unwrap_or_default();
    let sandbox_security = sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if security.privileged && !sandbox_security.is_some_and(|security| security.privileged) {
        return Err(SpecError::PrivilegedInPlainSandbox);
    }
    process::check_environment(config)?;
    for device in &config.devices {
        devices::check(device)?;
    }
    for mount in &config.mounts {
        check_mount(mount)?;
    }
    userns::of_container(
        sandbox_security.and_then(|security| security.namespace_options.as_ref()),
        security.namespace_options.as_ref(),
    )
}

fn check_mount(mount: &Mount) -> Result<(), SpecError> {
    let refuse = |field, problem: String| Err(SpecError::Invalid { field, problem });
    let Some(_) = &mount.image else {
        if !mount.image_sub_path.is_empty() {
            return refuse("mounts.image_sub_path", "is given without an image".to_owned());
        }
        if !mount.host_path.starts_with('/') || mount.host_path.contains('\0') {
            return refuse("mounts.host_path", format!("{:?} is not an absolute path", mount.host_path));
        }
        return Ok(());
    };
    if !mount.host_path.is_empty() {
        return refuse("mounts.host_path", format!("{} is given besides an image", mount.host_path));
    }
    if !mount.readonly {
        return refuse("mounts.readonly", format!("{}: an image volume is read-only", mount.container_path));
    }
    Ok(())
}

fn hooks(wanted: &[cdi::file::Hook]) -> Result<Hooks, SpecError> {
    let mut hooks = HooksBuilder::default().build()?;
    for hook in wanted {
        let mut built = HookBuilder::default().path(hook.path.as_str()).build()?;
        built.set_args((!hook.args.is_empty()).then(|| hook.args.clone()));
        built.set_env((!hook.env.is_empty()).then(|| hook.env.clone()));
        built.set_timeout(hook.timeout);
        let add = |list: &Option<Vec<Hook>>| {
            let mut list = list.clone().unwrap_or_default();
            list.push(built.clone());
            Some(list)
        };
        match hook.hook_name.as_str() {
            #[allow(deprecated, reason = "CDI files may still use it")]
            "prestart" => drop(hooks.set_prestart(add(hooks.prestart()))),
            "createRuntime" => drop(hooks.set_create_runtime(add(hooks.create_runtime()))),
            "createContainer" => drop(hooks.set_create_container(add(hooks.create_container()))),
            "startContainer" => drop(hooks.set_start_container(add(hooks.start_container()))),
            "poststart" => drop(hooks.set_poststart(add(hooks.poststart()))),
            _ => drop(hooks.set_poststop(add(hooks.poststop()))),
        }
    }
    Ok(hooks)
}

fn process_of(
    wanted: &ContainerSpec<'_>,
    security: &LinuxContainerSecurityContext,
    capabilities: &BTreeSet<String>,
) -> Result<Process, SpecError> {
    let mut groups = wanted.identity.groups.clone();
    groups.extend(wanted.cdi.additional_gids.iter().filter(|gid| !wanted.identity.groups.contains(gid)));
    let user = UserBuilder::default()
        .uid(wanted.identity.uid)
        .gid(wanted.identity.gid)
        .additional_gids(groups)
        .build()?;
    let oom_score = wanted
        .config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref())
        .map_or(0, |resources| resources.oom_score_adj);
    let mut env = process::environment(wanted.config, wanted.image, wanted.hostname);
    for pair in &wanted.cdi.env {
        process::set(&mut env, pair.clone());
    }
    let mut process = ProcessBuilder::default()
        .terminal(wanted.config.tty)
        .args(process::arguments(wanted.config, wanted.image)?)
        .env(env)
        .cwd(process::working_dir(wanted.config, wanted.image)?)
        .user(user)
        .capabilities(caps::sets(capabilities, security.capabilities.as_ref())?)
        .no_new_privileges(security.no_new_privs)
        .oom_score_adj(resources::oom_score(oom_score, wanted.node))
        .build()?;
    // What the shim has is what a container gets; the type's default would limit open files.
    process.set_rlimits(None);
    process.set_apparmor_profile(labels::apparmor(security, wanted.node)?);
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

#[cfg(test)]
mod tests;
