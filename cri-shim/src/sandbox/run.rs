//! RunPodSandbox: intent → files beside (network namespace → CNI ADD beside pause process) → ready.
//!
//! The record holds every name before anything is made, so each step can be undone from it alone: by this call when a later
//! step fails, by recovery after a crash. A repeated call joins the one under way or gets the finished sandbox's id.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cni_plugins_host::netns;
use cni_plugins_types::NetworkConfigList;
use cri_shim_api::v1::{ContainerEventType, NamespaceMode, PodSandboxConfig, RunPodSandboxRequest};
use cri_shim_core::bandwidth::Bandwidth;
use cri_shim_core::ids::SandboxId;
use cri_shim_core::names;
use cri_shim_core::oci::namespaces;
use cri_shim_core::record::{SandboxPhase, SandboxRecord};

use super::pause::Started;
use crate::clock;
use crate::error::{RuntimeError, chain};
use crate::host::blocking;
use crate::runtime::{Runtime, random};
use crate::state::{Sandbox, sandbox_word};
use crate::steps::{Step, reached};
use crate::telemetry::stage;

impl Runtime {
    /// Makes a sandbox and gives its id.
    pub async fn run_sandbox(
        self: &Arc<Self>,
        request: RunPodSandboxRequest,
    ) -> Result<String, RuntimeError> {
        let handler = self.handlers.obtain(&request.runtime_handler).await?.name.clone();
        let missing = || RuntimeError::Invalid { field: "config", problem: "is missing".to_owned() };
        let config = request.config.ok_or_else(missing)?;
        let name = names::sandbox(config.metadata.as_ref())?;
        let (runtime, key) = (Arc::clone(self), name.clone());
        let work = Box::pin(runtime.make_sandbox(name, config, request.runtime_handler, handler));
        self.sandbox_flights.join(&key, work).await
    }

    async fn make_sandbox(
        self: Arc<Self>,
        name: String,
        config: PodSandboxConfig,
        runtime_handler: String,
        handler: String,
    ) -> Result<String, RuntimeError> {
        if let Some(existing) = self.registry.sandbox_named(&name) {
            match existing.phase() {
                SandboxPhase::Ready => return Ok(existing.id.clone()),
                // One that could not be taken back earlier: whoever asks again gets a new one in its place.
                SandboxPhase::Creating | SandboxPhase::Removing => {
                    let _one_at_a_time = existing.operation.lock().await;
                    if self.registry.sandbox(&existing.id).is_some() {
                        self.erase_sandbox(&existing, false).await?;
                    }
                }
                phase => {
                    let state = sandbox_word(phase);
                    return Err(RuntimeError::NameTaken { name, id: existing.id.clone(), state });
                }
            }
        }
        let id = SandboxId::from_random(random()?);
        let network = self.network_for(&config)?;
        let mut record = SandboxRecord {
            id: id.to_string(),
            name,
            config,
            runtime_handler,
            handler,
            created_at: clock::now(),
            ..SandboxRecord::default()
        };
        if let Some(list) = &network {
            let file = self.paths.netns_dir.join(format!("cni-{}", &id.as_str()[..32]));
            record.netns = file.to_string_lossy().into_owned();
            record.network.clone_from(&list.name);
        }
        let sandbox = Arc::new(Sandbox::new(record));
        self.check(&sandbox.record.get())?;
        self.save(&sandbox.record).await?;
        self.registry.add_sandbox(&sandbox);
        reached(Step::SandboxIntent);
        match self.build_sandbox(&sandbox, network).await {
            Ok(()) => Ok(sandbox.id.clone()),
            Err(error) => {
                self.undo_sandbox(&sandbox).await;
                Err(error)
            }
        }
    }

    /// The pod network to join; nothing for a pod on the host's network.
    fn network_for(&self, config: &PodSandboxConfig) -> Result<Option<Arc<NetworkConfigList>>, RuntimeError> {
        let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let options = namespaces::options(security.and_then(|security| security.namespace_options.as_ref()))?;
        if options.network() == NamespaceMode::Node {
            return Ok(None);
        }
        self.network.current().map(Some).map_err(RuntimeError::NetworkNotReady)
    }

    async fn build_sandbox(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        network: Option<Arc<NetworkConfigList>>,
    ) -> Result<(), RuntimeError> {
        let record = sandbox.record.get();
        let (files, connected) =
            tokio::join!(self.make_files(&record), self.connect(sandbox, &record, network));
        // Both were waited for, so that undoing never runs beside one of them.
        files?;
        let (addresses, pause) = connected?;
        let pid = pause.pid;
        sandbox.record.change(|record| {
            record.pid = pause.pid;
            record.pause_began = pause.began;
            record.addresses = addresses;
            record.advance(SandboxPhase::Ready);
        });
        self.save(&sandbox.record).await?;
        reached(Step::SandboxReady);
        sandbox.end_untold.store(true, Ordering::Release);
        self.watch_sandbox(sandbox);
        self.tell(ContainerEventType::ContainerCreatedEvent, &sandbox.id, &sandbox.id);
        self.tell(ContainerEventType::ContainerStartedEvent, &sandbox.id, &sandbox.id);
        tracing::info!(sandbox = sandbox.id, name = record.name, pid, "sandbox is ready");
        Ok(())
    }

