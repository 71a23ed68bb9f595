//! From a container's pipes or terminal to its log file (CRI format) or FIFO, and to whoever is attached.
//!
//! One thread per container (and per exec process with a terminal), so that a slow disk or reader holds up nobody else. When
//! the log cannot be written, output is dropped: the container goes on. Bytes are written as soon as they are read; only an
//! unfinished line waits in memory. An end is told a while later when the disk does not take the last output.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use cri_shim_core::log_line::{LineSplitter, LogStream};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::follower::Follower;
use crate::log_file::LogFile;
use crate::protocol::Kind;
use crate::threads;

/// Most bytes read before they are written.
const BATCH: usize = 64 * 1024;
/// Most batches that are read of streams that have been told to stop: a full pipe of short lines makes some tens.
const MOST_BATCHES: usize = 256;
/// Most input held for a terminal that takes none at the moment.
const INPUT: usize = 4096;
/// How long the last output of an ended process is waited for; normally it is there already.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long a disk or a reader may take for an ended process's last output until the end is told all the same.
const STUCK: Duration = Duration::from_secs(2);
/// How long an order may take to be carried out.
const ORDER_PATIENCE: Duration = Duration::from_secs(10);

/// Where output goes.
#[derive(Debug)]
pub enum Sink {
    /// To a CRI log file; `None` is for those who attach only.
    Log(Option<PathBuf>),
    /// As it is to a FIFO, opened for reading as well so that readers can come and go.
    Fifo(File),
    /// Nowhere.
    Nowhere,
}

/// What a pump moves.
#[derive(Debug)]
pub struct Streams {
    /// Standard output, or a terminal's master.
    pub stdout: OwnedFd,
    /// Standard error, where it is separate.
    pub stderr: Option<OwnedFd>,
    /// Where it goes.
    pub sink: Sink,
    /// The input for a terminal and its master to write it to.
    pub input: Option<(File, OwnedFd)>,
}

/// A handle to one pump.
#[derive(Clone, Debug)]
pub struct Pump(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    orders: Mutex<Orders>,
    wake: EventFd,
    log: Option<PathBuf>,
    drained: Drained,
}

/// Whom to tell that all is written, once.
struct Drained {
    listener: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    told: Condvar,
}

impl std::fmt::Debug for Drained {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Drained")
    }
}

impl Drained {
    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn FnOnce() + Send>>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        let listener = self.lock().take();
        self.told.notify_all();
        if let Some(listener) = listener {
            listener();
        }
    }

    /// Waits until it was told, or for `limit`, and tells it then.
    fn tell_after(&self, limit: Duration) {
        let waited = self.told.wait_timeout_while(self.lock(), limit, |listener| listener.is_some());
        drop(waited);
        self.tell();
    }
}

#[derive(Debug, Default)]
struct Orders {
    waiting: Vec<Order>,
    over: bool,
}

#[derive(Debug)]
enum Order {
    Reopen(mpsc::SyncSender<std::io::Result<()>>),
    Follow(UnixStream),
    Ended,
    CloseInput,
    Stop,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pump {
    /// Starts one. `drained` is called once: when the streams have ended and everything is written, or soon after
    /// [`Pump::process_ended`] when something else keeps them open.
    pub fn start(streams: Streams, drained: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        let log = match &streams.sink {
            Sink::Log(path) => path.clone(),
            _ => None,
        };
        let file = LogFile::open(log.as_deref())?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let drained = Drained { listener: Mutex::new(Some(Box::new(drained))), told: Condvar::new() };
        let shared = Arc::new(Shared { orders: Mutex::default(), wake, log, drained });
        let mut sources = vec![Source::new(LogStream::Stdout, streams.stdout)?];
        if let Some(stderr) = streams.stderr {
            sources.push(Source::new(LogStream::Stderr, stderr)?);
        }
        let task = Task {
            shared: Arc::clone(&shared),
            sources,
            sink: streams.sink,
            file,
            input: streams.input.map(Input::new).transpose()?,
            followers: Vec::new(),
            deadline: None,
            stopping: false,
        };
        threads::spawn("output", move || task.run())?;
        Ok(Self(shared))
    }

    fn order(&self, order: Order) -> bool {
        let mut orders = self.0.lock();
        if orders.over {
            return false;
        }
        orders.waiting.push(order);
        drop(orders);
        self.0.wake.write(1).is_ok()
    }

    /// Writes to a new file of the same name from now on, after the old one was renamed.
    pub fn reopen(&self) -> std::io::Result<()> {
        let (sender, answer) = mpsc::sync_channel(1);
        if !self.order(Order::Reopen(sender)) {
            // All is written; who rotates still expects the file.
            return LogFile::open(self.0.log.as_deref()).map(drop);
        }
        match answer.recv_timeout(ORDER_PATIENCE) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Disconnected) => LogFile::open(self.0.log.as_deref()).map(drop),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(std::io::ErrorKind::TimedOut.into()),
        }
    }

    /// Sends a copy of everything that is read from now on; says whether there will be any.
    pub fn follow(&self, client: UnixStream) -> bool {
        self.order(Order::Follow(client))
    }

    /// Tells that the process has ended, so that its output should end too.
    pub fn process_ended(&self) {
        self.order(Order::Ended);
        if self.0.drained.lock().is_none() {
            return;
        }
        // The thread of the output may stand in a write that never ends.
        let shared = Arc::clone(&self.0);
        if threads::spawn("last words", move || shared.drained.tell_after(STUCK)).is_err() {
            self.0.drained.tell();
        }
    }

    /// Lets the terminal have no more input.
    pub fn close_input(&self) {
        self.order(Order::CloseInput);
    }

    /// Stops reading, also when somebody still holds the streams open.
    pub fn stop(&self) {
        self.order(Order::Stop);
    }
}

