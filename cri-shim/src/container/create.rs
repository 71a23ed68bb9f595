//! CreateContainer: intent → writable snapshot on the image → OCI specification → container record in containerd.

use std::path::Path;
use std::sync::Arc;

use containerd_client::types::Mount;
use cri_shim_api::v1::{ContainerConfig, ContainerEventType, CreateContainerRequest};
use cri_shim_core::ids::ContainerId;
use cri_shim_core::oci::container::{ContainerSpec, spec};
use cri_shim_core::record::{ContainerPhase, ContainerRecord};
use cri_shim_core::users::{self, Identity};
use cri_shim_core::{names, signal};
use keelson_shim::protocol::SOCKET_ANNOTATION;

use super::inputs::{self, image_defaults};
use crate::clock;
use crate::config::HandlerKind;
use crate::containerd::containers::NewContainer;
use crate::containerd::snapshots::GC_ROOT;
use crate::error::{RuntimeError, chain};
use crate::exec::OwnShim;
use crate::handlers::Handler;
use crate::host::{blocking, rootfs};
use crate::images::Image;
use crate::runtime::{KIND_LABEL, Runtime, random};
use crate::sandbox::run::{host_ipc, to_json};
use crate::state::{Container, Sandbox, container_word};
use crate::steps::{Step, reached};

impl Runtime {
    /// Makes a container in a ready sandbox and gives its id.
    pub async fn create_container(
        self: &Arc<Self>,
        request: CreateContainerRequest,
    ) -> Result<String, RuntimeError> {
        let missing = || RuntimeError::Invalid { field: "config", problem: "is missing".to_owned() };
        let config = request.config.ok_or_else(missing)?;
        let sandbox = self.ready_sandbox(&request.pod_sandbox_id)?;
        let metadata = sandbox.record.with(|record| record.config.metadata.clone());
        let name = names::container(config.metadata.as_ref(), metadata.as_ref())?;
        let (runtime, key) = (Arc::clone(self), format!("{}/{name}", sandbox.id));
        let work = Box::pin(runtime.make_container(sandbox, name, config));
        self.container_flights.join(&key, work).await
    }

    async fn make_container(
        self: Arc<Self>,
        sandbox: Arc<Sandbox>,
        name: String,
        config: ContainerConfig,
    ) -> Result<String, RuntimeError> {
        if let Some(existing) = self.registry.container_named(&sandbox.id, &name) {
            match existing.phase() {
                ContainerPhase::Created => return Ok(existing.id.clone()),
                // One that could not be taken back earlier: whoever asks again gets a new one in its place.
                ContainerPhase::Creating | ContainerPhase::Removing => {
                    let _one_at_a_time = existing.operation.lock().await;
                    if self.registry.container(&existing.id).is_some() {
                        self.erase_container(&existing).await?;
                    }
                }
                phase => {
                    let state = container_word(phase);
                    return Err(RuntimeError::NameTaken { name, id: existing.id.clone(), state });
                }
            }
        }
        let wanted = config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
        let image = self.images.resolve(&wanted).await?;
        let container = Arc::new(Container::new(self.intent(&sandbox, name, config, &image)?));
        self.save(&container.record).await?;
        self.registry.add_container(&container);
        reached(Step::ContainerIntent);
        match self.build_container(&sandbox, &container, &image).await {
            Ok(()) => Ok(container.id.clone()),
            Err(error) => {
                if let Err(undo) = self.erase_container(&container).await {
                    tracing::error!(
                        container = container.id,
                        error = %chain(&undo),
                        "a half-made container could not be undone"
                    );
                }
                Err(error)
            }
        }
    }

    fn intent(
        &self,
        sandbox: &Sandbox,
        name: String,
        config: ContainerConfig,
        image: &Image,
    ) -> Result<ContainerRecord, RuntimeError> {
        let id = ContainerId::from_random(random()?);
        let (log_directory, cgroup) = sandbox.record.with(|record| {
            (record.config.log_directory.clone(), self.cgroup(record.cgroup_parent(), id.as_str()))
        });
        let cgroup = cgroup?.directory;
        let log_path = if log_directory.is_empty() || config.log_path.is_empty() {
            String::new()
        } else {
            Path::new(&log_directory).join(&config.log_path).to_string_lossy().into_owned()
        };
        let defaults = image_defaults(image);
        Ok(ContainerRecord {
            id: id.to_string(),
            name,
            sandbox_id: sandbox.id.clone(),
            image_id: image.id.clone(),
            image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
            log_path,
            created_at: clock::now(),
            stop_signal: signal::stop_signal(config.stop_signal(), defaults.stop_signal.as_deref()),
            resources: config.linux.as_ref().and_then(|linux| linux.resources.clone()),
            cgroup,
            config,
            ..ContainerRecord::default()
        })
    }

