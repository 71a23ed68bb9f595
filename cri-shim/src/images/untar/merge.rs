//! Brings a layer that was unpacked apart to its place, between the layers below and those above.
//!
//! Layers are unpacked all at once, before the snapshots below them exist. Then each is moved, entry by entry of its top
//! directory, into the snapshot prepared on top of its parent; directories that the layer only implies take owner, mode,
//! times and attributes from the layers below, as overlayfs would have copied them up.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use rustix::fs::{
    AtFlags, CWD, Timespec, Timestamps, XattrFlags, lgetxattr, llistxattr, lsetxattr, utimensat,
};
use rustix::io::Errno;

use super::Applied;
use super::root::Root;

/// Most bytes of one attribute and of the list of them; the kernel's own limit.
const MAX_ATTRIBUTE: usize = 64 * 1024;

/// Where a snapshot's own files go, and what is below, uppermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The directory to fill.
    pub upper: PathBuf,
    /// Directories of the layers below.
    pub lower: Vec<PathBuf>,
}

impl Target {
    /// Reads a prepared snapshot's mounts; `None` when it is none that can be filled without mounting it.
    pub fn of(mounts: &[Mount]) -> Option<Self> {
        let [mount] = mounts else { return None };
        let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
        match mount.r#type.as_str() {
            "bind" => Some(Self { upper: mount.source.clone().into(), lower: Vec::new() }),
            // With this option overlayfs wants other marks.
            "overlay" if !mount.options.iter().any(|option| option == "userxattr") => Some(Self {
                upper: option("upperdir=")?.into(),
                lower: option("lowerdir=")?.split(':').map(PathBuf::from).collect(),
            }),
            _ => None,
        }
    }
}

/// Moves everything from `staged` to `target`, which is empty.
pub fn merge(staged: &Path, applied: &Applied, target: &Target) -> io::Result<()> {
    for entry in fs::read_dir(staged)? {
        let name = entry?.file_name();
        fs::rename(staged.join(&name), target.upper.join(&name))?;
    }
    if applied.opaque_root {
        lsetxattr(&target.upper, "trusted.overlay.opaque", b"y", XattrFlags::empty())?;
    }
    complete(applied, target)
}

/// Gives implied directories the looks that they have below.
pub fn complete(applied: &Applied, target: &Target) -> io::Result<()> {
    // Children first: each change of a child leaves its parent's times alone, but not the other way round.
    for path in applied.implicit.iter().rev() {
        let directory = target.upper.join(path);
        if !directory.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            continue;
        }
        for lower in &target.lower {
            let below = Root::open(lower)?.resolve(path)?;
            match lower.join(below).symlink_metadata() {
                Ok(found) if found.is_dir() => {
                    let below = lower.join(Root::open(lower)?.resolve(path)?);
                    copy_looks(&below, &found, &directory)?;
                    break;
                }
                // It was something else, which the directory replaces.
                Ok(_) => break,
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn copy_looks(from: &Path, found: &fs::Metadata, to: &Path) -> io::Result<()> {
    std::os::unix::fs::lchown(to, Some(found.uid()), Some(found.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(found.mode() & 0o7777))?;
    copy_attributes(from, to)?;
    let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps {
        last_access: time(found.atime(), found.atime_nsec()),
        last_modification: time(found.mtime(), found.mtime_nsec()),
    };
    Ok(utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn copy_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let mut names = vec![0_u8; MAX_ATTRIBUTE];
    let length = match llistxattr(from, &mut names[..]) {
        Err(Errno::NOTSUP) => return Ok(()),
        other => other?,
    };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        // What overlayfs has put there is about the other layer.
        if name.starts_with(b"trusted.") {
            continue;
        }
        let name = OsStr::from_bytes(name);
        let mut value = vec![0_u8; MAX_ATTRIBUTE];
        let length = lgetxattr(from, name, &mut value[..])?;
        match lsetxattr(to, name, &value[..length], XattrFlags::CREATE) {
            Ok(()) | Err(Errno::NOTSUP | Errno::NODATA | Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_tell_where_to_write() {
        let mount = |kind: &str, source: &str, options: &[&str]| Mount {
            r#type: kind.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Mount::default()
        };
        let first = Target::of(&[mount("bind", "/s/1/fs", &["rw", "rbind"])]).expect("usable");
        assert_eq!(first, Target { upper: "/s/1/fs".into(), lower: Vec::new() });
        let options = ["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"];
        let third = Target::of(&[mount("overlay", "overlay", &options)]).expect("usable");
        assert_eq!((third.upper.as_path(), third.lower.len()), (Path::new("/s/3/fs"), 2));
        assert_eq!(
            Target::of(&[mount("overlay", "overlay", &["userxattr", "upperdir=/a", "lowerdir=/b"])]),
            None
        );
        assert_eq!(Target::of(&[mount("btrfs", "/dev/x", &[])]), None);
        assert_eq!(Target::of(&[]), None);
    }

    #[test]
    fn a_staged_tree_takes_its_looks_from_below() {
        let dir = tempfile::tempdir().expect("temp dir");
        let make = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(&path).expect("made");
            path
        };
        let (staged, upper, lower) = (make("staged"), make("upper"), make("lower"));
        fs::create_dir_all(lower.join("var/spool")).expect("made");
        fs::set_permissions(lower.join("var/spool"), fs::Permissions::from_mode(0o1777)).expect("set");
        fs::create_dir_all(staged.join("var/spool")).expect("made");
        fs::write(staged.join("var/spool/x"), "x").expect("written");
        let applied = Applied {
            diff_id: String::new(),
            implicit: vec!["var".into(), "var/spool".into()],
            opaque_root: false,
        };
        merge(&staged, &applied, &Target { upper: upper.clone(), lower: vec![lower] }).expect("merged");
        let mode = upper.join("var/spool").metadata().expect("there").mode();
        assert_eq!(mode & 0o7777, 0o1777);
        assert_eq!(fs::read(upper.join("var/spool/x")).expect("read"), b"x");
        assert_eq!(fs::read_dir(&staged).expect("read").count(), 0);
    }
}
