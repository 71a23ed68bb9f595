//! `fsGroup`: who owns a volume's files.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown};
use std::path::Path;

use k8s_openapi::api::core::v1::PodSpec;

/// Setgid, so that new files get the group too.
const SETGID: u32 = 0o2000;
const GROUP_EXEC: u32 = 0o110;
/// Added to every mode: for volumes that pods write, and for those that they only read.
const READ_WRITE: u32 = 0o660;
const READ_ONLY: u32 = 0o440;

/// The part of a pod's security context that volumes follow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ownership {
    /// `securityContext.fsGroup`.
    pub(crate) group: Option<u32>,
}

impl Ownership {
    /// What `spec` asks for.
    pub(super) fn of(spec: &PodSpec) -> Self {
        let group = spec.security_context.as_ref().and_then(|context| context.fs_group);
        Self { group: group.and_then(|group| u32::try_from(group).ok()) }
    }

    /// The mode of a projected file.
    pub(super) fn file_mode(self, mode: u32) -> u32 {
        if self.group.is_some() { mode | READ_ONLY } else { mode }
    }

    /// The mode of a directory of projected files.
    pub(super) fn dir_mode(self, mode: u32) -> u32 {
        if self.group.is_some() { mode | READ_ONLY | GROUP_EXEC | SETGID } else { mode }
    }

    /// Gives a directory tree that pods write to the group, as `fsGroupChangePolicy: OnRootMismatch` does: a tree
    /// whose root is right already is not walked again.
    pub(crate) fn claim(self, root: &Path) -> io::Result<()> {
        let Some(group) = self.group else { return Ok(()) };
        let metadata = std::fs::metadata(root)?;
        let wanted = READ_WRITE | GROUP_EXEC | SETGID;
        if metadata.gid() == group && metadata.mode() & wanted == wanted {
            return Ok(());
        }
        self.claim_all(root)
    }

    /// The same, whatever the root looks like: `fsGroupChangePolicy: Always`.
    pub(crate) fn claim_all(self, root: &Path) -> io::Result<()> {
        let Some(group) = self.group else { return Ok(()) };
        let metadata = std::fs::metadata(root)?;
        let wanted = READ_WRITE | GROUP_EXEC | SETGID;
        claim_below(root, group)?;
        // Last, so that a walk that was cut short is repeated.
        chown(root, None, Some(group))?;
        std::fs::set_permissions(root, PermissionsExt::from_mode(metadata.mode() & 0o7777 | wanted))
    }
}

fn claim_below(dir: &Path, group: u32) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let (path, metadata) = (entry.path(), entry.metadata()?);
        lchown(&path, None, Some(group))?;
        if metadata.is_dir() {
            let mode = metadata.mode() & 0o7777 | READ_WRITE | GROUP_EXEC | SETGID;
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode))?;
            claim_below(&path, group)?;
        } else if metadata.is_file() {
            let mode = metadata.mode() & 0o7777 | READ_WRITE;
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode))?;
        }
    }
    Ok(())
}
