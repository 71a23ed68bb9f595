//! Ending and reaping the processes that this crate makes.

use std::os::fd::AsFd;

use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::error::Error;
use crate::host::sys;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit status, or 128 and the signal, as runtimes and shells tell it.
    pub status: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

/// Kills a process by its pidfd, which needs no other descriptor.
pub fn kill(pidfd: impl AsFd) -> Result<(), Error> {
    sys::send_signal(pidfd.as_fd(), libc::SIGKILL).map_err(Error::step("kill a process"))
}

/// Reaps a child by its pidfd. With `block` unset gives `None` while it runs; with it set, waits.
pub fn reap(pidfd: impl AsFd, block: bool) -> Result<Option<Exit>, Error> {
    let options = if block { WaitIdOptions::EXITED } else { WaitIdOptions::EXITED | WaitIdOptions::NOHANG };
    let status = rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(pidfd.as_fd()), options))
        .map_err(Error::step("wait for a process"))?;
    Ok(status.map(|status| match (status.exit_status(), status.terminating_signal()) {
        (Some(status), _) => Exit { status, signal: None },
        (None, signal) => Exit { status: 128 + signal.unwrap_or(0), signal },
    }))
}
