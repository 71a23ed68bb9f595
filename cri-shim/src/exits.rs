//! What happens when a process ends: it is noticed in milliseconds, told, and cleaned up.
//!
//! Every running process is waited for by one task each; containerd's event stream says the same and adds OOM kills.
//! Whoever is first counts, the other is no news.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use containerd_client::types::v1::{Process, Status};
use cri_shim_api::v1::ContainerEventType;
use cri_shim_core::cgroup::Driver;
use cri_shim_core::exit;
use cri_shim_core::record::{ContainerPhase, Ending, SandboxPhase};

use crate::clock;
use crate::containerd::events::TaskEvent;
use crate::containerd::tasks::Exit;
use crate::error::{RuntimeError, chain};
use crate::host::blocking;
use crate::runtime::Runtime;
use crate::state::{Container, Sandbox};
use crate::steps::{Step, reached};

/// How long the last output of an ended container is waited for before its end is told: normally it is there already; a
/// process that outlives the first one may hold the pipes.
const OUTPUT_PATIENCE: Duration = Duration::from_millis(500);
/// How long a task that never ran may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long containerd's stream may take to tell the end of a container that has been waited for.
const TOLD_PATIENCE: Duration = Duration::from_millis(500);
/// Exit status of a process that SIGKILL ended.
const KILLED: u32 = 137;
/// How long the kernel may take to tell that a cgroup was removed; what it told besides was a kill.
const REMOVAL_PATIENCE: Duration = Duration::from_millis(100);
/// Between two looks for that.
const REMOVAL_PAUSE: Duration = Duration::from_millis(5);

/// How long what is left of a container waits for requests to be served first: containerd, its shim and the kernel have more
/// to do for it than for most requests.
pub(crate) const REST: Duration = Duration::from_millis(25);

/// Whether a container's watch, where it has one, was told of a kill before its cgroup went. Blocks.
fn watched_kill(container: &Container, patience: Duration) -> bool {
    let mut watch = container.oom_watch.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(watch) = watch.as_mut() else { return false };
    let end = Instant::now() + patience;
    while watch.kills().is_ok() {
        let told = watch.told.load(Ordering::Acquire);
        if told || Instant::now() >= end {
            return told;
        }
        std::thread::sleep(REMOVAL_PAUSE);
    }
    false
}

impl Runtime {
    /// Waits for the container's first process in a task of its own, unless one does so already.
    pub(crate) fn watch_container(self: &Arc<Self>, container: &Arc<Container>) {
        if container.watched.swap(true, Ordering::AcqRel) {
            return;
        }
        let (runtime, container) = (Arc::clone(self), Arc::clone(container));
        tokio::spawn(async move {
            let result = runtime.client.wait_task(&container.id, "").await;
            container.watched.store(false, Ordering::Release);
            match result {
                Ok(exit) => {
                    if exit.status == KILLED && runtime.count_is_gone(&container) {
                        // The stream tells why, before it tells the end; this answer came another way.
                        runtime.has_ended(&container, TOLD_PATIENCE).await;
                    }
                    runtime.container_ended(&container, exit).await;
                }
                // Everything is looked at again once containerd is back.
                Err(error) if error.is_unavailable() => {}
                Err(_) => {
                    if let Err(error) = runtime.inspect_task(&container).await {
                        tracing::warn!(container = container.id, error = %chain(&error), "its state is not known");
                    }
                }
            }
        });
    }

    /// Waits for the sandbox's pause process in a task of its own, unless one does so already.
    pub(crate) fn watch_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        if sandbox.watched.swap(true, Ordering::AcqRel) {
            return;
        }
        // What was counted before its containers run is not theirs.
        self.account_pod_kills(sandbox);
        let (runtime, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        tokio::spawn(async move {
            if let Some(pause) = sandbox.pause() {
                pause.ended().await;
                sandbox.watched.store(false, Ordering::Release);
                return runtime.sandbox_ended(&sandbox).await;
            }
            // One that containerd keeps, of the first version.
            let result = runtime.client.wait_task(&sandbox.id, "").await;
            sandbox.watched.store(false, Ordering::Release);
            match result {
                Err(error) if error.is_unavailable() => {}
                Ok(_) | Err(_) => runtime.sandbox_ended(&sandbox).await,
            }
        });
    }

