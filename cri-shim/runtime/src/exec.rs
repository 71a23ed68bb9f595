//! Another process in a running container, confined as the first one.

use std::os::fd::OwnedFd;

use oci_spec::runtime::Process;

use crate::container::Container;
use crate::error::Error;
use crate::stdio::Stdio;

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
        drop(exec);
        Err(Error::Unavailable { feature: "exec", reason: format!("not written yet ({})", self.id) })
    }
}
