//! StartContainer: pipes and log → task → running. A start that fails is the container's end, with the runtime's words.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cri_shim_api::v1::ContainerEventType;
use cri_shim_core::exit;
use cri_shim_core::record::{ContainerPhase, ContainerRecord};
use keelson_shim::protocol::LOG_SCHEME;
use tokio::net::unix::pipe;
use tokio::sync::MutexGuard;
use tracing::Instrument;

use crate::clock;
use crate::config::HandlerKind;
use crate::error::{RuntimeError, chain};
use crate::exec::OwnShim;
use crate::host::blocking;
use crate::host::fifo::{self, Pipes};
use crate::host::keeper;
use crate::logs::LogPump;
use crate::runtime::Runtime;
use crate::state::Container;
use crate::steps::{Step, reached};
use crate::telemetry::stage;

/// How long a task that was made but could not be started may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

impl Runtime {
    /// Runs a created container.
    pub async fn start_container(self: &Arc<Self>, id: &str) -> Result<(), RuntimeError> {
        let container = self.container(id)?;
        // The work goes on when the caller goes away: a half-started container would help nobody.
        let runtime = Arc::clone(self);
        let work = async move {
            let _one_at_a_time = container.operation.lock().await;
            container.must_be(ContainerPhase::Created)?;
            runtime.ready_sandbox(&container.sandbox_id)?;
            runtime.run_task(&container).await
        };
        // What it logs belongs to the request.
        let work = tokio::spawn(work.in_current_span());
        work.await.unwrap_or(Err(RuntimeError::Interrupted("starting the container")))
    }

    async fn run_task(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), RuntimeError> {
        let record = container.record.get();
        match self.open_output(container, &record).await {
            Ok(pump) => container.set_pump(pump),
            Err(error) => {
                self.start_failed(container, &chain(&error)).await?;
                return Err(error);
            }
        }
        let started = self.create_and_start(container, &record).await;
        if let Err(error) = &started {
            // A container is not to blame for containerd being away: it can be started later.
            let lost = matches!(error, RuntimeError::Containerd(error) if error.is_unavailable());
            self.client.force_delete_task(&record.id, KILL_PATIENCE).await.ok();
            if let Some(pump) = container.pump() {
                pump.stop().await;
            }
            container.set_pump(None);
            let words = match error {
                RuntimeError::Containerd(inner) => inner.message(),
                other => chain(other),
            };
            if !lost || container.phase() != ContainerPhase::Created {
                self.start_failed(container, &words).await?;
            }
        }
        let starting = started?;
        self.watch_container(container);
        self.tell(ContainerEventType::ContainerStartedEvent, &record.sandbox_id, &record.id);
        drop(starting);
        tracing::info!(container = record.id, name = record.name, "container is started");
        Ok(())
    }

    /// Its end is taken up once what is returned is dropped: one that is over in a moment would be deleted before containerd
    /// has answered, which then knows no such container, and its end would be told before its start.
    async fn create_and_start<'c>(
        &self,
        container: &'c Container,
        record: &ContainerRecord,
    ) -> Result<MutexGuard<'c, ()>, RuntimeError> {
        let mut stdio = fifo::paths(&container.state_dir(&self.paths.state_dir), &record.id, pipes(record));
        let own_shim = self.own_shim(container).is_some();
        if own_shim {
            let log = format!("{LOG_SCHEME}{}", record.log_path);
            stdio.stderr = if stdio.terminal { String::new() } else { log.clone() };
            stdio.stdout = log;
        }
        self.register(container).await?;
        let root = self.rootfs_of(container).await?;
        let pid = stage("task_create", self.client.create_task(&record.id, root, stdio.clone())).await?;
        reached(Step::ContainerTask);
        if !own_shim {
            keeper::start(&self.paths.keeper, &stdio)?;
        }
        // On disk before it runs, so that a restart knows that its end must be told.
        container.record.change(|record| record.started(pid, clock::now()));
        self.save(&container.record).await?;
        reached(Step::ContainerRunning);
        // Whichever shim: what it looks at when its process has ended may be gone by then.
        self.watch_kills(container);
        let starting = container.ending.lock().await;
        stage("task_start", self.client.start_task(&record.id, "")).await?;
        reached(Step::ContainerStarted);
        Ok(starting)
    }

    /// Makes the pipes and starts reading them. Our own shim writes the log itself and holds standard input open.
    async fn open_output(
        &self,
        container: &Container,
        record: &ContainerRecord,
    ) -> Result<Option<LogPump>, RuntimeError> {
        let directory = container.state_dir(&self.paths.state_dir);
        let (id, pipes) = (record.id.clone(), pipes(record));
        if self.own_shim(container).is_some() {
            if pipes.stdin {
                blocking(move || fifo::make(&directory, &id, pipes)).await?;
            }
            reached(Step::ContainerPipes);
            return Ok(None);
        }
        let stdio = blocking(move || fifo::make(&directory, &id, pipes)).await?;
        container.set_stdin(hold_stdin(&stdio.stdin)?);
        reached(Step::ContainerPipes);
        LogPump::start(&stdio, log_path(record)).await.map(Some)
    }

    /// The shim of the container's pod, when it is ours.
    pub fn own_shim(&self, container: &Container) -> Option<OwnShim> {
        let sandbox = self.registry.sandbox(&container.sandbox_id)?;
        let handler = sandbox.record.with(|record| record.handler.clone());
        let ours = self.handlers.kind_of_record(&handler) == Some(HandlerKind::Keelson);
        ours.then(|| OwnShim::of(&self.paths.state_dir, &container.sandbox_id))
    }

    async fn start_failed(
        self: &Arc<Self>,
        container: &Arc<Container>,
        words: &str,
    ) -> Result<(), RuntimeError> {
        tracing::warn!(container = container.id, error = words, "container could not be started");
        let ending = exit::start_failed(words, clock::now());
        if container.record.change(|record| record.ended(ending)) {
            self.save(&container.record).await?;
            self.tell(ContainerEventType::ContainerStoppedEvent, &container.sandbox_id, &container.id);
        }
        Ok(())
    }
}

/// Opens standard input, if there is one, so that it does not end while no client is attached.
pub(crate) fn hold_stdin(path: &str) -> Result<Option<pipe::Sender>, RuntimeError> {
    if path.is_empty() {
        return Ok(None);
    }
    // Reading as well, because nobody else reads before the task is made.
    let opened = pipe::OpenOptions::new().read_write(true).open_sender(path);
    opened.map(Some).map_err(RuntimeError::host("open pipe", Path::new(path)))
}

/// The pipes a container has.
pub(crate) fn pipes(record: &ContainerRecord) -> Pipes {
    Pipes { stdin: record.config.stdin, terminal: record.config.tty }
}

/// The log file; none drops the output.
pub(crate) fn log_path(record: &ContainerRecord) -> Option<PathBuf> {
    (!record.log_path.is_empty()).then(|| PathBuf::from(&record.log_path))
}
