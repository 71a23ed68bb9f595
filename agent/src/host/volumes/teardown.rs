//! Takes a pod's directory away: first every mount below it, then the files.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use super::super::mount_table;

/// Removes `dir`. Absence is success. Nothing is deleted while anything is still mounted below, because deleting
/// would then reach into it.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    // The table holds real paths.
    let dir = dir.canonicalize()?;
    for mount_point in mount_table::below(&dir)? {
        match umount2(&mount_point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => {
                return Err(io::Error::other(format!("cannot unmount {}: {error}", mount_point.display())));
            }
        }
    }
    if let Some(left) = mount_table::below(&dir)?.first() {
        return Err(io::Error::other(format!("{} is still mounted", left.display())));
    }
    crate::files::gone(std::fs::remove_dir_all(&dir))
}