    async fn make_files(&self, record: &SandboxRecord) -> Result<(), RuntimeError> {
        let dirs = self.sandbox_dirs(&record.id);
        let (copy, host_ipc) = (record.clone(), host_ipc(&record.config));
        blocking(move || dirs.make(&copy, host_ipc)).await?;
        reached(Step::SandboxFiles);
        Ok(())
    }

    /// Makes the network namespace and the pause process in it, and attaches it to the pod network.
    async fn connect(
        &self,
        sandbox: &Sandbox,
        record: &SandboxRecord,
        network: Option<Arc<NetworkConfigList>>,
    ) -> Result<(Vec<String>, Started), RuntimeError> {
        let path = (!record.netns.is_empty()).then(|| PathBuf::from(&record.netns));
        let mut early = None;
        match path {
            // The namespace must belong to the pod's user namespace, which comes to be with the pause process.
            Some(path) if has_own_users(&record.config) => {
                let pause = self.paused(sandbox, record).await?;
                let made_by = PathBuf::from(format!("/proc/{}/ns/net", pause.pid));
                stage("netns", blocking(move || pin_netns(&path, Some(&made_by)))).await?;
                early = Some(pause);
            }
            Some(path) => stage("netns", blocking(move || pin_netns(&path, None))).await?,
            None => {}
        }
        reached(Step::SandboxNetns);
        let attach = async {
            let Some(list) = &network else { return Ok(Vec::new()) };
            let addresses = self.network.attach(list, record).await;
            if let Err(RuntimeError::Network { source, .. }) = &addresses
                && source.ran_nothing()
            {
                // Nobody gave it anything: nothing is owed when it is taken back.
                sandbox.record.change(|record| record.network.clear());
            }
            reached(Step::SandboxAttached);
            addresses
        };
        let pause = async {
            match early {
                Some(pause) => Ok(pause),
                None => self.paused(sandbox, record).await,
            }
        };
        // Both only need the namespace, and both are waited for.
        let (addresses, pause) = tokio::join!(attach, pause);
        Ok((addresses?, pause?))
    }

    /// Runs the pause process and holds it at once, so that whatever happens now can end it.
    async fn paused(&self, sandbox: &Sandbox, record: &SandboxRecord) -> Result<Started, RuntimeError> {
        let mut pause = self.start_pause(record).await?;
        reached(Step::SandboxPause);
        sandbox.hold_pause(&mut pause)?;
        Ok(pause)
    }

    /// Refuses what cannot work before anything is made.
    fn check(&self, record: &SandboxRecord) -> Result<(), RuntimeError> {
        let handler = self.handlers.of_record(&record.handler)?;
        if has_own_users(&record.config) && !handler.features.user_namespaces {
            let problem =
                format!("runtime handler {:?} cannot run pods with a user namespace here", handler.name);
            return Err(RuntimeError::Handler { problem });
        }
        Bandwidth::of(&record.config.annotations)
            .map_err(|error| RuntimeError::Invalid { field: "annotations", problem: error.to_string() })?;
        for port in &record.config.port_mappings {
            let is_port = |number: i32| u16::try_from(number).is_ok();
            if !is_port(port.host_port) || !is_port(port.container_port) {
                let (host, container) = (port.host_port, port.container_port);
                let problem = format!("{host} or {container} is no port number");
                return Err(RuntimeError::Invalid { field: "port_mappings", problem });
            }
        }
        self.pause_spec(record).map(drop)
    }

    /// Takes a half-made sandbox back. What cannot be undone stays visible as not ready, so that it is tried again.
    pub(crate) async fn undo_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let _one_at_a_time = sandbox.operation.lock().await;
        if let Err(error) = self.erase_sandbox(sandbox, false).await {
            tracing::error!(sandbox = sandbox.id, error = %chain(&error), "a half-made sandbox could not be undone");
        }
    }
}

/// Whether the pod shares the node's IPC namespace.
pub(crate) fn host_ipc(config: &PodSandboxConfig) -> bool {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    security
        .and_then(|security| security.namespace_options.as_ref())
        .is_some_and(|options| options.ipc() == NamespaceMode::Node)
}

/// A specification as containerd stores it.
pub(crate) fn to_json(spec: &oci_spec::runtime::Spec) -> Result<Vec<u8>, RuntimeError> {
    serde_json::to_vec(spec)
        .map_err(|error| RuntimeError::Invalid { field: "config", problem: error.to_string() })
}

/// Whether the pod has a user namespace of its own.
pub(crate) fn has_own_users(config: &PodSandboxConfig) -> bool {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    security
        .and_then(|security| security.namespace_options.as_ref())
        .and_then(|options| options.userns_options.as_ref())
        .is_some_and(|users| users.mode() == NamespaceMode::Pod)
}

/// Pins a new network namespace at `path`, or the one at `existing`.
fn pin_netns(path: &Path, existing: Option<&Path>) -> Result<(), RuntimeError> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str()))
    else {
        let problem = format!("{} cannot name a network namespace", path.display());
        return Err(RuntimeError::Invalid { field: "netnsDir", problem });
    };
    match existing {
        Some(existing) => netns::pin(existing, directory, name)?,
        None => netns::create_named(directory, name)?,
    };
    Ok(())
}
