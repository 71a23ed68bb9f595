//! Any signal, real-time ones too, to the process behind a pidfd.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Sends a signal; false when the process has ended.
pub fn send(pidfd: &impl AsFd, signal: i32) -> io::Result<bool> {
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: the descriptor is borrowed and open; without siginfo the kernel makes its own; there are no flags.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<u8>(), 0) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(false) } else { Err(error) }
}
