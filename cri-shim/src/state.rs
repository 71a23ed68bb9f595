//! What is known while the process runs: every sandbox and container with its record, and who waits for it to change.
//!
//! A record is changed through [`Shared::change`] only; writing it to disk is the caller's next
//! step ([`crate::runtime::Runtime::save`]). Nothing here does IO.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use containerd_client::types::Mount;
use cri_shim_core::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};
use cri_shim_runtime::cgroup::OomWatch;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::error::RuntimeError;
use crate::logs::LogPump;
use crate::sandbox::pause::Pause;
use crate::stats::LastFigures;

/// A record shared by its readers, with its own place in the order of disk writes. Clones share it.
#[derive(Clone, Debug)]
pub struct Shared<R> {
    record: Arc<watch::Sender<R>>,
    /// Held while the record is written; true once it must not be written any more.
    pub(crate) forgotten: Arc<Mutex<bool>>,
}

impl<R: Clone> Shared<R> {
    fn new(record: R) -> Self {
        Self { record: Arc::new(watch::Sender::new(record)), forgotten: Arc::default() }
    }

    /// A copy of the record.
    pub fn get(&self) -> R {
        self.record.borrow().clone()
    }

    /// A part of the record.
    pub fn with<T>(&self, read: impl FnOnce(&R) -> T) -> T {
        read(&self.record.borrow())
    }

    /// Changes the record in memory and wakes who waits for it.
    pub fn change<T>(&self, change: impl FnOnce(&mut R) -> T) -> T {
        let mut result = None;
        self.record.send_modify(|record| result = Some(change(record)));
        result.expect("send_modify runs its closure")
    }

    /// Waits until the record is as wanted.
    pub async fn wait_for(&self, wanted: impl FnMut(&R) -> bool) {
        // The sender is ours, so the channel cannot close.
        drop(self.record.subscribe().wait_for(wanted).await);
    }
}

/// A sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// Its record.
    pub record: Shared<SandboxRecord>,
    /// One operation at a time.
    pub operation: tokio::sync::Mutex<()>,
    /// Whether somebody waits for its pause process to end.
    pub watched: AtomicBool,
    /// Whether it was ready and its end was not told yet.
    pub(crate) end_untold: AtomicBool,
    /// Kills by the memory limit that were counted in the pod's cgroup and are accounted for.
    memory_kills: Mutex<u64>,
    /// Its pause process while it is held.
    pause: Mutex<Option<Arc<Pause>>>,
    /// Figures of earlier requests, to tell a rate from.
    pub last_figures: LastFigures,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its sandbox.
    pub sandbox_id: String,
    /// Its record.
    pub record: Shared<ContainerRecord>,
    /// One operation at a time.
    pub operation: Arc<tokio::sync::Mutex<()>>,
    /// One checkpoint at a time.
    pub(crate) checkpoint: tokio::sync::Mutex<()>,
    /// How many send it a signal: meanwhile no checkpoint begins.
    signalling: AtomicUsize,
    /// Held while its end is taken up and its task deleted: two deletions side by side can cost containerd 1.6 the shim.
    pub(crate) ending: tokio::sync::Mutex<()>,
    /// Held while an end is noted and told, so that a removal is told after it.
    pub(crate) telling: tokio::sync::Mutex<()>,
    /// Tells that somebody waits for its task to be deleted after its end.
    pub(crate) hurry: tokio::sync::Notify,
    /// Whether it was removed, and a task takes away what is left of it until nothing is.
    pub(crate) erasing: AtomicBool,
    /// Whether its task was deleted after its end, so that none is left to look for.
    pub(crate) task_deleted: AtomicBool,
    /// Whether somebody waits for its first process to end.
    pub watched: AtomicBool,
    /// Whether the kernel reported an OOM kill in it.
    pub out_of_memory: AtomicBool,
    /// Tells of OOM kills after its cgroup is gone, where nothing else does.
    pub(crate) oom_watch: Mutex<Option<OomWatch>>,
    /// What reads its output while it runs.
    pub pump: Mutex<Option<LogPump>>,
    /// Keeps standard input open between two clients that attach.
    stdin: Mutex<Option<pipe::Sender>>,
    /// The mounts of its root file system, known since it was made; a restart asks for them again.
    rootfs: Mutex<Option<Vec<Mount>>>,
    /// Figures of earlier requests, to tell a rate from.
    pub last_figures: LastFigures,
}

impl Sandbox {
    /// A sandbox with this record.
    pub fn new(record: SandboxRecord) -> Self {
        let ready = record.phase() == SandboxPhase::Ready;
        Self {
            id: record.id.clone(),
            end_untold: AtomicBool::new(ready),
            record: Shared::new(record),
            operation: tokio::sync::Mutex::default(),
            watched: AtomicBool::default(),
            memory_kills: Mutex::default(),
            pause: Mutex::default(),
            last_figures: LastFigures::default(),
        }
    }

