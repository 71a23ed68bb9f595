//! Removes a cgroup with everything in it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::super::sys;
use super::child_names;

/// How long processes have to end after SIGKILL; one in uninterruptible sleep may never.
const DEADLINE: Duration = Duration::from_secs(10);
/// Pause between attempts while a dead task is still being unlinked.
const RETRY: Duration = Duration::from_millis(2);

/// Kills what runs in `dir` and below, then removes the directories, deepest first. Absence is success.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + DEADLINE;
    if !dir.exists() {
        return Ok(());
    }
    kill_and_wait(dir, deadline)?;
    remove_tree(dir, deadline)
}

/// Signals every process and waits for each by its descriptor. Repeats until none is left, because a process may
/// fork between the listing and its death.
fn kill_and_wait(dir: &Path, deadline: Instant) -> io::Result<()> {
    loop {
        let pids = processes(dir)?;
        if pids.is_empty() {
            return Ok(());
        }
        let mut descriptors: Vec<OwnedFd> = Vec::with_capacity(pids.len());
        for pid in pids {
            match sys::pidfd_open(pid) {
                Ok(descriptor) => descriptors.push(descriptor),
                Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => continue,
                Err(error) => return Err(error),
            }
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        for descriptor in &descriptors {
            if !sys::wait_for_exit(descriptor, deadline)? {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "a process did not end after SIGKILL"));
            }
        }
        if descriptors.is_empty() && Instant::now() >= deadline {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "processes of other pid namespaces are inside",
            ));
        }
    }
}

fn processes(dir: &Path) -> io::Result<Vec<i32>> {
    let text = match std::fs::read_to_string(dir.join("cgroup.procs")) {
        // Removed meanwhile; ENODEV is what an open file of a removed cgroup says.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => return Ok(Vec::new()),
        text => text?,
    };
    // 0 stands for a process that this pid namespace cannot see.
    let mut pids: Vec<i32> =
        text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect();
    for name in child_names(dir)? {
        pids.extend(processes(&dir.join(name))?);
    }
    Ok(pids)
}

/// A cgroup stays busy for a moment after its last task has ended and the kernel tells nobody when that is over, so
/// this retries until the deadline.
fn remove_tree(dir: &Path, deadline: Instant) -> io::Result<()> {
    for name in child_names(dir)? {
        remove_tree(&dir.join(name), deadline)?;
    }
    loop {
        match std::fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(RETRY);
            }
            Err(error) => return Err(error),
        }
    }
}
