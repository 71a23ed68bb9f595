//! Start and coming back: connect to containerd, learn what runs, undo what was half done, remove what nothing explains.
//!
//! [`supervise`] does so at start and whenever the connection broke. Containers are never touched because we were away: those
//! that run go on running, those that ended meanwhile get their exit code. Orphans (things with our label or in our
//! directories without a record) are removed at the first time only, when no request can be under way yet.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cni_plugins_host::netns;
use containerd_client::types::v1::{Process, Status};
use cri_shim_core::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};
use futures::future::join_all;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::container::start::{hold_stdin, log_path, pipes};
use crate::error::{RuntimeError, chain};
use crate::host::shims::Shim;
use crate::host::{blocking, fifo, files, shims};
use crate::logs::LogPump;
use crate::runtime::{KIND_LABEL, Readiness, Runtime};
use crate::state::{Container, Sandbox};

/// First pause before another try to reach containerd.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long an orphaned process may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// How long a forgotten shim is waited for to finish what it was asked.
const SHIM_PATIENCE: Duration = Duration::from_secs(4);

/// Keeps the runtime connected until `cancel`.
pub async fn supervise(runtime: Arc<Runtime>, cancel: CancellationToken) {
    let mut pause = SHORTEST_PAUSE;
    let mut recovered = false;
    loop {
        // Cancel-safe: everything in `follow` may be cut off at any point, as by kill -9.
        let error = tokio::select! {
            () = cancel.cancelled() => return,
            error = follow(&runtime, &mut recovered, &mut pause) => error,
        };
        runtime.images.changes().follow(false);
        let reason = chain(&error);
        let news = runtime.readiness.send_if_modified(|state| {
            let next = Readiness::NotReady { reason: reason.clone(), recovered };
            let changed = *state != next;
            *state = next;
            changed
        });
        if news {
            tracing::warn!(reason, "containerd is away; trying again");
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One connection: subscribe, list, then events until it breaks.
async fn follow(runtime: &Arc<Runtime>, recovered: &mut bool, pause: &mut Duration) -> RuntimeError {
    let connected = async {
        let containerd = runtime.client.version().await?;
        runtime.client.ensure_namespace().await?;
        // Before listing, so that nothing falls between.
        let events = runtime.client.subscribe().await?;
        runtime.images.changes().follow(true);
        if *recovered {
            runtime.resync().await?;
            // A containerd that dies may leave a shim that it was just starting.
            runtime.end_forgotten_shims().await?;
        } else {
            runtime.recover().await?;
        }
        Ok((containerd, events))
    };
    let (containerd, mut events) = match connected.await {
        Ok(connected) => connected,
        Err(error) => return error,
    };
    *recovered = true;
    *pause = SHORTEST_PAUSE;
    tracing::info!(containerd, "ready");
    runtime.readiness.send_replace(Readiness::Ready { containerd });
    loop {
        match events.next().await {
            Ok(event) => runtime.task_event(event),
            Err(error) => return error.into(),
        }
    }
}

impl Runtime {
    /// Everything from the journal, brought in line with what there is; then orphans.
    async fn recover(self: &Arc<Self>) -> Result<(), RuntimeError> {
        let journal = self.journal.clone();
        let (sandboxes, containers) =
            blocking(move || Ok((journal.load::<SandboxRecord>()?, journal.load::<ContainerRecord>()?)))
                .await?;
        for record in sandboxes {
            // A try that was cut off by a broken connection has added it already.
            if self.registry.sandbox(&record.id).is_none() {
                self.registry.add_sandbox(&Arc::new(Sandbox::new(record)));
            }
        }
        for record in containers {
            if self.registry.container(&record.id).is_none() {
                self.registry.add_container(&Arc::new(Container::new(record)));
            }
        }
        self.recover_detachments().await?;
        if let Err(error) = self.clear_checkpoints().await {
            tracing::error!(error = %chain(&error), "what a checkpoint left stays");
        }
        self.resync().await?;
        self.continue_unfinished().await?;
        self.end_forgotten_shims().await?;
        self.remove_orphans().await?;
        tracing::info!(
            sandboxes = self.registry.sandboxes().len(),
            containers = self.registry.containers().len(),
            "recovered"
        );
        Ok(())
    }

    /// What should run, brought in line with what runs.
    async fn resync(self: &Arc<Self>) -> Result<(), RuntimeError> {
        let tasks = self.client.tasks().await?;
        let tasks: HashMap<String, Process> =
            tasks.into_iter().map(|task| (task_id(&task).to_owned(), task)).collect();
        for sandbox in self.registry.sandboxes() {
            // One with an operation under way is looked after by that.
            let Ok(_one_at_a_time) = sandbox.operation.try_lock() else { continue };
            if sandbox.phase() == SandboxPhase::Ready {
                let running = |task: &Process| task.status() == Status::Running;
                let lives = if sandbox.record.with(SandboxRecord::pause_in_containerd) {
                    tasks.get(&sandbox.id).is_some_and(running)
                } else {
                    sandbox.pause().is_some() || sandbox.take_pause_up()?
                };
                if lives {
                    self.watch_sandbox(&sandbox);
                } else {
                    self.sandbox_ended(&sandbox).await;
                }
            }
        }
        for container in self.registry.containers() {
            let Ok(_one_at_a_time) = container.operation.try_lock() else { continue };
            if container.phase() == ContainerPhase::Running {
                let task = tasks.get(&container.id);
                if task.is_some() && container.pump().is_none() && self.own_shim(&container).is_none() {
                    self.reopen_output(&container);
                }
                self.take_up(&container, task).await;
            }
        }
        Ok(())
    }

    /// Reads on where the process before us stopped. Without pipes the container goes on without a log.
    fn reopen_output(&self, container: &Container) {
        if let Err(error) = self.take_output_up(container) {
            tracing::error!(container = container.id, error = %chain(&error), "its output is lost");
        }
    }

    /// Reads the output of a running container from now on.
    pub(crate) fn take_output_up(&self, container: &Container) -> Result<(), RuntimeError> {
        let record = container.record.get();
        let stdio = fifo::paths(&container.state_dir(&self.paths.state_dir), &record.id, pipes(&record));
        if let Ok(stdin) = hold_stdin(&stdio.stdin) {
            container.set_stdin(stdin);
        }
        container.set_pump(Some(LogPump::resume(&stdio, log_path(&record))?));
        Ok(())
    }

    /// Undoes what was being made, goes on with what was being removed. One that cannot be cleaned, because a process of it
    /// hangs in the kernel, keeps no other waiting.
    async fn continue_unfinished(self: &Arc<Self>) -> Result<(), RuntimeError> {
        for container in self.registry.containers() {
            let phase = container.phase();
            let lost = self.registry.sandbox(&container.sandbox_id).is_none();
            if lost || matches!(phase, ContainerPhase::Creating | ContainerPhase::Removing) {
                tracing::info!(container = container.id, "removing what an interrupted operation left");
                if let Err(error) = skippable(self.erase_container(&container).await)? {
                    tracing::error!(container = container.id, error = %chain(&error), "its removal goes on later");
                    container.erasing.store(true, Ordering::Release);
                    self.erase_behind(container);
                }
            } else if phase != ContainerPhase::Running {
                // A task of a container that does not run: a start that was cut off before it was written down.
                let cleared = async {
                    self.client.force_delete_task(&container.id, KILL_PATIENCE).await?;
                    self.clear_runtime(&container).await
                };
                if let Err(error) = skippable(cleared.await)? {
                    tracing::error!(container = container.id, error = %chain(&error), "what its start left stays");
                }
            }
        }
        for sandbox in self.registry.sandboxes() {
            if matches!(sandbox.phase(), SandboxPhase::Creating | SandboxPhase::Removing) {
                tracing::info!(sandbox = sandbox.id, "removing what an interrupted operation left");
                self.undo_sandbox(&sandbox).await;
            }
        }
        Ok(())
    }

    /// Ends shims that containerd does not know, because it or we died while it was starting them.
    async fn end_forgotten_shims(self: &Arc<Self>) -> Result<(), RuntimeError> {
        let begun = tokio::time::Instant::now();
        loop {
            let (socket, namespace) =
                (self.paths.containerd_socket.clone(), self.client.namespace().to_owned());
            let found = blocking(move || shims::list(&socket, &namespace)).await?;
            let known = self.known_tasks().await?;
            let mut waiting = false;
            for shim in found.into_iter().filter(|shim| self.is_forgotten(shim, &known)) {
                waiting |= !self.end_forgotten_shim(shim).await?;
            }
            if !waiting {
                return Ok(());
            }
            if begun.elapsed() > SHIM_PATIENCE {
                tracing::error!("a shim that containerd has forgotten is still in use; it stays");
                return Ok(());
            }
            tokio::time::sleep(SHORTEST_PAUSE).await;
        }
    }

    /// The ids of everything that containerd runs.
    async fn known_tasks(&self) -> Result<HashSet<String>, RuntimeError> {
        Ok(self.client.tasks().await?.iter().map(|task| task_id(task).to_owned()).collect())
    }

    /// Whether containerd knows neither the container that a shim was started for nor another one of its pod.
    fn is_forgotten(&self, shim: &Shim, known: &HashSet<String>) -> bool {
        let group = |id: &String| self.registry.container(id).map(|found| found.sandbox_id.clone());
        let sandbox = group(&shim.id);
        !known.contains(&shim.id) && (sandbox.is_none() || !known.iter().any(|id| group(id) == sandbox))
    }

    /// Ends one, or what it works at for nobody; says whether there is nothing to wait for.
    async fn end_forgotten_shim(self: &Arc<Self>, shim: Shim) -> Result<bool, RuntimeError> {
        let container = self.registry.container(&shim.id);
        let sandbox = container.as_ref().map(|container| container.sandbox_id.clone()).unwrap_or_default();
        let containers = self.registry.containers_of(&sandbox);
        let nothing_starts: Result<Vec<_>, _> =
            containers.iter().map(|container| container.operation.try_lock()).collect();
        if nothing_starts.is_err() {
            return Ok(false);
        }
        // What was started until a moment ago is known by now.
        let known = self.known_tasks().await?;
        if !self.is_forgotten(&shim, &known) {
            return Ok(true);
        }
        if shim.has_children() {
            // A later container of the pod whose first one is gone, or runc still at work for nobody.
            let done = shim.serves_any(&known);
            if let Some(container) = container {
                self.clear_runtime(&container).await?;
            }
            return Ok(done);
        }
        tracing::warn!(pid = shim.pid, container = shim.id, "ending a shim that containerd has forgotten");
        blocking(move || shims::end(&shim)).await?;
        Ok(true)
    }

    /// Removes what no record explains.
    async fn remove_orphans(self: &Arc<Self>) -> Result<(), RuntimeError> {
        let sandboxes = self.registry.sandboxes();
        let mut known: HashSet<String> = sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
        known.extend(self.registry.containers().iter().map(|container| container.id.clone()));
        let filter = || vec![format!("labels.\"{KIND_LABEL}\"")];
        let orphans: Vec<String> =
            self.client.containers(filter()).await?.into_iter().map(|found| found.id).collect();
        let orphans = orphans.into_iter().filter(|id| !known.contains(id));
        let removed = join_all(orphans.map(|id| async move {
            tracing::warn!(id, "removing a container that no record explains");
            self.client.force_delete_task(&id, KILL_PATIENCE).await?;
            self.client.delete_container(&id).await
        }));
        for result in removed.await {
            if let Err(error) = skippable(result.map_err(RuntimeError::from))? {
                tracing::error!(error = %chain(&error), "a container that no record explains stays");
            }
        }
        for snapshot in self.client.snapshots(filter()).await? {
            if known.contains(&snapshot.name) {
                continue;
            }
            tracing::warn!(snapshot = snapshot.name, "removing a snapshot that no record explains");
            let removed = self.client.remove_snapshot(&snapshot.name).await;
            if let Err(error) = skippable(removed.map_err(RuntimeError::from))? {
                tracing::error!(snapshot = snapshot.name, error = %chain(&error), "it stays");
            }
        }
        self.images.retain_mounts(|owner| known.contains(owner)).await?;
        self.remove_orphaned_files(known).await?;
        self.release_unused().await;
        Ok(())
    }

    /// Tells the pod network which sandboxes there are.
    pub(crate) async fn release_unused(&self) {
        let attached = || {
            let sandboxes = self.registry.sandboxes();
            let attached =
                sandboxes.iter().filter(|sandbox| sandbox.record.with(|record| !record.network.is_empty()));
            attached.map(|sandbox| sandbox.id.clone()).collect()
        };
        self.network.collect(attached).await;
    }

    async fn remove_orphaned_files(&self, known: HashSet<String>) -> Result<(), RuntimeError> {
        let pinned: HashSet<PathBuf> = self
            .registry
            .sandboxes()
            .iter()
            .map(|sandbox| PathBuf::from(sandbox.record.with(|record| record.netns.clone())))
            .collect();
        let paths = self.paths.clone();
        let runtimes = paths.runtime_root().join(self.client.namespace());
        blocking(move || {
            for directory in [
                runtimes,
                paths.root_dir.join("sandboxes"),
                paths.root_dir.join("containers"),
                paths.state_dir.join("sandboxes"),
                paths.state_dir.join("containers"),
            ] {
                for name in files::names_in(&directory)?.into_iter().filter(|name| !known.contains(name)) {
                    files::remove_tree(&directory.join(name))?;
                }
            }
            files::remove_forgotten_sockets(&paths.state_dir, &known)?;
            for name in files::names_in(&paths.netns_dir)? {
                let path = paths.netns_dir.join(name);
                if !pinned.contains(&path) {
                    tracing::warn!(path = %path.display(), "removing a network namespace that no record explains");
                    netns::remove(&path)?;
                }
            }
            Ok(())
        })
        .await
    }
}

/// What went wrong with one object alone (inner); without containerd nothing can go on (outer).
fn skippable(result: Result<(), RuntimeError>) -> Result<Result<(), RuntimeError>, RuntimeError> {
    match result {
        Err(error) if error.code() == Code::Unavailable => Err(error),
        other => Ok(other),
    }
}

/// The container a task belongs to: containerd's list calls it `id`.
fn task_id(task: &Process) -> &str {
    if task.container_id.is_empty() { &task.id } else { &task.container_id }
}
