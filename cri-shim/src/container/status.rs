//! What CRI shows of containers.

use std::collections::BTreeMap;

use cri_shim_api::v1::{
    self, ContainerFilter, ContainerResources, ContainerStatus, ContainerStatusResponse, ImageSpec,
};
use cri_shim_core::record::{ContainerPhase, ContainerRecord};
use cri_shim_core::{filter, signal};

use crate::error::RuntimeError;
use crate::runtime::Runtime;

impl Runtime {
    /// The containers that match. One that is still being made, or is being removed, is not there.
    pub fn list_containers(&self, wanted: Option<&ContainerFilter>) -> Vec<v1::Container> {
        let shown = |record: &ContainerRecord| {
            (visible(record) && filter::container(wanted, record)).then(|| item(record))
        };
        self.registry.containers().iter().filter_map(|container| container.record.with(shown)).collect()
    }

    /// The status of one container.
    pub fn container_status_response(
        &self,
        id: &str,
        verbose: bool,
    ) -> Result<ContainerStatusResponse, RuntimeError> {
        let record = self.container(id)?.record.get();
        if !visible(&record) {
            return Err(RuntimeError::NotFound { kind: "container", id: id.to_owned() });
        }
        let info = if verbose { info(&record) } else { BTreeMap::new() };
        Ok(ContainerStatusResponse { status: Some(status(&record)), info })
    }

    /// The statuses of a sandbox's containers.
    pub(crate) fn container_statuses(&self, sandbox_id: &str) -> Vec<ContainerStatus> {
        let shown = |record: &ContainerRecord| visible(record).then(|| status(record));
        let containers = self.registry.containers_of(sandbox_id);
        containers.iter().filter_map(|container| container.record.with(shown)).collect()
    }
}

fn visible(record: &ContainerRecord) -> bool {
    !matches!(record.phase(), ContainerPhase::Creating | ContainerPhase::Removing)
}

fn item(record: &ContainerRecord) -> v1::Container {
    v1::Container {
        id: record.id.clone(),
        pod_sandbox_id: record.sandbox_id.clone(),
        metadata: record.config.metadata.clone(),
        image: record.config.image.clone(),
        image_ref: record.image_ref.clone(),
        state: record.state().into(),
        created_at: record.created_at,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        image_id: record.image_id.clone(),
    }
}

fn status(record: &ContainerRecord) -> ContainerStatus {
    ContainerStatus {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: record.state().into(),
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at: record.finished_at,
        exit_code: record.exit_code,
        image: Some(shown_image(record)),
        image_ref: record.image_ref.clone(),
        reason: record.reason.clone(),
        message: record.message.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        mounts: record.config.mounts.clone(),
        log_path: record.log_path.clone(),
        resources: Some(ContainerResources { linux: record.resources.clone(), windows: None }),
        image_id: record.image_id.clone(),
        user: record.user.clone(),
        stop_signal: signal::to_cri(record.stop_signal).into(),
    }
}

/// The image as the user named it, where the kubelet told.
fn shown_image(record: &ContainerRecord) -> ImageSpec {
    let mut image = record.config.image.clone().unwrap_or_default();
    if !image.user_specified_image.is_empty() {
        image.image.clone_from(&image.user_specified_image);
    }
    image
}

/// What helps a person who debugs.
fn info(record: &ContainerRecord) -> BTreeMap<String, String> {
    let info = serde_json::json!({
        "pid": record.pid,
        "sandboxID": record.sandbox_id,
        "cgroup": record.cgroup,
        "logPath": record.log_path,
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}
