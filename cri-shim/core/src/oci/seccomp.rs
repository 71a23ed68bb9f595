//! System call filters: the runtime's default profile, one from the node, or none.

use std::collections::BTreeSet;

use cri_shim_api::v1::security_profile::ProfileType;
use cri_shim_api::v1::{LinuxContainerSecurityContext, SecurityProfile};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use super::labels::old_name;
use super::seccomp_table::{ALLOWED, BY_CAPABILITY, PERSONALITIES};
use super::{NodeFacts, SpecError};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
/// Every `CLONE_NEW*` flag of clone(2): new namespaces need CAP_SYS_ADMIN.
const NAMESPACE_FLAGS: u64 = 0x7E02_0000;
/// `AF_VSOCK`: not namespaced, so it would reach the hypervisor from any pod.
const AF_VSOCK: u64 = 40;

/// The wanted profile, with the text of a profile on the node where it names one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// No filter.
    Unconfined,
    /// [`default_profile`].
    RuntimeDefault,
    /// A profile of the node.
    Localhost {
        /// Its path.
        path: String,
        /// Its text.
        json: String,
    },
}

/// The profile as CRI names it in its new field, or else in the old one.
pub fn wish(security: &LinuxContainerSecurityContext) -> Result<Option<SecurityProfile>, SpecError> {
    match (&security.seccomp, security.seccomp_profile_path.as_str()) {
        (Some(profile), _) => Ok(Some(profile.clone())),
        (None, old) => old_name(old, "seccomp_profile_path"),
    }
}

/// The path of the profile that the caller has to read first.
pub fn localhost_path(wanted: Option<&SecurityProfile>) -> Option<&str> {
    wanted
        .filter(|profile| profile.profile_type() == ProfileType::Localhost)
        .map(|profile| profile.localhost_ref.strip_prefix("localhost/").unwrap_or(&profile.localhost_ref))
}

/// The filter for a process with these capabilities; nothing when it is unconfined.
pub fn filter(
    profile: &Profile,
    capabilities: &BTreeSet<String>,
    node: &NodeFacts,
) -> Result<Option<LinuxSeccomp>, SpecError> {
    match profile {
        Profile::Unconfined => Ok(None),
        // What cannot be filtered runs unfiltered by default, but never against an explicit profile.
        Profile::RuntimeDefault if !node.seccomp => Ok(None),
        Profile::RuntimeDefault => default_profile(capabilities).map(Some),
        Profile::Localhost { path, .. } if !node.seccomp => {
            let problem = format!("{path}: this kernel has no seccomp filters");
            Err(SpecError::Unsupported { field: "seccomp", problem })
        }
        Profile::Localhost { path, json } => serde_json::from_str(json)
            .map(Some)
            .map_err(|source| SpecError::SeccompProfile { path: path.clone(), source }),
    }
}

/// The default profile: what is known to be harmless in a container is allowed, what a capability stands for is allowed
/// with it, everything else fails with EPERM.
pub fn default_profile(capabilities: &BTreeSet<String>) -> Result<LinuxSeccomp, SpecError> {
    let mut rules = vec![allow(ALLOWED)?];
    for value in PERSONALITIES {
        rules.push(allow_when("personality", 0, *value, None, LinuxSeccompOperator::ScmpCmpEq)?);
    }
    rules.push(allow_when("socket", 0, AF_VSOCK, None, LinuxSeccompOperator::ScmpCmpNe)?);
    for (capability, names) in BY_CAPABILITY {
        if capabilities.contains(*capability) {
            rules.push(allow(names)?);
        }
    }
    if !capabilities.contains("SYS_ADMIN") {
        let masked = LinuxSeccompOperator::ScmpCmpMaskedEq;
        rules.push(allow_when("clone", 0, NAMESPACE_FLAGS, Some(0), masked)?);
        // Its flags are behind a pointer that a filter cannot read; ENOSYS makes libc fall back to clone.
        rules.push(
            LinuxSyscallBuilder::default()
                .names(vec!["clone3".to_owned()])
                .action(LinuxSeccompAction::ScmpActErrno)
                .errno_ret(ENOSYS)
                .build()?,
        );
    }
    Ok(LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(EPERM)
        .architectures(architectures())
        .syscalls(rules)
        .build()?)
}

