//! The runtime: everything a request works with, and what all operations share.
//!
//! `sandbox` and `container` hold the operations, `recovery` what happens at start and after containerd came back,
//! `exits` what happens when a process ends. Each object has one operation at a time; different ones run side by side.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use cri_shim_api::v1::{ContainerEventResponse, ContainerEventType};
use cri_shim_core::cgroup::{Driver, Place};
use cri_shim_core::oci::NodeFacts;
use cri_shim_core::record::ContainerPhase;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, HandlerKind};
use crate::container::identity::AccountCache;
use crate::containerd::Client;
use crate::containerd::options::RuncOptions;
use crate::error::RuntimeError;
use crate::events::EventHub;
use crate::flight::Flights;
use crate::handlers::{Handler, Handlers};
use crate::host::asked::Asked;
use crate::host::cgroup::{Hierarchies, Roots};
use crate::host::files::{self, SandboxDirs};
use crate::host::{apparmor, blocking, pause};
use crate::images::ImageStore;
use crate::journal::{Journal, Journaled};
use crate::network::Network;
use crate::sandbox::owed::Owed;
use crate::state::{Container, Registry, Sandbox, Shared};
use crate::stats::Collector;
use crate::{clock, facts, sandbox};

/// Label of everything we make in containerd, with `sandbox` or `container`.
pub const KIND_LABEL: &str = "io.keelson.cri.kind";
/// How long a request waits for recovery after a start.
const READY_PATIENCE: Duration = Duration::from_secs(5);

/// How long processes that nobody waits for may take to go.
const CLEAR_PATIENCE: Duration = Duration::from_secs(10);

/// Where things are.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Persistent state.
    pub root_dir: PathBuf,
    /// Volatile state.
    pub state_dir: PathBuf,
    /// Pinned network namespaces.
    pub netns_dir: PathBuf,
    /// The pause program's root file system.
    pub pause_root: PathBuf,
    /// The keeper program.
    pub keeper: PathBuf,
    /// containerd's socket, by which its shims are told.
    pub containerd_socket: PathBuf,
    /// Files that describe CDI devices.
    pub cdi_dirs: Vec<PathBuf>,
}

impl Paths {
    /// Where checkpoints are made, a directory for each.
    pub fn checkpoints(&self) -> PathBuf {
        self.root_dir.join("checkpoints")
    }

    /// Where runtimes keep their own state: a directory for each containerd namespace, in it one for each container.
    pub fn runtime_root(&self) -> PathBuf {
        self.state_dir.join("runc")
    }
}

/// Whether the runtime can work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// containerd answers and what ran before is known.
    Ready {
        /// containerd's version.
        containerd: String,
    },
    /// Not yet, or not any more.
    NotReady {
        /// Why.
        reason: String,
        /// Whether it was ready before, so that what ran is known.
        recovered: bool,
    },
}

/// Everything a request works with; shared as `Arc<Runtime>`.
pub struct Runtime {
    /// containerd.
    pub client: Client,
    /// Images.
    pub images: ImageStore,
    /// Records on disk.
    pub journal: Journal,
    /// Records in memory.
    pub registry: Registry,
    /// Who follows events.
    pub events: EventHub,
    /// The pod network.
    pub network: Network,
    /// What the node can do; see [`Runtime::node_for`].
    pub node: NodeFacts,
    /// What may run containers.
    pub handlers: Arc<Handlers>,
    /// Who makes cgroups.
    pub cgroup_driver: Driver,
    /// Where cgroups are.
    pub hierarchies: Hierarchies,
    /// Every cgroup hierarchy.
    pub cgroups: Roots,
    /// What is kept of figures.
    pub collector: Collector,
    /// Where everything else is.
    pub paths: Paths,
    /// Whether we can work.
    pub readiness: watch::Sender<Readiness>,
    /// Sandboxes being made, by name.
    pub(crate) sandbox_flights: Flights<String>,
    /// Containers being made, by sandbox and name.
    pub(crate) container_flights: Flights<String>,
    /// Sandboxes being stopped or removed, by what is done and id.
    pub(crate) ending_flights: Flights<()>,
    /// Detachments that are still to be done.
    pub(crate) owed: Owed,
    /// The passwd and group files of images used lately.
    pub(crate) accounts: AccountCache,
    /// Mount sources that are being looked at.
    pub(crate) asked: Asked,
}

