//! System calls that `rustix` does not offer, as plain functions. None allocates; all are safe to use after a fork.
#![allow(
    unsafe_code,
    reason = "clone3, mount_setattr, seccomp, keyctl, execve and the like have no safe wrapper"
)]

use std::convert::Infallible;
use std::ffi::{CStr, c_char, c_int, c_long};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

/// What `mount_setattr` changes; laid out as the kernel's `struct mount_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MountAttr {
    /// Attributes to set (`MOUNT_ATTR_*`).
    pub(crate) set: u64,
    /// Attributes to clear.
    pub(crate) clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0 for no change.
    pub(crate) propagation: u64,
    /// The user namespace of `MOUNT_ATTR_IDMAP`.
    pub(crate) userns_fd: u64,
}

/// Laid out as the kernel's `struct clone_args`.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_PIDFD: u64 = 0x1000;
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of a [`clone3`] this is.
pub(crate) enum Side {
    /// The new process.
    Child,
    /// The old one, with the new one's id and descriptor.
    Parent(i32, OwnedFd),
}

fn checked(result: c_long) -> Result<c_long, Errno> {
    if result == -1 {
        // SAFETY: errno of this thread; reading it has no conditions.
        return Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }));
    }
    Ok(result)
}

/// Makes a process that goes on from here with a copy of this memory. In a process with threads the child may only
/// make system calls until it executes a program.
///
/// # Safety
/// The child side must not return to code that allocates, locks or relies on other threads, and must end in
/// [`exit`] or [`execve`].
pub(crate) unsafe fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Side, Errno> {
    let mut pidfd: c_int = -1;
    let mut args = CloneArgs {
        flags: flags | CLONE_PIDFD | CLONE_CLEAR_SIGHAND,
        pidfd: std::ptr::from_mut(&mut pidfd) as u64,
        // With CLONE_PARENT the kernel takes the caller's own and insists on 0 here.
        exit_signal: if flags & libc::CLONE_PARENT as u64 == 0 { libc::SIGCHLD as u64 } else { 0 },
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: `args` is laid out and filled as clone3 wants it, no CLONE_VM: the child has its own copy of the stack. The
    // caller keeps the child to system calls.
    let pid = checked(unsafe {
        libc::syscall(libc::SYS_clone3, std::ptr::from_mut(&mut args), size_of::<CloneArgs>())
    })?;
    if pid == 0 {
        return Ok(Side::Child);
    }
    // SAFETY: the kernel stored a new descriptor, which nobody else knows.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Side::Parent(i32::try_from(pid).unwrap_or(-1), pidfd))
}

/// Forks in a child, plainly, as system call filters allow it. Gives the new process's id.
pub(crate) fn fork(child: impl FnOnce() -> Infallible) -> Result<i32, Errno> {
    // SAFETY: without CLONE_VM the child has a copy of everything, its stack too; what it runs never comes back and is held to
    // system calls, as this process is, which has one thread.
    let pid =
        checked(unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(libc::SIGCHLD), 0, 0, 0, 0) })?;
    if pid == 0 {
        #[expect(unreachable_code, reason = "the child's code never comes back, as its type says")]
        match child() {}
    }
    Ok(i32::try_from(pid).unwrap_or(-1))
}

/// Waits for the blocked signal of a child's end; gives what is left of the time, or `AGAIN` when it is over.
pub(crate) fn wait_for_child_signal(patience: Duration) -> Result<Duration, Errno> {
    let begun = Instant::now();
    let limit = libc::timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    };
    // SAFETY: the set is owned here and initialised by the calls, which read it and the time; no information is asked for.
    let waited = checked(c_long::from(unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const limit)
    }));
    match waited {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno),
    }
    Ok(patience.saturating_sub(begun.elapsed()))
}

/// Ends this process at once.
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: no conditions.
    unsafe { libc::_exit(status) }
}

