//! What the shim knows: its containers, what the main loop watches, and the way from a process's end to those it is told.
//!
//! Shared by the main loop and the threads that do blocking work. Locks are held for moments only, never over a system
//! call that may block; one operation that changes a container (start, delete, update) runs at a time.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use cri_shim_runtime::cgroup::OomWatch;
use cri_shim_runtime::{Pending, wait};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signalfd::SignalFd;

use crate::bundle::Bundle;
use crate::files::Files;
use crate::process::{Exit, Phase, Process};
use crate::proto;
use crate::proto::events::{TaskExit, TaskOom};
use crate::publisher::Publisher;
use crate::serve::listen;
use crate::ttrpc::{Code, Connection, Failure, Incoming};

/// Signal that cannot be caught.
pub const SIGKILL: i32 = 9;
/// Exit status of what SIGKILL ended.
const KILLED: u32 = 137;

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: Bundle,
    /// What the runtime can do with it.
    pub runtime: cri_shim_runtime::Container,
    /// Whether its processes are all that its PID namespace holds, so that they end with the first one.
    pub own_pids: bool,
    /// One start, update or delete at a time.
    pub operation: Mutex<()>,
    /// Tells that a process's end was told.
    pub ended: Condvar,
    state: Mutex<State>,
}

/// What changes of a container.
#[derive(Debug)]
pub struct State {
    /// The right to start it, once.
    pub pending: Option<Pending>,
    /// Its first process.
    pub init: Process,
    /// Its exec processes by id.
    pub execs: BTreeMap<String, Process>,
    /// Whether it is frozen.
    pub paused: bool,
    /// Kills by the memory limit that were told.
    pub oom_kills: u64,
    /// Whether the kernel said that the limit was reached; see [`OomWatch::told`].
    pub limit_reached: Arc<AtomicBool>,
}

impl Container {
    /// A container that was just made.
    pub fn new(
        id: String,
        bundle: Bundle,
        runtime: cri_shim_runtime::Container,
        own_pids: bool,
        state: State,
    ) -> Self {
        Self {
            id,
            bundle,
            runtime,
            own_pids,
            operation: Mutex::default(),
            ended: Condvar::new(),
            state: Mutex::new(state),
        }
    }

