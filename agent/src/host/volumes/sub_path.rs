//! `subPath`: a file or directory inside a volume, without following links out of it.
//!
//! The kernel resolves each step below the volume's directory (`RESOLVE_BENEATH`), so a link that a container planted
//! cannot lead outside. The result is a path; between here and the runtime's mount a container that shares the volume
//! could still swap a directory, which only bind mounting the descriptor would prevent.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

use crate::contracts::HostPath;

/// The absolute path of `sub_path` in `volume`; missing directories are made with the volume's mode unless it is
/// read-only.
pub(super) fn resolve(volume: &HostPath, sub_path: &str) -> Result<PathBuf, String> {
    let relative = Path::new(sub_path);
    if relative.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(format!("subPath {sub_path:?} must be relative and must not contain '..'"));
    }
    let failed = |cause: String| format!("failed to prepare subPath {sub_path:?}: {cause}");
    let root = File::open(&volume.path).map_err(|error| failed(error.to_string()))?;
    let metadata = root.metadata().map_err(|error| failed(error.to_string()))?;
    let mode = Mode::from_bits_truncate(metadata.mode() & 0o777);
    let mut last: Option<OwnedFd> = None;
    let mut walked = PathBuf::new();
    for part in relative.components() {
        walked.push(part);
        let found = match open_beneath(&root, &walked) {
            Err(Errno::ENOENT) if !volume.read_only => {
                let parent = last.as_ref().map_or(root.as_fd(), AsFd::as_fd);
                match mkdirat(parent, part.as_os_str(), mode) {
                    Ok(()) | Err(Errno::EEXIST) => open_beneath(&root, &walked),
                    Err(error) => Err(error),
                }
            }
            found => found,
        };
        last = Some(found.map_err(|error| match error {
            Errno::EXDEV => failed(format!("{} leads out of the volume", walked.display())),
            other => failed(other.desc().to_owned()),
        })?);
    }
    let Some(last) = last else { return Ok(volume.path.clone()) };
    std::fs::read_link(format!("/proc/self/fd/{}", last.as_raw_fd()))
        .map_err(|error| failed(error.to_string()))
}

fn open_beneath(root: &File, path: &Path) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn volume(dir: &Path, read_only: bool) -> HostPath {
        HostPath { path: dir.to_owned(), read_only }
    }

    #[test]
    fn finds_makes_and_follows_inside() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        assert_eq!(resolve(&volume(&dir, false), "a/b").unwrap(), dir.join("a/b"));
        assert!(dir.join("a/b").is_dir());
        std::fs::create_dir(dir.join("..2026")).unwrap();
        std::fs::write(dir.join("..2026/key"), "x").unwrap();
        symlink("..2026", dir.join("..data")).unwrap();
        symlink("..data/key", dir.join("key")).unwrap();
        assert_eq!(resolve(&volume(&dir, true), "key").unwrap(), dir.join("..2026/key"));
        assert_eq!(resolve(&volume(&dir, true), ".").unwrap(), dir);
    }

    #[test]
    fn nothing_leads_out() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/etc", dir.path().join("absolute")).unwrap();
        symlink("../..", dir.path().join("up")).unwrap();
        for path in ["absolute/passwd", "up/etc", "../x", "/etc", "a/../b"] {
            let error = resolve(&volume(dir.path(), false), path).unwrap_err();
            assert!(
                error.contains("leads out of the volume") || error.contains("must be relative"),
                "{error}"
            );
        }
        assert!(resolve(&volume(dir.path(), true), "missing").is_err());
    }
}
