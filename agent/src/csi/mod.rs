//! CSI: volumes that drivers on this node make, by the Container Storage Interface.
//!
//! Inputs: drivers that register ([`crate::plugins`]), PersistentVolumes and inline volumes of pods, CSIDriver and
//! VolumeAttachment objects. Outputs: calls of drivers, `vol_data.json` on disk, the node's CSINode, and which volumes the node
//! has in use. A volume goes on disk before its driver is asked, and leaves it after the driver has let it go: what a killed
//! agent left is found there, and no call is lost. Every call has a deadline; calls about one volume come one after the other,
//! and nothing waits for another volume.
//!
//! Reading order: [`wire`] (messages), `spec` (what a volume asks for), `layout` (the disk), `mount`, `unmount`, then
//! `attach`, `expand`, `stats`, `node` (CSINode). Upstream's behaviour: `pkg/volume/csi` of the kubelet.

mod attach;
mod drivers;
mod expand;
mod layout;
mod mount;
mod node;
mod spec;
mod stats;
mod unmount;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::Client;
use tokio::sync::{OwnedMutexGuard, watch};

use self::drivers::Drivers;
use self::layout::{Layout, VolumeData};
pub use self::spec::CsiVolume;
use self::spec::unique_name;
use crate::contracts::{ObjectSource, VolumeError, VolumeEvent, VolumeStep};
use crate::host::volumes::tokens::Tokens;
use crate::plugins::{Plugin, PluginHandler};
use crate::sources::node::NodeWatch;

/// Deadline of a request to the API server.
const API_DEADLINE: Duration = Duration::from_secs(10);

/// Where the agent is, and how patient it is.
#[derive(Debug, Clone)]
pub struct CsiSettings {
    /// The kubelet's root directory.
    pub root_dir: PathBuf,
    /// This node.
    pub node_name: String,
    /// Its object, which tells whether what is in use was reported; `None`: nobody reports.
    pub node: Option<NodeWatch>,
    /// Deadline of a call that may format or mount.
    pub call_deadline: Duration,
    /// How long an attachment is waited for before that is told.
    pub attach_patience: Duration,
}

impl CsiSettings {
    /// With upstream's deadlines.
    pub fn new(root_dir: &Path, node_name: &str) -> Self {
        Self {
            root_dir: root_dir.to_owned(),
            node_name: node_name.to_owned(),
            node: None,
            call_deadline: Duration::from_secs(120),
            attach_patience: Duration::from_secs(120),
        }
    }
}

/// Volumes of drivers. Clones share them.
#[derive(Clone)]
pub struct Csi(Arc<Inner>);

struct Inner {
    settings: CsiSettings,
    layout: Layout,
    client: Client,
    objects: Arc<dyn ObjectSource>,
    drivers: Drivers,
    tokens: Tokens,
    state: Mutex<State>,
    /// Names of the volumes that must not be detached.
    in_use: watch::Sender<BTreeSet<String>>,
    /// One writer of the CSINode at a time.
    publishing: tokio::sync::Mutex<()>,
}

/// What is remembered. All of it can be found out again.
#[derive(Default)]
struct State {
    /// One for each volume that somebody is at.
    locks: BTreeMap<String, Weak<tokio::sync::Mutex<()>>>,
    /// What pods see, by path.
    published: BTreeMap<PathBuf, Published>,
    /// Where volumes are staged.
    staged: BTreeSet<PathBuf>,
    /// Pods that use a volume that is attached, by the volume's name.
    users: BTreeMap<String, BTreeSet<String>>,
    /// Since when a pod waits for an attachment.
    waiting: BTreeMap<(String, String), Instant>,
}

/// A volume that a pod sees.
#[derive(Debug, Clone)]
struct Published {
    uid: String,
    /// The pod's name of the volume.
    name: String,
    /// Namespace and name of its claim.
    claim: Option<(String, String)>,
    driver: String,
    handle: String,
    staging: Option<PathBuf>,
    /// When to publish it again.
    again_at: Option<Timestamp>,
}

/// A volume that a pod is to see.
#[derive(Debug, Clone)]
pub struct MountOrder<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Its name of the volume.
    pub name: &'a str,
    /// The volume.
    pub volume: CsiVolume,
    /// Its claim.
    pub claim: Option<&'a PersistentVolumeClaim>,
    /// `fsGroup`.
    pub group: Option<u32>,
    /// The group is given to every file at each start of a pod, not only where the root has another one.
    pub group_always: bool,
}

