//! Network namespaces as files: make, enter, recognise, remove.
//!
//! Input: directories and paths. Output: bind mounts of `nsfs` files that keep a namespace alive
//! without a process. All functions block shortly; asynchronous callers use `spawn_blocking`.
//! No function leaves the calling thread in another namespace: the work runs on a thread of its own,
//! which ends with it, or ([`visit`], for processes of one thread) the thread comes back.

#![allow(unsafe_code, reason = "ioctls that no safe wrapper offers: interface flags and namespace type")]

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        socket::{AddressFamily, SockFlag, SockType, socket},
        statfs::{FsType, statfs},
    },
};

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);
/// `NS_GET_NSTYPE` of linux/nsfs.h: `_IO(0xb7, 0x3)`.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
/// `SIOCSIFFLAGS` of linux/sockios.h: the libc crate has it in another type than `ioctl` takes, with musl.
const SIOCSIFFLAGS: libc::Ioctl = 0x8914;
/// How often a stacked mount is taken off one path; more means somebody mounts in a loop.
const MAX_STACKED_MOUNTS: usize = 64;

/// A failed step on a network namespace.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} network namespace {}", path.display())]
pub struct NetnsError {
    /// What was tried.
    pub step: &'static str,
    /// The namespace file or directory.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl NetnsError {
    fn new(step: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self { step, path: path.to_owned(), source: source.into() }
    }
}

/// Makes a namespace with a random name, `cni-<32 hex digits>`, below `dir`.
///
/// Callers that must find it again after a crash choose the name first and use [`create_named`].
pub fn create(dir: &Path) -> Result<PathBuf, NetnsError> {
    let mut random = [0_u8; 16];
    File::open("/dev/urandom")
        .and_then(|mut file| io::Read::read_exact(&mut file, &mut random))
        .map_err(|error| NetnsError::new("name a", dir, error))?;
    create_named(dir, &format!("cni-{:032x}", u128::from_be_bytes(random)))
}

/// Makes a namespace whose file is `dir/name`: a new file (it must not exist), a thread that unshares
/// its network, and a bind mount of that over the file. The loopback device is brought up.
///
/// `dir` is made with mode 0700 when missing. After an error nothing is left.
pub fn create_named(dir: &Path, name: &str) -> Result<PathBuf, NetnsError> {
    named(dir, name, |path| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| NetnsError::new("unshare", path, error))?;
        loopback_up().map_err(|error| NetnsError::new("bring up the loopback device of", path, error))?;
        bind(Path::new("/proc/thread-self/ns/net"), path)
    })
}

/// Keeps the namespace at `existing` (a process's, below `/proc`) alive as the new file `dir/name`, as
/// [`create_named`] does with one of its own. The loopback device is brought up.
pub fn pin(existing: &Path, dir: &Path, name: &str) -> Result<PathBuf, NetnsError> {
    named(dir, name, |path| {
        let file = File::open(existing).map_err(|error| NetnsError::new("open", existing, error))?;
        // Mounted from here: the mount table is this thread's, whatever its network.
        bind(existing, path)?;
        setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| NetnsError::new("enter", existing, error))?;
        loopback_up().map_err(|error| NetnsError::new("bring up the loopback device of", path, error))
    })
}

/// Makes the file `dir/name` and has `work` mount a namespace on it, on a thread of its own.
fn named(
    dir: &Path,
    name: &str,
    work: impl FnOnce(&Path) -> Result<(), NetnsError> + Send,
) -> Result<PathBuf, NetnsError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| NetnsError::new("create the directory of", dir, error))?;
    let path = dir.join(name);
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| NetnsError::new("create the file of", &path, error))?;
    if let Err(error) = on_own_thread(&path, || work(&path)) {
        // The first error is the one to tell; a file that stays is found by its name at recovery.
        return match remove(&path) {
            Ok(()) | Err(_) => Err(error),
        };
    }
    Ok(path)
}

fn bind(source: &Path, path: &Path) -> Result<(), NetnsError> {
    mount(Some(source), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|error| NetnsError::new("bind mount", path, error))
}

/// Takes the namespace at `path` away: detaches the mount, removes the file. Absence of either is
/// success, so it may be repeated. The kernel frees the namespace once nothing else uses it.
pub fn remove(path: &Path) -> Result<(), NetnsError> {
    for _ in 0..MAX_STACKED_MOUNTS {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more), or no such file.
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(error) => return Err(NetnsError::new("unmount", path, error)),
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NetnsError::new("remove the file of", path, error))
        }
        _ => Ok(()),
    }
}

/// Whether `path` is a live network namespace; `false` when it is absent, a plain file (a create that
/// was killed, or a reboot) or a namespace of another kind.
pub fn is_netns(path: &Path) -> bool {
    probe(path).unwrap_or(false)
}

