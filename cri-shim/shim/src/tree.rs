//! Ends a process with everything below it. The process is a subreaper, so nothing that it started can have left the tree
//! while it lives: it goes last.

use std::os::fd::OwnedFd;

use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;

use crate::host;
use crate::shim::SIGKILL;

const SIGSTOP: i32 = 19;
/// Rounds against processes that fork while they are killed. A fork that is under way when its process is killed fails,
/// so each round is final for what it saw.
const ROUNDS: usize = 1000;

/// Kills `root` and all its descendants.
pub fn kill(root: i32, pidfd: &OwnedFd) {
    // Stopped, it neither forks nor reaps: what dies below it keeps its id, so that no id is taken over by another process.
    if host::signal::send(pidfd, SIGSTOP).unwrap_or(false) {
        for _ in 0..ROUNDS {
            let below = descendants(root);
            if below.is_empty() {
                break;
            }
            for pid in below {
                // One that has ended in between is what we want.
                send(Pid::from_raw(pid), Signal::SIGKILL).ok();
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    host::signal::send(pidfd, SIGKILL).ok();
}

/// The processes below `root` that have not ended.
fn descendants(root: i32) -> Vec<i32> {
    let (mut found, mut next) = (Vec::new(), vec![root]);
    while let Some(parent) = next.pop() {
        for child in children(parent) {
            next.push(child);
            if !is_zombie(child) {
                found.push(child);
            }
        }
    }
    found
}

/// Children of all threads of a process.
fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists =
        threads.flatten().filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()
        })
        .collect()
}

fn is_zombie(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name may hold anything, so the state is behind its last parenthesis. A process that is gone is no concern.
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    #[test]
    fn a_tree_that_forks_twice_and_opens_sessions_is_ended_whole() {
        // Every process of the tree holds the pipe: its end says that all are gone. The test stands in for the command that
        // is a subreaper, by a program that makes itself one.
        let script = "for i in 1 2 3; do setsid sh -c 'setsid sleep 1000 & sleep 1000 &' & done; wait; echo up; sleep 1000";
        let mut child = Command::new("python3")
            .args([
                "-c",
                "import ctypes,os,sys;ctypes.CDLL(None).prctl(36,1);os.execvp('sh',['sh','-c',sys.argv[1]])",
            ])
            .arg(script)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut word = [0; 3];
        out.read_exact(&mut word).unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        kill(pid, &pidfd);
        child.wait().unwrap();
        let mut rest = Vec::new();
        out.read_to_end(&mut rest).unwrap();
    }
}
