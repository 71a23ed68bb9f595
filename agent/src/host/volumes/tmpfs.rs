//! File systems in memory over a volume's directory.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::mount::{MsFlags, mount};

/// Mounts a tmpfs at `dir` unless one is there; `size` limits it.
pub(super) fn ensure(dir: &Path, size: Option<u64>) -> io::Result<()> {
    if is_mount_point(dir)? {
        return Ok(());
    }
    let options = match size {
        Some(bytes) => format!("mode=0777,size={bytes}"),
        None => "mode=0777".to_owned(),
    };
    mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str()))
        .map_err(|error| io::Error::other(format!("cannot mount tmpfs at {}: {error}", dir.display())))
}

/// Mounts one of huge pages of so many bytes at `dir` unless one is there. How much may be in it is the containers' limit.
pub(super) fn ensure_of_huge_pages(dir: &Path, page: u64) -> io::Result<()> {
    if is_mount_point(dir)? {
        return Ok(());
    }
    let options = format!("mode=0777,pagesize={page}");
    mount(Some("nodev"), dir, Some("hugetlbfs"), MsFlags::empty(), Some(options.as_str())).map_err(|error| {
        io::Error::other(format!("cannot mount huge pages of {page} bytes at {}: {error}", dir.display()))
    })
}

/// A file system of its own has a device of its own. (A bind mount would not be seen; nobody makes one here.)
fn is_mount_point(dir: &Path) -> io::Result<bool> {
    let parent = dir.parent().unwrap_or(dir);
    Ok(std::fs::metadata(dir)?.dev() != std::fs::metadata(parent)?.dev())
}