    /// Where it is in its life.
    pub fn phase(&self) -> SandboxPhase {
        self.record.with(SandboxRecord::phase)
    }

    /// Kills by the memory limit in the pod's cgroup that are accounted for.
    pub(crate) fn memory_kills(&self) -> MutexGuard<'_, u64> {
        self.memory_kills.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its pause process, while it is held.
    pub(crate) fn pause(&self) -> Option<Arc<Pause>> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces its pause process.
    pub(crate) fn set_pause(&self, pause: Option<Arc<Pause>>) {
        *self.pause.lock().unwrap_or_else(PoisonError::into_inner) = pause;
    }

    /// Refuses unless it is ready.
    pub fn must_be_ready(&self) -> Result<(), RuntimeError> {
        match self.phase() {
            SandboxPhase::Ready => Ok(()),
            phase => Err(RuntimeError::WrongState {
                kind: "sandbox",
                id: self.id.clone(),
                state: sandbox_word(phase),
                needed: "ready",
            }),
        }
    }
}

impl Container {
    /// A container with this record.
    pub fn new(record: ContainerRecord) -> Self {
        Self {
            id: record.id.clone(),
            sandbox_id: record.sandbox_id.clone(),
            record: Shared::new(record),
            operation: Arc::default(),
            checkpoint: tokio::sync::Mutex::default(),
            signalling: AtomicUsize::default(),
            ending: tokio::sync::Mutex::default(),
            telling: tokio::sync::Mutex::default(),
            hurry: tokio::sync::Notify::default(),
            erasing: AtomicBool::default(),
            task_deleted: AtomicBool::default(),
            watched: AtomicBool::default(),
            out_of_memory: AtomicBool::default(),
            oom_watch: Mutex::default(),
            pump: Mutex::default(),
            stdin: Mutex::default(),
            rootfs: Mutex::default(),
            last_figures: LastFigures::default(),
        }
    }

    /// Where it is in its life.
    pub fn phase(&self) -> ContainerPhase {
        self.record.with(ContainerRecord::phase)
    }

    /// Refuses unless it is in this phase.
    pub fn must_be(&self, needed: ContainerPhase) -> Result<(), RuntimeError> {
        let phase = self.phase();
        if phase == needed {
            return Ok(());
        }
        Err(RuntimeError::WrongState {
            kind: "container",
            id: self.id.clone(),
            state: container_word(phase),
            needed: container_word(needed),
        })
    }

    /// Keeps checkpoints from beginning until what is given back is dropped.
    pub(crate) fn signalling(&self) -> Signalling<'_> {
        self.signalling.fetch_add(1, Ordering::AcqRel);
        Signalling(&self.signalling)
    }

    /// Refuses while a signal is sent to it.
    pub(crate) fn must_not_be_signalled(&self) -> Result<(), RuntimeError> {
        if self.signalling.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        Err(RuntimeError::WrongState {
            kind: "container",
            id: self.id.clone(),
            state: "being stopped",
            needed: container_word(ContainerPhase::Running),
        })
    }

    /// The pump of its output, when there is one.
    pub fn pump(&self) -> Option<LogPump> {
        self.pump.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the pump of its output.
    pub fn set_pump(&self, pump: Option<LogPump>) {
        *self.pump.lock().unwrap_or_else(PoisonError::into_inner) = pump;
    }

    /// Replaces what keeps its standard input open.
    pub fn set_stdin(&self, stdin: Option<pipe::Sender>) {
        *self.stdin.lock().unwrap_or_else(PoisonError::into_inner) = stdin;
    }

    /// The mounts of its root file system, where they are known.
    pub fn rootfs(&self) -> Option<Vec<Mount>> {
        self.rootfs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes the mounts of its root file system.
    pub fn set_rootfs(&self, mounts: Vec<Mount>) {
        *self.rootfs.lock().unwrap_or_else(PoisonError::into_inner) = Some(mounts);
    }

    /// Directory of its FIFOs below the state directory.
    pub fn state_dir(&self, state_dir: &Path) -> PathBuf {
        state_dir.join("containers").join(&self.id)
    }
}

/// Says, while it lives, that a container is being sent a signal.
#[derive(Debug)]
pub(crate) struct Signalling<'a>(&'a AtomicUsize);

impl Drop for Signalling<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The word for a sandbox's state in messages.
pub fn sandbox_word(phase: SandboxPhase) -> &'static str {
    match phase {
        SandboxPhase::Creating => "being made",
        SandboxPhase::Ready => "ready",
        SandboxPhase::Stopping | SandboxPhase::Stopped => "stopped",
        SandboxPhase::Removing => "being removed",
    }
}

/// The word for a container's state in messages.
pub fn container_word(phase: ContainerPhase) -> &'static str {
    match phase {
        ContainerPhase::Creating => "being made",
        ContainerPhase::Created => "created",
        ContainerPhase::Running => "running",
        ContainerPhase::Exited => "exited",
        ContainerPhase::Removing => "being removed",
    }
}

