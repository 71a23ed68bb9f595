//! Another process in a running container, confined as the first one.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use oci_spec::runtime::Process;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::cgroup::Entry;
use crate::container::Container;
use crate::error::Error;
use crate::host::fork::{Forked, fork, reap};
use crate::host::join::{self, JoinPlan};
use crate::host::link::{self, Message, Received};
use crate::plan::process::{self, Common};
use crate::stdio::Stdio;
use crate::steps;

/// How long a process may take from the fork to its program.
const LIMIT: Duration = Duration::from_secs(60);

/// What to run in a container.
#[derive(Debug)]
pub struct Exec<'a> {
    /// Program, user, capabilities, limits, … as the specification's `process` has them. Nothing of the first process is
    /// inherited but what the specification gives to the whole container: cgroups, namespaces, seccomp, keyring, mounts.
    pub process: &'a Process,
    /// Its streams; [`Stdio::Terminal`] when `process.terminal` is set.
    pub stdio: Stdio,
    /// Whether orphans of its process tree become its children (`PR_SET_CHILD_SUBREAPER`), so that the tree can be found
    /// and ended whole.
    pub subreaper: bool,
}

/// A process that was just started. It is a child of the caller, who must reap it ([`crate::wait::reap`] helps).
#[derive(Debug)]
pub struct Child {
    /// Its id in the caller's PID namespace.
    pub pid: i32,
    /// The same, safe from reuse; readable when it has ended.
    pub pidfd: OwnedFd,
    /// The master side of its terminal, when one was asked for.
    pub console: Option<OwnedFd>,
    /// What could not be done but does not stop the process, one sentence each.
    pub warnings: Vec<String>,
}

impl Container {
    /// Runs a process in the container's cgroups and namespaces; returns when its program has begun, or with the reason
    /// why it did not.
    ///
    /// Blocks for some milliseconds; safe to call from any thread of the caller.
    pub fn exec(&self, exec: Exec<'_>) -> Result<Child, Error> {
        let init = self.pidfd()?;
        let root = Path::new("/proc").join(self.pid.to_string()).join("root");
        let root = rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let common = Common {
            id: self.id.clone(),
            seccomp: self.seccomp.clone(),
            subreaper: exec.subreaper,
            root: root.ok(),
        };
        let mut warnings = crate::container::missing_capabilities(exec.process);
        let mut process = process::plan(exec.process, exec.stdio, common)?;
        if process.oom_score_adj.is_none() {
            // As runc does: what runs in a container is as dear as its first process.
            process.oom_score_adj = std::fs::read(format!("/proc/{}/oom_score_adj", self.pid)).ok();
        }
        let Entry { into, enter } = self.cgroups.entry()?;
        let pids = libc::CLONE_NEWPID.cast_unsigned();
        let plan = JoinPlan { process, enter, init, namespaces: self.namespaces & !pids };
        let pids = (self.namespaces & pids != 0).then_some(plan.init.as_fd());
        let make =
            |into: Option<&OwnedFd>| fork(0, into.map(AsFd::as_fd), pids, |socket| join::run(&plan, socket));
        let child = match make(into.as_ref()) {
            // The container made cgroups of its own and moved into one of them.
            Err(Error::Step { source, .. }) if source.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                make(self.cgroups.of_process(self.pid)?.as_ref())?
            }
            other => other?,
        };
        match self.begun(&plan, &child, &mut warnings) {
            Ok(console) => Ok(Child { pid: child.pid, pidfd: child.pidfd, console, warnings }),
            Err(error) => {
                child.discard();
                Err(error)
            }
        }
    }

    fn begun(
        &self,
        plan: &JoinPlan,
        child: &Forked,
        warnings: &mut Vec<String>,
    ) -> Result<Option<OwnedFd>, Error> {
        let mut console = None;
        loop {
            match link::receive(&child.socket, LIMIT).map_err(Error::step("hear from the process"))? {
                Received::Message(Message::Terminal, descriptor) => console = descriptor,
                Received::Message(Message::Ready(bits), _) => warnings.extend(steps::warnings(bits)),
                Received::Message(Message::Failed(failure), _) => {
                    reap(child.pidfd.as_fd());
                    return Err(self.pidfd().map_or_else(|gone| gone, |_| plan.error(failure)));
                }
                // The socket closes by itself when the program begins.
                Received::Closed => return Ok(console),
                Received::Message(..) => return Err(Error::Died("an odd message".to_owned())),
                Received::Late => return Err(Error::Died(format!("not ready after {LIMIT:?}"))),
            }
        }
    }
}
