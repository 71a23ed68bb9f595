//! Security contexts: what pod and container say, as CRI wants it. Pure.

use std::path::Path;

use cri_shim_api::v1;
use k8s_openapi::api::core::v1::{
    AppArmorProfile, Capabilities, Container, Pod, PodSecurityContext, PodSpec, SeccompProfile,
    SecurityContext,
};
use v1::security_profile::ProfileType;

/// Paths that containers must not see, unless `procMount: Unmasked`.
const MASKED_PATHS: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// Paths that containers must not write.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Settings of node and pod that a security context depends on beside the spec.
#[derive(Debug, Clone)]
pub struct SecuritySettings<'a> {
    /// RuntimeDefault for containers that name no seccomp profile.
    pub seccomp_default: bool,
    /// Directory of Localhost seccomp profiles.
    pub seccomp_root: &'a Path,
    /// The pod's own users, where it has some.
    pub users: Option<v1::UserNamespace>,
}

/// User that the image names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageUser {
    /// Numeric user.
    pub uid: Option<i64>,
    /// Named user.
    pub name: String,
}

/// runAsNonRoot is set and the container would run as root, or as a user whose uid nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("container{problem} (pod: \"{pod}\", container: {container})")]
pub struct NonRootError {
    problem: String,
    pod: String,
    container: String,
}

/// Namespaces that pod and containers share with the node or each other.
fn namespaces(spec: &PodSpec, users: Option<&v1::UserNamespace>) -> v1::NamespaceOption {
    let on_node = |on: Option<bool>| on.unwrap_or(false);
    let pid = if on_node(spec.host_pid) {
        v1::NamespaceMode::Node
    } else if on_node(spec.share_process_namespace) {
        v1::NamespaceMode::Pod
    } else {
        v1::NamespaceMode::Container
    };
    let shared = |host| if host { v1::NamespaceMode::Node } else { v1::NamespaceMode::Pod };
    v1::NamespaceOption {
        network: shared(on_node(spec.host_network)) as i32,
        pid: pid as i32,
        ipc: shared(on_node(spec.host_ipc)) as i32,
        userns_options: users.cloned(),
        ..v1::NamespaceOption::default()
    }
}

/// The sandbox's context.
pub fn sandbox_context(spec: &PodSpec, settings: &SecuritySettings<'_>) -> v1::LinuxSandboxSecurityContext {
    let pod = spec.security_context.clone().unwrap_or_default();
    let privileged = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .any(|container| context(container).and_then(|context| context.privileged).unwrap_or(false));
    v1::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(spec, settings.users.as_ref())),
        run_as_user: pod.run_as_user.map(int),
        run_as_group: pod.run_as_user.and(pod.run_as_group).map(int),
        supplemental_groups: groups(&pod),
        supplemental_groups_policy: groups_policy(&pod),
        privileged,
        seccomp: Some(seccomp(pod.seccomp_profile.as_ref(), true, settings)),
        selinux_options: pod.se_linux_options.as_ref().map(selinux),
        ..v1::LinuxSandboxSecurityContext::default()
    }
}

/// A container's context.
pub fn container_context(
    pod: &Pod,
    container: &Container,
    image_user: &ImageUser,
    settings: &SecuritySettings<'_>,
) -> Result<v1::LinuxContainerSecurityContext, NonRootError> {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let of_pod = spec.security_context.clone().unwrap_or_default();
    let own = context(container).cloned().unwrap_or_default();
    let user = own.run_as_user.or(of_pod.run_as_user);
    check_non_root(pod, container, user, image_user)?;
    let privileged = own.privileged.unwrap_or(false);
    let unmasked = privileged || own.proc_mount.as_deref() == Some("Unmasked");
    let paths = |paths: &[&str]| {
        if unmasked { Vec::new() } else { paths.iter().map(|path| (*path).to_owned()).collect() }
    };
    let may_escalate = own.allow_privilege_escalation.unwrap_or(true) || privileged;
    Ok(v1::LinuxContainerSecurityContext {
        capabilities: own.capabilities.as_ref().map(capabilities),
        privileged,
        namespace_options: Some(namespaces(spec, settings.users.as_ref())),
        selinux_options: own.se_linux_options.as_ref().or(of_pod.se_linux_options.as_ref()).map(selinux),
        // Without a user from the pod, the image's is used as the image names it.
        run_as_user: user.or(image_user.uid).map(int),
        run_as_username: if user.is_none() { image_user.name.clone() } else { String::new() },
        run_as_group: own.run_as_group.or(of_pod.run_as_group).map(int),
        readonly_rootfs: own.read_only_root_filesystem.unwrap_or(false),
        supplemental_groups: groups(&of_pod),
        supplemental_groups_policy: groups_policy(&of_pod),
        no_new_privs: !may_escalate,
        masked_paths: paths(&MASKED_PATHS),
        readonly_paths: paths(&READONLY_PATHS),
        seccomp: Some(seccomp(
            own.seccomp_profile.as_ref().or(of_pod.seccomp_profile.as_ref()),
            privileged,
            settings,
        )),
        apparmor: own.app_armor_profile.as_ref().or(of_pod.app_armor_profile.as_ref()).map(apparmor),
        ..v1::LinuxContainerSecurityContext::default()
    })
}

