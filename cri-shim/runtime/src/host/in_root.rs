//! Paths inside a container's root: no symbolic link leads out of it. Runs in the child.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// Longest path, as the kernel's.
const LENGTH: usize = 4096;
/// Most links followed by hand, as the kernel's.
const LINKS: u32 = 40;

/// What to make where nothing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File,
}

/// Opens what is there (`O_PATH`).
pub(crate) fn open(root: BorrowedFd<'_>, path: &CStr, more: ResolveFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
    let path = if path.is_empty() { c"." } else { path };
    loop {
        match openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // A rename went on anywhere in the system.
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
}

/// Opens what is there, after making what is missing: directories on the way, and at the end what `kind` says. A link to
/// nothing is followed, and what it names is made inside the root.
pub(crate) fn make(root: BorrowedFd<'_>, path: &CStr, kind: Kind) -> Result<OwnedFd, Errno> {
    match open(root, path, ResolveFlags::empty()) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let mut walk = Path::new(path.to_bytes())?;
    for _ in 0..LINKS {
        match make_once(root, &walk, kind)? {
            Made::Done(file) => return Ok(file),
            Made::Link(next) => walk = next,
        }
    }
    Err(Errno::LOOP)
}

#[allow(clippy::large_enum_variant, reason = "a path lives on the stack: nothing is allocated after a fork")]
enum Made {
    Done(OwnedFd),
    /// The path with the link on it replaced by what it names.
    Link(Path),
}

fn make_once(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> Result<Made, Errno> {
    let mut parent: Option<OwnedFd> = None;
    let mut start = 0;
    while let Some((from, to)) = path.component(start) {
        let last = path.component(to).is_none();
        let prefix = path.prefix(to)?;
        let here = match open(root, prefix.as_c_str(), ResolveFlags::empty()) {
            Err(Errno::NOENT) => {
                let directory = parent.as_ref().map_or(root, AsFd::as_fd);
                let name = path.part(from, to)?;
                if let Err(errno) = make_one(directory, name.as_c_str(), last && kind == Kind::File) {
                    if errno != Errno::EXIST {
                        return Err(errno);
                    }
                    return path.follow(directory, from, to).map(Made::Link);
                }
                open(root, prefix.as_c_str(), ResolveFlags::empty())?
            }
            other => other?,
        };
        parent = Some(here);
        start = to;
    }
    parent.map(Made::Done).ok_or(Errno::INVAL)
}

fn make_one(directory: BorrowedFd<'_>, name: &CStr, file: bool) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(0o755);
    if file {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY;
        return rustix::fs::openat(directory, name, flags, mode).map(drop);
    }
    rustix::fs::mkdirat(directory, name, mode)
}

/// A path in memory of its own, on the stack.
pub(crate) struct Path {
    bytes: [u8; LENGTH],
    length: usize,
}

impl Path {
    fn new(bytes: &[u8]) -> Result<Self, Errno> {
        let mut path = Self { bytes: [0; LENGTH], length: 0 };
        path.push(bytes)?;
        Ok(path)
    }

    /// Adds bytes; one zero always stays behind them.
    fn push(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let end = self.length + bytes.len();
        if end >= LENGTH {
            return Err(Errno::NAMETOOLONG);
        }
        self.bytes.get_mut(self.length..end).ok_or(Errno::NAMETOOLONG)?.copy_from_slice(bytes);
        self.length = end;
        Ok(())
    }

    fn get(&self, from: usize, to: usize) -> &[u8] {
        self.bytes.get(from..to).unwrap_or_default()
    }

    /// Where the next component from `start` on begins and ends.
    fn component(&self, start: usize) -> Option<(usize, usize)> {
        let rest = self.get(start, self.length);
        let from = start + rest.iter().position(|byte| *byte != b'/')?;
        let length = self.get(from, self.length).iter().position(|byte| *byte == b'/');
        Some((from, length.map_or(self.length, |length| from + length)))
    }

    fn prefix(&self, to: usize) -> Result<Self, Errno> {
        Self::new(self.get(0, to))
    }

    fn part(&self, from: usize, to: usize) -> Result<Self, Errno> {
        Self::new(self.get(from, to))
    }

    fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or(c"")
    }

    /// This path with the link at `from..to`, which is in `directory`, replaced by its target.
    fn follow(&self, directory: BorrowedFd<'_>, from: usize, to: usize) -> Result<Self, Errno> {
        let name = self.part(from, to)?;
        let stat = rustix::fs::statat(directory, name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            return Err(Errno::EXIST);
        }
        let mut space = [std::mem::MaybeUninit::uninit(); LENGTH];
        let (target, _) = rustix::fs::readlinkat_raw(directory, name.as_c_str(), &mut space)?;
        let mut next = Self::new(if target.first() == Some(&b'/') { b"" } else { self.get(0, from) })?;
        next.push(target)?;
        next.push(self.get(to, self.length))?;
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn made(dir: &std::path::Path, path: &CStr, kind: Kind) -> Result<(), Errno> {
        let root = rustix::fs::open(dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        make(root.as_fd(), path, kind).map(drop)
    }

    #[test]
    fn what_is_missing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        made(dir.path(), c"a/b//c", Kind::Directory).unwrap();
        assert!(dir.path().join("a/b/c").is_dir());
        made(dir.path(), c"a/b/f", Kind::File).unwrap();
        assert!(dir.path().join("a/b/f").is_file());
        made(dir.path(), c"a/b/f", Kind::File).unwrap();
        assert_eq!(made(dir.path(), c"a/b/f/g", Kind::Directory), Err(Errno::NOTDIR));
    }

    #[test]
    fn links_stay_inside_even_those_to_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        symlink("/run/resolve/stub.conf", dir.path().join("etc/resolv.conf")).unwrap();
        made(dir.path(), c"etc/resolv.conf", Kind::File).unwrap();
        assert!(dir.path().join("run/resolve/stub.conf").is_file());
        symlink("../../../../up", dir.path().join("etc/up")).unwrap();
        made(dir.path(), c"etc/up/x", Kind::Directory).unwrap();
        assert!(dir.path().join("up/x").is_dir());
        symlink(outside.path(), dir.path().join("out")).unwrap();
        made(dir.path(), c"out/x", Kind::Directory).unwrap();
        assert!(!outside.path().join("x").exists());
        symlink("loop", dir.path().join("loop")).unwrap();
        assert_eq!(made(dir.path(), c"loop/x", Kind::Directory), Err(Errno::LOOP));
    }
}
