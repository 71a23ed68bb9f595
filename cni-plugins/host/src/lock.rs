//! File locks with a deadline.

#![allow(unsafe_code, reason = "a signal handler that does nothing, so that a waiting flock returns")]

use std::{fs::File, io};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    unistd::alarm,
};

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub struct Lock {
    /// Held for its drop.
    _file: Flock<File>,
}

extern "C" fn wake(_signal: libc::c_int) {}

/// Waits for the exclusive lock of `file`, at most `seconds`; then the error is `TimedOut`.
///
/// For processes of one thread: it uses SIGALRM.
pub fn lock(file: File, seconds: u32) -> io::Result<Lock> {
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => return Ok(Lock { _file: file }),
        Err((file, Errno::EWOULDBLOCK)) => file,
        Err((_, errno)) => return Err(errno.into()),
    };
    // Without SA_RESTART: the point is that flock returns.
    let action = SigAction::new(SigHandler::Handler(wake), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so it may run at any point.
    let before = unsafe { sigaction(Signal::SIGALRM, &action) }?;
    alarm::set(seconds);
    let locked = Flock::lock(file, FlockArg::LockExclusive);
    alarm::cancel();
    // SAFETY: the action put back is the one the process had.
    unsafe { sigaction(Signal::SIGALRM, &before) }?;
    match locked {
        Ok(file) => Ok(Lock { _file: file }),
        Err((_, Errno::EINTR)) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("another call held the lock for more than {seconds} s"),
        )),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// The exclusive lock of `file` if nobody has it.
pub fn try_lock(file: File) -> io::Result<Option<Lock>> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => Ok(Some(Lock { _file: file })),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}
