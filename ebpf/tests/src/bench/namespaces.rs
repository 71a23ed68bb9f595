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

/// A namespace held by a thread; it goes when its thread and everything started there has ended.
pub struct Namespace {
    jobs: Sender<Job>,
    thread: Pid,
}

impl Namespace {
    /// Starts its thread, on one CPU where the machine has it.
    pub fn start(cpu: Option<usize>) -> Result<Self> {
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

    /// Another handle of it.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { jobs: self.jobs.clone(), thread: self.thread }
    }

    /// Lets packets through that are for others.
    pub fn forward(&self) -> Result<()> {
        self.run(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?.context("let a namespace forward")
    }

    /// Runs something there and waits for it.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (done, outcome) = channel();
        self.spawn(move || drop(done.send(job())));
        outcome.recv_timeout(LIMIT).context("a namespace's thread does not answer")
    }

    /// Hands its thread over to something that may never end.
    pub fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        // A thread that is gone shows as a missing answer.
        drop(self.jobs.send(Box::new(job)));
    }

    /// Joins this namespace's device to another's, each with its address.
    pub fn join(
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

    /// The same with a device of the calling thread's namespace.
    pub fn join_caller(
        &self,
        (name, address): (&str, &str),
        (peer, peer_address): (&str, &str),
    ) -> Result<()> {
        let thread = self.thread.to_string();
        ip(&["link", "add", name, "type", "veth", "peer", "name", peer, "netns", &thread])?;
        up(name, address)?;
        let (peer, peer_address) = (peer.to_owned(), peer_address.to_owned());
        self.run(move || up(&peer, &peer_address))?
    }

    /// Joins a bridge of the calling thread's namespace: `port` there, `device` with this link address and these addresses
    /// here.
    pub fn plug(
        &self,
        (bridge, port): (&str, &str),
        device: &str,
        link_address: &str,
        addresses: &[&str],
    ) -> Result<()> {
        let thread = self.thread.to_string();
        let pair = ["link", "add", port, "type", "veth", "peer", "name", device, "address", link_address];
        ip(&[&pair[..], &["netns", &thread]].concat())?;
        ip(&["link", "set", port, "master", bridge])?;
        ip(&["link", "set", port, "up"])?;
        let device = device.to_owned();
        let addresses: Vec<String> = addresses.iter().map(|&address| address.to_owned()).collect();
        self.run(move || -> Result<()> {
            for address in addresses {
                ip(&["addr", "add", &address, "dev", &device, "nodad"])?;
            }
            ip(&["link", "set", &device, "up"])
        })?
    }

    /// Sends a range through a neighbour.
    pub fn route(&self, range: &str, via: &str) -> Result<()> {
        let (range, via) = (range.to_owned(), via.to_owned());
        self.run(move || ip(&["route", "add", &range, "via", &via]))?
    }
}

fn up(device: &str, address: &str) -> Result<()> {
    ip(&["addr", "add", address, "dev", device])?;
    ip(&["link", "set", device, "up"])
}

/// Client and server must not share a CPU; a machine with one CPU measures what it can.
pub(crate) fn pin(cpu: usize) {
    let mut cpus = CpuSet::new();
    if cpus.set(cpu).is_ok() {
        let _unpinned = sched_setaffinity(Pid::from_raw(0), &cpus);
    }
}