struct Source {
    file: File,
    stream: LogStream,
    lines: LineSplitter,
}

impl Source {
    fn new(stream: LogStream, fd: OwnedFd) -> std::io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Self { file: fd.into(), stream, lines: LineSplitter::new(stream) })
    }
}

fn set_nonblocking(fd: &OwnedFd) -> std::io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// A client's input on its way to a terminal.
struct Input {
    from: File,
    to: File,
    waiting: Vec<u8>,
}

impl Input {
    fn new((from, to): (File, OwnedFd)) -> std::io::Result<Self> {
        set_nonblocking(&to)?;
        Ok(Self { from, to: to.into(), waiting: Vec::new() })
    }

    /// Moves what can be moved; says whether there may be more.
    fn step(&mut self) -> bool {
        if self.waiting.is_empty() {
            let mut buffer = [0_u8; INPUT];
            match self.from.read(&mut buffer) {
                Ok(0) => return false,
                Ok(count) => self.waiting.extend_from_slice(&buffer[..count]),
                Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
            }
        }
        match self.to.write(&self.waiting) {
            Ok(count) => {
                self.waiting.drain(..count);
                true
            }
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }
}

struct Task {
    shared: Arc<Shared>,
    sources: Vec<Source>,
    sink: Sink,
    file: LogFile,
    input: Option<Input>,
    followers: Vec<Follower>,
    deadline: Option<Instant>,
    stopping: bool,
}

impl Task {
    fn run(mut self) {
        while !self.sources.is_empty() {
            let ready = self.wait();
            if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                // Somebody else holds the streams open. The end is told; what still comes is still written.
                self.deadline = None;
                self.shared.drained.tell();
            }
            if ready.woken {
                self.obey(true);
            }
            if self.stopping {
                if matches!(self.sink, Sink::Log(_)) {
                    self.read_rest();
                } else {
                    // More could only come after a hole.
                    self.read_all();
                }
                break;
            }
            if ready.input && self.input.as_mut().is_some_and(|input| !input.step()) {
                self.input = None;
            }
            self.followers.retain_mut(Follower::flush);
            if ready.output {
                self.read_all();
            }
        }
        self.finish();
    }

    fn finish(mut self) {
        let mut out = Vec::new();
        for source in &mut self.sources {
            source.lines.finish(jiff::Timestamp::now(), &mut out);
        }
        self.put(&out);
        let left = {
            let mut orders = self.shared.lock();
            orders.over = true;
            std::mem::take(&mut orders.waiting)
        };
        for order in left {
            match order {
                Order::Reopen(answer) => drop(answer.send(self.file.reopen())),
                Order::Follow(client) => self.followers.push(Follower::new(client)),
                Order::Ended | Order::CloseInput | Order::Stop => {}
            }
        }
        self.shared.drained.tell();
        // Closes the FIFO, so that its reader sees the end.
        self.sink = Sink::Nowhere;
        for follower in std::mem::take(&mut self.followers) {
            follower.finish();
        }
    }

