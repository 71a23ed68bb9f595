//! Where a process reads from and writes to.

use std::os::fd::OwnedFd;

/// The standard streams of a process.
#[derive(Debug)]
pub enum Stdio {
    /// Three open files; each is made the process's own 0, 1 and 2. `None` is `/dev/null` (the container's own).
    Fds {
        /// Read by the process.
        stdin: Option<OwnedFd>,
        /// Written by it.
        stdout: Option<OwnedFd>,
        /// Written by it.
        stderr: Option<OwnedFd>,
    },
    /// A new terminal of the container's devpts as the controlling one; its master side is given back to the caller.
    Terminal {
        /// Its size at first, where known (else the specification's `consoleSize`).
        size: Option<WindowSize>,
    },
}

impl Stdio {
    /// All three streams on `/dev/null`.
    pub fn null() -> Self {
        Self::Fds { stdin: None, stdout: None, stderr: None }
    }
}

/// Rows and columns of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}
