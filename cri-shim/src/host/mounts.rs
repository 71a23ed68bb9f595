//! Mounts made for sandboxes, and what the node's mount table says.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::RuntimeError;

/// Size of a pod's `/dev/shm`, as with every common runtime.
const SHM_OPTIONS: &str = "mode=1777,size=65536k";

/// Mounts a fresh shared-memory file system at `path`.
pub fn mount_shm(path: &Path) -> Result<(), RuntimeError> {
    std::fs::create_dir_all(path).map_err(RuntimeError::host("make", path))?;
    let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("shm"), path, Some("tmpfs"), flags, Some(SHM_OPTIONS))
        .map_err(|errno| RuntimeError::host("mount shared memory at", path)(errno.into()))
}

/// Detaches whatever is mounted at `path`; nothing is fine.
pub fn unmount(path: &Path) -> Result<(), RuntimeError> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more), or no such file.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(RuntimeError::host("unmount", path)(errno.into())),
        }
    }
}

/// The mount table's text.
pub fn table() -> Result<String, RuntimeError> {
    let path = Path::new("/proc/self/mountinfo");
    std::fs::read_to_string(path).map_err(RuntimeError::host("read", path))
}

/// Detaches everything mounted at or below `directory`, deepest first.
pub fn unmount_below(directory: &Path) -> Result<(), RuntimeError> {
    let mut points: Vec<PathBuf> = table()?
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(directory))
        .collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    points.iter().try_for_each(|point| unmount(point))
}
