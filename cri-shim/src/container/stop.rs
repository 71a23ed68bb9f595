//! StopContainer and RemoveContainer. Both may be repeated and continued after a crash.
//!
//! A removal is answered once it is written down and nobody sees the container any more. What the container was made of is
//! taken away behind the answer: deleting its task and its snapshot waits for a shim, a runtime and disk writes of containerd.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cri_shim_api::v1::ContainerEventType;
use cri_shim_core::record::{ContainerPhase, ContainerRecord};
use cri_shim_core::signal::SIGKILL;

use crate::containerd::ContainerdError;
use crate::error::{RuntimeError, chain};
use crate::exits::REST;
use crate::host::{blocking, files};
use crate::runtime::Runtime;
use crate::state::Container;
use crate::steps::{Step, reached};

/// How long a killed process may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// First and longest pause before what could not be taken away is tried again.
const ERASE_PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(60));

impl Runtime {
    /// Asks a container to stop and kills it after `grace` seconds. An unknown one, or one that does not run, is fine.
    pub async fn stop_container(self: &Arc<Self>, id: &str, grace: i64) -> Result<(), RuntimeError> {
        let Some(container) = self.registry.container(id) else { return Ok(()) };
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or_default());
        // No lock while waiting: a second stop with a shorter grace must get through to its kill.
        if container.phase() == ContainerPhase::Running && !grace.is_zero() {
            let signal = container.record.with(|record| record.stop_signal);
            self.signal(&container, signal).await?;
            if self.has_ended(&container, grace).await {
                return Ok(());
            }
        }
        if container.phase() >= ContainerPhase::Exited {
            return Ok(());
        }
        // A start that is under way ends first; then there is something to kill, or nothing.
        let _one_at_a_time = container.operation.lock().await;
        self.kill(&container).await
    }

    /// Removes a container; a running one is killed. An unknown one is fine. Its log file stays. What it was made of is taken
    /// away behind the answer.
    pub async fn remove_container(self: &Arc<Self>, id: &str) -> Result<(), RuntimeError> {
        let Some(container) = self.registry.container(id) else { return Ok(()) };
        // On its own: what was begun is gone on with, also when the caller does not wait for it.
        let runtime = Arc::clone(self);
        let begun = tokio::spawn(async move { runtime.remove_known(container).await });
        begun.await.unwrap_or(Err(RuntimeError::Interrupted("removing the container")))
    }

    async fn remove_known(self: Arc<Self>, container: Arc<Container>) -> Result<(), RuntimeError> {
        let written = {
            let _one_at_a_time = container.operation.lock().await;
            // Somebody else may have removed it while we waited.
            let gone = self.registry.container(&container.id).is_none();
            if gone || container.erasing.load(Ordering::Acquire) {
                return Ok(());
            }
            self.kill(&container).await?;
            // Also where it could not be written down: nobody sees the container any more.
            let written = self.begin_removal(&container).await;
            container.erasing.store(true, Ordering::Release);
            written
        };
        self.erase_behind(container);
        written
    }

    /// Takes a container away in the background, again and again until nothing of it is left.
    pub(crate) fn erase_behind(self: &Arc<Self>, container: Arc<Container>) {
        let (runtime, layers) = (Arc::clone(self), self.images.use_layers());
        tokio::spawn(async move {
            let mut pause = ERASE_PAUSES.0;
            let mut layers = Some(layers);
            tokio::time::sleep(REST).await;
            while let Err(error) = runtime.remove_container_wholly(&container).await {
                tracing::warn!(container = container.id, error = %chain(&error), ?pause, "its removal goes on later");
                // An image is not waited for because of a container that cannot be removed.
                drop(layers.take());
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(ERASE_PAUSES.1);
            }
        });
    }

    /// Removes a container and waits until nothing of it is left.
    pub(crate) async fn remove_container_wholly(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<(), RuntimeError> {
        let _one_at_a_time = container.operation.lock().await;
        if self.registry.container(&container.id).is_none() {
            return Ok(());
        }
        self.kill(container).await?;
        self.erase_container(container).await?;
        tracing::info!(container = container.id, "container is removed");
        Ok(())
    }

    /// Writes down that a container that does not run is removed; from here on nobody sees it.
    async fn begin_removal(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), RuntimeError> {
        // Its end is told first.
        drop(container.telling.lock().await);
        let known = container.phase() == ContainerPhase::Removing;
        container.record.change(ContainerRecord::removing);
        self.save(&container.record).await?;
        reached(Step::ContainerRemoving);
        if known {
            return Ok(());
        }
        self.tell(ContainerEventType::ContainerDeletedEvent, &container.sandbox_id, &container.id);
        Ok(())
    }

    /// Takes everything of a container that does not run away, its record last.
    pub(crate) async fn erase_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<(), RuntimeError> {
        self.begin_removal(container).await?;
        {
            container.hurry.notify_one();
            let _one_at_a_time = container.ending.lock().await;
            if !container.task_deleted.load(Ordering::Acquire) {
                self.client.force_delete_task(&container.id, KILL_PATIENCE).await?;
            }
        }
        self.clear_runtime(container).await?;
        if let Some(pump) = container.pump() {
            pump.stop().await;
            container.set_pump(None);
        }
        // Two writes of containerd's that do not see each other.
        let (forgotten, released) =
            tokio::join!(self.delete_container_record(container), self.release_root(container));
        forgotten?;
        released?;
        self.forget(&container.id, &container.record).await?;
        reached(Step::ContainerForgotten);
        self.registry.drop_container(&container.id);
        Ok(())
    }

    async fn delete_container_record(&self, container: &Container) -> Result<(), RuntimeError> {
        self.client.delete_container(&container.id).await?;
        reached(Step::ContainerRecordDeleted);
        Ok(())
    }

    /// Takes the container's directories, mounts and snapshot away.
    async fn release_root(&self, container: &Container) -> Result<(), RuntimeError> {
        // Mounts of the state directory go before what they show.
        let directories = [self.container_state(&container.id), self.container_root(&container.id)];
        blocking(move || directories.iter().try_for_each(|directory| files::remove_tree(directory))).await?;
        self.images.unmount_all(&container.id).await?;
        // After its mounts, which hold it.
        self.client.remove_snapshot(&container.id).await?;
        reached(Step::ContainerSnapshotRemoved);
        Ok(())
    }

    /// Ends a running container at once.
    async fn kill(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), RuntimeError> {
        if container.phase() != ContainerPhase::Running {
            return Ok(());
        }
        self.signal(container, SIGKILL).await?;
        if self.has_ended(container, KILL_PATIENCE).await {
            return Ok(());
        }
        let what = format!("killing container {}", container.id);
        Err(RuntimeError::Deadline { what, seconds: KILL_PATIENCE.as_secs() })
    }

    /// Sends a signal; when there is no process any more its end is taken up at once.
    async fn signal(self: &Arc<Self>, container: &Arc<Container>, signal: u32) -> Result<(), RuntimeError> {
        let _no_checkpoint_begins = container.signalling();
        if self.give_checkpoint_up(container).await? {
            tracing::warn!(container = container.id, "its checkpoint is given up: it is to stop");
        }
        // Cancel-safe: the second never ends by itself, and what it has begun to kill is killed.
        let sent = tokio::select! {
            sent = self.client.kill_task(&container.id, "", signal, false) => sent,
            never = self.keep_checkpoints_down(container) => match never {},
        };
        match sent {
            Ok(()) => {
                reached(Step::ContainerSignalled);
                // Whoever waited for its end may have lost containerd a moment ago, and looking at everything again leaves
                // out what is being operated on.
                self.watch_container(container);
                Ok(())
            }
            Err(error) if error.is_unavailable() => Err(ContainerdError::into(error)),
            Err(error) => {
                tracing::debug!(container = container.id, %error, "nothing to signal");
                self.inspect_task(container).await
            }
        }
    }

    pub(crate) async fn has_ended(&self, container: &Container, patience: Duration) -> bool {
        let ended = container.record.wait_for(|record| record.phase() >= ContainerPhase::Exited);
        tokio::time::timeout(patience, ended).await.is_ok()
    }
}