impl Runtime {
    /// Prepares directories and looks at the node. Nothing is recovered yet: that is [`crate::recovery::supervise`].
    pub async fn open(
        config: &Config,
        client: Client,
        images: ImageStore,
        cancel: CancellationToken,
    ) -> anyhow::Result<Arc<Self>> {
        let (mut node, hierarchies, cgroups) = facts::find()?;
        if node.apparmor {
            let loaded = apparmor::load_default(&config.root_dir.join("apparmor")).await;
            node.apparmor_default = loaded.is_ok();
            if let Err(reason) = loaded {
                tracing::warn!(
                    reason,
                    "the default AppArmor profile is not loaded; containers run without one"
                );
            }
        }
        let handlers = Handlers::find(config, cgroups.clone()).await;
        let network = Network::start(&config.cni, cancel).await?;
        let journal = Journal::open(&config.root_dir.join("journal"))?;
        let paths = Paths {
            root_dir: config.root_dir.clone(),
            state_dir: config.state_dir.clone(),
            netns_dir: config.netns_dir.clone(),
            pause_root: pause::install(&config.root_dir)?,
            keeper: pause::install_keeper(&config.root_dir)?,
            containerd_socket: config.containerd_socket.clone(),
            cdi_dirs: config.cdi_dirs.clone(),
        };
        let reason = "containerd has not answered yet".to_owned();
        Ok(Arc::new(Self {
            client,
            images,
            journal,
            registry: Registry::default(),
            events: EventHub::default(),
            network,
            node,
            handlers,
            cgroup_driver: config.cgroup_driver.into(),
            hierarchies,
            cgroups,
            collector: Collector::new(config),
            paths,
            readiness: watch::Sender::new(Readiness::NotReady { reason, recovered: false }),
            sandbox_flights: Flights::default(),
            container_flights: Flights::default(),
            ending_flights: Flights::default(),
            owed: Owed::default(),
            accounts: AccountCache::default(),
            asked: Asked::default(),
        }))
    }

    /// Waits a while until what ran before is known; after that it returns at once.
    pub async fn recovered(&self) -> Result<(), RuntimeError> {
        let mut readiness = self.readiness.subscribe();
        let known = |state: &Readiness| {
            matches!(state, Readiness::Ready { .. } | Readiness::NotReady { recovered: true, .. })
        };
        let waited = tokio::time::timeout(READY_PATIENCE, readiness.wait_for(known)).await;
        if waited.is_ok_and(|state| state.is_ok()) {
            return Ok(());
        }
        let state = self.readiness.borrow().clone();
        match state {
            Readiness::NotReady { reason, recovered: false } => Err(RuntimeError::NotReady(reason)),
            _ => Ok(()),
        }
    }

    /// The sandbox with this id.
    pub fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, RuntimeError> {
        self.registry.sandbox(id).ok_or_else(|| RuntimeError::NotFound { kind: "sandbox", id: id.to_owned() })
    }