impl MountOrder<'_> {
    fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    fn error(&self, step: VolumeStep, message: impl std::fmt::Display) -> VolumeError {
        VolumeError {
            volume: self.volume.spec_name.clone(),
            step,
            message: message.to_string(),
            waits: false,
        }
    }

    /// The step at which a pod gets the volume.
    fn publish_step(&self) -> VolumeStep {
        if self.volume.block { VolumeStep::MapPodDevice } else { VolumeStep::SetUp }
    }

    /// The step at which the node gets it.
    fn stage_step(&self) -> VolumeStep {
        match (self.volume.block, self.volume.persistent) {
            (true, _) => VolumeStep::SetUpDevice,
            (false, true) => VolumeStep::MountDevice,
            (false, false) => VolumeStep::SetUp,
        }
    }
}

/// A volume that a pod sees.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mounted {
    /// Directory, or device.
    pub path: PathBuf,
    /// When to look again.
    pub refresh_at: Option<Timestamp>,
    /// What happened beside.
    pub events: Vec<VolumeEvent>,
}

impl Csi {
    /// Volumes below the settings' root directory, with what earlier agents left there. `objects` gives secrets and wakes pods.
    pub fn new(settings: CsiSettings, objects: Arc<dyn ObjectSource>, client: Client) -> Self {
        let layout = Layout::new(&settings.root_dir);
        let mut state = State::default();
        // Until each has gone, they must not be detached. Who cannot list them has no pods either.
        for (uid, volume) in layout.of_all_pods().unwrap_or_default() {
            if let Some(data) = volume.data.filter(VolumeData::is_persistent) {
                let name = unique_name(&data.driver_name, &data.volume_handle);
                state.users.entry(name).or_default().insert(uid);
            }
        }
        let in_use = watch::Sender::new(state.users.keys().cloned().collect());
        Self(Arc::new(Inner {
            layout,
            tokens: Tokens::new(client.clone()),
            client,
            objects,
            drivers: Drivers::default(),
            state: Mutex::new(state),
            in_use,
            publishing: tokio::sync::Mutex::default(),
            settings,
        }))
    }

    /// Names of the volumes that the node has in use, for its status.
    pub fn in_use(&self) -> watch::Receiver<BTreeSet<String>> {
        self.0.in_use.subscribe()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else is at the volume.
    async fn lock(&self, driver: &str, handle: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut state = self.state();
            state.locks.retain(|_, lock| lock.strong_count() > 0);
            let entry = state.locks.entry(unique_name(driver, handle)).or_default();
            entry.upgrade().unwrap_or_else(|| {
                let lock = Arc::default();
                *entry = Arc::downgrade(&lock);
                lock
            })
        };
        lock.lock_owned().await
    }

    /// Publishes who uses what, after a change of it.
    fn tell_in_use(&self, state: &State) {
        let names: BTreeSet<String> = state.users.keys().cloned().collect();
        self.0.in_use.send_if_modified(|known| {
            let changed = *known != names;
            *known = names;
            changed
        });
    }

    /// Runs what may block on disks.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Layout) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, String> {
        let layout = self.0.layout.clone();
        let done = tokio::task::spawn_blocking(move || work(&layout)).await;
        done.map_err(std::io::Error::other).and_then(|done| done).map_err(|error| error.to_string())
    }

    async fn take_in(&self, plugin: &Plugin) -> Result<(), String> {
        node::check(plugin)?;
        let driver = drivers::Driver::new(plugin);
        let info = node::info(&driver).await?;
        self.0.drivers.insert(&plugin.name, driver);
        // Pods of it can go on, also while the API server is away.
        self.0.objects.tell(&crate::contracts::Dependency::Plugin(plugin.name.clone()));
        self.install(&plugin.name, &info).await?;
        self.sweep(&plugin.name).await;
        Ok(())
    }
}

impl PluginHandler for Csi {
    fn kind(&self) -> &'static str {
        "CSIPlugin"
    }

    fn register<'a>(&'a self, plugin: &'a Plugin) -> BoxFuture<'a, Result<(), String>> {
        self.take_in(plugin).boxed()
    }

    fn deregister<'a>(&'a self, plugin: &'a Plugin) -> BoxFuture<'a, ()> {
        async move {
            if self.0.drivers.remove(plugin) {
                self.uninstall(&plugin.name).await;
            }
        }
        .boxed()
    }
}

/// One request to the API server.
async fn ask<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(API_DEADLINE, call).await {
        Ok(answer) => answer.map_err(|error| crate::chain::chain(&error)),
        Err(_elapsed) => Err(format!("no answer of the API server within {} s", API_DEADLINE.as_secs())),
    }
}
