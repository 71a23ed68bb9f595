//! Control groups: where a container's are, limits, figures, freezing, killing, removal.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};

use crate::error::Error;

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

impl Paths {
    /// Sends a signal to all processes in them and below.
    pub fn kill_all(&self, signal: i32) -> Result<(), Error> {
        Err(Error::Unavailable { feature: "kill_all", reason: format!("not written yet {signal}") })
    }

    /// All processes in them and below.
    pub fn pids(&self) -> Result<Vec<i32>, Error> {
        Err(Error::Unavailable { feature: "pids", reason: "not written yet".to_owned() })
    }

    /// Writes the limits that are present.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        let _ = resources;
        Err(Error::Unavailable { feature: "update", reason: "not written yet".to_owned() })
    }

    /// Freezes or thaws; waits until it is so.
    pub fn freeze(&self, frozen: bool, deadline: Duration) -> Result<(), Error> {
        Err(Error::Unavailable {
            feature: "freeze",
            reason: format!("not written yet {frozen} {deadline:?}"),
        })
    }

    /// Reads the figures.
    pub fn stats(&self) -> Result<Stats, Error> {
        Err(Error::Unavailable { feature: "stats", reason: "not written yet".to_owned() })
    }

    /// Watches for kills by the memory limit.
    pub fn oom_watch(&self) -> Result<OomWatch, Error> {
        Err(Error::Unavailable { feature: "oom events", reason: "not written yet".to_owned() })
    }

    /// Kills what is in them and removes them.
    pub fn delete(&self, deadline: Duration) -> Result<(), Error> {
        Err(Error::Unavailable { feature: "delete", reason: format!("not written yet {deadline:?}") })
    }
}

/// What a container has used. A figure that its controller does not give is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Whether the figures are of version 2.
    pub unified: bool,
    /// Processor time in nanoseconds.
    pub cpu_usage_ns: Option<u64>,
    /// Of it in user mode.
    pub cpu_user_ns: Option<u64>,
    /// Of it in the kernel.
    pub cpu_system_ns: Option<u64>,
    /// Periods of the quota that have passed, were throttled, and how long.
    pub throttling: Option<Throttling>,
    /// Bytes of memory in use, page cache included.
    pub memory_usage: Option<u64>,
    /// The most it ever was.
    pub memory_peak: Option<u64>,
    /// The limit; absent when there is none.
    pub memory_limit: Option<u64>,
    /// Swap in use (version 2) or memory and swap (version 1).
    pub swap_usage: Option<u64>,
    /// The limit of the same.
    pub swap_limit: Option<u64>,
    /// Every line of `memory.stat`.
    pub memory_stat: BTreeMap<String, u64>,
    /// Kills by the memory limit.
    pub oom_kills: Option<u64>,
    /// Processes and threads.
    pub pids_current: Option<u64>,
    /// Their limit; absent when there is none.
    pub pids_limit: Option<u64>,
    /// Every line of `io.stat` (`rbytes`, `wbytes`, `rios`, `wios`) or `blkio.throttle.*` by device `major:minor`.
    pub io: BTreeMap<String, BTreeMap<String, u64>>,
    /// Bytes of huge pages in use, by page size (`2MB`).
    pub hugetlb_usage: BTreeMap<String, u64>,
}

/// What the processor quota did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttling {
    /// Periods that passed.
    pub periods: u64,
    /// Periods in which it was held back.
    pub throttled_periods: u64,
    /// For how long, in nanoseconds.
    pub throttled_ns: u64,
}

/// Tells when the memory limit kills.
#[derive(Debug)]
pub struct OomWatch {
    /// Readable (for poll or epoll) when there may be news; then call [`OomWatch::kills`].
    pub fd: OwnedFd,
}

impl OomWatch {
    /// Takes the news off the descriptor and tells how many processes the limit has killed so far; `None` when the
    /// cgroup is gone.
    pub fn kills(&mut self) -> Result<Option<u64>, Error> {
        Err(Error::Unavailable { feature: "oom events", reason: "not written yet".to_owned() })
    }
}
