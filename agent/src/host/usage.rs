//! What a directory takes of its file system: for the rare moments in which the disk is full and somebody has to go.
//!
//! Links are not followed, other file systems (tmpfs, mounts) not entered, and at most [`MAX_ENTRIES`] looked at.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

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
    let Ok(root) = std::fs::symlink_metadata(path) else { return used };
    let mut directories = vec![path.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.dev() != root.dev() {
                continue;
            }
            used.inodes += 1;
            used.bytes = used.bytes.saturating_add(metadata.blocks().saturating_mul(BLOCK));
            if used.inodes >= most {
                return used;
            }
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    used
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
    }
}
