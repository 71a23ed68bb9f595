//! The life of a container: created, started, signalled, updated, deleted.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use oci_spec::runtime::{Capabilities, LinuxCapabilities, LinuxResources, Process, Spec};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::cgroup::{self, CgroupDriver, OomWatch, Stats};
use crate::error::Error;
use crate::hooks::{AtStart, Hooks, Last, StartHooks};
use crate::host::fork::{Forked, fork, reap};
use crate::host::link::{self, Message, Received};
use crate::host::{idmap, init, sys};
use crate::plan::process::Common;
use crate::plan::{self, ContainerPlan, Given, UserNamespace};
use crate::seccomp::{self, Filter};
use crate::stdio::Stdio;
use crate::steps;

/// How long a process may take to set up, or from the word to start to its program.
const LIMIT: Duration = Duration::from_secs(120);
/// How long cgroups of a container that could not be made may take to go away.
const CLEAN_UP: Duration = Duration::from_secs(10);

/// Everything that a container is made of.
#[derive(Debug)]
pub struct Create<'a> {
    /// Its id: used in names of cgroups (where the specification gives no path) and of its session keyring.
    pub id: &'a str,
    /// What it is. `root.path` is not read: see `rootfs`.
    pub spec: &'a Spec,
    /// The directory of its specification, which hooks are told.
    pub bundle: &'a Path,
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
        let spec = self.spec;
        let linux = spec.linux().as_ref().ok_or_else(|| Error::spec("linux", "is missing"))?;
        let process = spec.process().as_ref().ok_or_else(|| Error::spec("process", "is missing"))?;
        let profile = linux.seccomp().as_ref();
        let seccomp = profile.map(|profile| seccomp::compile(profile, self.seccomp_cache)).transpose()?;
        let root =
            rustix::fs::open(self.rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(Error::step(format!("open the root file system {}", self.rootfs.display())))?;
        let common =
            Common { id: self.id.to_owned(), seccomp: seccomp.clone(), subreaper: false, root: Some(root) };
        let mut process_plan = plan::process::plan(process, self.stdio, common)?;
        let (hooks, start_hooks) = Hooks::plan(spec, self.id, self.bundle)?.unzip();
        process_plan.hooks = start_hooks.flatten();
        let start_hooks = process_plan.hooks.as_ref().map(StartHooks::summary);
        let path = linux.cgroups_path().as_deref();
        let resources = linux.resources().as_ref();
        let (cgroups, placeholder) = cgroup::Paths::make(self.cgroups, self.id, path, resources)?;
        let made = cgroups.entry().and_then(|entry| {
            let given = Given { rootfs: self.rootfs, process: process_plan, entry, cgroups: &cgroups, hooks };
            let mut plan = plan::plan(spec, given)?;
            match make(&mut plan, &cgroups, resources) {
                Ok(made) => Ok((made, plan.hooks)),
                Err(error) => {
                    if let Some(hooks) = &plan.hooks {
                        hooks.given_up();
                    }
                    Err(error)
                }
            }
        });
        drop(placeholder);
        let (made, hooks) = match made {
            Ok(made) => made,
            Err(error) => {
                // The first error is the one to tell.
                let _also_failed = cgroups.delete(CLEAN_UP);
                return Err(error);
            }
        };
        let (at_start, last) = hooks.map(|hooks| hooks.ready(made.process.pid, start_hooks)).unzip();
        let annotations = spec.annotations().iter().flatten();
        let mut warnings = missing_capabilities(process);
        warnings.extend(steps::warnings(made.warnings));
        let container = Container {
            id: self.id.to_owned(),
            pid: made.process.pid,
            start_time: start_time(made.process.pid).unwrap_or(0),
            namespaces: foreign_namespaces(made.process.pid),
            cgroups,
            seccomp,
            annotations: annotations.map(|(key, value)| (key.clone(), value.clone())).collect(),
            last: last.flatten(),
        };
        Ok(Created {
            container,
            pending: Pending { socket: made.process.socket, program: program_name(process), hooks: at_start },
            pidfd: made.process.pidfd,
            console: made.console,
            warnings,
        })
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
    socket: OwnedFd,
    program: String,
    hooks: Option<AtStart>,
}