/// As [`is_netns`], but what cannot be told (no permission, no descriptor left) is an error.
pub fn probe(path: &Path) -> Result<bool, NetnsError> {
    let failed = |step, error: io::Error| match error.raw_os_error().map(Errno::from_raw) {
        // The last is of a process that has ended, below `/proc`.
        Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ESRCH) => Ok(false),
        _ => Err(NetnsError::new(step, path, error)),
    };
    match statfs(path) {
        Ok(stat) if stat.filesystem_type() == NSFS_MAGIC => {}
        Ok(_) => return Ok(false),
        Err(error) => return failed("inspect", error.into()),
    }
    match File::open(path) {
        Ok(file) => Ok(namespace_type(&file) == libc::CLONE_NEWNET),
        Err(error) => failed("open", error),
    }
}

/// Runs `work` on a thread inside the namespace at `path` and returns what it returns.
///
/// Sockets made there stay in that namespace wherever they are used later.
pub fn run_in<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    let file = File::open(path).map_err(|error| NetnsError::new("open", path, error))?;
    on_own_thread(path, || {
        setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| NetnsError::new("enter", path, error))?;
        Ok(work())
    })
}

/// As [`run_in`] on the calling thread itself, which spares a short-lived process a thread.
///
/// `work` must not panic and must not wait for other tasks of this thread. When the way back fails the
/// process aborts: going on in the wrong namespace would change a pod's network for the host's.
pub fn visit<T>(path: &Path, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
    let home = Path::new("/proc/thread-self/ns/net");
    let back = File::open(home).map_err(|error| NetnsError::new("open", home, error))?;
    let there = File::open(path).map_err(|error| NetnsError::new("open", path, error))?;
    setns(&there, CloneFlags::CLONE_NEWNET).map_err(|error| NetnsError::new("enter", path, error))?;
    let done = work();
    if setns(&back, CloneFlags::CLONE_NEWNET).is_err() {
        std::process::abort();
    }
    Ok(done)
}

/// Inode of the calling thread's namespace.
pub fn own_identity() -> Result<u64, NetnsError> {
    identity(Path::new("/proc/thread-self/ns/net"))
}

/// Inode of the namespace at `path`, its identity while it lives.
pub fn identity(path: &Path) -> Result<u64, NetnsError> {
    std::fs::metadata(path)
        .map(|metadata| std::os::unix::fs::MetadataExt::ino(&metadata))
        .map_err(|error| NetnsError::new("inspect", path, error))
}

/// The calling thread's namespace by a number that no other gets before the next boot, which an inode is not; `None` on
/// kernels before 5.14.
pub fn own_cookie() -> Option<u64> {
    let any = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).ok()?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).ok()?;
    // SAFETY: the descriptor is an open socket; the kernel writes at most `length` bytes to `cookie`, which has as many,
    // and the length to `length`. Both outlive the call.
    let done = unsafe {
        libc::getsockopt(
            any.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    (done == 0 && cookie != 0).then_some(cookie)
}

fn on_own_thread<T: Send>(
    path: &Path,
    work: impl FnOnce() -> Result<T, NetnsError> + Send,
) -> Result<T, NetnsError> {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, work)
            .map_err(|error| NetnsError::new("start a thread for", path, error))?;
        handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn loopback_up() -> io::Result<()> {
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: `ifreq` is plain old data for which all zero bytes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(*b"lo") {
        *slot = libc::c_char::from_ne_bytes([byte]);
    }
    // IFF_UP and IFF_RUNNING are 0x1 and 0x40, inside `c_short`.
    request.ifr_ifru.ifru_flags = 0x41;
    // SAFETY: the descriptor is an open socket and `request` lives through the call; SIOCSIFFLAGS reads
    // name and flags only. A netlink request would need a runtime on this short-lived thread.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn namespace_type(file: &File) -> libc::c_int {
    // SAFETY: NS_GET_NSTYPE takes no argument and touches no memory; on a descriptor that is not a
    // namespace it fails with ENOTTY. nix has no wrapper for it.
    unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_is_told_from_what_cannot_be_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        for not in [file.as_path(), dir.path(), &file.join("below"), &dir.path().join("absent")] {
            assert!(!probe(not).unwrap(), "{}", not.display());
        }
        assert!(!probe(Path::new("/proc/self/ns/uts")).unwrap());
        assert!(probe(Path::new("/proc/self/ns/net")).unwrap());
        // As root everything may be looked at; a name that is too long is refused to everybody.
        let refused = probe(&dir.path().join("x".repeat(300))).unwrap_err();
        assert_eq!(refused.source.raw_os_error(), Some(Errno::ENAMETOOLONG as i32));
        assert!(!is_netns(&refused.path));
    }
}