    /// Waits for something to do.
    fn wait(&self) -> Ready {
        let mut fds = vec![PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.sources.iter().map(|source| PollFd::new(source.file.as_fd(), PollFlags::POLLIN)));
        let sources = 1..fds.len();
        if let Some(input) = &self.input {
            fds.push(if input.waiting.is_empty() {
                PollFd::new(input.from.as_fd(), PollFlags::POLLIN)
            } else {
                PollFd::new(input.to.as_fd(), PollFlags::POLLOUT)
            });
        }
        let followers = fds.len();
        fds.extend(self.followers.iter().map(Follower::poll_fd));
        if poll(&mut fds, timeout(self.deadline)).is_err() {
            // Interrupted: look again.
            return Ready { woken: false, output: false, input: false };
        }
        let any = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        Ready {
            woken: any(&fds[0]),
            output: fds[sources.clone()].iter().any(any),
            input: fds[sources.end..followers].iter().any(any),
        }
    }

    /// Carries orders out. While output is `moving`, what was said before a reopen still goes to the old file.
    fn obey(&mut self, moving: bool) {
        self.shared.wake.read().ok();
        let orders = std::mem::take(&mut self.shared.lock().waiting);
        for order in orders {
            match order {
                Order::Reopen(answer) => {
                    if moving {
                        self.read_all();
                    }
                    drop(answer.send(self.file.reopen()));
                }
                Order::Follow(client) => {
                    let mut follower = Follower::new(client);
                    // From here on it misses nothing.
                    if follower.send(Kind::Stdout, &[]) {
                        self.followers.push(follower);
                    }
                }
                Order::Ended => self.deadline = Some(Instant::now() + LAST_WORDS),
                Order::CloseInput => self.input = None,
                Order::Stop => self.stopping = true,
            }
        }
    }

    /// Reads what is there and hands it on; drops streams that have ended.
    fn read_all(&mut self) {
        let mut index = 0;
        while index < self.sources.len() {
            if self.read_one(index) {
                index += 1;
            } else {
                drop(self.sources.remove(index));
            }
        }
    }

    /// Reads what the streams still hold. Somebody may write on without an end: no more than a few pipes full is taken.
    fn read_rest(&mut self) {
        for _ in 0..MOST_BATCHES {
            self.read_all();
            let mut fds: Vec<PollFd<'_>> = self
                .sources
                .iter()
                .map(|source| PollFd::new(source.file.as_fd(), PollFlags::POLLIN))
                .collect();
            if fds.is_empty() || !poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
                break;
            }
        }
    }

    /// Reads one stream; says whether it goes on.
    fn read_one(&mut self, index: usize) -> bool {
        let Some(Source { file, stream, lines }) = self.sources.get_mut(index) else { return false };
        let raw = !matches!(self.sink, Sink::Log(_));
        let mut out = Vec::new();
        let mut open = true;
        let mut buffer = [0_u8; 16 * 1024];
        while out.len() < BATCH {
            match file.read(&mut buffer) {
                Ok(0) => open = false,
                Ok(count) => {
                    let piece = &buffer[..count];
                    if raw {
                        out.extend_from_slice(piece);
                    } else {
                        lines.feed(piece, jiff::Timestamp::now(), &mut out);
                    }
                    let kind = if *stream == LogStream::Stdout { Kind::Stdout } else { Kind::Stderr };
                    self.followers.retain_mut(|follower| follower.send(kind, piece));
                    continue;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                // EIO: nobody has the terminal open any more.
                Err(_) => open = false,
            }
            break;
        }
        if !open && !raw {
            lines.finish(jiff::Timestamp::now(), &mut out);
        }
        self.put(&out);
        open
    }

    fn put(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        match &mut self.sink {
            Sink::Log(_) => self.file.write(bytes),
            Sink::Fifo(_) => self.put_fifo(bytes),
            Sink::Nowhere => {}
        }
    }

    /// Writes to the FIFO as its reader takes it; what nobody has taken when the process is deleted is dropped.
    fn put_fifo(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let Sink::Fifo(fifo) = &mut self.sink else { return };
            match fifo.write(bytes) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    continue;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            }
            let mut fds = [
                PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
                PollFd::new(fifo.as_fd(), PollFlags::POLLOUT),
            ];
            let ready = poll(&mut fds, timeout(self.deadline));
            let woken = fds[0].any().unwrap_or(false);
            if ready == Ok(0) {
                // The end is told. Whoever reads slowly still gets the rest, without a hole.
                self.deadline = None;
                self.shared.drained.tell();
                continue;
            }
            if woken {
                self.obey(false);
            }
            if self.stopping {
                return;
            }
        }
    }
}

/// How long to poll.
fn timeout(deadline: Option<Instant>) -> PollTimeout {
    deadline.map_or(PollTimeout::NONE, |deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the deadline has passed when it wakes us.
        PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
    })
}

struct Ready {
    woken: bool,
    output: bool,
    input: bool,
}

#[cfg(test)]
#[path = "pump_tests.rs"]
mod tests;