/// All sandboxes and containers, in the order of their ids.
#[derive(Debug, Default)]
pub struct Registry {
    sandboxes: RwLock<BTreeMap<String, Arc<Sandbox>>>,
    containers: RwLock<BTreeMap<String, Arc<Container>>>,
}

impl Registry {
    /// Adds a sandbox.
    pub fn add_sandbox(&self, sandbox: &Arc<Sandbox>) {
        write(&self.sandboxes).insert(sandbox.id.clone(), Arc::clone(sandbox));
    }

    /// Adds a container.
    pub fn add_container(&self, container: &Arc<Container>) {
        write(&self.containers).insert(container.id.clone(), Arc::clone(container));
    }

    /// Forgets a sandbox.
    pub fn drop_sandbox(&self, id: &str) {
        write(&self.sandboxes).remove(id);
    }

    /// Forgets a container.
    pub fn drop_container(&self, id: &str) {
        write(&self.containers).remove(id);
    }

    /// Makes the first digits of a sandbox's id, as people type them, the whole one. Unknown ones stay as they are.
    pub fn complete_sandbox(&self, id: &mut String) -> Result<(), RuntimeError> {
        complete(&read(&self.sandboxes), "pod_sandbox_id", id)
    }

    /// The same for containers.
    pub fn complete_container(&self, id: &mut String) -> Result<(), RuntimeError> {
        complete(&read(&self.containers), "container_id", id)
    }

    /// The sandbox with this id.
    pub fn sandbox(&self, id: &str) -> Option<Arc<Sandbox>> {
        read(&self.sandboxes).get(id).cloned()
    }

    /// The container with this id.
    pub fn container(&self, id: &str) -> Option<Arc<Container>> {
        read(&self.containers).get(id).cloned()
    }

    /// Every sandbox.
    pub fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        read(&self.sandboxes).values().cloned().collect()
    }

    /// Every container.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        read(&self.containers).values().cloned().collect()
    }

    /// The containers of a sandbox.
    pub fn containers_of(&self, sandbox_id: &str) -> Vec<Arc<Container>> {
        let all = read(&self.containers);
        all.values().filter(|container| container.sandbox_id == sandbox_id).cloned().collect()
    }

    /// The sandbox of this name.
    pub fn sandbox_named(&self, name: &str) -> Option<Arc<Sandbox>> {
        let named = |sandbox: &&Arc<Sandbox>| sandbox.record.with(|record| record.name == name);
        read(&self.sandboxes).values().find(named).cloned()
    }

    /// The container of this name in this sandbox.
    pub fn container_named(&self, sandbox_id: &str, name: &str) -> Option<Arc<Container>> {
        let named = |container: &Arc<Container>| container.record.with(|record| record.name == name);
        self.containers_of(sandbox_id).into_iter().find(named)
    }
}

/// The one id that begins so.
fn complete<T>(all: &BTreeMap<String, T>, field: &'static str, id: &mut String) -> Result<(), RuntimeError> {
    if id.is_empty() || all.contains_key(id) {
        return Ok(());
    }
    let from = (Bound::Included(id.as_str()), Bound::Unbounded);
    let mut fitting =
        all.range::<str, _>(from).map(|(known, _)| known).take_while(|known| known.starts_with(&*id));
    match (fitting.next().cloned(), fitting.next()) {
        (Some(only), None) => *id = only,
        (Some(_), Some(_)) => {
            return Err(RuntimeError::Invalid { field, problem: format!("{id:?} begins more than one id") });
        }
        (None, _) => {}
    }
    Ok(())
}

// A map is whole between two calls even when a thread panicked in the middle of another one's use.
fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_digits_of_an_id_are_enough_when_they_are_one_only_s() {
        let registry = Registry::default();
        for id in ["ab12", "ab34", "c", "cd"] {
            let record = ContainerRecord { id: id.into(), ..ContainerRecord::default() };
            registry.add_container(&Arc::new(Container::new(record)));
        }
        let complete = |text: &str| {
            let mut id = text.to_owned();
            registry.complete_container(&mut id).map(|()| id)
        };
        for (typed, meant) in [("ab1", "ab12"), ("ab34", "ab34"), ("c", "c"), ("cd", "cd")] {
            assert_eq!(complete(typed).unwrap(), meant);
        }
        for unknown in ["", "b", "ab12345", "d"] {
            assert_eq!(complete(unknown).unwrap(), unknown, "nothing is guessed");
        }
        let told = complete("ab").unwrap_err().to_string();
        assert!(told.contains("container_id") && told.contains("\"ab\""), "{told}");
        let mut none = "ab12".to_owned();
        registry.complete_sandbox(&mut none).unwrap();
        assert_eq!(none, "ab12");
    }
}
