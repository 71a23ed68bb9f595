//! The keeper program: holds the pipes of one container open, so that its last output and its standard input survive a
//! restart of `keelson-cri`. It never reads or writes them.
//!
//! Input: standard input may be the writing end of the container's stdin; standard output and error are the reading ends of
//! its stdout and stderr, or `/dev/null`. It ends by itself once the container has closed its output and somebody has read
//! everything, or after ten minutes of nobody doing so. `build.rs` compiles it into a static executable that is embedded in
//! `keelson-cri`.

#![no_std]
#![no_main]
#![allow(dead_code, reason = "each program uses a part of `sys`")]

mod sys;

use sys::{call, exit, nr};

const FIONREAD: usize = 0x541b;
const STDOUT: i32 = 1;
const STDERR: i32 = 2;
/// Pause between two looks at what is left unread.
static PAUSE: Timespec = Timespec { seconds: 0, nanoseconds: 100_000_000 };
/// How often is looked before giving up: ten minutes.
const LOOKS: usize = 6000;

/// The kernel's `timespec`.
#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

/// The kernel's `pollfd`.
#[repr(C)]
struct PollFd {
    fd: i32,
    wanted: i16,
    found: i16,
}

extern "C" fn run() -> ! {
    // SAFETY: the call takes nothing and touches no memory. Signals for the server's process group are not for us.
    unsafe { call(nr::SETSID, 0, 0, 0, 0) };
    for fd in [STDOUT, STDERR] {
        wait_until_closed(fd);
    }
    for _ in 0..LOOKS {
        if unread(STDOUT) <= 0 && unread(STDERR) <= 0 {
            exit(0);
        }
        // SAFETY: the call reads the static time and writes nothing.
        unsafe { call(nr::NANOSLEEP, &raw const PAUSE as usize, 0, 0, 0) };
    }
    exit(1)
}

/// Waits until nobody can write to the pipe any more.
fn wait_until_closed(fd: i32) {
    // Only what is no pipe fails FIONREAD: /dev/null would be waited for for ever.
    if unread(fd) < 0 {
        return;
    }
    loop {
        // Nothing is asked for: a closed pipe is always told.
        let mut poll = PollFd { fd, wanted: 0, found: 0 };
        // SAFETY: the call writes to `poll`, which is borrowed mutably and has the kernel's layout; no timeout, no mask.
        if unsafe { call(nr::PPOLL, &raw mut poll as usize, 1, 0, 0) } > 0 {
            return;
        }
    }
}

/// How many bytes wait in the pipe; negative for what is no pipe.
fn unread(fd: i32) -> isize {
    let mut count: i32 = 0;
    // SAFETY: the call writes an int to `count`, which is borrowed mutably.
    let result = unsafe { call(nr::IOCTL, fd as usize, FIONREAD, &raw mut count as usize, 0) };
    if result < 0 { result } else { count as isize }
}
