//! Identity of a process over restarts of its watcher: a pid counts only together with its start time.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process that cannot be confused with a later one of the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    /// Process id.
    pub(crate) pid: i32,
    /// Start time in clock ticks since boot (`/proc/<pid>/stat`, field 22).
    pub(crate) start: u64,
}

impl ProcessId {
    /// The process that has `pid` now.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name may hold blanks and brackets; the fields start behind its last bracket.
        let rest = stat.rsplit_once(')')?.1;
        let mut fields = rest.split_whitespace();
        let state = fields.next()?;
        let start = fields.nth(18)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Self { pid, start })
    }

    /// This very process.
    pub(crate) fn own() -> Self {
        let pid = std::process::id().cast_signed();
        Self::of(pid).unwrap_or(Self { pid, start: 0 })
    }

    /// Whether it still runs (a zombie does not).
    pub(crate) fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// A file descriptor that becomes readable at its end; `None` when it has ended.
    pub(crate) fn pidfd(&self) -> Option<OwnedFd> {
        let fd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::NONBLOCK).ok()?;
        self.is_alive().then_some(fd)
    }

    /// Sends a signal to exactly this process; one that has ended is fine.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(fd) = self.pidfd() {
            // Only ESRCH can come back: it ended in between, which is what the caller wants.
            pidfd_send_signal(&fd, signal).ok();
        }
    }

    /// SIGTERM, `grace` to leave, SIGKILL; returns when it has gone.
    pub(crate) fn terminate(&self, grace: Duration) -> bool {
        self.signal(Signal::TERM);
        if self.wait_gone(grace) {
            return true;
        }
        self.signal(Signal::KILL);
        self.wait_gone(Duration::from_secs(10))
    }

    /// Blocks until it has ended.
    pub(crate) fn wait_end(&self) {
        while !self.wait_gone(Duration::from_secs(3600)) {}
    }

    /// Blocks until it has ended, or the time is over; says whether it has.
    pub(crate) fn wait_gone(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            let Some(fd) = self.pidfd() else { return true };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
            let mut fds =
                [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&fd), nix::poll::PollFlags::POLLIN)];
            // An interrupted poll is simply tried again by the loop.
            nix::poll::poll(&mut fds, nix::poll::PollTimeout::from(millis)).ok();
        }
    }
}

/// What is kept about one supervised process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Component name.
    pub(crate) name: String,
    /// The process.
    pub(crate) process: ProcessId,
    /// How often it was started again after it ended.
    pub(crate) restarts: u32,
}

impl Record {
    /// Writes it atomically as `dir/<name>.json`.
    pub(crate) fn save(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        write_atomic(&dir.join(format!("{}.json", self.name)), &serde_json::to_vec(self)?)
    }

    /// All records of `dir`, by name; a file that cannot be read is left out.
    pub(crate) fn load_all(dir: &Path) -> Vec<Self> {
        let mut records: Vec<Self> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| serde_json::from_slice(&fs::read(entry.ok()?.path()).ok()?).ok())
            .collect();
        records.sort_by(|a, b| a.name.cmp(&b.name));
        records
    }
}

/// Replaces `path` in one step, so that a reader sees the old or the new content and nothing between.
pub(crate) fn write_atomic(path: &Path, content: &[u8]) -> Result<()> {
    let dir = path.parent().context("a path without a folder")?;
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let temporary = path.with_extension("new");
    fs::write(&temporary, content).with_context(|| format!("writing {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("replacing {}", path.display()))
}

/// Resident and proportional memory in KiB.
pub(crate) fn memory(pid: i32) -> Option<(u64, u64)> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let field = |name: &str| -> Option<u64> {
        rollup.lines().find(|line| line.starts_with(name))?.split_whitespace().nth(1)?.parse().ok()
    };
    Some((field("Rss:")?, field("Pss:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_alive_until_it_ends() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id().cast_signed()).unwrap();
        assert!(id.is_alive());
        assert!(!ProcessId { start: id.start + 1, ..id }.is_alive(), "another start time is another process");
        let reaper = std::thread::spawn(move || child.wait());
        assert!(id.terminate(Duration::from_secs(5)));
        reaper.join().unwrap().unwrap();
        assert!(!id.is_alive());
    }
}
