//! The running program, out of reach for containers.
//!
//! A process that is about to become a container's program is, for a moment, a copy of this one in the container's
//! namespaces. A container that names `/proc/self/exe` as its program gets hold of the executable file then
//! (CVE-2019-5736). A long-lived caller therefore runs from a read-only mount that is attached nowhere: the file cannot be
//! written through it, and nothing in any mount namespace can change that mount. It costs no memory: the file is the same.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, StatVfsMountFlags};

use crate::error::Error;
use crate::host::sys::{MountAttr, mount_setattr};
use crate::plan::mounts::detached;
use crate::plan::options::attr;

/// This program's file on a detached read-only mount. Start the long-lived process from [`path`] of it; the descriptor may be closed
/// when that runs.
pub fn own_program() -> Result<OwnedFd, Error> {
    let link = std::fs::read_link("/proc/self/exe").map_err(Error::step("read /proc/self/exe"))?;
    let tree =
        detached(&link, false).map_err(Error::step(format!("clone the mount of {}", link.display())))?;
    let change = MountAttr { set: attr::RDONLY | attr::NOSUID | attr::NODEV, ..MountAttr::default() };
    mount_setattr(tree.as_fd(), false, &change).map_err(Error::step("make it read-only"))?;
    Ok(tree)
}

/// Where to execute the program that [`own_program`] gave.
pub fn path(program: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", program.as_raw_fd()))
}

/// Whether this process runs from a file that cannot be written through `/proc/self/exe`.
pub fn is_sealed() -> bool {
    rustix::fs::open(c"/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::fs::fstatvfs(&file))
        .is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY))
}
