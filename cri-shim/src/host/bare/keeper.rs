//! The keeper program: holds the pipes of one container open, so that its last output and its standard input survive a
//! restart of `keelson-cri`. It never reads or writes them.
//!
//! Input: standard input may be the writing end of the container's stdin; standard output and error are the reading ends of
//! its stdout and stderr, or `/dev/null`. It ends by itself once the container has closed its output and somebody has read
//! everything, or after ten minutes of nobody doing so. SIGUSR1 makes it close standard input. `build.rs` compiles it into a static executable that is embedded in
//! `keelson-cri`.

#![no_std]
#![no_main]
#![allow(dead_code, reason = "each program uses a part of `sys`")]

mod sys;

use sys::{call, exit, nr};

const FIONREAD: usize = 0x541b;
const POLLIN: i16 = 1;
const SIG_BLOCK: usize = 0;
const SIGUSR1: u32 = 10;
const STDIN: i32 = 0;
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
    let mut signals = listen();
    for fd in [STDOUT, STDERR] {
        wait_until_closed(fd, &mut signals);
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

/// Takes SIGUSR1 as something to read from; gives the descriptor, or a negative number.
fn listen() -> i32 {
    let set: u64 = 1 << (SIGUSR1 - 1);
    let (place, size) = (&raw const set as usize, size_of::<u64>());
    // SAFETY: the call reads `set`, which lives until it returns, and writes nothing as the old set is null.
    unsafe { call(nr::RT_SIGPROCMASK, SIG_BLOCK, place, 0, size) };
    // SAFETY: the call reads `set`, which lives until it returns; all bits of -1 ask for a new descriptor.
    unsafe { call(nr::SIGNALFD4, usize::MAX, place, size, 0) as i32 }
}

/// Waits until nobody can write to the pipe any more; lets go of standard input when a signal says so.
fn wait_until_closed(fd: i32, signals: &mut i32) {
    // Only what is no pipe fails FIONREAD: /dev/null would be waited for for ever.
    if unread(fd) < 0 {
        return;
    }
    loop {
        // Nothing is asked for of the pipe: a closed one is always told. A negative descriptor is passed over.
        let mut polls =
            [PollFd { fd, wanted: 0, found: 0 }, PollFd { fd: *signals, wanted: POLLIN, found: 0 }];
        // SAFETY: the call writes to `polls`, which is borrowed mutably and has the kernel's layout; no timeout, no mask.
        if unsafe { call(nr::PPOLL, &raw mut polls as usize, polls.len(), 0, 0) } <= 0 {
            continue;
        }
        let [pipe, signal] = polls;
        if signal.found != 0 {
            *signals = -1;
            // SAFETY: the call takes a number and touches no memory; nothing here uses standard input.
            unsafe { call(nr::CLOSE, STDIN as usize, 0, 0, 0) };
        }
        if pipe.found != 0 {
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
