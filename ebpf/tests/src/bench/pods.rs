//! Two pods and the node between them: network namespaces joined by veth pairs, a server in one, a client in the
//! other.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::mpsc::{Receiver, Sender, channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, unshare},
    sys::socket::{setsockopt, sockopt::Linger},
    unistd::{Pid, gettid},
};

use crate::{arena::ip, servers::DEADLINE};

/// The server's address.
pub(super) const BACKEND: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 244, 2, 2)), 8080);
/// The service's address.
pub(super) const VIP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);

/// A block of connections to make.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockSpec {
    pub(super) target: SocketAddr,
    pub(super) connections: u32,
}

impl BlockSpec {
    pub(super) fn direct(connections: u32) -> Self {
        Self { target: BACKEND, connections }
    }

    pub(super) fn service(connections: u32) -> Self {
        Self { target: VIP, connections }
    }
}

/// How a block went.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) connections: u32,
    pub(super) seconds: f64,
    pub(super) p99_us: f64,
}

impl Block {
    pub(super) fn per_sec(&self) -> f64 {
        f64::from(self.connections) / self.seconds
    }
}

/// The client's thread, to be asked for blocks. The namespaces go with the threads.
pub(super) struct Pods {
    ask: Sender<BlockSpec>,
    answer: Receiver<Result<Block>>,
}

impl Pods {
    /// Makes the pods around the calling thread's namespace, the node.
    pub(super) fn start() -> Result<Self> {
        let server = Pod::start("pod-s", "10.244.2.1", "10.244.2.2", 1)?;
        let client = Pod::start("pod-c", "10.244.1.1", "10.244.1.2", 0)?;
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("let the node forward")?;
        let listening = server.run(|| TcpListener::bind(BACKEND))??;
        server.spawn(move || serve(&listening));
        let (ask, asked) = channel::<BlockSpec>();
        let (reply, answer) = channel();
        client.spawn(move || {
            while let Ok(spec) = asked.recv() {
                if reply.send(block(spec)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { ask, answer })
    }

    /// Makes a block of connections, one after the other.
    pub(super) fn run(&self, spec: BlockSpec) -> Result<Block> {
        self.ask.send(spec).context("the client is gone")?;
        self.answer
            .recv_timeout(Duration::from_mins(1))
            .context("a block of connections takes over a minute")?
    }
}

/// A thread in a network namespace of its own.
struct Pod {
    jobs: Sender<Box<dyn FnOnce() + Send>>,
}

impl Pod {
    /// Starts it on a CPU, joined to the caller's namespace, the default route through there.
    fn start(name: &str, node_ip: &str, pod_ip: &str, cpu: usize) -> Result<Self> {
        let (jobs, work) = channel::<Box<dyn FnOnce() + Send>>();
        let (ready, started) = channel();
        std::thread::spawn(move || {
            let outcome = unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid()).map_err(anyhow::Error::from);
            pin(cpu);
            if ready.send(outcome).is_ok() {
                for job in work {
                    job();
                }
            }
        });
        let thread = started.recv()??;
        let pod = Self { jobs };
        ip(&["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", &thread.to_string()])?;
        ip(&["addr", "add", &format!("{node_ip}/24"), "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        let (node_ip, pod_ip) = (node_ip.to_owned(), pod_ip.to_owned());
        pod.run(move || {
            ip(&["link", "set", "lo", "up"])?;
            ip(&["addr", "add", &format!("{pod_ip}/24"), "dev", "eth0"])?;
            ip(&["link", "set", "eth0", "up"])?;
            ip(&["route", "add", "default", "via", &node_ip])
        })??;
        Ok(pod)
    }

    /// Runs something there and waits for it.
    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (done, outcome) = channel();
        self.spawn(move || drop(done.send(job())));
        outcome.recv_timeout(DEADLINE).context("a pod's thread does not answer")
    }

    fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        // A thread that is gone shows as a missing answer.
        drop(self.jobs.send(Box::new(job)));
    }
}

/// Client and server must not share a CPU; a machine with one CPU measures what it can.
fn pin(cpu: usize) {
    let mut cpus = CpuSet::new();
    if cpus.set(cpu).is_ok() {
        let _unpinned = sched_setaffinity(Pid::from_raw(0), &cpus);
    }
}

/// One byte for everybody, then goodbye.
fn serve(listener: &TcpListener) {
    while let Ok((mut stream, _)) = listener.accept() {
        drop(stream.write_all(b"x"));
    }
}

fn block(spec: BlockSpec) -> Result<Block> {
    let mut nanos = Vec::with_capacity(spec.connections as usize);
    let start = Instant::now();
    for _ in 0..spec.connections {
        let begin = Instant::now();
        let mut stream =
            TcpStream::connect(spec.target).with_context(|| format!("connect to {}", spec.target))?;
        nanos.push(begin.elapsed().as_nanos());
        let mut byte = [0];
        stream.read_exact(&mut byte).context("read the byte")?;
        // Reset instead of waiting: TIME_WAIT would use the ports up.
        setsockopt(&stream.as_fd(), Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    }
    let seconds = start.elapsed().as_secs_f64();
    nanos.sort_unstable();
    let p99 = nanos.get(nanos.len() * 99 / 100).copied().ok_or_else(|| anyhow!("an empty block"))?;
    #[allow(clippy::cast_precision_loss, reason = "microseconds for people")]
    Ok(Block { connections: spec.connections, seconds, p99_us: p99 as f64 / 1000.0 })
}