fn check_non_root(
    pod: &Pod,
    container: &Container,
    user: Option<i64>,
    image: &ImageUser,
) -> Result<(), NonRootError> {
    let of_pod = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
    let required = context(container)
        .and_then(|context| context.run_as_non_root)
        .or(of_pod.and_then(|context| context.run_as_non_root))
        .unwrap_or(false);
    let problem = match (user, image.uid, image.name.as_str()) {
        _ if !required => return Ok(()),
        (Some(0), ..) => "'s runAsUser breaks non-root policy".to_owned(),
        (None, Some(0), _) | (None, None, "") => " has runAsNonRoot and image will run as root".to_owned(),
        (Some(_), ..) | (None, Some(_), _) => return Ok(()),
        (None, None, name) => {
            format!(
                " has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root"
            )
        }
    };
    let metadata = &pod.metadata;
    Err(NonRootError {
        problem,
        pod: format!(
            "{}_{}({})",
            metadata.name.as_deref().unwrap_or_default(),
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.uid.as_deref().unwrap_or_default()
        ),
        container: container.name.clone(),
    })
}

fn context(container: &Container) -> Option<&SecurityContext> {
    container.security_context.as_ref()
}

fn int(value: i64) -> v1::Int64Value {
    v1::Int64Value { value }
}

fn groups(pod: &PodSecurityContext) -> Vec<i64> {
    pod.supplemental_groups.iter().flatten().copied().chain(pod.fs_group).collect()
}

fn groups_policy(pod: &PodSecurityContext) -> i32 {
    match pod.supplemental_groups_policy.as_deref() {
        Some("Strict") => v1::SupplementalGroupsPolicy::Strict as i32,
        _ => v1::SupplementalGroupsPolicy::Merge as i32,
    }
}

fn capabilities(wanted: &Capabilities) -> v1::Capability {
    v1::Capability {
        add_capabilities: wanted.add.clone().unwrap_or_default(),
        drop_capabilities: wanted.drop.clone().unwrap_or_default(),
        ..v1::Capability::default()
    }
}

fn seccomp(
    profile: Option<&SeccompProfile>,
    privileged: bool,
    settings: &SecuritySettings<'_>,
) -> v1::SecurityProfile {
    let (kind, localhost_ref) = match profile.map(|profile| profile.type_.as_str()) {
        Some("RuntimeDefault") => (ProfileType::RuntimeDefault, String::new()),
        Some("Localhost") => {
            let name = profile.and_then(|profile| profile.localhost_profile.clone()).unwrap_or_default();
            (ProfileType::Localhost, settings.seccomp_root.join(name).to_string_lossy().into_owned())
        }
        None if settings.seccomp_default && !privileged => (ProfileType::RuntimeDefault, String::new()),
        _ => (ProfileType::Unconfined, String::new()),
    };
    v1::SecurityProfile { profile_type: kind as i32, localhost_ref }
}

fn apparmor(profile: &AppArmorProfile) -> v1::SecurityProfile {
    let kind = match profile.type_.as_str() {
        "Localhost" => ProfileType::Localhost,
        "Unconfined" => ProfileType::Unconfined,
        _ => ProfileType::RuntimeDefault,
    };
    v1::SecurityProfile {
        profile_type: kind as i32,
        localhost_ref: profile.localhost_profile.clone().unwrap_or_default(),
    }
}

fn selinux(options: &k8s_openapi::api::core::v1::SELinuxOptions) -> v1::SeLinuxOption {
    v1::SeLinuxOption {
        user: options.user.clone().unwrap_or_default(),
        role: options.role.clone().unwrap_or_default(),
        r#type: options.type_.clone().unwrap_or_default(),
        level: options.level.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(context: &serde_json::Value, image: &ImageUser, expected: Result<Option<i64>, &str>) {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {"containers": [{"name": "a", "securityContext": context}]}}))
        .expect("a pod");
        let container = pod.spec.as_ref().expect("spec").containers[0].clone();
        let settings =
            SecuritySettings { seccomp_default: false, seccomp_root: Path::new("/s"), users: None };
        let result = container_context(&pod, &container, image, &settings);
        match (result, expected) {
            (Ok(context), Ok(uid)) => assert_eq!(context.run_as_user.map(|user| user.value), uid),
            (Err(error), Err(text)) => assert!(error.to_string().contains(text), "{error}"),
            (result, expected) => panic!("{result:?} is not {expected:?}"),
        }
    }

    #[test]
    fn non_root_is_enforced_with_upstreams_words() {
        let root = ImageUser { uid: Some(0), name: String::new() };
        let named = ImageUser { uid: None, name: "nginx".to_owned() };
        check(&json!({"runAsNonRoot": true}), &root, Err("image will run as root"));
        check(&json!({"runAsNonRoot": true}), &named, Err("non-numeric user (nginx)"));
        check(&json!({"runAsNonRoot": true, "runAsUser": 1000}), &root, Ok(Some(1000)));
        check(
            &json!({"runAsNonRoot": true, "runAsUser": 0}),
            &named,
            Err("container's runAsUser breaks non-root policy (pod: "),
        );
        check(&json!({}), &root, Ok(Some(0)));
    }
}