    /// Takes an event of containerd's stream up.
    pub(crate) fn task_event(self: &Arc<Self>, event: TaskEvent) {
        let runtime = Arc::clone(self);
        match event {
            TaskEvent::Images => self.images.changes().tell(),
            TaskEvent::OutOfMemory { container } => {
                if let Some(container) = self.registry.container(&container) {
                    container.out_of_memory.store(true, Ordering::Release);
                    // Told, so no other container's.
                    if let Some(sandbox) = self.registry.sandbox(&container.sandbox_id) {
                        self.account_pod_kills(&sandbox);
                    }
                }
            }
            TaskEvent::Exit { container: id, exit } => {
                if let Some(container) = self.registry.container(&id) {
                    tokio::spawn(async move { runtime.container_ended(&container, exit).await });
                } else if let Some(sandbox) = self.registry.sandbox(&id) {
                    tokio::spawn(async move { runtime.sandbox_ended(&sandbox).await });
                }
            }
        }
    }

    /// Asks containerd about a container that should run, and takes up what it says.
    pub(crate) async fn inspect_task(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<(), RuntimeError> {
        let task = self.client.task(&container.id).await?;
        self.take_up(container, task.as_ref()).await;
        Ok(())
    }

    /// Brings a container that should run in line with what its task is.
    pub(crate) async fn take_up(self: &Arc<Self>, container: &Arc<Container>, task: Option<&Process>) {
        match task.map(Process::status) {
            Some(Status::Running | Status::Paused | Status::Pausing) => self.watch_container(container),
            Some(Status::Stopped) => {
                let task = task.cloned().unwrap_or_default();
                self.container_ended(container, Exit::new(task.exit_status, task.exited_at)).await;
            }
            // containerd's word for a shim that does not answer. Nothing is known, so nothing is done; its end is told when
            // the shim goes on.
            Some(Status::Unknown) => {
                tracing::error!(container = container.id, "its shim does not answer; it is left as it is");
                self.watch_container(container);
            }
            // Made, but the start was cut off by a crash of ours.
            Some(Status::Created) => {
                let words = "the start was interrupted by a restart of the runtime";
                if let Err(error) = self.client.force_delete_task(&container.id, KILL_PATIENCE).await {
                    tracing::warn!(container = container.id, %error, "its task stays until the container is removed");
                }
                self.finish(container, exit::start_failed(words, clock::now())).await;
            }
            None => self.finish(container, exit::unseen(clock::now())).await,
        }
    }

    /// The container's first process has ended.
    async fn container_ended(self: &Arc<Self>, container: &Arc<Container>, exit: Exit) {
        if container.phase() != ContainerPhase::Running {
            return;
        }
        let mut out_of_memory = container.out_of_memory.load(Ordering::Acquire);
        if !out_of_memory && exit.status == KILLED {
            // The event may still be on its way.
            let (runtime, container) = (Arc::clone(self), Arc::clone(container));
            out_of_memory =
                blocking(move || Ok(runtime.killed_for_memory(&container))).await.unwrap_or(false);
        }
        self.finish(container, exit::ran(exit.status, exit.at, out_of_memory)).await;
    }

    /// Whether the kernel counted kills by the memory limit. A container's own counter is there as long as its task is not
    /// deleted; but systemd removes a scope with its last process. Then the pod's counter tells, which in version 2 is
    /// its containers' sum and stays.
    fn killed_for_memory(&self, container: &Container) -> bool {
        let cgroup = container.record.with(|record| record.cgroup.clone());
        let sandbox = self.registry.sandbox(&container.sandbox_id);
        // The end is told by containerd twice. Whoever looks second must not find that nothing is new.
        let mut known = sandbox.as_ref().map(|sandbox| sandbox.memory_kills());
        let now = sandbox.as_ref().and_then(|sandbox| self.pod_kills(sandbox));
        let grew = known.as_ref().zip(now).is_some_and(|(known, now)| **known < now);
        if let (Some(known), Some(now)) = (&mut known, now) {
            **known = now;
        }
        let exists = self.hierarchies.exists(&cgroup);
        let counted = self.hierarchies.oom_kills(&cgroup) > 0
            || (!exists && (grew || watched_kill(container, REMOVAL_PATIENCE)));
        if counted {
            container.out_of_memory.store(true, Ordering::Release);
        }
        container.out_of_memory.load(Ordering::Acquire)
    }

    /// Watches a container for kills by the memory limit, where systemd takes its cgroup away, and with it the only count:
    /// a shim of containerd may begin to watch too late, and ours cannot wait for the kernel's word.
    pub(crate) fn watch_kills(&self, container: &Container) {
        if self.cgroup_driver == Driver::Systemd {
            let watch = self.hierarchies.watch_kills(&container.record.with(|record| record.cgroup.clone()));
            *container.oom_watch.lock().unwrap_or_else(PoisonError::into_inner) = watch;
        }
    }

    /// Whether systemd has taken the container's cgroup away, and with it, in version 1, the count of kills.
    fn count_is_gone(&self, container: &Container) -> bool {
        self.cgroup_driver == Driver::Systemd
            && !self.hierarchies.exists(&container.record.with(|record| record.cgroup.clone()))
    }

    /// Takes what was counted in a pod so far as nobody's.
    fn account_pod_kills(&self, sandbox: &Sandbox) {
        if let Some(now) = self.pod_kills(sandbox) {
            *sandbox.memory_kills() = now;
        }
    }

    /// Kills by the memory limit in a pod; only where systemd has the pod's cgroup.
    fn pod_kills(&self, sandbox: &Sandbox) -> Option<u64> {
        if self.cgroup_driver != Driver::Systemd {
            return None;
        }
        let pod = sandbox.record.with(|record| self.cgroup_driver.pod_directory(record.cgroup_parent()))?;
        Some(self.hierarchies.oom_kills(&pod))
    }

    /// Notes and tells a container's end, once, and deletes its task.
    async fn finish(self: &Arc<Self>, container: &Arc<Container>, ending: Ending) {
        let _one_at_a_time = container.ending.lock().await;
        if let Some(pump) = container.pump() {
            // Whoever hears of the end finds the whole log.
            pump.drained(OUTPUT_PATIENCE).await;
        }
        let (code, reason) = (ending.code, ending.reason.clone());
        let telling = container.telling.lock().await;
        if !container.record.change(|record| record.ended(ending)) {
            return;
        }
        if let Err(error) = self.save(&container.record).await {
            tracing::error!(container = container.id, error = %chain(&error), "its end could not be written down");
        }
        reached(Step::ContainerEnded);
        container.last_figures.files().close();
        self.tell(ContainerEventType::ContainerStoppedEvent, &container.sandbox_id, &container.id);
        drop(telling);
        tracing::info!(container = container.id, code, reason, "container has ended");
        // Who is told of the end asks for something next, as a rule: that comes first, unless it waits for this.
        drop(tokio::time::timeout(REST, container.hurry.notified()).await);
        // Deleting also ends what the first process left behind, which lets go of the pipes.
        match self.client.delete_task(&container.id).await {
            Ok(_) => container.task_deleted.store(true, Ordering::Release),
            Err(error) => {
                tracing::warn!(container = container.id, %error, "its task stays until the container is removed");
            }
        }
        reached(Step::ContainerTaskDeleted);
        if let Some(pump) = container.pump() {
            pump.stop().await;
            container.set_pump(None);
        }
        container.set_stdin(None);
    }

    /// The sandbox's pause process has ended without being asked to.
    pub(crate) async fn sandbox_ended(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let was_ready = sandbox.record.change(|record| {
            let ready = record.phase() == SandboxPhase::Ready;
            if ready {
                record.advance(SandboxPhase::Stopping);
                record.pid = 0;
            }
            ready
        });
        if !was_ready {
            return;
        }
        tracing::warn!(sandbox = sandbox.id, "the pause process has ended; the sandbox is not ready");
        if let Err(error) = self.save(&sandbox.record).await {
            tracing::error!(sandbox = sandbox.id, error = %chain(&error), "its end could not be written down");
        }
        self.tell_end(sandbox);
    }

    /// Tells that a sandbox that was ready is not any more, once: also when stopping it failed half-way and is repeated, or its
    /// process ends by itself meanwhile.
    pub(crate) fn tell_end(&self, sandbox: &Sandbox) {
        if sandbox.end_untold.swap(false, Ordering::AcqRel) {
            self.tell(ContainerEventType::ContainerStoppedEvent, &sandbox.id, &sandbox.id);
        }
    }
}
