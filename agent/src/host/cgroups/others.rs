//! Cgroups of others than pods: those that are held to what is reserved for them, and those that processes move to.
//!
//! Blocks, but briefly; runs before anything else does.

use std::io;

use super::hierarchy::{Hierarchy, Version, mounted};
use super::values::{apply, reserved_settings};
use crate::config::ReservedCgroup;

/// Processes fork while they are moved: so many rounds at most.
const ROUNDS: usize = 10;

/// Says which hierarchy lacks a cgroup that is to be limited.
pub(crate) fn missing(cgroup: &ReservedCgroup) -> Result<(), String> {
    let hierarchies = mounted().map_err(|error| error.to_string())?;
    let settings = reserved_settings(cgroup);
    let concerned =
        hierarchies.iter().filter(|hierarchy| settings.iter().any(|setting| setting.is_for(hierarchy)));
    for hierarchy in concerned {
        let dir = hierarchy.dir(&cgroup.path);
        if !dir.is_dir() {
            let (path, whose) = (&cgroup.path, cgroup.whose);
            return Err(format!(
                "failed to enforce {whose} reserved cgroup limits on {path:?}: there is no cgroup {}",
                dir.display()
            ));
        }
    }
    Ok(())
}

/// Limits a cgroup that exists to what is reserved for it.
pub(crate) fn hold(cgroup: &ReservedCgroup) -> io::Result<()> {
    let settings = reserved_settings(cgroup);
    mounted()?.iter().try_for_each(|hierarchy| apply(hierarchy, &cgroup.path, &settings))
}

/// Moves this process to a cgroup, which is made where it is not there.
pub(crate) fn join(path: &str) -> io::Result<()> {
    let own = std::process::id();
    mounted()?.iter().try_for_each(|hierarchy| move_to(hierarchy, path, own))
}

/// Moves the processes that are in the root cgroup to another, but for the first one and the kernel's.
pub(crate) fn gather_system(path: &str) -> io::Result<()> {
    for hierarchy in mounted()? {
        for _ in 0..ROUNDS {
            let text = std::fs::read_to_string(hierarchy.mount_point.join("cgroup.procs"))?;
            let own: Vec<u32> =
                text.lines().filter_map(|line| line.parse().ok()).filter(|pid| is_users(*pid)).collect();
            if own.is_empty() {
                break;
            }
            for pid in own {
                match move_to(&hierarchy, path, pid) {
                    // It has ended meanwhile.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    moved => moved?,
                }
            }
        }
    }
    Ok(())
}

/// The kernel's threads have no program; the first process is nobody's to move.
fn is_users(pid: u32) -> bool {
    pid > 1 && std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

fn move_to(hierarchy: &Hierarchy, path: &str, pid: u32) -> io::Result<()> {
    // Version 2 has no processes where controllers are passed down: only down to the cgroup above this one.
    let above = path.trim_end_matches('/').rsplit_once('/').map_or("", |(above, _)| above);
    let dir = hierarchy.dir(path);
    match hierarchy.version {
        Version::V1 => hierarchy.create(path)?,
        Version::V2 => {
            hierarchy.create(above)?;
            match std::fs::create_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
    }
    std::fs::write(dir.join("cgroup.procs"), pid.to_string())
}
