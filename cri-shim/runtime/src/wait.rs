//! Reaping the processes that this crate makes.

use std::os::fd::AsFd;

use crate::error::Error;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit status, or 128 and the signal, as runtimes and shells tell it.
    pub status: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

/// Reaps a child by its pidfd. With `block` unset gives `None` while it runs; with it set, waits.
pub fn reap(pidfd: impl AsFd, block: bool) -> Result<Option<Exit>, Error> {
    let _ = (pidfd, block);
    Err(Error::Unavailable { feature: "reap", reason: "not written yet".to_owned() })
}
