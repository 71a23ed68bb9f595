//! Processes by pidfd: a descriptor names one process for ever, whatever becomes of its id.
//!
//! Input: process ids with the time the process began. Output: descriptors, ends.

#![allow(unsafe_code, reason = "pidfds have no safe wrapper")]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::files;
use crate::error::RuntimeError;

/// When a process began, in the kernel's ticks since boot; nothing when there is none.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command stands in parentheses and may hold anything; the 22nd field is the 20th after it.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// How many files the process may have open (its soft limit); nothing when unlimited. Fails with EPERM for another user's process
/// without CAP_SYS_RESOURCE.
pub fn open_files_limit(pid: i32) -> io::Result<Option<u64>> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the new limit is null, so nothing is set; the kernel writes the old one to memory of ours that outlives the call.
    let result = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur))
}

/// A descriptor of process `pid`; nothing when it has ended, also when another one has its id by now.
pub fn open(pid: u32, started: u64) -> io::Result<Option<OwnedFd>> {
    let Ok(number) = libc::pid_t::try_from(pid) else { return Ok(None) };
    if number <= 0 {
        return Ok(None);
    }
    // SAFETY: the system call takes two integers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, number, 0) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) };
    }
    let raw = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // Looked at after the descriptor is open, so the id cannot change hands in between unnoticed.
    Ok((start_time(pid) == Some(started)).then_some(fd))
}

/// The descriptor in the runtime's poll, readable once the process has ended.
pub fn watched(process: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor for as long as it lives, and the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(process, Interest::READABLE)? })
}

/// Kills the process; one that has ended is fine.
pub fn kill(process: &impl AsFd) -> io::Result<()> {
    send(process, Signal::SIGKILL)
}

/// Sends a signal to the process; one that has ended is fine.
pub fn send(process: &impl AsFd, signal: Signal) -> io::Result<()> {
    let number = signal as libc::c_int;
    let fd = process.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open for the time of the call, and a null `siginfo` is what the call takes for "as kill".
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd, number, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
}

/// Kills every process that writes images below a directory: was told so (`--image-path`, as runc takes it) or works there, as
/// CRIU does. Reads `/proc`.
pub fn kill_imaging(below: &Path) -> Result<(), RuntimeError> {
    let proc = Path::new("/proc");
    for name in files::names_in(proc)? {
        let Ok(pid) = name.parse::<u32>() else { continue };
        let place = proc.join(&name);
        let Some(started) = start_time(pid) else { continue };
        let command = fs::read(place.join("cmdline")).unwrap_or_default();
        let works_there = || fs::read_link(place.join("cwd")).is_ok_and(|path| path.starts_with(below));
        if !images_below(&command, below) && !works_there() {
            continue;
        }
        let process = open(pid, started);
        let killed = process.and_then(|process| process.map_or(Ok(()), |process| kill(&process)));
        killed.map_err(RuntimeError::host("end the checkpoint of", &place))?;
    }
    Ok(())
}

/// Whether a command line says so.
fn images_below(command: &[u8], below: &Path) -> bool {
    let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
    words.windows(2).any(|pair| {
        pair[0] == b"--image-path" && Path::new(std::ffi::OsStr::from_bytes(pair[1])).starts_with(below)
    })
}

/// Kills a child and takes its entry out of the process table. Blocks until it has ended.
pub fn end_child(process: &impl AsFd) {
    if kill(process).is_ok() {
        // Whatever it answers, there is nothing of ours left to reap.
        waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED).ok();
    }
}

/// Takes an ended child's entry out of the process table. One that is not our child is reaped by whoever it belongs to.
pub fn reap(process: &impl AsFd) {
    // Whatever it answers, there is nothing of ours left to reap.
    waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    #[test]
    fn only_who_writes_images_there_is_meant() {
        let below = Path::new("/var/lib/cri/checkpoints");
        let of = |words: &[&str]| images_below(words.join("\0").as_bytes(), below);
        let images = "/var/lib/cri/checkpoints/c1/checkpoint";
        assert!(of(&["runc", "checkpoint", "--image-path", images, "--work-path", "/x", "c1"]));
        assert!(!of(&["runc", "checkpoint", "--image-path", "/var/lib/cri/checkpoints-of-mine/c1", "c1"]));
        assert!(!of(&["ls", images]) && !of(&[]) && !of(&["runc", "--image-path"]));
    }

    #[test]
    fn a_process_is_known_by_id_and_time_ended_and_reaped() {
        #[allow(clippy::zombie_processes, reason = "`reap` is what is tested")]
        let child = std::process::Command::new("/bin/sleep").arg("3600").spawn().unwrap();
        let started = start_time(child.id()).unwrap();
        assert!(open(child.id(), started + 1).unwrap().is_none(), "another process of the same id");
        let process = open(child.id(), started).unwrap().unwrap();
        kill(&process).unwrap();
        let mut polled = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut polled, PollTimeout::from(20_000_u16)).unwrap(), 1);
        reap(&process);
        kill(&process).unwrap();
        assert!(open(child.id(), started).unwrap().is_none());
        assert_eq!(start_time(0), None);
    }
}
