//! An additional process of a container, up to its program. Runs in the child.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};

use super::finish::{self, OwnFiles, fail};
use super::{link, sys, tty};
use crate::plan::process::{ProcessPlan, Streams};
use crate::steps::{At, Outcome, Step};

/// What an additional process needs beside its own plan.
#[derive(Debug)]
pub(crate) struct JoinPlan {
    pub(crate) process: ProcessPlan,
    /// The container's cgroups that the fork did not already put it in.
    pub(crate) enter: Vec<OwnedFd>,
    /// The container's first process.
    pub(crate) init: OwnedFd,
    /// The namespaces to join, but PID.
    pub(crate) namespaces: u32,
}

/// Joins and becomes the program.
pub(crate) fn run(plan: &JoinPlan, socket: OwnedFd) -> Infallible {
    match prepare(plan, &socket) {
        Ok((own, warnings)) => finish::become_program(&plan.process, own, socket, false, warnings),
        Err(failure) => fail(socket.as_fd(), failure),
    }
}

fn prepare(plan: &JoinPlan, socket: &OwnedFd) -> Outcome<(OwnFiles, u32)> {
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Session)?;
    finish::enter_cgroups(&plan.enter)?;
    let warnings = finish::limits(&plan.process)?;
    let own = OwnFiles::open(&plan.process)?;
    rustix::process::setsid().map(|_| ()).at(Step::Session)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    if plan.namespaces != 0 {
        sys::setns(plan.init.as_fd(), plan.namespaces).at(Step::JoinNamespace)?;
    }
    if plan.namespaces & libc::CLONE_NEWUSER.cast_unsigned() != 0 {
        finish::become_root()?;
        // Changing ids made the process's memory visible again.
        sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Session)?;
    }
    finish::keyring(&plan.process)?;
    finish::schedule(&plan.process)?;
    let terminal = match &plan.process.streams {
        Streams::Terminal(size) => {
            let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
            let root = rustix::fs::openat(CWD, c"/", flags, Mode::empty()).at(Step::Terminal)?;
            let terminal = tty::open(root.as_fd(), c"dev/ptmx", *size).at(Step::Terminal)?;
            link::send_terminal(socket.as_fd(), terminal.master.as_fd()).at(Step::Terminal)?;
            Some(terminal.slave)
        }
        Streams::Files(_) => None,
    };
    finish::streams(&plan.process, terminal.as_ref())?;
    Ok((own, warnings))
}
