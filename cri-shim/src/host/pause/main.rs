//! The pause program: keeps a sandbox's namespaces alive, reaps orphans of a shared PID namespace, ends on SIGTERM or SIGINT.
//!
//! No input, no output, no memory beyond its stack. `build.rs` compiles it by itself, without std or libc, into a static
//! executable that is embedded in `keelson-cri`; it is not a module of that crate. It never starts a process.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

#[cfg(target_arch = "x86_64")]
mod nr {
    pub const RT_SIGACTION: usize = 13;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const RT_SIGTIMEDWAIT: usize = 128;
    pub const EXIT_GROUP: usize = 231;
}

#[cfg(target_arch = "aarch64")]
mod nr {
    pub const RT_SIGACTION: usize = 134;
    pub const RT_SIGPROCMASK: usize = 135;
    pub const RT_SIGTIMEDWAIT: usize = 137;
    pub const EXIT_GROUP: usize = 94;
}

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

// The kernel enters here with the stack pointer at argc; nothing of it is needed.
#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start:", "xor ebp, ebp", "and rsp, -16", "call {run}", "ud2", run = sym run);
#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start:", "mov x29, #0", "bl {run}", "brk #1", run = sym run);

extern "C" fn run() -> ! {
    let ending = &raw const ENDING as usize;
    // An ignored SIGCHLD makes the kernel reap children at once, orphans given to process 1 included.
    call(nr::RT_SIGACTION, SIGCHLD, &raw const IGNORE as usize, 0, SET_SIZE);
    // Process 1 of a namespace only gets a signal that has no handler when it is blocked and waited for.
    call(nr::RT_SIGPROCMASK, SIG_BLOCK, ending, 0, SET_SIZE);
    // Interrupted by being stopped and continued, for example: wait on.
    while call(nr::RT_SIGTIMEDWAIT, ending, 0, 0, SET_SIZE) < 0 {}
    loop {
        call(nr::EXIT_GROUP, 0, 0, 0, 0);
    }
}

#[cfg(target_arch = "x86_64")]
fn call(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: the four calls above only read the two statics, which live as long as the program and have the layout the
    // kernel expects; the kernel clobbers rcx and r11. There is no libc whose wrapper could be used instead.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

#[cfg(target_arch = "aarch64")]
fn call(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: as above; arm64 clobbers nothing but x0.
    unsafe {
        asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") a as isize => result,
            in("x1") b,
            in("x2") c,
            in("x3") d,
            options(nostack),
        );
    }
    result
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        call(nr::EXIT_GROUP, 1, 0, 0, 0);
    }
}
