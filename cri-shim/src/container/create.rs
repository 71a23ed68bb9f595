//! CreateContainer: intent → OCI specification → writable snapshot on the image beside the container record in containerd.
//!
//! For the first container of an image the snapshot comes first, since the image's accounts are read from it. For later ones
//! everything that can be refused is looked at, the specification is written down, and the rest is made behind the answer:
//! what operates on the container waits for it, and after a crash its start does it.

use std::path::{Component, Path};
use std::sync::Arc;

use containerd_client::types::Mount;
use cri_shim_api::v1::{ContainerConfig, ContainerEventType, CreateContainerRequest};
use cri_shim_core::ids::ContainerId;
use cri_shim_core::oci::container::{ContainerSpec, check, spec};
use cri_shim_core::oci::labels::DEFAULT_PROFILE_NAME;
use cri_shim_core::oci::process::ImageDefaults;
use cri_shim_core::oci::resources;
use cri_shim_core::record::{ContainerPhase, ContainerRecord, Registration, SandboxRecord};
use cri_shim_core::users::Identity;
use cri_shim_core::{names, signal};
use keelson_shim::protocol::SOCKET_ANNOTATION;

use super::identity::Accounts;
use super::inputs::{self, Made, Search, image_defaults};
use super::volumes::{Users, bound};
use crate::clock;
use crate::config::HandlerKind;
use crate::containerd::containers::NewContainer;
use crate::containerd::snapshots::GC_ROOT;
use crate::error::{RuntimeError, chain};
use crate::exec::OwnShim;
use crate::handlers::Handler;
use crate::host::{apparmor, blocking, idmap};
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
        // What can be refused without a look at anything is, before anything is made.
        sandbox.record.with(|record| check(&config, &record.config))?;
        if let Some(limits) = config.linux.as_ref().and_then(|linux| linux.resources.as_ref()) {
            resources::check(limits, &self.node)?;
        }
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
        let image = self.images.resolve_known(&wanted).await?;
        let container = Arc::new(Container::new(self.intent(&sandbox, name, config, &image)?));
        let accounts = self.known_accounts(&container, &image)?;
        // Where nothing is made before the container is written down as created, that is intent enough.
        if accounts.is_none() || container.record.with(|record| has_own_volumes(&record.config, &image)) {
            self.save(&container.record).await?;
        }
        self.registry.add_container(&container);
        reached(Step::ContainerIntent);
        match Box::pin(self.build_container(&sandbox, &container, &image, accounts)).await {
            Ok(()) => Ok(container.id.clone()),
            Err(error) => {
                // A removal of the pod may be at the same.
                let _one_at_a_time = container.operation.lock().await;
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

    /// The image's accounts, where they are known and nothing else of its root must be looked at.
    fn known_accounts(
        &self,
        container: &Container,
        image: &Image,
    ) -> Result<Option<Arc<Accounts>>, RuntimeError> {
        let own_users = container.record.with(|record| inputs::id_maps(&record.config))?.is_some();
        Ok(if own_users { None } else { self.accounts.get(image.chain_id()) })
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
        if Path::new(&config.log_path).components().any(|part| part == Component::ParentDir) {
            let problem = format!("{:?} leads out of the pod's log_directory", config.log_path);
            return Err(RuntimeError::Invalid { field: "log_path", problem });
        }
        let log_path = if log_directory.is_empty() || config.log_path.is_empty() {
            String::new()
        } else {
            // Joined as containerd does: also one that begins with a slash is below the directory.
            let below = config.log_path.trim_start_matches('/');
            Path::new(&log_directory).join(below).to_string_lossy().into_owned()
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
        known: Option<Arc<Accounts>>,
    ) -> Result<(), RuntimeError> {
        // Checked after the container can be found, while stopping marks the sandbox before it looks for containers:
        // one of the two sees the other.
        sandbox.must_be_ready()?;
        let record = container.record.get();
        let pod = sandbox.record.get();
        let users = inputs::users(&record.config, pod.pid)?.map(Arc::new);
        let handler = self.handlers.obtain_of_record(&pod.handler).await?;
        let plan =
            Plan { sandbox, pod: &pod, record: &record, image, handler: &handler, users: users.clone() };
        let identity = if let Some(accounts) = known {
            // Nothing that is in the snapshot has to be looked at: that it and the record come to be is written down, and
            // containerd's disk writes are not waited for.
            let (identity, spec) = self.specify(&plan, &accounts).await?;
            let registration = Registration { spec, chain_id: image.chain_id().to_owned() };
            container.record.change(|record| record.registration = Some(registration));
            identity
        } else {
            let mounts = self.prepare_rootfs(&record.id, &record.image_id, image.chain_id()).await?;
            reached(Step::ContainerSnapshot);
            let accounts = Arc::new(Accounts::read(mounts.clone()).await?);
            self.accounts.put(image.chain_id(), &accounts);
            let (identity, spec) = self.specify(&plan, &accounts).await?;
            self.make_record(&record, plan.handler, spec).await?;
            container.set_rootfs(match users {
                Some(users) => self.shifted_root(&record.id, mounts, users).await?,
                None => mounts,
            });
            identity
        };
        // The pod may have been removed in the meantime, this container with it: what was made since is taken away again.
        let still_wanted = container.record.change(|record| {
            let wanted = record.phase() == ContainerPhase::Creating;
            if wanted {
                record.user = Some(identity.to_cri());
                record.set_phase(ContainerPhase::Created);
            }
            wanted
        });
        if !still_wanted {
            return Err(RuntimeError::WrongState {
                kind: "container",
                id: record.id,
                state: container_word(container.phase()),
                needed: "being made",
            });
        }
        self.save(&container.record).await?;
        reached(Step::ContainerCreated);
        self.register_behind(container).await;
        self.tell(ContainerEventType::ContainerCreatedEvent, &sandbox.id, &record.id);
        tracing::info!(container = record.id, name = record.name, "container is created");
        Ok(())
    }

    /// Makes the container's mount sources and its specification.
    async fn specify(
        &self,
        plan: &Plan<'_>,
        accounts: &Accounts,
    ) -> Result<(Identity, Vec<u8>), RuntimeError> {
        let record = plan.record;
        let defaults = image_defaults(plan.image);
        let identity = accounts.identity(&record.config, &defaults.user)?;
        let declared =
            self.declared_volumes(&record.id, plan.image, &defaults.volumes, &record.config.mounts).await?;
        reached(Step::ContainerVolumes);
        let images = self.image_volumes(&record.id, &record.config.mounts).await?;
        reached(Step::ContainerImages);
        let spec = self.container_spec(plan, &defaults, &identity, Made { declared, images }).await?;
        Ok((identity, spec))
    }

    /// Makes the container's record in containerd; one that is there is its own.
    async fn make_record(
        &self,
        record: &ContainerRecord,
        handler: &Handler,
        spec: Vec<u8>,
    ) -> Result<(), RuntimeError> {
        let new = NewContainer {
            id: record.id.clone(),
            labels: [(KIND_LABEL.to_owned(), "container".to_owned())].into(),
            image: record.image_ref.clone(),
            snapshot: record.id.clone(),
            spec,
            shim: handler.shim(),
            options: self.shim_options(handler),
        };
        match self.client.create_container(new).await {
            Err(error) if !error.is_already_exists() => return Err(error.into()),
            _ => {}
        }
        reached(Step::ContainerRecord);
        Ok(())
    }

    /// Makes what containerd must have of a created container behind the answer. Every operation on it waits for that.
    async fn register_behind(self: &Arc<Self>, container: &Arc<Container>) {
        if container.record.with(|record| record.registration.is_none()) {
            return;
        }
        let (runtime, container) = (Arc::clone(self), Arc::clone(container));
        let one_at_a_time = Arc::clone(&container.operation).lock_owned().await;
        let layers = self.images.use_layers();
        tokio::spawn(async move {
            let _until_done = (one_at_a_time, layers);
            if let Err(error) = runtime.register(&container).await {
                let error = chain(&error);
                tracing::warn!(container = container.id, error, "it is prepared again when it is started");
            }
        });
    }

    /// Makes what containerd does not have yet of a created container: its snapshot and its record. The caller holds the
    /// container's operation.
    pub(super) async fn register(&self, container: &Container) -> Result<(), RuntimeError> {
        let record = container.record.get();
        let Some(registration) = &record.registration else { return Ok(()) };
        if record.phase() == ContainerPhase::Removing {
            return Ok(());
        }
        let sandbox = self.sandbox(&record.sandbox_id)?;
        let handler = sandbox.record.with(|record| record.handler.clone());
        let handler = self.handlers.obtain_of_record(&handler).await?;
        let snapshot = async {
            let mounts = self.prepare_rootfs(&record.id, &record.image_id, &registration.chain_id).await;
            reached(Step::ContainerSnapshot);
            mounts
        };
        // Both are waited for, so that a removal never runs beside one of them.
        let (mounts, made) =
            tokio::join!(snapshot, self.make_record(&record, &handler, registration.spec.clone()));
        made?;
        container.set_rootfs(mounts?);
        // On disk with whatever is written next; until then it would only be told twice.
        container.record.change(|record| record.registration = None);
        Ok(())
    }

    /// The container's root file system with the owners of its pod's user namespace.
    async fn shifted_root(
        &self,
        id: &str,
        snapshot: Vec<Mount>,
        users: Arc<Users>,
    ) -> Result<Vec<Mount>, RuntimeError> {
        let directory = self.container_state(id);
        blocking(move || {
            idmap::root(&snapshot, &directory, &users.namespace, &users.maps).map(|root| bound(&root))
        })
        .await
    }

    /// The mounts of a created container's root file system, also after a restart.
    pub(super) async fn rootfs_of(&self, container: &Container) -> Result<Vec<Mount>, RuntimeError> {
        if let Some(mounts) = container.rootfs() {
            return Ok(mounts);
        }
        let config = container.record.with(|record| record.config.clone());
        let own_users = inputs::id_maps(&config)?.is_some();
        if own_users {
            return Ok(bound(&self.container_state(&container.id).join("rootfs")));
        }
        Ok(self.client.snapshot_mounts(&container.id).await?)
    }

    /// Makes the container's writable snapshot, or finds the one it has; an image whose layers were collected is unpacked
    /// again first.
    async fn prepare_rootfs(
        &self,
        id: &str,
        image: &str,
        chain_id: &str,
    ) -> Result<Vec<Mount>, RuntimeError> {
        let labels = || {
            [
                (KIND_LABEL.to_owned(), "container".to_owned()),
                (GC_ROOT.to_owned(), jiff::Timestamp::now().to_string()),
            ]
            .into()
        };
        match self.client.prepare_snapshot(id, chain_id, labels()).await {
            Err(error) if error.is_not_found() => {
                let image = self.images.resolve(image).await?;
                self.images.ensure_unpacked(&image).await?;
                Ok(self.client.prepare_snapshot(id, chain_id, labels()).await?)
            }
            Err(error) if error.is_already_exists() => Ok(self.client.snapshot_mounts(id).await?),
            other => Ok(other?),
        }
    }

    async fn container_spec(
        &self,
        plan: &Plan<'_>,
        image: &ImageDefaults,
        identity: &Identity,
        made: Made,
    ) -> Result<Vec<u8>, RuntimeError> {
        let (pod, record) = (plan.pod, plan.record);
        let namespaces = self.namespaces_for(plan.sandbox, &record.config)?;
        let files = self.sandbox_dirs(&plan.sandbox.id).files(host_ipc(&pod.config));
        let cgroup = self.cgroup(pod.cgroup_parent(), &record.id)?.for_runtime;
        let search = Search {
            config: record.config.clone(),
            sources: self.mount_sources(&record.config.mounts).await?,
            cdi_dirs: self.paths.cdi_dirs.clone(),
            directory: self.container_state(&record.id),
            pod_files: files.clone(),
            host_ipc: host_ipc(&pod.config),
            users: plan.users.clone(),
            made,
        };
        let inputs = blocking(move || inputs::gather(search)).await?;
        let mut spec = spec(&ContainerSpec {
            sandbox_id: &plan.sandbox.id,
            sandbox: &pod.config,
            config: &record.config,
            image,
            identity,
            namespaces,
            mounts: &inputs.mounts,
            files: &files,
            devices: &inputs.devices,
            cdi: &inputs.cdi,
            seccomp: inputs.seccomp,
            hostname: if pod.host_network() { &inputs.node_hostname } else { &pod.config.hostname },
            cgroup: &cgroup,
            node: &self.node_for(plan.handler),
        })?;
        let profile = spec.process().as_ref().and_then(|process| process.apparmor_profile().clone());
        if let Some(profile) = profile.filter(|profile| profile != DEFAULT_PROFILE_NAME) {
            blocking(move || apparmor::demand(&profile)).await?;
        }
        if plan.handler.kind == HandlerKind::Keelson {
            let socket =
                OwnShim::socket(&self.paths.state_dir, &plan.sandbox.id).to_string_lossy().into_owned();
            let mut annotations = spec.annotations().clone().unwrap_or_default();
            annotations.insert(SOCKET_ANNOTATION.to_owned(), socket);
            spec.set_annotations(Some(annotations));
        }
        to_json(&spec)
    }
}

/// Whether volumes are made for the container: those that the image declares, and images.
fn has_own_volumes(config: &ContainerConfig, image: &Image) -> bool {
    let declares = image
        .config()
        .config()
        .as_ref()
        .and_then(|config| config.volumes().as_ref())
        .is_some_and(|all| !all.is_empty());
    declares || config.mounts.iter().any(|mount| mount.image.is_some())
}

/// What a container is made of.
struct Plan<'a> {
    sandbox: &'a Sandbox,
    pod: &'a SandboxRecord,
    record: &'a ContainerRecord,
    image: &'a Image,
    handler: &'a Handler,
    users: Option<Arc<Users>>,
}
