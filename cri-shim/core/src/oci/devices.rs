//! Devices of a container and the rules that allow them.

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};

use super::SpecError;

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
}
