//! The dialling side: a process of its own, so that it can be moved between a cgroup with hooks and one without, in
//! the client's network namespace. Asked and answering by lines of JSON.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddrV4, TcpStream, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{setsockopt, sockopt::Linger};
use serde::{Deserialize, Serialize};

use super::namespaces::{Namespace, pin};
use crate::arena::end_with_us;

/// What a block of work consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Connect, read the server's byte, reset.
    Connections,
    /// One byte there and one back on one open connection.
    Requests,
    /// The call `connect` of a datagram socket, which sends nothing: the hook, and what the kernel does anyway.
    Calls,
}

/// A block to work off.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) work: Work,
    pub(super) target: SocketAddrV4,
    pub(super) count: u32,
}

/// How a block went.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Block {
    /// Repetitions.
    pub count: u32,
    /// All of them together.
    pub seconds: f64,
    /// Median of one, in microseconds; of a connection: of its `connect`.
    pub p50_us: f64,
    /// 99th percentile of one, in microseconds.
    pub p99_us: f64,
}

impl Block {
    /// Repetitions per second.
    #[must_use]
    pub fn per_sec(&self) -> f64 {
        f64::from(self.count) / self.seconds
    }
}

/// The process, as its starter sees it. Ended when dropped.
pub(super) struct Client {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    cgroup: PathBuf,
}

impl Client {
    /// Starts it in a namespace, where hooks are not (see [`Self::live_in`]).
    pub(super) fn start(namespace: &Namespace) -> Result<Self> {
        let spawned = namespace.run(|| {
            let program = std::env::current_exe()?;
            end_with_us(&mut Command::new(program))
                .arg("client")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
        })?;
        let mut child = spawned.context("start the client")?;
        let ask = child.stdin.take().context("the client's input")?;
        let answers = BufReader::new(child.stdout.take().context("the client's output")?);
        Ok(Self { child, ask, answers, cgroup: PathBuf::new() })
    }

    /// Moves it to a cgroup: what it opens afterwards belongs there.
    pub(super) fn live_in(&mut self, cgroup: &Path) -> Result<()> {
        if self.cgroup != cgroup {
            fs::write(cgroup.join("cgroup.procs"), self.child.id().to_string())
                .with_context(|| format!("move the client to {}", cgroup.display()))?;
            cgroup.clone_into(&mut self.cgroup);
        }
        Ok(())
    }

    /// Has a block worked off.
    pub(super) fn run(&mut self, task: Task) -> Result<Block> {
        writeln!(self.ask, "{}", serde_json::to_string(&task)?).context("the client is gone")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let answer: Result<Block, String> =
            serde_json::from_str(&line).with_context(|| format!("{task:?}: {line:?}"))?;
        answer.map_err(anyhow::Error::msg).with_context(|| format!("{task:?}"))
    }
}

impl Client {
    /// Ends it and waits until it has.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.stop());
    }
}

/// The process itself: works off one block per line of its input.
pub fn serve(input: impl BufRead, mut output: impl Write) -> Result<()> {
    pin(0);
    for line in input.lines() {
        let task: Task = serde_json::from_str(&line?).context("a task")?;
        let outcome = work(&task).map_err(|error| format!("{error:#}"));
        writeln!(output, "{}", serde_json::to_string(&outcome)?)?;
        output.flush()?;
    }
    Ok(())
}

fn work(task: &Task) -> Result<Block> {
    if task.count == 0 {
        bail!("an empty block");
    }
    let mut nanos = Vec::with_capacity(task.count as usize);
    let start = Instant::now();
    match task.work {
        Work::Connections => connections(task, &mut nanos)?,
        Work::Requests => requests(task, &mut nanos)?,
        Work::Calls => calls(task, &mut nanos)?,
    }
    let seconds = start.elapsed().as_secs_f64();
    nanos.sort_unstable();
    #[allow(clippy::cast_precision_loss, reason = "microseconds for people")]
    let at =
        |percent: usize| nanos.get(nanos.len() * percent / 100).copied().unwrap_or_default() as f64 / 1000.0;
    Ok(Block { count: task.count, seconds, p50_us: at(50), p99_us: at(99) })
}

fn connections(task: &Task, nanos: &mut Vec<u128>) -> Result<()> {
    for _ in 0..task.count {
        let begin = Instant::now();
        let mut stream = TcpStream::connect(task.target).context("connect")?;
        nanos.push(begin.elapsed().as_nanos());
        stream.read_exact(&mut [0]).context("read the byte")?;
        // Reset instead of waiting: TIME_WAIT would use the ports up.
        setsockopt(&stream.as_fd(), Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    }
    Ok(())
}

fn requests(task: &Task, nanos: &mut Vec<u128>) -> Result<()> {
    let mut stream = TcpStream::connect(task.target).context("connect")?;
    stream.set_nodelay(true)?;
    for _ in 0..task.count {
        let begin = Instant::now();
        stream.write_all(b"x").context("ask")?;
        stream.read_exact(&mut [0]).context("read the answer")?;
        nanos.push(begin.elapsed().as_nanos());
    }
    setsockopt(&stream.as_fd(), Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    Ok(())
}

fn calls(task: &Task, nanos: &mut Vec<u128>) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    for _ in 0..task.count {
        let begin = Instant::now();
        socket.connect(task.target).context("connect a datagram socket")?;
        nanos.push(begin.elapsed().as_nanos());
    }
    Ok(())
}
