//! UpdateContainerResources and ReopenContainerLog.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use cri_shim_api::v1::{LinuxContainerResources, UpdateContainerResourcesRequest};
use cri_shim_core::oci::resources;
use cri_shim_core::record::ContainerPhase;
use oci_spec::runtime::{LinuxResources, Spec};
use tonic::Code;
use tracing::Instrument;

use crate::container::start::log_path;
use crate::containerd::ContainerdError;
use crate::error::RuntimeError;
use crate::host::blocking;
use crate::logs;
use crate::runtime::Runtime;
use crate::state::{Container, container_word};
use crate::steps::{Step, reached};

impl Runtime {
    /// Changes the limits of a container that runs or waits to be started.
    pub async fn update_resources(
        self: &Arc<Self>,
        request: UpdateContainerResourcesRequest,
    ) -> Result<(), RuntimeError> {
        let container = self.container(&request.container_id)?;
        let Some(update) = request.linux else { return Ok(()) };
        // On its own: a caller that goes away in the middle would leave limits that no record tells.
        let runtime = Arc::clone(self);
        let work = async move { runtime.apply_update(&container, update).await };
        let work = tokio::spawn(work.in_current_span());
        work.await.unwrap_or(Err(RuntimeError::Interrupted("changing the container's resources")))
    }

    async fn apply_update(
        self: &Arc<Self>,
        container: &Arc<Container>,
        update: LinuxContainerResources,
    ) -> Result<(), RuntimeError> {
        let _one_at_a_time = container.operation.lock().await;
        let old = container.record.with(|record| record.resources.clone()).unwrap_or_default();
        let new = resources::merged(&old, &update);
        match container.phase() {
            ContainerPhase::Running => {
                let limits = resources::limits(&update, &self.node)?;
                self.client.update_task(&container.id, json(&limits)?).await.map_err(refused)?;
                if update.oom_score_adj != 0 && update.oom_score_adj != old.oom_score_adj {
                    self.rescore(&container.id, resources::oom_score(update.oom_score_adj, &self.node))
                        .await?;
                }
            }
            ContainerPhase::Created => {
                self.register(container).await?;
                let score = resources::oom_score(new.oom_score_adj, &self.node);
                self.update_spec(container, resources::limits(&new, &self.node)?, score).await?;
            }
            phase => {
                let needed = "created or running";
                let (id, state) = (container.id.clone(), container_word(phase));
                return Err(RuntimeError::WrongState { kind: "container", id, state, needed });
            }
        }
        reached(Step::ContainerLimited);
        container.record.change(|record| record.resources = Some(new));
        self.save(&container.record).await
    }

    /// Goes on in a new log file after the old one was renamed.
    pub async fn reopen_log(&self, id: &str) -> Result<(), RuntimeError> {
        let container = self.running_container(id)?;
        if let Some(shim) = self.own_shim(&container) {
            return shim.reopen_log(id).await.map_err(|error| RuntimeError::Shim(Box::new(error)));
        }
        if let Some(pump) = container.pump() {
            return pump.reopen().await;
        }
        // Its output was lost when we came back after a restart, or it is just ending: then who rotates still gets a file.
        let _one_at_a_time = container.operation.lock().await;
        match container.phase() {
            ContainerPhase::Running if container.pump().is_none() => self.take_output_up(&container),
            _ => logs::make(log_path(&container.record.get())).await,
        }
    }

    /// Gives every process of a running container a new score; which of them runs when it is asked for is enough.
    async fn rescore(&self, id: &str, score: i32) -> Result<(), RuntimeError> {
        let pids = self.client.task_pids(id).await?;
        blocking(move || {
            for pid in pids {
                let path = PathBuf::from(format!("/proc/{pid}/oom_score_adj"));
                match std::fs::write(&path, score.to_string()) {
                    // It has ended, or may not be scored lower than it is.
                    Err(error) if is_past(&error) => {}
                    other => other.map_err(RuntimeError::host("write", &path))?,
                }
            }
            Ok(())
        })
        .await
    }

    /// Puts new limits into the specification a created container will start with.
    async fn update_spec(
        &self,
        container: &Container,
        mut limits: LinuxResources,
        oom_score: i32,
    ) -> Result<(), RuntimeError> {
        let unreadable = |problem: &str| RuntimeError::Invalid {
            field: "container_id",
            problem: format!("{} has no usable specification: {problem}", container.id),
        };
        let stored = self.client.container(&container.id).await?.and_then(|stored| stored.spec);
        let bytes = stored.ok_or_else(|| unreadable("none"))?.value;
        let mut spec: Spec =
            serde_json::from_slice(&bytes).map_err(|error| unreadable(&error.to_string()))?;
        let mut linux = spec.linux().clone().unwrap_or_default();
        // Device rules are no limits: they stay.
        limits.set_devices(linux.resources().as_ref().and_then(|old| old.devices().clone()));
        linux.set_resources(Some(limits));
        spec.set_linux(Some(linux));
        if let Some(process) = spec.process_mut() {
            process.set_oom_score_adj(Some(oom_score));
        }
        self.client.update_container_spec(&container.id, json(&spec)?).await?;
        Ok(())
    }
}

/// Values that the kernel does not take are the caller's fault, but containerd hands on what the runtime said as `Unknown`.
fn refused(error: ContainerdError) -> RuntimeError {
    const WORDS: [&str; 4] = [
        "invalid argument",
        "numerical result out of range",
        "device or resource busy",
        "no space left on device",
    ];
    let message = error.message();
    let lower = message.to_lowercase();
    if error.code() == Code::Unknown && WORDS.iter().any(|words| lower.contains(words)) {
        return RuntimeError::Invalid {
            field: "linux",
            problem: format!("the kernel refuses the values: {message}"),
        };
    }
    error.into()
}

fn is_past(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
        || error.raw_os_error() == Some(libc::ESRCH)
}

fn json<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, RuntimeError> {
    serde_json::to_vec(value)
        .map_err(|error| RuntimeError::Invalid { field: "linux", problem: error.to_string() })
}
