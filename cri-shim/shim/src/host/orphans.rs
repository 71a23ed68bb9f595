//! Looking for ended children of this thread alone: those of other threads are waited for by them.

use rustix::process::Pid;

/// An ended child of the calling thread, which stays to be reaped.
pub fn peek() -> Option<Pid> {
    // SAFETY: all zeroes is a valid siginfo_t: it holds numbers and pointers that nobody follows.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WNOTHREAD;
    // SAFETY: `info` is borrowed mutably and of the size the call writes; the other arguments are numbers.
    if unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) } != 0 {
        return None;
    }
    // SAFETY: waitid filled the fields of a child's change, or left the zeroes, for which the id is 0.
    Pid::from_raw(unsafe { info.si_pid() })
}
