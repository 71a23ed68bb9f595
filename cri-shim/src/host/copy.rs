//! Copies the content of an image's volume: everything below a directory with owners, modes, times, extended attributes,
//! hard links and special files.
//!
//! Input: a directory nobody writes to (a read-only mount of an image) and an empty directory of ours. Symbolic links are
//! copied as such and never followed, except on the way to the directory itself, where they stay inside the root.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, mknod};
use rustix::fs::XattrFlags;

use crate::error::RuntimeError;

/// Longest list of names, and longest value, of extended attributes that Linux allows.
const XATTR_LIMIT: usize = 64 << 10;

/// The real place of `path` in the root file system at `root`, and nothing when there is no such directory. The second
/// value keeps the place open; the first one leads through it.
pub fn find_in(root: &Path, path: &str) -> Result<Option<(PathBuf, fs::File)>, RuntimeError> {
    let opened = fs::File::open(root).map_err(RuntimeError::host("open", root))?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    match openat2(&opened, path.trim_start_matches('/'), how).map(fs::File::from) {
        Ok(found) => {
            let descriptor = std::os::fd::AsRawFd::as_raw_fd(&found);
            Ok(Some((PathBuf::from(format!("/proc/self/fd/{descriptor}")), found)))
        }
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
        Err(errno) => Err(RuntimeError::host("find", &root.join(path.trim_start_matches('/')))(errno.into())),
    }
}

/// Makes `target`, which has no entries, like the directory `source`. Blocks.
pub fn directory(source: &Path, target: &Path) -> Result<(), RuntimeError> {
    let mut copy = Copy { links: HashMap::new() };
    let metadata = source.metadata().map_err(RuntimeError::host("inspect", source))?;
    // The directories still to be filled; what is like its source only when it is full comes last.
    let mut open = vec![(source.to_owned(), target.to_owned(), metadata)];
    let mut full = Vec::new();
    while let Some((from, to, metadata)) = open.pop() {
        for entry in fs::read_dir(&from).map_err(RuntimeError::host("list", &from))? {
            let name = entry.map_err(RuntimeError::host("list", &from))?.file_name();
            let (from, to) = (from.join(&name), to.join(&name));
            let metadata = from.symlink_metadata().map_err(RuntimeError::host("inspect", &from))?;
            if metadata.is_dir() {
                fs::create_dir(&to).map_err(RuntimeError::host("make", &to))?;
                open.push((from, to, metadata));
            } else {
                copy.entry(&from, &to, &metadata).map_err(RuntimeError::host("copy to", &to))?;
            }
        }
        full.push((from, to, metadata));
    }
    for (from, to, metadata) in full.iter().rev() {
        // The top is reached through a link of procfs, which must be followed.
        let from = if from == source { from.join(".") } else { from.clone() };
        attributes(&from, to, metadata).map_err(RuntimeError::host("copy the attributes of", to))?;
    }
    Ok(())
}

/// A copy under way.
struct Copy {
    /// Where a file with several names was copied first, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
}

impl Copy {
    /// Copies what is no directory.
    fn entry(&mut self, from: &Path, to: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        if metadata.nlink() > 1 {
            let inode = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&inode) {
                return fs::hard_link(first, to);
            }
            self.links.insert(inode, to.to_owned());
        }
        if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(from)?, to)?;
        } else if kind.is_file() {
            fs::copy(from, to)?;
        } else {
            let special = if kind.is_fifo() {
                SFlag::S_IFIFO
            } else if kind.is_char_device() {
                SFlag::S_IFCHR
            } else if kind.is_block_device() {
                SFlag::S_IFBLK
            } else {
                SFlag::S_IFSOCK
            };
            mknod(to, special, Mode::from_bits_truncate(0o600), metadata.rdev())?;
        }
        attributes(from, to, metadata)
    }
}

/// Owner, mode, extended attributes and times, in the order in which one does not undo another.
fn attributes(from: &Path, to: &Path, metadata: &Metadata) -> io::Result<()> {
    std::os::unix::fs::lchown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    if !metadata.file_type().is_symlink() {
        fs::set_permissions(to, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    }
    xattrs(from, to)?;
    let time = |seconds: i64, nanoseconds: i64| nix::sys::time::TimeSpec::new(seconds, nanoseconds);
    nix::sys::stat::utimensat(
        nix::fcntl::AT_FDCWD,
        to,
        &time(metadata.atime(), metadata.atime_nsec()),
        &time(metadata.mtime(), metadata.mtime_nsec()),
        nix::sys::stat::UtimensatFlags::NoFollowSymlink,
    )?;
    Ok(())
}

/// Copies extended attributes; those of overlayfs itself and of labels that the host gives anew are left out.
fn xattrs(from: &Path, to: &Path) -> io::Result<()> {
    let mut names = vec![0; XATTR_LIMIT];
    let length = match rustix::fs::llistxattr(from, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    let mut value = vec![0; XATTR_LIMIT];
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let ours = [&b"trusted.overlay."[..], b"user.overlay.", b"security.selinux"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if ours {
            continue;
        }
        let name = OsStr::from_bytes(name);
        let length = rustix::fs::lgetxattr(from, name, &mut value)?;
        match rustix::fs::lsetxattr(to, name, &value[..length], XattrFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_arrives_as_it_was_and_links_lead_nowhere_else() {
        let root = tempfile::tempdir().unwrap();
        let data = root.path().join("data");
        fs::create_dir_all(data.join("sub")).unwrap();
        fs::write(data.join("sub/file"), "text").unwrap();
        fs::hard_link(data.join("sub/file"), data.join("again")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", data.join("link")).unwrap();
        fs::set_permissions(data.join("sub"), fs::Permissions::from_mode(0o2750)).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(0o1777)).unwrap();
        mknod(&data.join("fifo"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o640), 0).unwrap();
        std::os::unix::fs::symlink("/../../data", root.path().join("alias")).unwrap();

        let target = tempfile::tempdir().unwrap();
        let (source, _held) = find_in(root.path(), "/alias").unwrap().unwrap();
        directory(&source, target.path()).unwrap();
        let at = |name: &str| target.path().join(name);
        assert_eq!(fs::read_to_string(at("sub/file")).unwrap(), "text");
        assert_eq!(at("again").metadata().unwrap().ino(), at("sub/file").metadata().unwrap().ino());
        assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("/etc/passwd"));
        assert!(at("fifo").metadata().unwrap().file_type().is_fifo());
        assert_eq!(at("sub").metadata().unwrap().mode() & 0o7777, 0o2750);
        assert_eq!(target.path().metadata().unwrap().mode() & 0o7777, 0o1777);
        let time = |path: &Path| path.metadata().unwrap().modified().unwrap();
        assert_eq!(time(&data.join("sub")), time(&at("sub")));
        assert!(find_in(root.path(), "/nothing/here").unwrap().is_none());
    }
}
