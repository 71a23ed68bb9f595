//! The first process of a container, up to its program. Runs in the child.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::finish::{self, OwnFiles, fail};
use super::fork::fork_sibling;
use super::link::{self, Message};
use super::{attach, hook, namespaces, sys, tty};
use crate::plan::process::Streams;
use crate::plan::{ContainerPlan, UserNamespace};
use crate::steps::{At, Outcome, Step};

/// Without a user namespace: this is the container's process, already in its new namespaces.
pub(crate) fn run(plan: &ContainerPlan, socket: OwnedFd) -> Infallible {
    let begun = begin(plan).and_then(|warnings| namespaces::join(&plan.join).map(|()| warnings));
    match begun {
        Ok(warnings) => inside(plan, socket, warnings),
        Err(failure) => fail(socket.as_fd(), failure),
    }
}

/// With a user namespace: a helper that joins or makes it, and makes the container's process from within.
pub(crate) fn run_helper(plan: &ContainerPlan, user: &UserNamespace, socket: &OwnedFd) -> Infallible {
    match helper(plan, user, socket) {
        Ok(pid) => {
            let _gone = link::send(socket.as_fd(), Message::Made(pid));
            sys::exit(0)
        }
        Err(failure) => fail(socket.as_fd(), failure),
    }
}

fn helper(plan: &ContainerPlan, user: &UserNamespace, socket: &OwnedFd) -> Outcome<i32> {
    let warnings = begin(plan)?;
    namespaces::join(&plan.join)?;
    match user {
        UserNamespace::Join(namespace) => namespaces::join(std::slice::from_ref(namespace))?,
        UserNamespace::New { .. } => {
            sys::unshare(libc::CLONE_NEWUSER.cast_unsigned()).at(Step::NewNamespace)?;
            link::send(socket.as_fd(), Message::MapMe).at(Step::BecomeRoot)?;
            if !link::wait_for_go(socket.as_fd()) {
                sys::exit(1);
            }
        }
    }
    finish::become_root()?;
    fork_sibling(plan.new_namespaces, || match socket.try_clone() {
        Ok(socket) => inside(plan, socket, warnings),
        Err(_) => sys::exit(1),
    })
    .at(Step::Fork)
}

/// What needs the host: cgroups and limits.
fn begin(plan: &ContainerPlan) -> Outcome<u32> {
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Session)?;
    finish::enter_cgroups(&plan.enter)?;
    finish::limits(&plan.process)
}

/// In all namespaces but the cgroup one.
fn inside(plan: &ContainerPlan, socket: OwnedFd, warnings: u32) -> Infallible {
    match build(plan, socket.as_fd()) {
        Ok(own) => finish::become_program(&plan.process, own, socket, true, warnings),
        Err(failure) => fail(socket.as_fd(), failure),
    }
}

fn build(plan: &ContainerPlan, socket: BorrowedFd<'_>) -> Outcome<OwnFiles> {
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Session)?;
    let own = OwnFiles::open(&plan.process)?;
    rustix::process::setsid().map(|_| ()).at(Step::Session)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    if plan.new_cgroup_namespace {
        sys::unshare(libc::CLONE_NEWCGROUP.cast_unsigned()).at(Step::NewNamespace)?;
    }
    finish::keyring(&plan.process)?;
    host_settings(plan)?;
    attach::tree(plan)?;
    if let Some(hooks) = &plan.hooks {
        hook::before_root(hooks, plan.root.tree.as_fd(), socket)?;
    }
    let terminal = match &plan.process.streams {
        Streams::Terminal(size) => {
            let root = plan.root.tree.as_fd();
            let terminal = tty::open(root, c"dev/ptmx", *size).at(Step::Terminal)?;
            attach::console(root, &terminal.slave).at(Step::Terminal)?;
            link::send_terminal(socket, terminal.master.as_fd()).at(Step::Terminal)?;
            Some(terminal.slave)
        }
        Streams::Files(_) => None,
    };
    attach::seal(plan)?;
    finish::schedule(&plan.process)?;
    if let Some(domain) = plan.personality {
        sys::personality(domain).at(Step::Personality)?;
    }
    finish::streams(&plan.process, terminal.as_ref())?;
    Ok(own)
}

/// Network, names and kernel parameters of the new namespaces, while the host's `/proc` can be seen.
fn host_settings(plan: &ContainerPlan) -> Outcome<()> {
    if plan.new_namespaces & libc::CLONE_NEWNET.cast_unsigned() != 0 {
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
        socket.and_then(|socket| sys::loopback_up(socket.as_fd())).at(Step::Loopback)?;
    }
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name).at(Step::Hostname)?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name).at(Step::Domainname)?;
    }
    for (index, (path, value)) in plan.sysctls.iter().enumerate() {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let written = rustix::fs::open(path.as_c_str(), flags, Mode::empty())
            .and_then(|file| rustix::io::write(&file, value));
        match written {
            Ok(length) if length == value.len() => {}
            Ok(_) => return Err(Errno::INVAL).at_index(Step::Sysctl, index),
            Err(errno) => return Err(errno).at_index(Step::Sysctl, index),
        }
    }
    Ok(())
}