    async fn build_container(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        container: &Arc<Container>,
        image: &Image,
    ) -> Result<(), RuntimeError> {
        // Checked after the container can be found, while stopping marks the sandbox before it looks for containers:
        // one of the two sees the other.
        sandbox.must_be_ready()?;
        let record = container.record.get();
        let mounts = self.prepare_rootfs(&record.id, image).await?;
        reached(Step::ContainerSnapshot);
        let identity = identity_of(&record, image, mounts).await?;
        let handler = self.handlers.of_record(&sandbox.record.with(|record| record.handler.clone()))?;
        let spec = self.container_spec(sandbox, &record, image, &identity, handler).await?;
        let new = NewContainer {
            id: record.id.clone(),
            labels: [(KIND_LABEL.to_owned(), "container".to_owned())].into(),
            image: record.image_ref.clone(),
            snapshot: record.id.clone(),
            spec,
            shim: handler.shim(),
            options: self.shim_options(handler),
        };
        self.client.create_container(new).await?;
        reached(Step::ContainerRecord);
        container.record.change(|record| {
            record.user = Some(identity.to_cri());
            record.set_phase(ContainerPhase::Created);
        });
        self.save(&container.record).await?;
        reached(Step::ContainerCreated);
        self.tell(ContainerEventType::ContainerCreatedEvent, &sandbox.id, &record.id);
        tracing::info!(container = record.id, name = record.name, "container is created");
        Ok(())
    }

    /// Makes the container's writable snapshot; an image whose layers were collected is unpacked again first.
    async fn prepare_rootfs(&self, id: &str, image: &Image) -> Result<Vec<Mount>, RuntimeError> {
        let labels = || {
            [
                (KIND_LABEL.to_owned(), "container".to_owned()),
                (GC_ROOT.to_owned(), jiff::Timestamp::now().to_string()),
            ]
            .into()
        };
        match self.client.prepare_snapshot(id, image.chain_id(), labels()).await {
            Err(error) if error.is_not_found() => {
                self.images.ensure_unpacked(image).await?;
                Ok(self.client.prepare_snapshot(id, image.chain_id(), labels()).await?)
            }
            other => Ok(other?),
        }
    }

    async fn container_spec(
        &self,
        sandbox: &Sandbox,
        record: &ContainerRecord,
        image: &Image,
        identity: &Identity,
        handler: &Handler,
    ) -> Result<Vec<u8>, RuntimeError> {
        let namespaces = self.namespaces_for(sandbox, &record.config)?;
        let config = record.config.clone();
        let inputs = blocking(move || inputs::gather(&config)).await?;
        let pod = sandbox.record.get();
        let files = self.sandbox_dirs(&sandbox.id).files(host_ipc(&pod.config));
        let cgroup = self.cgroup(pod.cgroup_parent(), &record.id)?.for_runtime;
        let mut spec = spec(&ContainerSpec {
            sandbox_id: &sandbox.id,
            sandbox: &pod.config,
            config: &record.config,
            image: &image_defaults(image),
            identity,
            namespaces,
            mounts: &inputs.mounts,
            files: &files,
            devices: &inputs.devices,
            seccomp: inputs.seccomp,
            hostname: if pod.host_network() { &inputs.node_hostname } else { &pod.config.hostname },
            cgroup: &cgroup,
            node: &self.node_for(handler),
        })?;
        if handler.kind == HandlerKind::Keelson {
            let socket = OwnShim::socket(&self.paths.state_dir, &sandbox.id).to_string_lossy().into_owned();
            let mut annotations = spec.annotations().clone().unwrap_or_default();
            annotations.insert(SOCKET_ANNOTATION.to_owned(), socket);
            spec.set_annotations(Some(annotations));
        }
        to_json(&spec)
    }
}

/// Who the first process is, by the passwd and group files in the container's own root.
async fn identity_of(
    record: &ContainerRecord,
    image: &Image,
    mounts: Vec<Mount>,
) -> Result<Identity, RuntimeError> {
    let security = record.config.linux.as_ref().and_then(|linux| linux.security_context.clone());
    let (passwd, group) =
        blocking(move || Ok((rootfs::read(&mounts, "etc/passwd")?, rootfs::read(&mounts, "etc/group")?)))
            .await?;
    Ok(users::resolve(&security.unwrap_or_default(), &image_defaults(image).user, &passwd, &group)?)
}
