//! The seams between the agent's parts: who offers what to whom.
//!
//! Inputs and outputs: traits that `crate::host` and the pod loop implement, and the plain structs that cross
//! them. This module decides nothing and does no IO. The traits are object-safe, so that tests bring fakes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use agent_core::eviction::Pressure;
use cri_shim_api::v1::image_service_client::ImageServiceClient;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{ConfigMap, Node, NodeFeatures, NodeRuntimeHandler, Pod, Secret};
use tokio::sync::{Notify, watch};
use tonic::transport::Channel;

use crate::devices::Counts;
use crate::events::EventRecorder;
use crate::network;

/// The CRI clients every part shares (one connection each, reconnecting by itself).
#[derive(Clone, Debug)]
pub struct CriClients {
    /// Sandboxes and containers.
    pub runtime: RuntimeServiceClient<Channel>,
    /// Images.
    pub images: ImageServiceClient<Channel>,
}

/// Why a request for a pod's container cannot be served; the text is what kubectl shows.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum LookupError {
    /// No such pod on this node (HTTP 404).
    #[error("pod {pod:?} not found in namespace {namespace:?}")]
    PodNotFound {
        /// Namespace asked for.
        namespace: String,
        /// Pod asked for.
        pod: String,
    },
    /// The pod has no container of that name (HTTP 404).
    #[error("container {container:?} is not valid for pod {pod:?}")]
    ContainerNotFound {
        /// Pod asked for.
        pod: String,
        /// Container asked for.
        container: String,
    },
    /// The container has never run yet (HTTP 400).
    #[error("container {container:?} in pod {pod:?} is waiting to start: {reason}")]
    NotStarted {
        /// Pod asked for.
        pod: String,
        /// Container asked for.
        container: String,
        /// Waiting reason or message.
        reason: String,
    },
    /// `previous` was asked for and there is none (HTTP 400).
    #[error("previous terminated container {container:?} in pod {pod:?} not found")]
    NoPrevious {
        /// Pod asked for.
        pod: String,
        /// Container asked for.
        container: String,
    },
    /// The pod has no running sandbox (HTTP 404), or the container is not running.
    #[error("pod {pod:?} is not running on this node")]
    NotRunning {
        /// Pod asked for.
        pod: String,
    },
}

/// A container as the kubelet API needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerRef {
    /// CRI container id (without the runtime's scheme).
    pub id: String,
    /// Pod's uid.
    pub pod_uid: String,
    /// Absolute path of its log file.
    pub log_path: PathBuf,
    /// Whether it runs now (a log follower ends when it does not and the file is read to its end).
    pub running: bool,
}

/// Read access to the pods as the agent sees them. Cheap to call; never blocks.
pub trait PodLookup: Send + Sync + 'static {
    /// Every pod with its newest status, for `/pods`.
    fn pods(&self) -> Vec<Arc<Pod>>;

    /// The newest container of that name (running or not) for exec, attach and logs; an empty `container` means
    /// the only (or first) one. `uid` narrows when given.
    fn container(
        &self,
        namespace: &str,
        pod: &str,
        uid: Option<&str>,
        container: &str,
    ) -> Result<ContainerRef, LookupError>;

    /// The container instance before the newest one (`kubectl logs --previous`).
    fn previous_container(
        &self,
        namespace: &str,
        pod: &str,
        uid: Option<&str>,
        container: &str,
    ) -> Result<ContainerRef, LookupError>;

    /// The READY sandbox, for port-forward.
    fn sandbox(&self, namespace: &str, pod: &str, uid: Option<&str>) -> Result<String, LookupError>;
}

/// ConfigMaps and Secrets, each read once and then watched while a pod uses it.
///
/// A change wakes the pods that use the object, and their loop calls [`VolumeManager::mount_all`] again.
pub trait ObjectSource: Send + Sync + 'static {
    /// The ConfigMap, `None` when the API server says that it does not exist.
    fn config_map<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<ConfigMap>>, SourceError>>;

    /// The Secret, `None` when the API server says that it does not exist.
    fn secret<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Secret>>, SourceError>>;

    /// The pod depends on these too, beside what its spec names: it is woken when one of them changes, as far as the API
    /// server lets a node watch it.
    fn depend(&self, _pod_uid: &str, _on: &[Dependency]) {}

    /// Wakes the pods that depend on something that is no object of the API.
    fn tell(&self, _changed: &Dependency) {}
}

/// What a pod's volumes depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dependency {
    /// A PersistentVolumeClaim, by namespace and name.
    Claim(String, String),
    /// A PersistentVolume.
    Volume(String),
    /// A VolumeAttachment.
    Attachment(String),
    /// The CSIDriver object of a driver.
    Driver(String),
    /// The driver itself, on this node.
    Plugin(String),
}

/// An object could not be read from the API server.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {kind} \"{namespace}/{name}\": {message}")]
pub struct SourceError {
    /// `configmap` or `secret`.
    pub kind: &'static str,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// What went wrong.
    pub message: String,
}

