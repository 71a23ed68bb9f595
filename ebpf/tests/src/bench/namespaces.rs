//! Network namespaces, each held by a thread that works in it, and the veth pairs between them.

use std::{
    fs,
    sync::mpsc::{Sender, channel},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, unshare},
    unistd::{Pid, gettid},
};

use crate::arena::ip;

/// Longest work that is waited for: a rule set of many services.
const LIMIT: Duration = Duration::from_mins(20);

type Job = Box<dyn FnOnce() + Send>;

/// A namespace; it goes when its thread and everything started there has ended.
pub(super) struct Namespace {
    jobs: Sender<Job>,
    thread: Pid,
}

impl Namespace {
    /// Starts its thread, on one CPU where the machine has it.
    pub(super) fn start(cpu: Option<usize>) -> Result<Self> {
        let (jobs, work) = channel::<Job>();
        let (ready, started) = channel();
        std::thread::spawn(move || {
            let outcome = unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid()).map_err(anyhow::Error::from);
            if let Some(cpu) = cpu {
                pin(cpu);
            }
            if ready.send(outcome).is_ok() {
                for job in work {
                    job();
                }
            }
        });
        let namespace = Self { jobs, thread: started.recv()?? };
        namespace.run(|| ip(&["link", "set", "lo", "up"]))??;
        Ok(namespace)
    }

    /// Lets packets through that are for others.
    pub(super) fn forward(&self) -> Result<()> {
        self.run(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?.context("let a namespace forward")
    }

    /// Runs something there and waits for it.
    pub(super) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (done, outcome) = channel();
        self.spawn(move || drop(done.send(job())));
        outcome.recv_timeout(LIMIT).context("a namespace's thread does not answer")
    }

    /// Hands its thread over to something that may never end.
    pub(super) fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        // A thread that is gone shows as a missing answer.
        drop(self.jobs.send(Box::new(job)));
    }

    /// Joins this namespace's device to another's, each with its address.
    pub(super) fn join(
        &self,
        (name, address): (&str, &str),
        other: &Self,
        (peer, peer_address): (&str, &str),
    ) -> Result<()> {
        let thread = other.thread.to_string();
        let (own, address) = (name.to_owned(), address.to_owned());
        let theirs = peer.to_owned();
        self.run(move || {
            ip(&["link", "add", &own, "type", "veth", "peer", "name", &theirs, "netns", &thread])?;
            up(&own, &address)
        })??;
        let (peer, peer_address) = (peer.to_owned(), peer_address.to_owned());
        other.run(move || up(&peer, &peer_address))?
    }

    /// Sends a range through a neighbour.
    pub(super) fn route(&self, range: &str, via: &str) -> Result<()> {
        let (range, via) = (range.to_owned(), via.to_owned());
        self.run(move || ip(&["route", "add", &range, "via", &via]))?
    }
}

fn up(device: &str, address: &str) -> Result<()> {
    ip(&["addr", "add", address, "dev", device])?;
    ip(&["link", "set", device, "up"])
}

/// Client and server must not share a CPU; a machine with one CPU measures what it can.
pub(super) fn pin(cpu: usize) {
    let mut cpus = CpuSet::new();
    if cpus.set(cpu).is_ok() {
        let _unpinned = sched_setaffinity(Pid::from_raw(0), &cpus);
    }
}
