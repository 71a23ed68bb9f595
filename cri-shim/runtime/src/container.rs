//! The life of a container: created, started, signalled, updated, deleted.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use crate::cgroup::{self, CgroupDriver, OomWatch, Stats};
use crate::error::Error;
use crate::stdio::Stdio;

/// Everything that a container is made of.
#[derive(Debug)]
pub struct Create<'a> {
    /// Its id: used in names of cgroups (where the specification gives no path) and of its session keyring.
    pub id: &'a str,
    /// What it is. `root.path` is not read: see `rootfs`.
    pub spec: &'a Spec,
    /// Its root file system, ready, on this host.
    pub rootfs: &'a Path,
    /// The first process's streams; [`Stdio::Terminal`] when `process.terminal` is set.
    pub stdio: Stdio,
    /// Who manages cgroups, and so how `linux.cgroupsPath` is written.
    pub cgroups: CgroupDriver,
    /// A directory where compiled seccomp profiles are kept by their hash (shared by all containers of the host);
    /// without one each `create` compiles.
    pub seccomp_cache: Option<&'a Path>,
}

impl Create<'_> {
    /// Makes the container's process, which waits before its program.
    ///
    /// The process is a child of the caller, who must reap it when it ends. When this fails nothing is left: the process
    /// is reaped, its cgroups are gone.
    pub fn create(self) -> Result<Created, Error> {
        drop(self.stdio);
        Err(Error::Unavailable { feature: "create", reason: format!("not written yet ({})", self.id) })
    }
}

/// A container whose first process waits before its program.
#[derive(Debug)]
pub struct Created {
    /// What can be done with it, and what to write down.
    pub container: Container,
    /// Starts it. Dropped unused (or with the caller's end) the process ends with status 1.
    pub pending: Pending,
    /// The first process, safe from reuse of its id; readable when it has ended.
    pub pidfd: OwnedFd,
    /// The master side of its terminal, when one was asked for.
    pub console: Option<OwnedFd>,
    /// What could not be done but does not stop the container, one sentence each (an `oom_score_adj` that needs a
    /// capability that the host has not).
    pub warnings: Vec<String>,
}

/// The right to start a created container, once.
#[derive(Debug)]
pub struct Pending {
    pub(crate) socket: OwnedFd,
    pub(crate) program: String,
}

impl Pending {
    /// Lets the program run; returns when it has begun, or with the reason why it cannot (the process ends then).
    pub fn start(self) -> Result<(), Error> {
        drop(self.socket);
        Err(Error::Unavailable { feature: "start", reason: format!("not written yet ({})", self.program) })
    }
}

/// A container that exists. Its JSON form lets another process take it up (all but starting it).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its first process in the PID namespace of the process that made it.
    pub pid: i32,
    /// When that process began, in the kernel's ticks: with the pid it names one process for ever.
    pub start_time: u64,
    /// Its cgroups.
    pub cgroups: cgroup::Paths,
    /// The namespaces (`CLONE_NEW*`) that are not the maker's: those an exec must join.
    pub namespaces: u32,
    /// Its own annotations as the specification has them.
    pub annotations: BTreeMap<String, String>,
}

impl Container {
    /// Opens the first process; fails with [`Error::NotRunning`] when it has ended, also when its id was taken by another.
    pub fn pidfd(&self) -> Result<OwnedFd, Error> {
        Err(Error::NotRunning(self.id.clone()))
    }

    /// Sends a signal to the first process.
    pub fn kill(&self, signal: i32) -> Result<(), Error> {
        Err(Error::Unavailable { feature: "kill", reason: format!("not written yet ({signal})") })
    }

    /// Sends a signal to every process in the container's cgroups; no error when there is none.
    pub fn kill_all(&self, signal: i32) -> Result<(), Error> {
        self.cgroups.kill_all(signal)
    }

    /// The ids of all processes in it, as this process's PID namespace has them.
    pub fn pids(&self) -> Result<Vec<i32>, Error> {
        self.cgroups.pids()
    }

    /// Changes its resources; what is absent stays as it is.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        self.cgroups.update(resources)
    }

    /// Freezes all its processes; returns when they are.
    pub fn pause(&self) -> Result<(), Error> {
        self.cgroups.freeze(true, Duration::from_secs(10))
    }

    /// Thaws them.
    pub fn resume(&self) -> Result<(), Error> {
        self.cgroups.freeze(false, Duration::from_secs(10))
    }

    /// What it has used.
    pub fn stats(&self) -> Result<Stats, Error> {
        self.cgroups.stats()
    }

    /// Watches for kills by the memory limit.
    pub fn oom_watch(&self) -> Result<OomWatch, Error> {
        self.cgroups.oom_watch()
    }

    /// Removes what is left of it when its first process has ended: kills what still runs in its cgroups (with a private
    /// PID namespace nothing does) and removes them, within `deadline`. A second call finds nothing to do. Mounts of the
    /// root file system and the streams are the caller's.
    pub fn delete(&self, deadline: Duration) -> Result<(), Error> {
        self.cgroups.delete(deadline)
    }
}
