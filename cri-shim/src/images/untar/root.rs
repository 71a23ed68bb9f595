//! File operations confined to a directory: no path of an archive, whatever links it goes through, leads out of it.
//!
//! Input: paths as an archive has them, in normal form. Parents are opened with `RESOLVE_IN_ROOT`, everything else is done
//! relative to the parent without following links. The directory has one writer, which is us.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, linkat, lsetxattr, mkdirat, mknodat, openat, openat2, readlinkat, statat, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::Errno;

use super::stream::Header;

/// Links followed on one path.
const MAX_LINKS: usize = 255;

/// Mode of a directory that only its children imply.
const IMPLICIT: u32 = 0o755;

/// A directory that is being filled.
pub struct Root {
    fd: OwnedFd,
    /// The parent used last: most entries are in the same directory as the one before.
    last: Option<(PathBuf, std::rc::Rc<OwnedFd>)>,
    implicit: Vec<PathBuf>,
}

/// An entry's directory and name.
#[derive(Clone)]
pub struct Place {
    parent: std::rc::Rc<OwnedFd>,
    name: Vec<u8>,
}

impl Place {
    fn name(&self) -> &OsStr {
        OsStr::from_bytes(&self.name)
    }

    /// A path for calls that take no directory descriptor.
    fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.parent.as_raw_fd().to_string()).join(self.name())
    }

    /// Another name in the same directory.
    pub fn beside(&self, name: &[u8]) -> Self {
        Self { parent: std::rc::Rc::clone(&self.parent), name: name.to_vec() }
    }
}

