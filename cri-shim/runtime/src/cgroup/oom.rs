//! Kills by the memory limit.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use rustix::io::Errno;

use super::Paths;
use crate::error::Error;

/// Tells when the memory limit kills.
#[derive(Debug)]
pub struct OomWatch {
    /// Readable (for poll or epoll) when there may be news; then call [`OomWatch::kills`].
    pub fd: OwnedFd,
    /// The file with the line `oom_kill N`.
    file: PathBuf,
    version1: bool,
    /// Version 1: how often it was told. The removal of the cgroup is told the same way, once, and some time later.
    times: u64,
    /// Version 1: whether the limit was said to be reached, in this cgroup or one above it. That comes before the kill;
    /// when the killed process has ended, systemd may have removed the cgroup and its count already.
    pub told: Arc<AtomicBool>,
}

impl Paths {
    /// Watches for kills by the memory limit.
    pub fn oom_watch(&self) -> Result<OomWatch, Error> {
        if let Some(directory) = self.v1.get("memory") {
            return version1(directory)
                .map_err(Error::step(format!("watch for memory kills in {}", directory.display())));
        }
        let Some(directory) = self.unified.as_ref().filter(|_| self.v1.is_empty()) else {
            return Err(Error::Unavailable {
                feature: "out-of-memory events",
                reason: "the host has no memory controller".to_owned(),
            });
        };
        let file = directory.join("memory.events");
        let watch = || -> Result<OwnedFd, Errno> {
            let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
            let notify = inotify::init(flags)?;
            inotify::add_watch(&notify, &file, inotify::WatchFlags::MODIFY)?;
            Ok(notify)
        };
        let fd = watch().map_err(Error::step(format!("watch {}", file.display())))?;
        Ok(OomWatch { fd, file, version1: false, times: 0, told: Arc::default() })
    }
}

fn version1(directory: &Path) -> io::Result<OomWatch> {
    let file = directory.join("memory.oom_control");
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let control = std::fs::File::open(&file)?;
    let line = format!("{} {}", fd.as_raw_fd(), control.as_raw_fd());
    std::fs::write(directory.join("cgroup.event_control"), line)?;
    Ok(OomWatch { fd, file, version1: true, times: 0, told: Arc::default() })
}

impl OomWatch {
    /// Takes the news off the descriptor and tells how many processes the limit has killed so far; `None` when the
    /// cgroup is gone.
    pub fn kills(&mut self) -> Result<Option<u64>, Error> {
        let mut news = [0_u8; 4096];
        let length = match rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut news)) {
            Ok(length) => length,
            Err(Errno::AGAIN) => 0,
            Err(errno) => return Err(Error::step("read memory events")(errno)),
        };
        let kills = match std::fs::read_to_string(&self.file) {
            Ok(text) => Some(count(&text)),
            Err(error) if super::gone(&error) => None,
            Err(error) => return Err(Error::step(format!("read {}", self.file.display()))(error)),
        };
        if self.version1 && length == 8 {
            let since = news.first_chunk().map_or(0, |sum| u64::from_ne_bytes(*sum));
            self.times = self.times.saturating_add(since);
        }
        if self.times > u64::from(kills.is_none()) {
            self.told.store(true, Ordering::Release);
        }
        Ok(kills)
    }
}

fn count(text: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_in_both_versions_files() {
        assert_eq!(count("low 0\nhigh 0\nmax 3\noom 3\noom_kill 2\noom_group_kill 0\n"), 2);
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"), 7);
        assert_eq!(count(""), 0);
    }
}