impl Pending {
    /// Lets the program run; returns when it has begun, or with the reason why it cannot (the process ends then). When a
    /// hook fails that runs after its beginning, the program still runs, and the caller must end it.
    pub fn start(self) -> Result<(), Error> {
        let hooks_limit = self.hooks.as_ref().map(AtStart::begin).transpose()?.unwrap_or_default();
        if link::send(self.socket.as_fd(), Message::Go).is_err() {
            return Err(Error::Died("it had ended before it was started".to_owned()));
        }
        let heard = link::receive(&self.socket, LIMIT + hooks_limit);
        match heard.map_err(Error::step("hear from the container's process"))? {
            // The socket closes by itself when the program begins.
            Received::Closed => self.hooks.as_ref().map_or(Ok(()), AtStart::started),
            Received::Message(Message::Failed(failure), _) => {
                Err(plan::words::start_error(&self.program, self.hooks.as_ref(), failure))
            }
            Received::Message(..) => Err(Error::Died("an odd message".to_owned())),
            Received::Late => Err(Error::Died(format!("its program has not begun after {LIMIT:?}"))),
        }
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
    /// Its annotations as the specification has them.
    pub annotations: BTreeMap<String, String>,
    /// The compiled system call filter of all its processes.
    pub(crate) seccomp: Option<Filter>,
    /// Hooks that run when it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) last: Option<Last>,
}

impl Container {
    /// Opens the first process; fails with [`Error::NotRunning`] when it has ended, also when its id was taken by another.
    pub fn pidfd(&self) -> Result<OwnedFd, Error> {
        let gone = || Error::NotRunning(self.id.clone());
        let pid = Pid::from_raw(self.pid).ok_or_else(gone)?;
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Err(gone()) };
        // Opened first and looked at second: now the id cannot change hands.
        if start_time(self.pid) != Some(self.start_time) {
            return Err(gone());
        }
        Ok(pidfd)
    }

    /// Sends a signal to the first process.
    pub fn kill(&self, signal: i32) -> Result<(), Error> {
        let pidfd = self.pidfd()?;
        match sys::send_signal(pidfd.as_fd(), signal) {
            Err(rustix::io::Errno::SRCH) => Err(Error::NotRunning(self.id.clone())),
            other => other.map_err(Error::step(format!("send signal {signal} to {}", self.pid))),
        }
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

    /// Runs its `poststop` hooks, after [`Self::delete`], all of them within `limit`. Gives what went wrong, a sentence each:
    /// nothing is undone by it.
    pub fn run_poststop(&self, limit: Duration) -> Vec<String> {
        self.last.as_ref().map(|last| last.run(limit)).unwrap_or_default()
    }
}

fn program_name(process: &Process) -> String {
    process.args().iter().flatten().next().cloned().unwrap_or_default()
}

/// A container's process that is ready.
struct Made {
    process: Forked,
    console: Option<OwnedFd>,
    warnings: u32,
}

fn make(
    plan: &mut ContainerPlan,
    cgroups: &cgroup::Paths,
    resources: Option<&LinuxResources>,
) -> Result<Made, Error> {
    let into = plan.into.as_ref().map(AsFd::as_fd);
    let first = match &plan.user {
        None => {
            let pids = plan.pids.as_ref().map(|join| join.file.as_fd());
            fork(plan.new_namespaces, into, pids, |socket| init::run(plan, socket))?
        }
        Some(user) => fork(0, into, None, |socket| init::run_helper(plan, user, &socket))?,
    };
    let helper = plan.user.is_some();
    let limits = Limits { cgroups, resources };
    let mut hearing = Hearing { plan, limits, helper, hooks: false, made: None, console: None };
    let heard = hearing.until_ready(&first);
    let ready = heard.and_then(|warnings| {
        // Only now: a small quota would make the set-up slow. Hooks may have changed what was set before them.
        if !hearing.plan.hooks.as_ref().is_some_and(Hooks::before_root) {
            cgroups.set_all(resources)?;
        }
        Ok(warnings)
    });
    match ready {
        Ok(warnings) => {
            let process = match hearing.made.take() {
                Some((pid, pidfd)) => Forked { pid, pidfd, socket: first.socket },
                None => first,
            };
            Ok(Made { process, console: hearing.console, warnings })
        }
        Err(error) => {
            hearing.late_child(&first);
            if let Some((_, pidfd)) = &hearing.made {
                let _ended = sys::send_signal(pidfd.as_fd(), libc::SIGKILL);
                reap(pidfd.as_fd());
            }
            if !hearing.helper || hearing.made.is_none() {
                first.discard();
            }
            Err(error)
        }
    }
}

/// What the cgroups are set to.
struct Limits<'a> {
    cgroups: &'a cgroup::Paths,
    resources: Option<&'a LinuxResources>,
}

/// Following a process from the fork until it is ready.
struct Hearing<'a> {
    plan: &'a mut ContainerPlan,
    limits: Limits<'a>,
    /// Whether the first process is a helper that makes the container's.
    helper: bool,
    /// Whether the child waits for hooks.
    hooks: bool,
    made: Option<(i32, OwnedFd)>,
    console: Option<OwnedFd>,
}