    /// Its state, for a moment.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One operation at a time.
    pub fn operate(&self) -> MutexGuard<'_, ()> {
        self.operation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the first process's end was told; says whether it was.
    pub fn wait_ended(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut state = self.lock();
        while state.init.exit().is_none() {
            let Some(left) = end.checked_duration_since(Instant::now()) else { return false };
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl State {
    /// The first process (`""`) or an exec process.
    pub fn process(&mut self, exec: &str) -> Option<&mut Process> {
        if exec.is_empty() { Some(&mut self.init) } else { self.execs.get_mut(exec) }
    }

    /// The same, or the answer that there is none.
    pub fn find(&mut self, id: &str, exec: &str) -> Result<&mut Process, Failure> {
        self.process(exec).ok_or_else(|| {
            Failure::new(Code::NotFound, format!("process {exec} of container {id} not found"))
        })
    }
}

/// What the main loop waits for.
#[derive(Debug)]
pub enum Watched {
    /// containerd connects.
    Listener(UnixListener),
    /// keelson-cri connects.
    OwnListener(UnixListener),
    /// containerd calls.
    Connection(Arc<Connection>, Incoming),
    /// A process ends.
    Process {
        /// Of this container.
        container: Arc<Container>,
        /// The exec process, or empty.
        exec: String,
        /// Its id.
        pid: u32,
        /// Readable when it has ended.
        pidfd: OwnedFd,
    },
    /// The memory limit kills.
    Oom(Arc<Container>, OomWatch),
    /// A child has ended, perhaps one that lost its parent.
    Children(SignalFd),
    /// A thread says that its work is done.
    Wake(Arc<EventFd>),
}

impl Watched {
    fn with_fd<T>(&self, act: impl FnOnce(std::os::fd::BorrowedFd<'_>) -> T) -> T {
        match self {
            Self::Listener(listener) | Self::OwnListener(listener) => act(listener.as_fd()),
            Self::Connection(connection, _) => act(connection.as_fd()),
            Self::Process { pidfd, .. } => act(pidfd.as_fd()),
            Self::Oom(_, watch) => act(watch.fd.as_fd()),
            Self::Children(signals) => act(signals.as_fd()),
            Self::Wake(wake) => act(wake.as_fd()),
        }
    }
}

/// The shim. Shared as `Arc<Shim>`.
#[derive(Debug)]
pub struct Shim {
    /// Events for containerd.
    pub events: Publisher,
    /// How many files may be open.
    pub files: Files,
    /// Threads of requests that run.
    pub busy: AtomicUsize,
    /// Connections of containerd.
    pub connections: AtomicUsize,
    /// Set when the shim has to end whatever it has.
    pub ending: AtomicBool,
    /// Set when containerd needs it no more.
    idle: AtomicBool,
    /// Until when it stays although it has nothing to do.
    stay: Mutex<Instant>,
    /// Where keelson-cri reaches it, once a container has named the place.
    own_socket: Mutex<Option<PathBuf>>,
    containers: Mutex<BTreeMap<String, Slot>>,
    epoll: Epoll,
    wake: Arc<EventFd>,
    watched: Mutex<BTreeMap<u64, Watched>>,
    next: AtomicU64,
}

/// A container, or the promise of one that is being made.
#[derive(Clone, Debug)]
enum Slot {
    Making,
    Made(Arc<Container>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shim {
    /// One without containers, that stays for `patience` when none come.
    pub fn new(events: Publisher, patience: Duration) -> std::io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_flags(flags)?);
        let this = Self {
            events,
            files: Files::raise(),
            busy: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
            idle: AtomicBool::new(false),
            stay: Mutex::new(Instant::now() + patience),
            own_socket: Mutex::default(),
            containers: Mutex::default(),
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            wake: Arc::clone(&wake),
            watched: Mutex::default(),
            next: AtomicU64::new(1),
        };
        this.watch(Watched::Wake(wake))?;
        Ok(this)
    }

    /// Keeps the shim for a while although it has nothing to do: a container is about to come.
    pub fn stay(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut stay = lock(&self.stay);
        *stay = until.max(*stay);
    }

    /// containerd has no more use for the shim, unless there are containers or one was announced.
    pub fn idle_now(&self) {
        let empty = lock(&self.containers).is_empty();
        self.idle.store(empty, Ordering::Release);
    }

    /// Whether containerd has said so.
    pub fn was_told_idle(&self) -> bool {
        self.idle.load(Ordering::Acquire)
    }

    /// How long it still waits for a container that was announced.
    pub fn expects_for(&self) -> Option<Duration> {
        let left = lock(&self.stay).saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// A thread has done its work. The main loop is woken by the last one, since the shim may have nothing left to do.
    pub fn work_done(&self) {
        if self.busy.fetch_sub(1, Ordering::AcqRel) == 1 {
            // It only fails when it is full of wake-ups.
            self.wake.write(1).ok();
        }
    }

    /// Listens for keelson-cri at `path`, unless the shim does so already.
    pub fn serve_own(&self, path: &Path) -> std::io::Result<()> {
        let mut own = lock(&self.own_socket);
        if own.as_deref() != Some(path) {
            self.watch(Watched::OwnListener(listen(path)?))?;
            *own = Some(path.to_owned());
        }
        Ok(())
    }

    /// Where keelson-cri reaches it.
    pub fn own_socket(&self) -> Option<PathBuf> {
        lock(&self.own_socket).clone()
    }

    /// Whether there are containers or work.
    pub fn is_used(&self) -> bool {
        self.busy.load(Ordering::Acquire) > 0 || !lock(&self.containers).is_empty()
    }

    /// Reserves an id for a container to be made.
    pub fn reserve(&self, id: &str) -> Result<(), Failure> {
        let mut containers = lock(&self.containers);
        if containers.contains_key(id) {
            return Err(Failure::new(Code::AlreadyExists, format!("container {id} already exists")));
        }
        containers.insert(id.to_owned(), Slot::Making);
        drop(containers);
        // What was announced has come.
        *lock(&self.stay) = Instant::now();
        self.idle.store(false, Ordering::Release);
        Ok(())
    }

    /// Makes a reserved id a container.
    pub fn add(&self, container: &Arc<Container>) {
        lock(&self.containers).insert(container.id.clone(), Slot::Made(Arc::clone(container)));
    }

    /// Forgets a container or a reserved id.
    pub fn forget(&self, id: &str) {
        lock(&self.containers).remove(id);
    }

    /// The container with this id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Failure> {
        match lock(&self.containers).get(id) {
            Some(Slot::Made(container)) => Ok(Arc::clone(container)),
            _ => Err(Failure::new(Code::NotFound, format!("container {id} not found"))),
        }
    }

    /// Watches something from the main loop on; callable from any thread.
    pub fn watch(&self, watched: Watched) -> std::io::Result<()> {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        let mut all = lock(&self.watched);
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        watched.with_fd(|fd| self.epoll.add(fd, event))?;
        all.insert(token, watched);
        Ok(())
    }

    /// Waits for something watched, at most `patience`, where there is one; gives their tokens.
    pub fn next_events(&self, patience: Option<Duration>) -> Vec<u64> {
        let mut events = [EpollEvent::empty(); 16];
        // Rounded up, so that the time is over when it wakes us.
        let timeout = patience.map_or(EpollTimeout::NONE, |patience| {
            EpollTimeout::try_from(patience + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX)
        });
        let count = self.epoll.wait(&mut events, timeout).unwrap_or(0);
        events[..count].iter().map(EpollEvent::data).collect()
    }

    /// Takes a watched thing to work with it; it is either put back or dropped, which ends the watching.
    pub fn take(&self, token: u64) -> Option<Watched> {
        lock(&self.watched).remove(&token)
    }

    /// Puts it back.
    pub fn put_back(&self, token: u64, watched: Watched) {
        lock(&self.watched).insert(token, watched);
    }

    /// Stops watching one that was taken.
    pub fn unwatch(&self, watched: &Watched) {
        // It may be closed by its other end already.
        watched.with_fd(|fd| self.epoll.delete(fd)).ok();
    }

    /// Stops watching the memory of a container and gives up its processes.
    pub fn unwatch_container(&self, container: &Arc<Container>) {
        let of_it = |watched: &Watched| match watched {
            Watched::Oom(of, _) | Watched::Process { container: of, .. } => Arc::ptr_eq(of, container),
            _ => false,
        };
        let mut all = lock(&self.watched);
        let tokens: Vec<u64> =
            all.iter().filter(|(_, watched)| of_it(watched)).map(|(token, _)| *token).collect();
        for token in tokens {
            if let Some(watched) = all.remove(&token) {
                self.unwatch(&watched);
            }
        }
    }

    /// The watched process with this id.
    pub fn token_of(&self, wanted: u32) -> Option<u64> {
        let all = lock(&self.watched);
        all.iter()
            .find(|(_, watched)| matches!(watched, Watched::Process { pid, .. } if *pid == wanted))
            .map(|(token, _)| *token)
    }

    /// Takes up that a watched process may have ended: reaps it and goes on to [`Self::process_ended`]. Says whether it
    /// has.
    pub fn look_after(self: &Arc<Self>, container: &Arc<Container>, exec: &str, pidfd: &OwnedFd) -> bool {
        let status = match wait::reap(pidfd, false) {
            Ok(None) => return false,
            Ok(Some(exit)) => u32::try_from(exit.status).unwrap_or(255),
            // Somebody else reaped it, which nobody should.
            Err(_) => 255,
        };
        self.process_ended(container, exec, Exit { status, at: SystemTime::now() });
        true
    }

    /// A process has ended: what is left of it goes, then its end is told once its output has arrived.
    pub fn process_ended(self: &Arc<Self>, container: &Arc<Container>, exec: &str, exit: Exit) {
        let pump = {
            let mut state = container.lock();
            let Some(process) = state.process(exec) else { return };
            match process.phase {
                Phase::Starting => {
                    process.early = Some(exit);
                    return;
                }
                Phase::Ended(_) | Phase::Told(_) => return,
                Phase::Created | Phase::Running => {}
            }
            process.phase = Phase::Ended(exit);
            process.held.release();
            (!process.drained).then(|| process.pump.clone()).flatten()
        };
        if exec.is_empty() && !container.own_pids {
            // What shares a PID namespace does not end with its first process by itself.
            container.runtime.kill_all(SIGKILL).ok();
        }
        // At once, too: with version 1 controllers systemd soon takes an empty scope away, and the count with it.
        if pump.is_some() && exec.is_empty() && exit.status == KILLED {
            self.look_for_oom(container);
        }
        match pump {
            Some(pump) => pump.process_ended(),
            None => self.tell_end(container, exec),
        }
    }

    /// All output of a process has arrived.
    pub fn drained(self: &Arc<Self>, container: &Arc<Container>, exec: &str) {
        let ended = {
            let mut state = container.lock();
            let Some(process) = state.process(exec) else { return };
            process.drained = true;
            matches!(process.phase, Phase::Ended(_))
        };
        if ended {
            self.tell_end(container, exec);
        }
    }

    fn tell_end(&self, container: &Arc<Container>, exec: &str) {
        if exec.is_empty() {
            let killed = matches!(container.lock().init.phase, Phase::Ended(Exit { status: KILLED, .. }));
            if killed {
                self.look_for_oom(container);
            }
        }
        let mut state = container.lock();
        let Some(process) = state.process(exec) else { return };
        let Phase::Ended(exit) = process.phase else { return };
        process.phase = Phase::Told(exit);
        let waiting = std::mem::take(&mut process.waiting);
        self.events.publish(&TaskExit {
            container_id: container.id.clone(),
            id: if exec.is_empty() { container.id.clone() } else { exec.to_owned() },
            pid: process.pid,
            exit_status: exit.status,
            exited_at: Some(proto::timestamp(exit.at)),
        });
        drop(state);
        container.ended.notify_all();
        for responder in waiting {
            responder.answer(Ok(exit.to_answer()));
        }
    }

    /// The kernel's event may come later than the end of what it killed; its count does not.
    fn look_for_oom(&self, container: &Arc<Container>) {
        let kills = container.runtime.stats().ok().and_then(|stats| stats.oom_kills);
        // Without a count: a process that was killed after the limit was reached.
        let guess = || u64::from(container.lock().limit_reached.load(Ordering::Acquire));
        self.oom_kills(container, kills.unwrap_or_else(guess));
    }

    /// Tells kills that were not told yet.
    pub fn oom_kills(&self, container: &Arc<Container>, kills: u64) {
        let news = {
            let mut state = container.lock();
            let news = kills > state.oom_kills;
            state.oom_kills = state.oom_kills.max(kills);
            news
        };
        if news {
            self.events.publish(&TaskOom { container_id: container.id.clone() });
        }
    }
}
