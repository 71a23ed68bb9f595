//! What a directory takes of its file system: for the rare moments in which the disk is full and somebody has to go.
//!
//! Links are not followed, other file systems (tmpfs, mounts) not entered, and at most [`MAX_ENTRIES`] looked at. What serves
//! another file system is not even asked: it may hang, and what a container mounts in a volume is seen by the node.

use std::path::Path;

use rustix::fs::{AtFlags, FileType, Statx};

use super::asked::known;

/// A larger directory counts as it was seen so far.
const MAX_ENTRIES: u64 = 200_000;
/// Unit of `st_blocks`.
const BLOCK: u64 = 512;

/// Bytes and inodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TreeUse {
    /// Bytes on the disk.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// Adds up what is below `path`, at most [`MAX_ENTRIES`]; what cannot be read counts as nothing.
pub fn tree(path: &Path) -> TreeUse {
    tree_up_to(path, MAX_ENTRIES)
}

/// Adds up what is below `path`, for whoever has the time: at most `most` files and directories.
pub fn tree_up_to(path: &Path, most: u64) -> TreeUse {
    let mut used = TreeUse::default();
    let Ok(root) = known(path, AtFlags::SYMLINK_NOFOLLOW) else { return used };
    let mut directories = vec![path.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(found) = known(&path, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            if device(&found) != device(&root) {
                continue;
            }
            used.inodes += 1;
            used.bytes = used.bytes.saturating_add(found.stx_blocks.saturating_mul(BLOCK));
            if used.inodes >= most {
                return used;
            }
            if FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory {
                directories.push(path);
            }
        }
    }
    used
}

/// Whether both are on one file system; what cannot be looked at is on another. Nothing is asked of who serves it.
pub fn share_file_system(one: &Path, other: &Path) -> bool {
    let found = |path| known(path, AtFlags::empty());
    matches!((found(one), found(other)), (Ok(one), Ok(other)) if device(&one) == device(&other))
}

fn device(found: &Statx) -> (u32, u32) {
    (found.stx_dev_major, found.stx_dev_minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_added_up_and_links_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(tree(&dir.path().join("missing")), TreeUse::default());
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/file"), vec![1; 100_000]).unwrap();
        std::os::unix::fs::symlink("/usr", dir.path().join("link")).unwrap();
        let used = tree(dir.path());
        assert_eq!(used.inodes, 3);
        assert_eq!(tree_up_to(dir.path(), 2).inodes, 2);
        assert!(used.bytes >= 100_000 && used.bytes < 10_000_000, "{used:?}");
        assert!(share_file_system(dir.path(), &dir.path().join("sub")));
        assert!(!share_file_system(dir.path(), Path::new("/proc")));
        assert!(!share_file_system(dir.path(), &dir.path().join("missing")));
    }
}
