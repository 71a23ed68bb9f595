//! The pause program: keeps a sandbox's namespaces alive, reaps orphans of a shared PID namespace, ends on SIGTERM or SIGINT.
//!
//! No input, no output, no memory beyond its stack. `build.rs` compiles it into a static executable that is embedded in
//! `keelson-cri`. It never starts a process.

#![no_std]
#![no_main]
#![allow(dead_code, reason = "each program uses a part of `sys`")]

mod sys;

use sys::{call, exit, nr};

const SIGINT: usize = 2;
const SIGTERM: usize = 15;
const SIGCHLD: usize = 17;
const SIG_BLOCK: usize = 0;
const SIG_IGN: usize = 1;
/// Size of the kernel's signal set.
const SET_SIZE: usize = 8;
/// The signals that end the program, as the kernel's bit set.
static ENDING: u64 = 1 << (SIGINT - 1) | 1 << (SIGTERM - 1);
/// The kernel's `sigaction`: handler, flags, restorer, mask (on arm64 three words would do).
static IGNORE: [usize; 4] = [SIG_IGN, 0, 0, 0];

extern "C" fn run() -> ! {
    let ending = &raw const ENDING as usize;
    // SAFETY: the three calls only read the two statics, which live as long as the program and have the kernel's layout.
    unsafe {
        // An ignored SIGCHLD makes the kernel reap children at once, orphans given to process 1 included.
        call(nr::RT_SIGACTION, SIGCHLD, &raw const IGNORE as usize, 0, SET_SIZE);
        // Process 1 of a namespace only gets a signal that has no handler when it is blocked and waited for.
        call(nr::RT_SIGPROCMASK, SIG_BLOCK, ending, 0, SET_SIZE);
        // Interrupted by being stopped and continued, for example: wait on.
        while call(nr::RT_SIGTIMEDWAIT, ending, 0, 0, SET_SIZE) < 0 {}
    }
    exit(0)
}