/// One mounted volume, as container mounts need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPath {
    /// Directory, file, socket or device on the node.
    pub path: PathBuf,
    /// The volume itself is read-only (configMap, secret, projected, downwardAPI).
    pub read_only: bool,
}

/// What [`VolumeManager::mount_all`] made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountedVolumes {
    /// By volume name. Of a volume that is a device, the device.
    pub volumes: HashMap<String, HostPath>,
    /// When to call again even if nothing changes (service account tokens).
    pub refresh_at: Option<jiff::Timestamp>,
    /// What happened beside.
    pub events: Vec<VolumeEvent>,
}

/// Something to tell of a pod's volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeEvent {
    /// A problem.
    pub is_warning: bool,
    /// As upstream names it.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl VolumeEvent {
    /// Something good.
    pub fn normal(reason: &'static str, message: String) -> Self {
        Self { is_warning: false, reason, message }
    }

    /// A problem.
    pub fn warning(reason: &'static str, message: String) -> Self {
        Self { is_warning: true, reason, message }
    }
}

/// What was being done with a volume, as upstream names it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VolumeStep {
    /// The pod gets a directory.
    #[default]
    SetUp,
    /// The node gets a file system.
    MountDevice,
    /// It is to be attached to the node.
    Attach,
    /// Its attachment is looked at.
    WaitForAttach,
    /// The node gets a device.
    SetUpDevice,
    /// The pod gets a device.
    MapPodDevice,
    /// A directory is taken away.
    TearDown,
    /// A device is taken away.
    UnmapDevice,
}

impl VolumeStep {
    /// Upstream's name of the operation.
    pub fn words(self) -> &'static str {
        match self {
            Self::SetUp => "MountVolume.SetUp",
            Self::MountDevice => "MountVolume.MountDevice",
            Self::Attach => "AttachVolume.Attach",
            Self::WaitForAttach => "MountVolume.WaitForAttach",
            Self::SetUpDevice => "MapVolume.SetUpDevice",
            Self::MapPodDevice => "MapVolume.MapPodDevice",
            Self::TearDown => "UnmountVolume.TearDown",
            Self::UnmapDevice => "UnmapVolume.UnmapPodDevice",
        }
    }

    /// Reason of the event.
    pub fn reason(self) -> &'static str {
        match self {
            Self::SetUp | Self::MountDevice | Self::WaitForAttach | Self::TearDown => "FailedMount",
            Self::Attach => "FailedAttachVolume",
            Self::SetUpDevice | Self::MapPodDevice | Self::UnmapDevice => "FailedMapVolume",
        }
    }
}

/// One volume could not be set up or torn down; the text goes into the event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} failed for volume {volume:?} : {message}", step.words())]
pub struct VolumeError {
    /// Volume name (or a path, in teardown).
    pub volume: String,
    /// What was being done.
    pub step: VolumeStep,
    /// What went wrong, as upstream words it: `configmap "x" not found`.
    pub message: String,
    /// Nothing is wrong yet: it is waited for somebody.
    pub waits: bool,
}

/// What a volume holds, as its driver tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VolumeFigures {
    /// The pod's name of the volume.
    pub name: String,
    /// Namespace and name of its claim.
    pub claim: Option<(String, String)>,
    /// In all, left, in use.
    pub bytes: Option<(i64, i64, i64)>,
    /// The same of inodes.
    pub inodes: Option<(i64, i64, i64)>,
    /// Whether something is wrong with it, and what.
    pub abnormal: Option<(bool, String)>,
}

/// Facts that a volume's content may need and the pod object does not carry.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct VolumeContext {
    /// Node name.
    pub node_name: String,
    /// Node's allocatable, the default of a missing limit in resourceFieldRef (quantity strings).
    pub allocatable: BTreeMap<String, String>,
}

/// Sets up and removes the volumes of pods below `<rootDir>/pods/<uid>/volumes`.
pub trait VolumeManager: Send + Sync + 'static {
    /// Makes every volume of the pod ready and brings configMap, secret, downwardAPI and token contents up to date.
    /// Idempotent: called again after each change of the pod or of an object that it uses, and after a restart.
    fn mount_all<'a>(
        &'a self,
        pod: &'a Pod,
        context: &'a VolumeContext,
    ) -> BoxFuture<'a, Result<MountedVolumes, VolumeError>>;

    /// The path for a `subPath` mount: resolved inside the volume without following links out of it, made as a
    /// directory when missing.
    fn sub_path<'a>(
        &'a self,
        volume: &'a HostPath,
        sub_path: &'a str,
    ) -> BoxFuture<'a, Result<PathBuf, VolumeError>>;

    /// Unmounts and removes all of `<rootDir>/pods/<uid>` (also `etc-hosts` and `containers/`, which the pod loop
    /// writes there). Idempotent.
    fn teardown<'a>(&'a self, pod_uid: &'a str) -> BoxFuture<'a, Result<(), VolumeError>>;

    /// Figures of those of the pod's volumes whose drivers tell them.
    fn figures<'a>(&'a self, _pod_uid: &'a str) -> BoxFuture<'a, Vec<VolumeFigures>> {
        Box::pin(std::future::ready(Vec::new()))
    }

    /// Uids with a directory below `<rootDir>/pods`; the caller tears down those that it does not know.
    fn on_disk(&self) -> BoxFuture<'_, Result<Vec<String>, VolumeError>>;
}

