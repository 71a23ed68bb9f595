//! Devices of a container and the rules that allow them.

use cri_shim_api::v1::Device;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};

use super::mounts::clean;
use super::{SpecError, cdi};

/// A device of the host, as the caller found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDevice {
    /// Path in the container.
    pub path: String,
    /// Whether it is a block device.
    pub block: bool,
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// What the container may do: some of `rwm`.
    pub permissions: String,
}

/// Device nodes, and rules: everything denied but these (and runc's usual ones), or everything allowed when privileged.
pub fn nodes_and_rules(
    devices: &[HostDevice],
    privileged: bool,
) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>), SpecError> {
    let rule = LinuxDeviceCgroupBuilder::default().allow(privileged).access("rwm").build()?;
    let mut rules = vec![rule];
    let mut nodes = Vec::new();
    for device in devices {
        let kind = if device.block { LinuxDeviceType::B } else { LinuxDeviceType::C };
        nodes.push(
            LinuxDeviceBuilder::default()
                .path(device.path.as_str())
                .typ(kind)
                .major(device.major)
                .minor(device.minor)
                .file_mode(device.mode)
                .uid(device.uid)
                .gid(device.gid)
                .build()?,
        );
        if !privileged {
            rules.push(
                LinuxDeviceCgroupBuilder::default()
                    .allow(true)
                    .typ(kind)
                    .major(device.major)
                    .minor(device.minor)
                    .access(device.permissions.clone())
                    .build()?,
            );
        }
    }
    Ok((nodes, rules))
}

/// Refuses a wish that names no device path or asks for something else than reading, writing and making nodes.
pub fn check(wanted: &Device) -> Result<(), SpecError> {
    let refuse = |field, problem: String| Err(SpecError::Invalid { field, problem });
    if !wanted.host_path.starts_with('/') || wanted.host_path.contains('\0') {
        return refuse("devices.host_path", format!("{:?} is not an absolute path", wanted.host_path));
    }
    if wanted.container_path.contains('\0') || clean(&wanted.container_path) == "/" {
        return refuse("devices.container_path", format!("{:?} is no path", wanted.container_path));
    }
    let letters = &wanted.permissions;
    if letters.is_empty() || !letters.chars().all(|letter| "rwm".contains(letter)) {
        return refuse("devices.permissions", format!("{letters:?} is not made of r, w, m"));
    }
    Ok(())
}

/// A device that a CDI file describes; `host` is what the node says about it, where the caller could look.
pub fn from_cdi(node: &cdi::DeviceNode, host: Option<&HostDevice>) -> Result<HostDevice, SpecError> {
    let missing = |what: &str| SpecError::Invalid {
        field: "CDI_devices",
        problem: format!("device node {}: neither its file nor the node tells its {what}", node.path),
    };
    let block = match node.kind.as_str() {
        "b" => true,
        "c" | "u" => false,
        "" => host.ok_or_else(|| missing("type"))?.block,
        _ => {
            let problem = format!("device node {}: a pipe is no device", node.path);
            return Err(SpecError::Unsupported { field: "CDI_devices", problem });
        }
    };
    Ok(HostDevice {
        path: clean(&node.path),
        block,
        major: node.major.or(host.map(|host| host.major)).ok_or_else(|| missing("major number"))?,
        minor: node.minor.or(host.map(|host| host.minor)).ok_or_else(|| missing("minor number"))?,
        mode: node.file_mode.or(host.map(|host| host.mode)).unwrap_or(0o660) & 0o7777,
        uid: node.uid.or(host.map(|host| host.uid)).unwrap_or_default(),
        gid: node.gid.or(host.map(|host| host.gid)).unwrap_or_default(),
        permissions: if node.permissions.is_empty() { "rwm".to_owned() } else { node.permissions.clone() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_named_devices_are_allowed() {
        let fuse = HostDevice {
            path: "/dev/fuse".into(),
            block: false,
            major: 10,
            minor: 229,
            mode: 0o666,
            uid: 0,
            gid: 0,
            permissions: "rw".into(),
        };
        let (nodes, rules) = nodes_and_rules(std::slice::from_ref(&fuse), false).unwrap();
        assert_eq!((nodes.len(), rules.len()), (1, 2));
        assert!(!rules[0].allow() && rules[1].allow());
        let (_, rules) = nodes_and_rules(&[fuse], true).unwrap();
        assert!(rules.len() == 1 && rules[0].allow());
    }

    #[test]
    fn impossible_wishes_are_refused_by_name() {
        let device = |host: &str, own: &str, permissions: &str| Device {
            host_path: host.into(),
            container_path: own.into(),
            permissions: permissions.into(),
        };
        check(&device("/dev/fuse", "/dev/fuse", "rwm")).unwrap();
        let cases = [
            (device("fuse", "/dev/fuse", "r"), "devices.host_path"),
            (device("/dev/fuse", "", "r"), "devices.container_path"),
            (device("/dev/fuse", "/dev/fuse", ""), "devices.permissions"),
            (device("/dev/fuse", "/dev/fuse", "rx"), "devices.permissions"),
        ];
        for (device, field) in cases {
            assert!(check(&device).unwrap_err().to_string().starts_with(field), "{field}");
        }
    }

    #[test]
    fn a_described_device_is_completed_from_the_node() {
        let described = cdi::DeviceNode { path: "/dev/gpu0".into(), gid: Some(44), ..Default::default() };
        let host = HostDevice {
            path: "/dev/x".into(),
            block: false,
            major: 1,
            minor: 3,
            mode: 0o666,
            uid: 0,
            gid: 0,
            permissions: String::new(),
        };
        let device = from_cdi(&described, Some(&host)).unwrap();
        assert_eq!((device.path.as_str(), device.major, device.gid), ("/dev/gpu0", 1, 44));
        assert_eq!(device.permissions, "rwm");
        let error = from_cdi(&described, None).unwrap_err().to_string();
        assert!(error.contains("/dev/gpu0") && error.contains("type"), "{error}");
        let whole = cdi::DeviceNode { kind: "c".into(), major: Some(1), minor: Some(5), ..described };
        assert_eq!(from_cdi(&whole, None).unwrap().minor, 5);
    }
}
