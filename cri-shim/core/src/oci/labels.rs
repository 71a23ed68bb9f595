//! Labels of security modules: the AppArmor profile a process is confined by and its SELinux label.

use cri_shim_api::v1::security_profile::ProfileType;
use cri_shim_api::v1::{LinuxContainerSecurityContext, SeLinuxOption, SecurityProfile};

use super::{NodeFacts, SpecError};

/// Name of the profile that RuntimeDefault stands for; its text is [`DEFAULT_PROFILE`].
pub const DEFAULT_PROFILE_NAME: &str = "keelson-default";

/// The default AppArmor profile: everything inside the container's own namespaces, nothing that configures the kernel.
pub const DEFAULT_PROFILE: &str = r"#include <tunables/global>

profile keelson-default flags=(attach_disconnected,mediate_deleted) {
  #include <abstractions/base>

  network,
  capability,
  file,
  umount,

  # The node's runtime and the container itself may signal its processes.
  signal (receive) peer=unconfined,
  signal (receive) peer={runc,crun},
  signal (send,receive) peer=keelson-default,
  ptrace (trace,read,tracedby,readby) peer=keelson-default,

  deny mount,

  # The kernel's memory and its emergency keys.
  deny @{PROC}/{kcore,kmem,mem,sysrq-trigger} rwklx,
  # Switches of the whole node; those of the container's own namespaces stay open.
  deny @{PROC}/{acpi,bus,driver,fs,irq,mtrr,scsi}/** wl,
  deny @{PROC}/sys/{abi,debug,dev,fs,user,vm}/** wl,
  deny @{PROC}/sys/kernel/[^dhms]** wl,
  deny @{PROC}/sys/kernel/{dm**,hu**,ho[^s]**,ma**,mo**,s[^eh]**,sec**} wl,
  deny /sys/{block,bus,class,dev,devices,firmware,hypervisor,kernel,module,power}/** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/{firmware,kernel/security,devices/virtual/powercap}/** rwklx,
}
";

/// The profile as CRI names it in its new field, or else in the old one.
pub fn apparmor_wish(security: &LinuxContainerSecurityContext) -> Result<Option<SecurityProfile>, SpecError> {
    match (&security.apparmor, security.apparmor_profile.as_str()) {
        (Some(profile), _) => Ok(Some(profile.clone())),
        (None, old) => old_name(old, "apparmor_profile"),
    }
}

/// The names of profiles before they had a message: `runtime/default`, `unconfined`, `localhost/<name>`.
pub(super) fn old_name(name: &str, field: &'static str) -> Result<Option<SecurityProfile>, SpecError> {
    let profile = |kind: ProfileType, localhost_ref: &str| {
        Ok(Some(SecurityProfile { profile_type: kind.into(), localhost_ref: localhost_ref.to_owned() }))
    };
    match name {
        "" => Ok(None),
        "runtime/default" | "docker/default" => profile(ProfileType::RuntimeDefault, ""),
        "unconfined" => profile(ProfileType::Unconfined, ""),
        other => match other.strip_prefix("localhost/") {
            Some(reference) => profile(ProfileType::Localhost, reference),
            None => Err(SpecError::Invalid { field, problem: format!("unknown profile {other:?}") }),
        },
    }
}

/// The AppArmor profile of a process; none leaves it unconfined.
pub fn apparmor(
    security: &LinuxContainerSecurityContext,
    node: &NodeFacts,
) -> Result<Option<String>, SpecError> {
    let wish = apparmor_wish(security)?;
    let name = match wish.as_ref().map(|wish| (wish.profile_type(), wish.localhost_ref.as_str())) {
        // A privileged process is confined by nothing but what somebody asked for by name.
        Some((ProfileType::RuntimeDefault, _)) if security.privileged => return Ok(None),
        // Where the kernel has AppArmor every other container is confined unless somebody says otherwise.
        None if node.apparmor && node.apparmor_default && !security.privileged => DEFAULT_PROFILE_NAME,
        Some((ProfileType::Unconfined, _)) | None => return Ok(None),
        Some((ProfileType::RuntimeDefault, _)) if node.apparmor && !node.apparmor_default => {
            let problem = "the default profile could not be loaded; the log of the start says why".to_owned();
            return Err(SpecError::Unsupported { field: "apparmor", problem });
        }
        Some((ProfileType::RuntimeDefault, _)) => DEFAULT_PROFILE_NAME,
        Some((ProfileType::Localhost, reference)) => {
            let name = reference.strip_prefix("localhost/").unwrap_or(reference);
            if name.is_empty() || name.contains(['\0', '\n']) {
                let problem = format!("{name:?} is no name of a profile");
                return Err(SpecError::Invalid { field: "apparmor.localhost_ref", problem });
            }
            name
        }
    };
    if !node.apparmor {
        let problem = format!("profile {name}: AppArmor is not enabled on this node");
        return Err(SpecError::Unsupported { field: "apparmor", problem });
    }
    Ok(Some(name.to_owned()))
}

/// The SELinux labels of a process and of its root file system; none where the node has no SELinux or CRI names none.
pub fn selinux(
    options: Option<&SeLinuxOption>,
    privileged: bool,
    node: &NodeFacts,
) -> Result<Option<(String, String)>, SpecError> {
    let Some(options) = options.filter(|_| node.selinux && !privileged) else { return Ok(None) };
    let parts = [&options.user, &options.role, &options.r#type, &options.level];
    if parts.iter().all(|part| part.is_empty()) {
        return Ok(None);
    }
    // A level holds colons; the others end at one.
    if parts[..3].iter().any(|part| part.contains(':')) || parts.iter().any(|part| part.contains(['\0', ' ']))
    {
        let problem = format!("{parts:?} is no label");
        return Err(SpecError::Invalid { field: "selinux_options", problem });
    }
    let or = |part: &str, usual: &str| if part.is_empty() { usual.to_owned() } else { part.to_owned() };
    let (user, level) = (or(&options.user, "system_u"), or(&options.level, "s0"));
    let process =
        format!("{user}:{}:{}:{level}", or(&options.role, "system_r"), or(&options.r#type, "container_t"));
    Ok(Some((process, format!("{user}:object_r:container_file_t:{level}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeFacts {
        NodeFacts { apparmor: true, apparmor_default: true, selinux: true, ..NodeFacts::default() }
    }

    fn wish(kind: ProfileType, reference: &str) -> LinuxContainerSecurityContext {
        let profile = SecurityProfile { profile_type: kind.into(), localhost_ref: reference.to_owned() };
        LinuxContainerSecurityContext { apparmor: Some(profile), ..Default::default() }
    }

    #[test]
    fn apparmor_by_the_table() {
        let old = |name: &str| LinuxContainerSecurityContext {
            apparmor_profile: name.to_owned(),
            ..Default::default()
        };
        let cases = [
            (LinuxContainerSecurityContext::default(), Some(DEFAULT_PROFILE_NAME)),
            (wish(ProfileType::RuntimeDefault, ""), Some(DEFAULT_PROFILE_NAME)),
            (wish(ProfileType::Localhost, "localhost/web"), Some("web")),
            (wish(ProfileType::Localhost, "web"), Some("web")),
            (wish(ProfileType::Unconfined, ""), None),
            (old("runtime/default"), Some(DEFAULT_PROFILE_NAME)),
            (old("localhost/web"), Some("web")),
            (old("unconfined"), None),
            (
                LinuxContainerSecurityContext { privileged: true, ..wish(ProfileType::RuntimeDefault, "") },
                None,
            ),
            (
                LinuxContainerSecurityContext { privileged: true, ..wish(ProfileType::Localhost, "web") },
                Some("web"),
            ),
            (
                LinuxContainerSecurityContext {
                    privileged: true,
                    ..LinuxContainerSecurityContext::default()
                },
                None,
            ),
        ];
        for (security, expected) in cases {
            assert_eq!(apparmor(&security, &node()).unwrap().as_deref(), expected, "{security:?}");
        }
        assert!(apparmor(&old("web"), &node()).unwrap_err().to_string().contains("unknown profile"));
        assert!(DEFAULT_PROFILE.contains(&format!("profile {DEFAULT_PROFILE_NAME} ")));
    }

    #[test]
    fn without_apparmor_only_a_demand_fails() {
        let plain = NodeFacts::default();
        assert_eq!(apparmor(&LinuxContainerSecurityContext::default(), &plain).unwrap(), None);
        assert_eq!(apparmor(&wish(ProfileType::Unconfined, ""), &plain).unwrap(), None);
        for demand in [wish(ProfileType::RuntimeDefault, ""), wish(ProfileType::Localhost, "web")] {
            let error = apparmor(&demand, &plain).unwrap_err().to_string();
            assert!(error.contains("AppArmor is not enabled"), "{error}");
        }
    }

    #[test]
    fn a_default_profile_that_is_not_loaded_is_missed_only_where_it_is_demanded() {
        let node = NodeFacts { apparmor_default: false, ..node() };
        assert_eq!(apparmor(&LinuxContainerSecurityContext::default(), &node).unwrap(), None);
        let error = apparmor(&wish(ProfileType::RuntimeDefault, ""), &node).unwrap_err().to_string();
        assert!(error.contains("could not be loaded"), "{error}");
        assert_eq!(apparmor(&wish(ProfileType::Localhost, "web"), &node).unwrap().as_deref(), Some("web"));
    }

    #[test]
    fn selinux_labels_are_passed_on_where_there_is_selinux() {
        let options = SeLinuxOption { level: "s0:c1,c2".into(), ..SeLinuxOption::default() };
        let (process, mount) = selinux(Some(&options), false, &node()).unwrap().unwrap();
        assert_eq!(process, "system_u:system_r:container_t:s0:c1,c2");
        assert_eq!(mount, "system_u:object_r:container_file_t:s0:c1,c2");
        assert_eq!(selinux(Some(&options), false, &NodeFacts::default()).unwrap(), None);
        assert_eq!(selinux(Some(&options), true, &node()).unwrap(), None);
        assert_eq!(selinux(None, false, &node()).unwrap(), None);
        let bad = SeLinuxOption { r#type: "a:b".into(), ..SeLinuxOption::default() };
        assert!(selinux(Some(&bad), false, &node()).unwrap_err().to_string().starts_with("selinux_options"));
    }
}
