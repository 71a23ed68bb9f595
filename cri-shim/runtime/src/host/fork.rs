//! The fork. Runs in the caller, which keeps everything it had: signals, namespaces, working directory.
#![allow(unsafe_code, reason = "clone3 is unsafe: the child may only make system calls")]

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::{link, sys};
use crate::error::Error;

/// A process that was just made.
#[derive(Debug)]
pub(crate) struct Forked {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// This side of the socket to it.
    pub(crate) socket: OwnedFd,
}

impl Forked {
    /// Kills and reaps it: it did not get as far as its program.
    pub(crate) fn discard(&self) {
        let _ended = sys::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        reap(self.pidfd.as_fd());
    }
}

/// Waits for a process that is about to end. Somebody else may have reaped it.
pub(crate) fn reap(pidfd: BorrowedFd<'_>) {
    let _reaped =
        rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED).map(|_| ()));
}

/// Makes a process that runs `child` with its side of the socket, with signals blocked and at their defaults.
///
/// `pids` is a process or PID namespace whose PID namespace the new process is made in.
/// `child` may only make system calls: no memory, no locks.
pub(crate) fn fork(
    namespaces: u32,
    cgroup: Option<BorrowedFd<'_>>,
    pids: Option<BorrowedFd<'_>>,
    child: impl FnOnce(OwnedFd) -> Infallible,
) -> Result<Forked, Error> {
    let (ours, theirs) = link::pair().map_err(Error::step("make a socket pair"))?;
    let theirs = above_streams(theirs)?;
    let home = pids.map(|_| own_pid_namespace()).transpose()?;
    let before = sys::block_signals();
    let made = in_pid_namespace(pids, home.as_ref(), || {
        // SAFETY: the child runs `child`, which is held to system calls and never returns.
        match unsafe { sys::clone3(u64::from(namespaces), cgroup) }? {
            sys::Side::Child => {
                sys::reset_signals();
                // With a copy of its parent's side it would wait for ever for a parent that died.
                sys::close_range(ours.as_raw_fd(), ours.as_raw_fd());
                never(child(theirs))
            }
            sys::Side::Parent(pid, pidfd) => Ok((pid, pidfd)),
        }
    });
    sys::restore_signals(&before);
    let (pid, pidfd) = made?;
    Ok(Forked { pid, pidfd, socket: ours })
}

/// Forks once more, in a child, into new namespaces and as a child of its parent. Gives the id on the old side.
pub(crate) fn fork_sibling(namespaces: u32, child: impl FnOnce() -> Infallible) -> Result<i32, Errno> {
    let namespaces = u64::from(namespaces) | u64::from(libc::CLONE_PARENT.cast_unsigned());
    // SAFETY: both sides are held to system calls: this already runs in a child.
    match unsafe { sys::clone3(namespaces, None) }? {
        #[expect(unreachable_code, reason = "the child's code never comes back, as its type says")]
        sys::Side::Child => never(child()),
        sys::Side::Parent(pid, _) => Ok(pid),
    }
}

/// The child's code ends in an exit or in its program.
fn never(child: Infallible) -> ! {
    match child {}
}

/// The child puts its streams on 0 to 2, so nothing it needs may be there.
fn above_streams(socket: OwnedFd) -> Result<OwnedFd, Error> {
    if socket.as_raw_fd() > 2 {
        return Ok(socket);
    }
    rustix::io::fcntl_dupfd_cloexec(&socket, 3).map_err(Error::step("move a socket"))
}

fn own_pid_namespace() -> Result<OwnedFd, Error> {
    rustix::fs::open(c"/proc/thread-self/ns/pid", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(Error::step("open /proc/thread-self/ns/pid"))
}

/// Makes children of this thread in another PID namespace while `work` runs.
fn in_pid_namespace<T>(
    pids: Option<BorrowedFd<'_>>,
    home: Option<&OwnedFd>,
    work: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Error> {
    let (Some(pids), Some(home)) = (pids, home) else {
        return work().map_err(Error::step("fork"));
    };
    sys::setns(pids, libc::CLONE_NEWPID.cast_unsigned()).map_err(Error::step("join the PID namespace"))?;
    let done = work();
    // Only a lack of kernel memory can make this fail; then children of this thread would go astray.
    let mut back = sys::setns(home.as_fd(), libc::CLONE_NEWPID.cast_unsigned());
    for _ in 0..100 {
        if back.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        back = sys::setns(home.as_fd(), libc::CLONE_NEWPID.cast_unsigned());
    }
    let done = done.map_err(Error::step("fork"))?;
    back.map_err(Error::step("return to the own PID namespace"))?;
    Ok(done)
}
