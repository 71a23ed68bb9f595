//! UpdateContainerResources and ReopenContainerLog.

use std::sync::Arc;

use cri_shim_api::v1::UpdateContainerResourcesRequest;
use cri_shim_core::oci::resources;
use cri_shim_core::record::ContainerPhase;
use oci_spec::runtime::{LinuxResources, Spec};

use crate::error::RuntimeError;
use crate::runtime::Runtime;
use crate::state::{Container, container_word};

impl Runtime {
    /// Changes the limits of a container that runs or waits to be started.
    pub async fn update_resources(
        self: &Arc<Self>,
        request: UpdateContainerResourcesRequest,
    ) -> Result<(), RuntimeError> {
        let container = self.container(&request.container_id)?;
        let Some(update) = request.linux else { return Ok(()) };
        let _one_at_a_time = container.operation.lock().await;
        let old = container.record.with(|record| record.resources.clone()).unwrap_or_default();
        let new = resources::merged(&old, &update);
        match container.phase() {
            ContainerPhase::Running => {
                let limits = resources::limits(&update, &self.node)?;
                self.client.update_task(&container.id, json(&limits)?).await?;
            }
            ContainerPhase::Created => {
                self.update_spec(&container, resources::limits(&new, &self.node)?).await?;
            }
            phase => {
                let needed = "created or running";
                let (id, state) = (container.id.clone(), container_word(phase));
                return Err(RuntimeError::WrongState { kind: "container", id, state, needed });
            }
        }
        container.record.change(|record| record.resources = Some(new));
        self.save(&container.record).await
    }

    /// Goes on in a new log file after the old one was renamed.
    pub async fn reopen_log(&self, id: &str) -> Result<(), RuntimeError> {
        let container = self.running_container(id)?;
        if let Some(shim) = self.own_shim(&container) {
            return shim.reopen_log(id).await.map_err(|error| RuntimeError::Shim(Box::new(error)));
        }
        match container.pump() {
            Some(pump) => pump.reopen().await,
            None => container.must_be(ContainerPhase::Exited),
        }
    }

    /// Puts new limits into the specification a created container will start with.
    async fn update_spec(
        &self,
        container: &Container,
        mut limits: LinuxResources,
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
        self.client.update_container_spec(&container.id, json(&spec)?).await?;
        Ok(())
    }
}

fn json<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, RuntimeError> {
    serde_json::to_vec(value)
        .map_err(|error| RuntimeError::Invalid { field: "linux", problem: error.to_string() })
}
