//! Control groups: where a container's are, limits, figures, freezing, killing, removal.

mod convert;
mod dbus;
mod detect;
mod devices;
mod limits;
mod oom;
mod properties;
mod stats;
mod systemd;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::host::sys;

pub(crate) use detect::hierarchies;
pub use oom::OomWatch;
pub use stats::{Stats, Throttling};

/// Who manages cgroups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// The files are written directly; `linux.cgroupsPath` is a path below each hierarchy's root.
    #[default]
    Cgroupfs,
    /// systemd makes a transient scope; `linux.cgroupsPath` is `slice:prefix:name`.
    Systemd,
}

/// A container's cgroups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paths {
    /// The directory in the version 2 hierarchy (on hybrid hosts too, where it carries no controllers).
    pub unified: Option<PathBuf>,
    /// The directory by version 1 controller (`memory`, `name=systemd`, …); empty on a host with version 2 only.
    pub v1: BTreeMap<String, PathBuf>,
    /// The transient unit, with the systemd driver.
    pub unit: Option<String>,
}

/// Open files by which a process comes into cgroups.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    /// The version 2 directory, for the fork itself.
    pub(crate) into: Option<OwnedFd>,
    /// `tasks` of version 1, for the process to write itself into while it has one thread: unlike `cgroup.procs` this does
    /// not wait for the whole machine's processors (`cgroup_threadgroup_rwsem`), which takes milliseconds.
    pub(crate) enter: Vec<OwnedFd>,
}

/// What is above a number that a descriptor of the child may have.
fn high(file: OwnedFd) -> Result<OwnedFd, Errno> {
    if file.as_raw_fd() > 2 { Ok(file) } else { rustix::io::fcntl_dupfd_cloexec(&file, 3) }
}

impl Paths {
    /// Makes the cgroups of a container. `path` is `linux.cgroupsPath`. What comes with them is to be kept until the
    /// container's process is inside.
    pub(crate) fn make(
        driver: CgroupDriver,
        id: &str,
        path: Option<&Path>,
        resources: Option<&LinuxResources>,
    ) -> Result<(Self, Option<systemd::Placeholder>), Error> {
        match driver {
            CgroupDriver::Cgroupfs => Ok((Self::make_cgroupfs(id, path)?, None)),
            CgroupDriver::Systemd => {
                let (paths, placeholder) = systemd::make(id, path, resources)?;
                Ok((paths, Some(placeholder)))
            }
        }
    }

    fn make_cgroupfs(id: &str, path: Option<&Path>) -> Result<Self, Error> {
        let relative = Path::new(id);
        let path = path.filter(|path| !path.as_os_str().is_empty()).unwrap_or(relative);
        let mut paths = Self::default();
        paths.make_directories(path)?;
        if paths.unified.is_none() && paths.v1.is_empty() {
            return Err(Error::Unavailable {
                feature: "cgroups",
                reason: "no hierarchy is mounted below /sys/fs/cgroup".to_owned(),
            });
        }
        let left = paths.pids()?;
        if !left.is_empty() {
            return Err(Error::spec(
                "linux.cgroupsPath",
                format!("{} is in use by {} processes", path.display(), left.len()),
            ));
        }
        Ok(paths)
    }