    /// The container with this id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, RuntimeError> {
        self.registry
            .container(id)
            .ok_or_else(|| RuntimeError::NotFound { kind: "container", id: id.to_owned() })
    }

    /// The sandbox with this id, which must be ready.
    pub fn ready_sandbox(&self, id: &str) -> Result<Arc<Sandbox>, RuntimeError> {
        let sandbox = self.sandbox(id)?;
        sandbox.must_be_ready()?;
        Ok(sandbox)
    }

    /// The container with this id, which must be running.
    pub fn running_container(&self, id: &str) -> Result<Arc<Container>, RuntimeError> {
        let container = self.container(id)?;
        container.must_be(ContainerPhase::Running)?;
        Ok(container)
    }

    /// Writes a record to disk as it is now.
    pub async fn save<R: Journaled + Sync>(&self, record: &Shared<R>) -> Result<(), RuntimeError> {
        let (journal, record) = (self.journal.clone(), record.clone());
        blocking(move || {
            // Two writers of one record follow each other here, so the newest version is what stays.
            let forgotten = record.forgotten.lock().unwrap_or_else(PoisonError::into_inner);
            if *forgotten { Ok(()) } else { journal.write(&record.get()) }
        })
        .await
    }

    /// Takes a record from the disk for good.
    pub async fn forget<R: Journaled + Sync>(
        &self,
        id: &str,
        record: &Shared<R>,
    ) -> Result<(), RuntimeError> {
        let (journal, record, id) = (self.journal.clone(), record.clone(), id.to_owned());
        blocking(move || record.forget(&journal, &id)).await
    }

    /// The directories of a sandbox.
    pub fn sandbox_dirs(&self, id: &str) -> SandboxDirs {
        SandboxDirs::new(&self.paths.root_dir, &self.paths.state_dir, id)
    }

    /// Options of a handler's shim: the runtime's own state lives in our directory.
    pub fn shim_options(&self, handler: &Handler) -> RuncOptions {
        RuncOptions {
            binary_name: match handler.kind {
                HandlerKind::Runc => handler.binary.to_string_lossy().into_owned(),
                HandlerKind::Keelson => String::new(),
            },
            root: self.paths.runtime_root().to_string_lossy().into_owned(),
            systemd_cgroup: self.cgroup_driver == Driver::Systemd,
        }
    }

    /// What the node can do with this handler.
    pub fn node_for(&self, handler: &Handler) -> NodeFacts {
        NodeFacts { recursive_readonly: handler.features.recursive_readonly, ..self.node.clone() }
    }

    /// The cgroup of a sandbox's process or of a container.
    pub fn cgroup(&self, parent: &str, id: &str) -> Result<Place, RuntimeError> {
        self.cgroup_driver.place(parent, id, self.client.namespace()).map_err(|error| RuntimeError::Invalid {
            field: "linux.cgroup_parent",
            problem: error.to_string(),
        })
    }

    /// Takes away what a runtime that was cut off left of a container's process: the process, its cgroup and the
    /// runtime's own notes. For a container that does not run.
    pub(crate) async fn clear_runtime(&self, container: &Container) -> Result<(), RuntimeError> {
        let notes = self.paths.runtime_root().join(self.client.namespace()).join(&container.id);
        let cgroup = container.record.with(|record| record.cgroup.clone());
        let cgroups = self.cgroups.clone();
        blocking(move || {
            // Only records of the first version have none.
            if !cgroup.is_empty() {
                cgroups.clear(&cgroup, CLEAR_PATIENCE)?;
            }
            // Rarely there: a runtime that ends in peace takes its notes away itself.
            if notes.is_dir() { files::remove_tree(&notes) } else { Ok(()) }
        })
        .await
    }

    /// Tells who follows that something happened to a container, or to a sandbox by its own id.
    pub fn tell(&self, kind: ContainerEventType, sandbox_id: &str, id: &str) {
        if !self.events.followed() {
            return;
        }
        let status =
            self.registry.sandbox(sandbox_id).map(|sandbox| sandbox.record.with(sandbox::status::status));
        self.events.tell(ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind.into(),
            created_at: clock::now(),
            pod_sandbox_status: status,
            containers_statuses: self.container_statuses(sandbox_id),
        });
    }
}

/// 32 bytes that nobody can guess.
pub fn random() -> Result<[u8; 32], RuntimeError> {
    let mut bytes = [0; 32];
    let failed = |error: getrandom::Error| {
        RuntimeError::host("read", Path::new("/dev/urandom"))(std::io::Error::other(error))
    };
    getrandom::fill(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
