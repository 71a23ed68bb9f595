//! Figures that are not in cgroup files: interfaces of a network namespace, open files of processes, file systems, disks.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cri_shim_core::metrics::DiskFigures;
use cri_shim_core::stats::{DeviceUsage, InterfaceCounters, ProcessUsage, interfaces, soft_open_files};

use super::files::kernel_text;
use super::process;

/// Processes and files of one container that are counted; more cost too much to look at.
const MAX_COUNTED: usize = 10_000;

/// The interfaces that the process `pid` sees. Nothing when the process is not in the namespace pinned at `netns` (any more).
pub fn interfaces_of(pid: u32, netns: &str) -> Vec<InterfaceCounters> {
    let id = |path: &Path| path.metadata().map(|metadata| (metadata.dev(), metadata.ino())).ok();
    let process = format!("/proc/{pid}");
    let pinned = id(Path::new(netns));
    if pid == 0 || pinned.is_none() || id(Path::new(&format!("{process}/ns/net"))) != pinned {
        return Vec::new();
    }
    interfaces(&kernel_text(Path::new(&format!("{process}/net/dev"))))
}

/// What these processes hold. The first one's limits count.
pub fn processes(pids: &[i32]) -> ProcessUsage {
    let mut usage = ProcessUsage { processes: pids.len() as u64, ..ProcessUsage::default() };
    for pid in pids.iter().take(MAX_COUNTED) {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        for file in files {
            usage.file_descriptors += 1;
            let far = usage.file_descriptors > MAX_COUNTED as u64;
            let target = if far { None } else { std::fs::read_link(file.path()).ok() };
            usage.sockets +=
                u64::from(target.is_some_and(|target| target.to_string_lossy().starts_with("socket:")));
        }
    }
    if let Some(first) = pids.first() {
        // The short way needs the process's user or a capability.
        usage.max_open_files = process::open_files_limit(*first)
            .unwrap_or_else(|_| soft_open_files(&kernel_text(Path::new(&format!("/proc/{first}/limits")))));
    }
    usage
}

/// The file system that holds `path`; nothing is said about use.
pub fn file_system(path: &Path) -> Option<DiskFigures> {
    let about = nix::sys::statvfs::statvfs(path).ok()?;
    let number = path.metadata().ok()?.dev();
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let mounts = kernel_text(Path::new("/proc/self/mountinfo"));
    Some(DiskFigures {
        device: source_of(&mounts, &format!("{major}:{minor}")).unwrap_or_default(),
        size: about.blocks() * about.fragment_size(),
        inodes: about.files(),
        free_inodes: about.files_free(),
        used: 0,
    })
}

/// What the file system with this number is mounted from.
fn source_of(mountinfo: &str, number: &str) -> Option<String> {
    let line = mountinfo.lines().find(|line| line.split(' ').nth(2) == Some(number))?;
    line.split_once(" - ")?.1.split(' ').nth(1).map(str::to_owned)
}

/// Names of disks; numbers for those that have none. `known` keeps them for the next container.
pub fn device_names(devices: &[DeviceUsage], known: &mut BTreeMap<(u32, u32), String>) -> Vec<String> {
    let name = |device: &DeviceUsage| {
        let key = (device.major, device.minor);
        known.entry(key).or_insert_with(|| device_name(key.0, key.1)).clone()
    };
    devices.iter().map(name).collect()
}

fn device_name(major: u32, minor: u32) -> String {
    let about = kernel_text(Path::new(&format!("/sys/dev/block/{major}:{minor}/uevent")));
    let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    name.map_or_else(|| format!("{major}:{minor}"), |name| format!("/dev/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_process_has_files_sockets_threads_and_a_limit() {
        let (_one, _two) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let own = i32::try_from(std::process::id()).expect("a pid");
        let usage = processes(&[own]);
        assert!(usage.file_descriptors >= 5 && usage.sockets >= 2 && usage.processes == 1, "{usage:?}");
        assert!(usage.max_open_files.is_some_and(|limit| limit > 0));
        assert_eq!(processes(&[]), ProcessUsage::default());
    }

    #[test]
    fn interfaces_are_told_only_of_the_pinned_namespace() {
        let own = std::process::id();
        let here = format!("/proc/{own}/ns/net");
        let found = interfaces_of(own, &here);
        assert!(found.iter().all(|one| one.name != "lo"));
        assert!(interfaces_of(own, "/proc/self/ns/uts").is_empty(), "some other namespace");
        assert!(interfaces_of(0, &here).is_empty());
    }

    #[test]
    fn a_file_system_has_a_size_and_a_device() {
        let root = file_system(Path::new("/")).expect("a root");
        assert!(root.size > 0);
        let text = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n";
        assert_eq!(source_of(text, "98:0").as_deref(), Some("/dev/root"));
        assert_eq!(device_name(u32::MAX, 0), format!("{}:0", u32::MAX));
    }
}
