//! Work that goes on after the plugin has answered.

#![allow(unsafe_code, reason = "fork, to go on in a process that the runtime does not wait for")]

use std::{fs::OpenOptions, io};

use nix::{
    libc,
    unistd::{ForkResult, fork, setsid},
};

/// Runs `work` in a child process of its own session that holds none of the standard streams, so that a
/// runtime that reads them to their end does not wait for it. Returns at once in this process.
///
/// Only for processes of one thread. What `work` holds belongs to the child alone: here it is forgotten, not
/// dropped, as dropping a file lock would let go of the child's too.
pub fn run(work: impl FnOnce()) -> io::Result<()> {
    // SAFETY: the process has one thread (the plugins start none), so the child's copy of the heap and of
    // every lock is consistent and it may do whatever this process might have done.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => {
            std::mem::forget(work);
            Ok(())
        }
        ForkResult::Child => {
            let code = match leave() {
                Ok(()) => {
                    work();
                    0
                }
                Err(_) => 1,
            };
            // SAFETY: ends the child without running the parent's exit handlers or flushing its buffers a
            // second time; there is nothing to hand over.
            unsafe { libc::_exit(code) }
        }
    }
}

fn leave() -> io::Result<()> {
    setsid()?;
    // Not to keep a mount busy.
    nix::unistd::chdir("/")?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}