/// A cgroup operation failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} cgroup {path}")]
pub struct CgroupError {
    /// `create`, `configure`, `remove`, `list`.
    pub operation: &'static str,
    /// Cgroup path relative to the hierarchy's root.
    pub path: String,
    /// Cause.
    #[source]
    pub source: std::io::Error,
}

/// A pod cgroup found on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundPodCgroup {
    /// Uid from the directory's name.
    pub pod_uid: String,
    /// Path relative to the hierarchy's root (`/keelson/up/kubepods/burstable/pod<uid>`).
    pub path: String,
}

/// Pod cgroups below `<cgroupRoot>/kubepods`. Paths are relative to the cgroup hierarchy's root, as CRI's
/// `cgroup_parent` wants them. Works with cgroup v1 and v2; limits that the host does not allow are logged once.
pub trait CgroupManager: Send + Sync + 'static {
    /// Makes `<cgroupRoot>/kubepods`, `/burstable`, `/besteffort`, with the controllers enabled down to there.
    fn ensure_root(&self) -> BoxFuture<'_, Result<(), CgroupError>>;

    /// Makes the pod's cgroup and sets its values. Idempotent; also updates.
    fn ensure_pod<'a>(
        &'a self,
        cgroup: &'a agent_core::qos::PodCgroup,
    ) -> BoxFuture<'a, Result<(), CgroupError>>;

    /// Kills what is left inside (the pod's containers are gone by now) and removes the pod's cgroup with all below
    /// it, in every hierarchy. Idempotent; returns when it is gone.
    fn remove_pod<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<(), CgroupError>>;

    /// Pod cgroups of every QoS class that exist now.
    fn list_pods(&self) -> BoxFuture<'_, Result<Vec<FoundPodCgroup>, CgroupError>>;
}

/// What a `/var/log/containers` link needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLink {
    /// Namespace.
    pub namespace: String,
    /// Pod name.
    pub pod: String,
    /// Container name.
    pub container: String,
    /// CRI container id.
    pub container_id: String,
    /// The log file that the link points at.
    pub log_path: PathBuf,
}

/// Links `<containerLogLinksDir>/<pod>_<ns>_<container>-<id>.log`.
pub trait LogLinks: Send + Sync + 'static {
    /// Makes or corrects the link. Failures are logged by the implementation; nothing depends on links.
    fn link(&self, link: LogLink) -> BoxFuture<'_, ()>;

    /// Removes links whose target is gone.
    fn remove_dangling(&self) -> BoxFuture<'_, ()>;
}

/// What the CRI's Version and Status say, refreshed every few seconds and at once after [`NodeFacts::recheck`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RuntimeHealth {
    /// `containerd://1.6.20`-like `containerRuntimeVersion` for the node's status; empty until first contact.
    pub version: String,
    /// Scheme of container ids (`containerd`, `keelson`): the CRI's runtime_name.
    pub runtime_name: String,
    /// RuntimeReady; `Err` holds the message for the node's Ready condition.
    pub runtime: Option<Result<(), String>>,
    /// NetworkReady; `Err` holds the message (`NetworkPluginNotReady message:…`).
    pub network: Option<Result<(), String>>,
    /// RuntimeClass handlers and what they can do, in the order of their names.
    pub handlers: Vec<NodeRuntimeHandler>,
    /// What the runtime can do whatever the handler.
    pub features: Option<NodeFeatures>,
}

/// What `crate::node` reads and may trigger.
#[derive(Clone)]
pub struct NodeFacts {
    /// CRI clients (ListImages for the node's images).
    pub cri: CriClients,
    /// Runtime health.
    pub health: watch::Receiver<RuntimeHealth>,
    /// Ask for a health check now (after the CNI configuration was written).
    pub recheck: Arc<Notify>,
    /// This node's object as the API server has it, `None` until seen.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    /// Pods on this node.
    pub pods: Arc<dyn PodLookup>,
    /// Events about the node.
    pub events: EventRecorder,
    /// Address the node registers with.
    pub node_ip: IpAddr,
    /// What the node runs short of.
    pub pressures: watch::Receiver<BTreeSet<Pressure>>,
    /// The node is going down.
    pub going_down: watch::Receiver<bool>,
    /// Devices of plugins.
    pub devices: watch::Receiver<Counts>,
    /// Names of the volumes that must not be detached.
    pub volumes_in_use: watch::Receiver<BTreeSet<String>>,
    /// What the network between nodes needs of pods, `None` until it is there; absent: there is none.
    pub overlay: Option<watch::Receiver<Option<network::State>>>,
}

/// The host side of the pod loop, bundled.
#[derive(Clone)]
pub struct Host {
    /// Volumes.
    pub volumes: Arc<dyn VolumeManager>,
    /// Pod cgroups.
    pub cgroups: Arc<dyn CgroupManager>,
    /// Log links.
    pub log_links: Arc<dyn LogLinks>,
}
