//! Device nodes and the usual links of `/dev`.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, Spec};

use super::LinkPlan;
use super::mounts::detached;
use super::options::propagation;
use super::process::c_string;
use crate::error::Error;
use crate::host::sys::{MountAttr, mount_setattr};

/// A node to make.
#[derive(Debug)]
pub(crate) struct DevicePlan {
    /// Below the root.
    pub(crate) path: CString,
    pub(crate) directory: CString,
    pub(crate) name: CString,
    /// Kind and permissions.
    pub(crate) mode: u32,
    pub(crate) number: u64,
    pub(crate) owner: (u32, u32),
    /// The host's node as a detached mount, where nodes cannot be made (in a user namespace).
    pub(crate) bind: Option<OwnedFd>,
}

/// What every container has: minor numbers of major 1 (memory) and 5 (the terminal).
const DEFAULTS: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Whether `/dev` is the container's own, and not a directory of the host.
pub(crate) fn wanted(spec: &Spec) -> bool {
    !spec.mounts().iter().flatten().any(|mount| {
        let dev = mount.destination().as_path() == Path::new("/dev");
        let bind = mount.typ().as_deref() == Some("bind")
            || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
        dev && bind
    })
}

/// The specification's devices and the usual ones.
pub(crate) fn plan(linux: &Linux, user_namespace: bool) -> Result<Vec<DevicePlan>, Error> {
    let mut plans = Vec::new();
    let own = linux.devices().as_deref().unwrap_or_default();
    for (path, major, minor) in DEFAULTS {
        if own.iter().any(|device| device.path() == Path::new(path)) {
            continue;
        }
        let number = rustix::fs::makedev(*major, *minor);
        plans.push(node(path, libc::S_IFCHR | 0o666, number, (0, 0), user_namespace)?);
    }
    for (at, device) in own.iter().enumerate() {
        plans.push(of_spec(device, user_namespace, &format!("linux.devices[{at}]"))?);
    }
    Ok(plans)
}

fn of_spec(device: &LinuxDevice, user_namespace: bool, field: &str) -> Result<DevicePlan, Error> {
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => {
            return Err(Error::spec(format!("{field}.type"), "a node cannot be of all types"));
        }
    };
    let part = |value: i64, name: &str| {
        u32::try_from(value).map_err(|error| Error::spec(format!("{field}.{name}"), error.to_string()))
    };
    let number = match device.typ() {
        LinuxDeviceType::P => 0,
        _ => rustix::fs::makedev(part(device.major(), "major")?, part(device.minor(), "minor")?),
    };
    let path = device.path().to_str().filter(|path| path.starts_with('/') && path.len() > 1);
    let path = path.ok_or_else(|| Error::spec(format!("{field}.path"), "is not an absolute path"))?;
    let mode = kind | device.file_mode().unwrap_or(0o666) & 0o7777;
    node(path, mode, number, (device.uid().unwrap_or(0), device.gid().unwrap_or(0)), user_namespace)
}

fn node(path: &str, mode: u32, number: u64, owner: (u32, u32), bind: bool) -> Result<DevicePlan, Error> {
    let bind = if bind && mode & libc::S_IFMT != libc::S_IFIFO {
        let host = host_node(path, mode, number).ok_or_else(|| Error::Unavailable {
            feature: "a device in a user namespace",
            reason: format!("the host has no node for {path}"),
        })?;
        let step = || Error::step(format!("clone {}", host.display()));
        let tree = detached(&host, false).map_err(step())?;
        // Where the host's mounts are shared the clone would be its peer.
        let change = MountAttr { propagation: propagation::SLAVE, ..MountAttr::default() };
        mount_setattr(tree.as_fd(), false, &change).map_err(step())?;
        Some(tree)
    } else {
        None
    };
    let inside = path.trim_start_matches('/');
    let (directory, name) = inside.rsplit_once('/').unwrap_or(("", inside));
    let c = |text: &str| c_string(text.as_bytes(), "linux.devices");
    Ok(DevicePlan { path: c(inside)?, directory: c(directory)?, name: c(name)?, mode, number, owner, bind })
}

/// The host's node of a device: under the same name, or the one that sysfs tells.
fn host_node(path: &str, mode: u32, number: u64) -> Option<PathBuf> {
    let same = |path: &Path| {
        std::fs::metadata(path)
            .is_ok_and(|found| found.rdev() == number && found.mode() & libc::S_IFMT == mode & libc::S_IFMT)
    };
    if same(Path::new(path)) {
        return Some(PathBuf::from(path));
    }
    let class = if mode & libc::S_IFMT == libc::S_IFBLK { "block" } else { "char" };
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let uevent = std::fs::read_to_string(format!("/sys/dev/{class}/{major}:{minor}/uevent")).ok()?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    let path = Path::new("/dev").join(name);
    same(&path).then_some(path)
}

/// The links of `/dev` that programs expect.
pub(crate) fn links() -> Result<Vec<LinkPlan>, Error> {
    let mut links = vec![
        ("fd", "/proc/self/fd", false),
        ("stdin", "/proc/self/fd/0", false),
        ("stdout", "/proc/self/fd/1", false),
        ("stderr", "/proc/self/fd/2", false),
        ("ptmx", "pts/ptmx", true),
    ];
    if Path::new("/proc/kcore").exists() {
        links.push(("core", "/proc/kcore", false));
    }
    let c = |text: &str| c_string(text.as_bytes(), "linux.devices");
    links
        .into_iter()
        .map(|(name, target, replace)| {
            Ok(LinkPlan { directory: c("dev")?, name: c(name)?, target: c(target)?, replace })
        })
        .collect()
}