/// Replaces this process's program; comes back only with the reason why not.
///
/// `argv` and `envp` are arrays of pointers to C strings that end with a null pointer, see [`crate::plan::process`].
pub(crate) fn execve(program: &CStr, argv: &[*const c_char], envp: &[*const c_char]) -> Errno {
    if argv.last().is_none_or(|last| !last.is_null()) || envp.last().is_none_or(|last| !last.is_null()) {
        return Errno::INVAL;
    }
    // SAFETY: both arrays end with null (just checked) and point to C strings that live in the plan, which the caller holds.
    unsafe {
        libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr());
        Errno::from_raw_os_error(*libc::__errno_location())
    }
}

/// Sets every signal to its default and unblocks all.
pub(crate) fn reset_signals() {
    // SAFETY: a zeroed sigaction is SIG_DFL with no flags and an empty mask; calls for SIGKILL, SIGSTOP and the C library's own
    // signals fail harmlessly.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        for signal in 1..=64 {
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        }
    }
}

/// Blocks all signals of this thread; gives back what was blocked.
pub(crate) fn block_signals() -> libc::sigset_t {
    // SAFETY: both sets are owned here and initialised by the calls.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    }
}

/// Puts back what [`block_signals`] gave.
pub(crate) fn restore_signals(before: &libc::sigset_t) {
    // SAFETY: `before` is an initialised set.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut());
    }
}

/// Unblocks all signals of this thread.
pub(crate) fn unblock_signals() {
    // SAFETY: the set is owned here and initialised by the call.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Changes attributes of the mount that `tree` is, and with `recursive` of those below it.
pub(crate) fn mount_setattr(tree: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, `attr` is laid out as the kernel's structure of this size.
    checked(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    })
    .map(|_| ())
}

/// Leaves namespaces for new ones (`CLONE_NEW*` only).
pub(crate) fn unshare(namespaces: u32) -> Result<(), Errno> {
    // SAFETY: the callers give CLONE_NEW* flags only, which leave memory and descriptors alone.
    checked(c_long::from(unsafe { libc::unshare(namespaces.cast_signed()) })).map(|_| ())
}

/// Joins the namespaces that `fd` (a namespace or a pidfd) stands for.
pub(crate) fn setns(fd: BorrowedFd<'_>, namespaces: u32) -> Result<(), Errno> {
    // SAFETY: changes namespaces of the calling thread only; memory and descriptors stay.
    checked(c_long::from(unsafe { libc::setns(fd.as_raw_fd(), namespaces.cast_signed()) })).map(|_| ())
}

/// Closes all descriptors from `first` on.
pub(crate) fn close_from(first: RawFd) -> Result<(), Errno> {
    // SAFETY: called in the child before its program begins; nothing uses those descriptors any more.
    checked(unsafe { libc::syscall(libc::SYS_close_range, first, c_int::MAX, 0) }).map(|_| ())
}

/// Installs a compiled filter.
pub(crate) fn seccomp(program: &[libc::sock_filter], flags: u32) -> Result<(), Errno> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_long| Errno::TOOBIG)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel only reads the program, which lives until the call is over.
    checked(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(&program))
    })
    .map(|_| ())
}

/// Joins (makes) the session keyring of that name and lets its possessor search it.
pub(crate) fn join_keyring(name: &CStr) -> Result<(), Errno> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_long = 1;
    const KEYCTL_DESCRIBE: c_long = 6;
    const KEYCTL_SETPERM: c_long = 5;
    let mut text = [0_u8; 512];
    // SAFETY: a C string and a buffer with its length, as these commands take them.
    unsafe {
        let key = checked(libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()))?;
        let length =
            checked(libc::syscall(libc::SYS_keyctl, KEYCTL_DESCRIBE, key, text.as_mut_ptr(), text.len()))?;
        let Some(permissions) = permissions_of(text.get(..usize::try_from(length).unwrap_or(0))) else {
            return Ok(());
        };
        // The owner may search, whoever possesses it.
        checked(libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, key, c_long::from(permissions | 0x8_0000)))?;
    }
    Ok(())
}

/// The permission mask in `type;uid;gid;mask;description`.
fn permissions_of(description: Option<&[u8]>) -> Option<u32> {
    let digits = description?.split(|byte| *byte == b';').nth(3)?;
    digits.iter().try_fold(0_u32, |value, digit| Some((value << 4) | char::from(*digit).to_digit(16)?))
}

