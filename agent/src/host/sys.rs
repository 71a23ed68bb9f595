//! What has no safe wrapper: process descriptors and waiting on them, and descriptors that the reactor watches.

#![allow(unsafe_code, reason = "pidfd_open and AsyncFd's registration have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor of process `pid` that becomes readable when it ends.
pub(super) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers, touches no memory, and returns a new descriptor or -1.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    // SAFETY: the descriptor was just returned by the kernel and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Waits until the process behind `pidfd` has ended, or until `deadline`; tells which.
pub(super) fn wait_for_exit(pidfd: &OwnedFd, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut descriptors = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut descriptors, timeout) {
            Ok(0) if left > Duration::ZERO => {}
            Ok(ready) => return Ok(ready > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Lets the reactor tell when `file` has something urgent (`EPOLLPRI`).
pub(super) fn on_priority(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: the descriptor must stay open and the same while it is registered. The `AsyncFd` owns the `File`, which owns
    // its descriptor alone, is not cloned, and is only dropped together with the registration. The safe constructors are
    // deprecated for types that do not promise that.
    unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.map_err(|error| error.into_parts().1)
}

/// Lets the reactor tell when a descriptor has something to read.
pub(crate) fn on_readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as above: an `OwnedFd` owns its descriptor alone, and is only dropped together with the registration.
    unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }
        .map_err(|error| error.into_parts().1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_an_exit_from_a_deadline() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd_open(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(!wait_for_exit(&pidfd, Instant::now()).unwrap());
        child.kill().unwrap();
        assert!(wait_for_exit(&pidfd, Instant::now() + Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
    }
}