/// This machine's architecture and the 32-bit ones it runs as well.
fn architectures() -> Vec<Arch> {
    if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    }
}

fn allow(names: &[&str]) -> Result<LinuxSyscall, SpecError> {
    Ok(LinuxSyscallBuilder::default()
        .names(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
        .action(LinuxSeccompAction::ScmpActAllow)
        .build()?)
}

fn allow_when(
    name: &str,
    index: usize,
    value: u64,
    value_two: Option<u64>,
    operator: LinuxSeccompOperator,
) -> Result<LinuxSyscall, SpecError> {
    let mut argument = LinuxSeccompArgBuilder::default().index(index).value(value).op(operator);
    if let Some(value_two) = value_two {
        argument = argument.value_two(value_two);
    }
    Ok(LinuxSyscallBuilder::default()
        .names(vec![name.to_owned()])
        .action(LinuxSeccompAction::ScmpActAllow)
        .args(vec![argument.build()?])
        .build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(capabilities: &[&str], name: &str) -> bool {
        let capabilities = capabilities.iter().map(|name| (*name).to_owned()).collect();
        let profile = default_profile(&capabilities).unwrap();
        profile.syscalls().as_ref().unwrap().iter().any(|rule| {
            rule.action() == LinuxSeccompAction::ScmpActAllow
                && rule.names().iter().any(|known| known == name)
        })
    }

    #[test]
    fn dangerous_calls_need_their_capability() {
        for (name, capability) in
            [("mount", "SYS_ADMIN"), ("init_module", "SYS_MODULE"), ("clock_settime", "SYS_TIME")]
        {
            assert!(!allowed(&[], name), "{name}");
            assert!(allowed(&[capability], name), "{name}");
        }
        for name in ["keyctl", "add_key", "kexec_load", "userfaultfd", "io_uring_setup"] {
            assert!(!allowed(&["SYS_ADMIN"], name), "{name} is never allowed");
        }
        for name in ["read", "openat", "execve", "futex", "epoll_pwait2", "openat2", "ptrace"] {
            assert!(allowed(&[], name), "{name}");
        }
    }

    #[test]
    fn no_name_is_listed_twice() {
        let mut seen = BTreeSet::new();
        assert!(ALLOWED.iter().all(|name| seen.insert(*name)));
    }

    #[test]
    fn the_old_field_counts_where_the_new_one_is_absent() {
        let old = |path: &str| LinuxContainerSecurityContext {
            seccomp_profile_path: path.to_owned(),
            ..LinuxContainerSecurityContext::default()
        };
        let kind = |path: &str| wish(&old(path)).unwrap().map(|profile| profile.profile_type());
        assert_eq!(kind(""), None);
        assert_eq!(kind("unconfined"), Some(ProfileType::Unconfined));
        assert_eq!(kind("docker/default"), Some(ProfileType::RuntimeDefault));
        let local = wish(&old("localhost//var/p.json")).unwrap();
        assert_eq!(localhost_path(local.as_ref()), Some("/var/p.json"));
        assert!(wish(&old("strange")).unwrap_err().to_string().starts_with("seccomp_profile_path"));
        let both = LinuxContainerSecurityContext { seccomp: local.clone(), ..old("unconfined") };
        assert_eq!(wish(&both).unwrap(), local);
    }

    #[test]
    fn a_broken_profile_is_named() {
        let profile = Profile::Localhost { path: "/p.json".into(), json: "{".into() };
        let node = NodeFacts { seccomp: true, ..NodeFacts::default() };
        let error = filter(&profile, &BTreeSet::new(), &node).unwrap_err();
        assert!(error.to_string().contains("/p.json"));
    }
}