/// Closes descriptors from `first` to `last`, those that there are. A child's copies only: nothing that owns one may run on.
pub(crate) fn close_range(first: c_int, last: c_int) {
    if first <= last {
        // SAFETY: takes integers; the caller is a child that goes on by system calls on descriptors outside the range.
        let _closed =
            unsafe { libc::syscall(libc::SYS_close_range, c_long::from(first), c_long::from(last), 0) };
    }
}

/// `prctl` with integers only.
pub(crate) fn prctl(option: c_int, a: u64, b: u64) -> Result<(), Errno> {
    // SAFETY: the options used here take integers.
    checked(c_long::from(unsafe { libc::prctl(option, a, b, 0, 0) })).map(|_| ())
}

/// Empties the ambient capabilities.
pub(crate) fn ambient_clear() -> Result<(), Errno> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL.cast_unsigned().into(), 0)
}

/// Makes a capability ambient.
pub(crate) fn ambient_raise(capability: u64) -> Result<(), Errno> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE.cast_unsigned().into(), capability)
}

/// Closes one descriptor that nothing of this process uses any more; no error when it is not open.
pub(crate) fn close_one(number: RawFd) {
    // SAFETY: called in the child before its program begins; its owner never runs again.
    unsafe {
        libc::close(number);
    }
}

/// Makes a terminal the controlling one of this session.
pub(crate) fn set_controlling_terminal(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: takes an integer.
    checked(c_long::from(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY, 0) })).map(|_| ())
}

/// Brings the loopback interface of this network namespace up.
pub(crate) fn loopback_up(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: a zeroed ifreq with a name that ends with zero, and flags, as SIOCSIFFLAGS takes it.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = c_char::try_from(b'l').unwrap_or(0);
        request.ifr_name[1] = c_char::try_from(b'o').unwrap_or(0);
        request.ifr_ifru.ifru_flags = 0x41; // IFF_UP | IFF_RUNNING
        checked(c_long::from(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)))
            .map(|_| ())
    }
}

/// Sets the execution domain.
pub(crate) fn personality(domain: u64) -> Result<(), Errno> {
    // SAFETY: takes an integer.
    checked(c_long::from(unsafe { libc::personality(domain) })).map(|_| ())
}

/// Sets the class and level of this process's disk requests.
pub(crate) fn set_io_priority(value: i32) -> Result<(), Errno> {
    const IOPRIO_WHO_PROCESS: c_long = 1;
    // SAFETY: takes integers.
    checked(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(|_| ())
}

/// Laid out as the first version of the kernel's `struct sched_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SchedAttr {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// Sets how this process is scheduled.
pub(crate) fn set_scheduler(attr: &SchedAttr) -> Result<(), Errno> {
    // SAFETY: `attr` carries its own size and is only read.
    checked(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attr), 0) }).map(|_| ())
}

/// Whether the working directory is inside this process's root.
pub(crate) fn working_directory_is_inside() -> bool {
    let mut text = [0_u8; 4096];
    // SAFETY: a buffer with its length.
    let length = unsafe { libc::syscall(libc::SYS_getcwd, text.as_mut_ptr(), text.len()) };
    // The kernel writes `(unreachable)…` for a directory outside.
    length > 0 && text[0] == b'/'
}

/// Sends a signal to the process behind a pidfd.
pub(crate) fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    // SAFETY: the optional information is null, as allowed.
    checked(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(|_| ())
}

/// Sends a signal to a process by its id.
pub(crate) fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes integers.
    checked(c_long::from(unsafe { libc::kill(pid, signal) })).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_permission_mask_is_the_fourth_part_in_hexadecimal() {
        assert_eq!(permissions_of(Some(b"keyring;0;0;3f030000;_ses.x")), Some(0x3f03_0000));
        assert_eq!(permissions_of(Some(b"keyring;0;0")), None);
        assert_eq!(permissions_of(Some(b"keyring;0;0;zz;x")), None);
    }
}