impl Root {
    /// Opens the directory to fill.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(rustix::fs::CWD, path, flags, Mode::empty())?;
        Ok(Self { fd, last: None, implicit: Vec::new() })
    }

    /// Directories that were made for their children's sake only and never got an entry.
    pub fn into_implicit(self) -> Vec<PathBuf> {
        self.implicit
    }

    /// The place of a path that [`clean`] gave, with its parents made where they are missing.
    pub fn place(&mut self, path: &Path) -> io::Result<Place> {
        let name = path.file_name().ok_or(Errno::INVAL)?.as_bytes().to_vec();
        let parent = path.parent().unwrap_or(Path::new(""));
        if let Some((known, fd)) = &self.last
            && known == parent
        {
            return Ok(Place { parent: std::rc::Rc::clone(fd), name });
        }
        let fd = std::rc::Rc::new(self.directory(parent)?);
        self.last = Some((parent.to_owned(), std::rc::Rc::clone(&fd)));
        Ok(Place { parent: fd, name })
    }

    /// The place that a hard link leads to; nothing is made.
    pub fn target(&self, path: &Path) -> io::Result<Place> {
        let name = path.file_name().ok_or(Errno::INVAL)?.as_bytes().to_vec();
        let parent = path.parent().unwrap_or(Path::new(""));
        Ok(Place { parent: std::rc::Rc::new(self.existing(parent)?), name })
    }

    /// Makes a directory, or keeps the one that is there.
    pub fn make_directory(&mut self, place: &Place) -> io::Result<()> {
        match mkdirat(&place.parent, place.name(), Mode::from_raw_mode(IMPLICIT)) {
            Err(Errno::EXIST) => {
                if is_directory(&place.parent, place.name())? {
                    return Ok(());
                }
                self.remove(place)?;
                Ok(mkdirat(&place.parent, place.name(), Mode::from_raw_mode(IMPLICIT))?)
            }
            other => Ok(other?),
        }
    }

    /// Tells that a directory has an entry of its own.
    pub fn is_explicit(&mut self, path: &Path) {
        if !self.implicit.is_empty() {
            // The same directory may be known by another name, through a link.
            let resolved = self.resolve(path).unwrap_or_default();
            self.implicit.retain(|one| *one != resolved);
        }
    }

    /// Makes an empty file in place of whatever is there.
    pub fn create_file(&mut self, place: &Place) -> io::Result<std::fs::File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let create = |_: &mut Self| openat(&place.parent, place.name(), flags, Mode::from_raw_mode(0o600));
        Ok(self.replacing(place, create)?.into())
    }

    /// Makes a symbolic link in place of whatever is there.
    pub fn create_symlink(&mut self, place: &Place, target: &[u8]) -> io::Result<()> {
        self.replacing(place, |_| symlinkat(OsStr::from_bytes(target), &place.parent, place.name()))
    }

    /// Makes a hard link in place of whatever is there.
    pub fn create_hardlink(&mut self, place: &Place, target: &Place) -> io::Result<()> {
        let link = |_: &mut Self| {
            linkat(&target.parent, target.name(), &place.parent, place.name(), AtFlags::empty())
        };
        self.replacing(place, link)
    }

    /// Makes a device or pipe in place of whatever is there.
    pub fn create_node(&mut self, place: &Place, kind: FileType, numbers: (u32, u32)) -> io::Result<()> {
        let device = rustix::fs::makedev(numbers.0, numbers.1);
        let make =
            |_: &mut Self| mknodat(&place.parent, place.name(), kind, Mode::from_raw_mode(0o600), device);
        self.replacing(place, make)
    }

    /// Makes overlayfs' mark of a removed file, where nothing is.
    pub fn create_whiteout(&self, place: &Place, uid: u32, gid: u32) -> io::Result<()> {
        let device = rustix::fs::makedev(0, 0);
        mknodat(&place.parent, place.name(), FileType::CharacterDevice, Mode::empty(), device)?;
        owner(place, uid, gid)
    }

    /// Marks the directory of `place` as hiding all that is below it.
    pub fn mark_opaque(&self, place: &Place) -> io::Result<()> {
        let path = Path::new("/proc/self/fd").join(place.parent.as_raw_fd().to_string()).join(".");
        Ok(lsetxattr(&path, "trusted.overlay.opaque", b"y", XattrFlags::empty())?)
    }

    /// Removes whatever is there, with everything below; nothing is fine.
    pub fn remove(&mut self, place: &Place) -> io::Result<()> {
        // It may have been an ancestor of the parent remembered.
        self.last = None;
        match unlinkat(&place.parent, place.name(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => std::fs::remove_dir_all(place.path()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn replacing<T>(
        &mut self,
        place: &Place,
        mut make: impl FnMut(&mut Self) -> Result<T, Errno>,
    ) -> io::Result<T> {
        match make(self) {
            Err(Errno::EXIST) => {
                self.remove(place)?;
                Ok(make(self)?)
            }
            other => Ok(other?),
        }
    }

    /// Opens the directory at `path`, links resolved inside the root; missing ones are made.
    fn directory(&mut self, path: &Path) -> io::Result<OwnedFd> {
        match self.existing(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let resolved = self.resolve(path)?;
                self.make_parents(&resolved)?;
                self.existing(&resolved)
            }
            other => other,
        }
    }

    fn existing(&self, path: &Path) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        Ok(openat2(&self.fd, path, flags, Mode::empty(), resolve)?)
    }

    fn make_parents(&mut self, resolved: &Path) -> io::Result<()> {
        let mut path = PathBuf::new();
        for component in resolved.components() {
            path.push(component);
            match mkdirat(&self.fd, &path, Mode::from_raw_mode(IMPLICIT)) {
                Ok(()) => {
                    chmodat(&self.fd, &path, Mode::from_raw_mode(IMPLICIT), AtFlags::empty())?;
                    self.implicit.push(path.clone());
                }
                Err(Errno::EXIST) if is_directory(&self.fd, path.as_os_str())? => {}
                Err(Errno::EXIST) => return Err(Errno::NOTDIR.into()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The path without links, as far as it exists; what is missing is taken as it is written.
    pub fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        let mut todo: Vec<Vec<u8>> = parts(path).rev().collect();
        let (mut resolved, mut links) = (PathBuf::new(), 0);
        while let Some(part) = todo.pop() {
            if part == b".." {
                resolved.pop();
                continue;
            }
            let next = resolved.join(OsStr::from_bytes(&part));
            match readlinkat(&self.fd, &next, Vec::new()) {
                Ok(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = Path::new(OsStr::from_bytes(target.as_bytes())).to_owned();
                    if target.is_absolute() {
                        resolved = PathBuf::new();
                    }
                    todo.extend(parts(&target).rev());
                }
                Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => resolved = next,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(resolved)
    }

    /// Sets the times of a directory, however it is reached.
    pub fn set_directory_time(&self, path: &Path, modified: (i64, u32)) -> io::Result<()> {
        let resolved = self.resolve(path)?;
        match utimensat(&self.fd, &resolved, &times(modified), AtFlags::SYMLINK_NOFOLLOW) {
            // A later entry took it away again.
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            other => Ok(other?),
        }
    }
}

/// Sets owner, attributes, mode and times, in the order in which none undoes another.
pub fn dress(place: &Place, header: &Header, is_link: bool) -> io::Result<()> {
    owner(place, header.uid, header.gid)?;
    for (name, value) in &header.xattrs {
        // An archive must not speak to overlayfs, nor to anything else that trusts the administrator.
        if name.starts_with(b"trusted.") {
            continue;
        }
        match lsetxattr(place.path(), OsStr::from_bytes(name), value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    if !is_link {
        chmodat(&place.parent, place.name(), Mode::from_raw_mode(header.mode), AtFlags::empty())?;
    }
    Ok(utimensat(&place.parent, place.name(), &times(header.modified), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Tells whether a hard link leads to a symbolic link, whose mode cannot be set.
pub fn is_symlink(place: &Place) -> io::Result<bool> {
    let found = statat(&place.parent, place.name(), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(found.st_mode) == FileType::Symlink)
}

/// The path of an entry inside the root, `None` for the root itself: `.` and `..` undone as text, never above the root.
pub fn clean(path: &[u8]) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(path)).components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::ParentDir => drop(clean.pop()),
            _ => {}
        }
    }
    (!clean.as_os_str().is_empty()).then_some(clean)
}

fn owner(place: &Place, uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(chownat(&place.parent, place.name(), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

fn is_directory(parent: impl AsFd, name: &OsStr) -> io::Result<bool> {
    let found = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(found.st_mode) == FileType::Directory)
}

fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn parts(path: &Path) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    path.components().filter_map(|component| match component {
        Component::Normal(part) => Some(part.as_bytes().to_vec()),
        Component::ParentDir => Some(b"..".to_vec()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_end_inside() {
        for (path, inside) in [
            ("a/b", Some("a/b")),
            ("./a/./b/", Some("a/b")),
            ("../../etc/passwd", Some("etc/passwd")),
            ("/etc/passwd", Some("etc/passwd")),
            ("a/../../b", Some("b")),
            ("a/..", None),
            (".", None),
            ("", None),
        ] {
            assert_eq!(clean(path.as_bytes()), inside.map(PathBuf::from), "{path:?}");
        }
    }

    #[test]
    fn links_are_followed_inside_the_root_only() {
        let dir = tempfile::tempdir().expect("temp dir");
        let outside = tempfile::tempdir().expect("temp dir");
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).expect("made");
        for (name, target) in [
            ("absolute", outside.path().to_owned()),
            ("above", "../../../../tmp".into()),
            ("dangling", "inner/new/deep".into()),
            ("loop", "loop".into()),
        ] {
            std::os::unix::fs::symlink(target, dir.path().join(name)).expect("linked");
        }
        let mut root = Root::open(dir.path()).expect("opened");
        for path in ["absolute/f", "above/f", "dangling/f"] {
            let place = root.place(Path::new(path)).expect("a place");
            root.create_file(&place).expect("created");
        }
        assert_eq!(std::fs::read_dir(outside.path()).expect("read").count(), 0);
        assert!(dir.path().join("inner/new/deep/f").exists() && dir.path().join("tmp/f").exists());
        assert!(root.place(Path::new("loop/f")).is_err());
        assert!(root.into_implicit().contains(&PathBuf::from("inner/new")));
    }

    #[test]
    fn what_is_there_is_replaced() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::create_dir_all(dir.path().join("x/y/z")).expect("made");
        let mut root = Root::open(dir.path()).expect("opened");
        let place = root.place(Path::new("x")).expect("a place");
        root.create_symlink(&place, b"/etc").expect("a link instead of a tree");
        assert_eq!(std::fs::read_link(dir.path().join("x")).expect("a link"), Path::new("/etc"));
        root.make_directory(&place).expect("a directory instead of a link");
        assert!(dir.path().join("x").symlink_metadata().expect("there").is_dir());
    }
}
