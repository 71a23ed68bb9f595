//! RunPodSandbox: intent → network namespace → (CNI ADD beside files and pause process) → ready.
//!
//! The record holds every name before anything is made, so each step can be undone from it alone: by this call when a later
//! step fails, by recovery after a crash. A repeated call joins the one under way or gets the finished sandbox's id.

use std::path::Path;
use std::sync::Arc;

use cni_plugins_host::netns;
use cni_plugins_types::NetworkConfigList;
use containerd_client::types::Mount;
use cri_shim_api::v1::{ContainerEventType, NamespaceMode, PodSandboxConfig, RunPodSandboxRequest};
use cri_shim_core::ids::SandboxId;
use cri_shim_core::names;
use cri_shim_core::oci::namespaces;
use cri_shim_core::oci::sandbox::{SandboxSpec, spec};
use cri_shim_core::record::{SandboxPhase, SandboxRecord};

use crate::clock;
use crate::containerd::containers::NewContainer;
use crate::containerd::tasks::Stdio;
use crate::error::{RuntimeError, chain};
use crate::host::blocking;
use crate::runtime::{KIND_LABEL, Runtime, random};
use crate::state::{Sandbox, sandbox_word};

impl Runtime {
    /// Makes a sandbox and gives its id.
    pub async fn run_sandbox(
        self: &Arc<Self>,
        request: RunPodSandboxRequest,
    ) -> Result<String, RuntimeError> {
        let handler = self.handlers.get(&request.runtime_handler)?.name.clone();
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
            return match existing.phase() {
                SandboxPhase::Ready => Ok(existing.id.clone()),
                phase => {
                    let state = sandbox_word(phase);
                    Err(RuntimeError::NameTaken { name, id: existing.id.clone(), state })
                }
            };
        }
        let id = SandboxId::from_random(random().await?);
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
        self.save(&sandbox.record).await?;
        self.registry.add_sandbox(&sandbox);
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
        if !record.netns.is_empty() {
            let path = record.netns.clone();
            blocking(move || pin_netns(Path::new(&path))).await?;
        }
        // Both only need the namespace. Both are waited for, so that undoing never runs beside one of them.
        let attach = async {
            match &network {
                Some(list) => self.network.attach(list, &record).await,
                None => Ok(Vec::new()),
            }
        };
        let (addresses, pid) = tokio::join!(attach, self.start_pause(&record));
        let (addresses, pid) = (addresses?, pid?);
        sandbox.record.change(|record| {
            record.pid = pid;
            record.addresses = addresses;
            record.advance(SandboxPhase::Ready);
        });
        self.save(&sandbox.record).await?;
        self.watch_sandbox(sandbox);
        self.tell(ContainerEventType::ContainerCreatedEvent, &sandbox.id, &sandbox.id);
        self.tell(ContainerEventType::ContainerStartedEvent, &sandbox.id, &sandbox.id);
        tracing::info!(sandbox = sandbox.id, name = record.name, pid, "sandbox is ready");
        Ok(())
    }

    /// Makes the sandbox's files and runs its pause process; gives its process id.
    async fn start_pause(&self, record: &SandboxRecord) -> Result<u32, RuntimeError> {
        let dirs = self.sandbox_dirs(&record.id);
        let (copy, host_ipc) = (record.clone(), host_ipc(&record.config));
        blocking(move || dirs.make(&copy, host_ipc)).await?;
        let netns = (!record.netns.is_empty()).then(|| record.netns.clone().into());
        let cgroup = self.cgroup(record.cgroup_parent(), &record.id)?.for_runtime;
        let handler = self.handlers.of_record(&record.handler)?;
        let spec = spec(&SandboxSpec {
            id: &record.id,
            config: &record.config,
            netns,
            cgroup: &cgroup,
            node: &self.node,
        })?;
        let container = NewContainer {
            id: record.id.clone(),
            labels: [(KIND_LABEL.to_owned(), "sandbox".to_owned())].into(),
            image: String::new(),
            snapshot: String::new(),
            spec: to_json(&spec)?,
            shim: handler.shim(),
            options: self.shim_options(handler),
        };
        self.client.create_container(container).await?;
        let root = Mount {
            r#type: "bind".to_owned(),
            source: self.paths.pause_root.to_string_lossy().into_owned(),
            options: vec!["rbind".to_owned(), "ro".to_owned()],
            ..Mount::default()
        };
        let pid = self.client.create_task(&record.id, vec![root], Stdio::default()).await?;
        self.client.start_task(&record.id, "").await?;
        Ok(pid)
    }

    /// Takes a half-made sandbox back. What cannot be undone stays visible as not ready, so that it is tried again.
    pub(crate) async fn undo_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let _one_at_a_time = sandbox.operation.lock().await;
        if let Err(error) = self.erase_sandbox(sandbox).await {
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

fn pin_netns(path: &Path) -> Result<(), RuntimeError> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str()))
    else {
        let problem = format!("{} cannot name a network namespace", path.display());
        return Err(RuntimeError::Invalid { field: "netnsDir", problem });
    };
    netns::create_named(directory, name)?;
    Ok(())
}