impl Hearing<'_> {
    fn until_ready(&mut self, first: &Forked) -> Result<u32, Error> {
        let mut ready = None;
        let limit = LIMIT + self.plan.hooks.as_ref().map(Hooks::limit).unwrap_or_default();
        loop {
            self.run_hooks(first)?;
            if let Some(warnings) = ready.filter(|_| !self.helper || self.made.is_some()) {
                return Ok(warnings);
            }
            match link::receive(&first.socket, limit)
                .map_err(Error::step("hear from the container's process"))?
            {
                Received::Message(Message::Hooks, _) => self.hooks = true,
                Received::Message(Message::Ready(warnings), _) => ready = Some(warnings),
                Received::Message(Message::Terminal, descriptor) => self.console = descriptor,
                Received::Message(Message::MapMe, _) => self.map(first)?,
                Received::Message(Message::Made(pid), _) => self.adopt(pid, first)?,
                Received::Message(Message::Failed(failure), _) => return Err(self.plan.error(failure)),
                Received::Message(Message::Go, _) => return Err(Error::Died("an odd message".to_owned())),
                Received::Closed => {
                    return Err(Error::Died("killed, by the memory limit or from outside".to_owned()));
                }
                Received::Late => return Err(Error::Died(format!("not ready after {LIMIT:?}"))),
            }
        }
    }

    /// Runs hooks that the child waits for, as soon as its id is known.
    fn run_hooks(&mut self, first: &Forked) -> Result<(), Error> {
        let pid = match &self.made {
            _ if !self.hooks => return Ok(()),
            Some((pid, _)) => *pid,
            None if self.helper => return Ok(()),
            None => first.pid,
        };
        self.hooks = false;
        self.limits.cgroups.set_all(self.limits.resources)?;
        if let Some(hooks) = &mut self.plan.hooks {
            hooks.created(pid)?;
        }
        link::send(first.socket.as_fd(), Message::Go).map_err(Error::step("speak to the container's process"))
    }

    fn map(&self, first: &Forked) -> Result<(), Error> {
        if let Some(UserNamespace::New { uid_map, gid_map }) = &self.plan.user {
            idmap::write_maps(first.pid, uid_map, gid_map)?;
        }
        link::send(first.socket.as_fd(), Message::Go).map_err(Error::step("speak to the container's process"))
    }

    /// The helper has made the container's process, a child of ours, and ends.
    fn adopt(&mut self, pid: i32, first: &Forked) -> Result<(), Error> {
        reap(first.pidfd.as_fd());
        let id = Pid::from_raw(pid).ok_or_else(|| Error::Died("an odd process id".to_owned()))?;
        let pidfd =
            pidfd_open(id, PidfdFlags::empty()).map_err(Error::step("open the container's process"))?;
        self.made = Some((pid, pidfd));
        Ok(())
    }

    /// After a failure: the helper may have made a process that we have not heard of.
    fn late_child(&mut self, first: &Forked) {
        while self.helper && self.made.is_none() {
            match link::receive(&first.socket, Duration::from_secs(1)) {
                Ok(Received::Message(Message::Made(pid), _)) => {
                    let _unknown = self.adopt(pid, first);
                    return;
                }
                Ok(Received::Message(..)) => {}
                _ => return,
            }
        }
    }
}

/// When a process began: the 22nd figure of its `stat`.
pub(crate) fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may contain anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The namespaces of a process that are not ours.
fn foreign_namespaces(pid: i32) -> u32 {
    [
        ("mnt", libc::CLONE_NEWNS),
        ("uts", libc::CLONE_NEWUTS),
        ("ipc", libc::CLONE_NEWIPC),
        ("net", libc::CLONE_NEWNET),
        ("pid", libc::CLONE_NEWPID),
        ("user", libc::CLONE_NEWUSER),
        ("cgroup", libc::CLONE_NEWCGROUP),
    ]
    .into_iter()
    .filter(|(name, _)| {
        let theirs = rustix::fs::stat(format!("/proc/{pid}/ns/{name}"));
        let ours = rustix::fs::stat(format!("/proc/thread-self/ns/{name}"));
        match (theirs, ours) {
            (Ok(theirs), Ok(ours)) => (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino),
            _ => false,
        }
    })
    .fold(0, |bits, (_, flag)| bits | flag.cast_unsigned())
}

/// Capabilities that are asked for and that this process does not hold itself.
pub(crate) fn missing_capabilities(process: &Process) -> Vec<String> {
    let held = rustix::thread::capabilities(None).map_or(u64::MAX, |sets| sets.permitted.bits());
    let Some(LinuxCapabilities { .. }) = process.capabilities() else { return Vec::new() };
    let permitted: Option<&Capabilities> =
        process.capabilities().as_ref().and_then(|caps| caps.permitted().as_ref());
    let mut names: Vec<String> = permitted
        .into_iter()
        .flatten()
        .filter(|name| plan::caps::number(**name).is_none_or(|number| held & (1 << number) == 0))
        .map(|name| format!("CAP_{name}").replace("CAP_CAP_", "CAP_"))
        .collect();
    names.sort();
    if names.is_empty() {
        return Vec::new();
    }
    vec![format!("process.capabilities: this host does not have {}", names.join(", "))]
}