    /// Makes the directory in every hierarchy, or leaves none.
    fn make_directories(&mut self, path: &Path) -> Result<(), Error> {
        for hierarchy in hierarchies()? {
            let directory = hierarchy.directory(path)?;
            self.add(&hierarchy, directory.clone());
            if let Err(error) = hierarchy.make(&directory) {
                for directory in self.directories() {
                    // One that somebody uses stays.
                    let _in_use = std::fs::remove_dir(directory);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn add(&mut self, hierarchy: &detect::Hierarchy, directory: PathBuf) {
        if hierarchy.unified {
            self.unified = Some(directory);
        } else {
            for key in hierarchy.keys() {
                self.v1.insert(key.to_owned(), directory.clone());
            }
        }
    }

    /// All directories, each once.
    fn directories(&self) -> BTreeSet<&Path> {
        self.unified.iter().chain(self.v1.values()).map(PathBuf::as_path).collect()
    }

    /// Opens them for a process to enter.
    pub(crate) fn entry(&self) -> Result<Entry, Error> {
        let mut entry = Entry::default();
        if let Some(directory) = &self.unified {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let file = rustix::fs::open(directory, flags, Mode::empty()).and_then(high);
            entry.into = Some(file.map_err(Error::step(format!("open {}", directory.display())))?);
        }
        for directory in self.v1.values().map(PathBuf::as_path).collect::<BTreeSet<_>>() {
            let file = directory.join("tasks");
            let open = rustix::fs::open(&file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            entry.enter.push(open.and_then(high).map_err(Error::step(format!("open {}", file.display())))?);
        }
        Ok(entry)
    }

    /// Opens the version 2 cgroup that a process of the container is really in.
    pub(crate) fn of_process(&self, pid: i32) -> Result<Option<OwnedFd>, Error> {
        let step = || Error::step(format!("find the cgroup of {pid}"));
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(step())?;
        let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let hierarchy = hierarchies()?.into_iter().find(|hierarchy| hierarchy.unified);
        let (Some(own), Some(hierarchy)) = (own, hierarchy) else { return Ok(None) };
        let directory = hierarchy.mountpoint.join(own);
        // Never outside the container's own.
        if !self.unified.as_ref().is_some_and(|unified| directory.starts_with(unified)) {
            return Ok(None);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = rustix::fs::open(&directory, flags, Mode::empty()).and_then(high);
        file.map(Some).map_err(Error::step(format!("open {}", directory.display())))
    }

    /// Sends a signal to all processes in them and below.
    pub fn kill_all(&self, signal: i32) -> Result<(), Error> {
        if signal == libc::SIGKILL
            && let Some(directory) = &self.unified
        {
            // Kills all at once, also those that are being made.
            match std::fs::write(directory.join("cgroup.kill"), "1") {
                Ok(()) => return Ok(()),
                Err(error) if gone(&error) && !directory.exists() => return Ok(()),
                Err(_) => {}
            }
        }
        for pid in self.pids()? {
            match sys::kill(pid, signal) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(errno) => return Err(Error::step(format!("send signal {signal} to {pid}"))(errno)),
            }
        }
        Ok(())
    }

    /// All processes in them and below, in the order of their ids.
    pub fn pids(&self) -> Result<Vec<i32>, Error> {
        let mut found = BTreeSet::new();
        // One hierarchy has them all.
        if let Some(directory) = self.unified.as_ref().or_else(|| self.v1.values().next()) {
            collect(directory, &mut found)
                .map_err(Error::step(format!("list processes of {}", directory.display())))?;
        }
        Ok(found.into_iter().collect())
    }

    /// Freezes or thaws; waits until it is so.
    pub fn freeze(&self, frozen: bool, deadline: Duration) -> Result<(), Error> {
        let (file, word, state, wanted) = match (self.v1.get("freezer"), &self.unified) {
            (Some(directory), _) => {
                let word = if frozen { "FROZEN" } else { "THAWED" };
                (directory.join("freezer.state"), word, directory.join("freezer.state"), word.to_owned())
            }
            (None, Some(directory)) => {
                let word = if frozen { "1" } else { "0" };
                let file = directory.join("cgroup.freeze");
                (file, word, directory.join("cgroup.events"), format!("frozen {word}"))
            }
            (None, None) => {
                return Err(Error::Unavailable {
                    feature: "freezing",
                    reason: "the container has no freezer cgroup".to_owned(),
                });
            }
        };
        let step = || format!("{} the cgroup ({})", if frozen { "freeze" } else { "thaw" }, file.display());
        let begun = Instant::now();
        loop {
            // Version 1 may stay half frozen while processes are made; writing again takes in the new ones.
            std::fs::write(&file, word).map_err(Error::step(step()))?;
            let now = std::fs::read_to_string(&state).map_err(Error::step(step()))?;
            if now.lines().any(|line| line == wanted) {
                return Ok(());
            }
            if begun.elapsed() > deadline {
                if frozen {
                    let thaw = if word == "1" { "0" } else { "THAWED" };
                    std::fs::write(&file, thaw).map_err(Error::step(step()))?;
                }
                return Err(Error::step(step())(io::Error::from(io::ErrorKind::TimedOut)));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills what is in them and removes them.
    pub fn delete(&self, deadline: Duration) -> Result<(), Error> {
        let begun = Instant::now();
        let mut pause = Duration::from_micros(500);
        let mut killed = false;
        loop {
            let mut busy = None;
            for directory in self.directories() {
                match remove(directory) {
                    Err(error) if gone(&error) => {}
                    Err(error) => busy = Some((directory, error)),
                    Ok(()) => {}
                }
            }
            let Some((directory, error)) = busy else { break };
            if !killed || begun.elapsed() > deadline / 2 {
                self.thaw_and_kill();
                killed = true;
            }
            if begun.elapsed() > deadline {
                return Err(Error::step(format!("remove the cgroup {}", directory.display()))(error));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        if let Some(unit) = &self.unit {
            systemd::forget(unit);
        }
        Ok(())
    }

    /// Frozen processes of version 1 do not die.
    fn thaw_and_kill(&self) {
        let _gone = self.kill_all(libc::SIGKILL);
        if let Some(directory) = self.v1.get("freezer") {
            let _not_frozen = std::fs::write(directory.join("freezer.state"), "THAWED");
        }
    }
}

fn gone(error: &io::Error) -> bool {
    // A file of a cgroup that is being removed says ENODEV.
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn collect(directory: &Path, found: &mut BTreeSet<i32>) -> io::Result<()> {
    match std::fs::read_to_string(directory.join("cgroup.procs")) {
        Ok(text) => found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
        Err(error) if gone(&error) => return Ok(()),
        // A threaded cgroup of the container's own making: its threads' processes are listed above it.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    for below in subdirectories(directory)? {
        collect(&below, found)?;
    }
    Ok(())
}

fn subdirectories(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if gone(&error) => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let Ok(entry) = entry else { continue };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Removes a cgroup, first those below it.
fn remove(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir(directory) {
        // Either processes or cgroups are in it.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            for below in subdirectories(directory)? {
                remove(&below)?;
            }
            std::fs::remove_dir(directory)
        }
        other => other,
    }
}
