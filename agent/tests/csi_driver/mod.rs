//! A small CSI driver: the Node service on a real socket. Volumes are real mounts of tmpfs, or plain directories where a test has
//! no rights.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keelson_agent::csi::wire::{
    self, CapabilitiesResponse, Capability, CapabilityRpc, Empty, ExpandRequest, ExpandResponse,
    InfoResponse, NodeCapability, PublishRequest, StageRequest, StatsRequest, StatsResponse, Topology, Unit,
    UnpublishRequest, UnstageRequest, Usage, VolumeCondition,
};
use keelson_agent::plugins::registration::RegistrationStatus;
use keelson_agent::plugins::socket::{Methods, answer, unimplemented};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::body::Body;
use tonic::{Code, Status};

use crate::mounts::is_mounted;
use crate::plugin::{Process, Registration};

/// What the driver does instead of what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Fails with this code.
    Code(Code),
    /// Never answers.
    Hang,
}

/// What outlives the driver's process: its volumes, and what the test wants to know.
pub(crate) struct Shared {
    registration: Arc<Registration>,
    pub(crate) capabilities: Vec<NodeCapability>,
    pub(crate) node_id: Mutex<String>,
    /// Volumes are mounts.
    pub(crate) mounts: bool,
    pub(crate) abnormal: Mutex<bool>,
    /// By method and volume; a volume `*` stands for all.
    pub(crate) faults: Mutex<BTreeMap<(&'static str, String), Fault>>,
    /// Calls that the driver got, in order.
    pub(crate) calls: Mutex<Vec<String>>,
    pub(crate) published: Mutex<Vec<PublishRequest>>,
    pub(crate) staged: Mutex<Vec<StageRequest>>,
    pub(crate) expanded: Mutex<Vec<ExpandRequest>>,
}

impl Shared {
    pub(crate) fn new(name: &str, mounts: bool, capabilities: &[NodeCapability]) -> Arc<Self> {
        Arc::new(Self {
            registration: Arc::new(Registration::new("CSIPlugin", name, "1.0.0")),
            capabilities: capabilities.to_vec(),
            node_id: Mutex::new("node-id".to_owned()),
            mounts,
            abnormal: Mutex::default(),
            faults: Mutex::default(),
            calls: Mutex::default(),
            published: Mutex::default(),
            staged: Mutex::default(),
            expanded: Mutex::default(),
        })
    }

    pub(crate) fn fault(&self, method: &'static str, volume: &str, fault: Option<Fault>) {
        let mut faults = self.faults.lock().unwrap();
        let key = (method, volume.to_owned());
        match fault {
            Some(fault) => faults.insert(key, fault),
            None => faults.remove(&key),
        };
    }

    /// The calls so far, which are forgotten.
    pub(crate) fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    /// Waits until the driver was called so.
    pub(crate) async fn called(&self, call: &str) {
        let begin = Instant::now();
        while !self.calls.lock().unwrap().iter().any(|known| known == call) {
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "no {call:?} in {:?}",
                self.calls.lock().unwrap()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until it was told `count` times whether it is registered; the last answer.
    pub(crate) async fn told(&self, count: usize) -> RegistrationStatus {
        self.registration.told(count).await
    }

    /// A process of the driver, below the kubelet's root directory.
    pub(crate) fn start(self: &Arc<Self>, root: &Path) -> Process {
        Process::start(root, "csi.sock", Driver(Arc::clone(self)), Arc::clone(&self.registration))
    }

    async fn begin(&self, method: &'static str, volume: &str) -> Result<(), Status> {
        self.calls.lock().unwrap().push(format!("{method} {volume}"));
        let fault = {
            let faults = self.faults.lock().unwrap();
            let found =
                faults.get(&(method, volume.to_owned())).or_else(|| faults.get(&(method, "*".to_owned())));
            found.copied()
        };
        match fault {
            None => Ok(()),
            Some(Fault::Code(code)) => Err(Status::new(code, format!("{method} does not work"))),
            Some(Fault::Hang) => std::future::pending().await,
        }
    }

    async fn stage(&self, request: StageRequest) -> Result<Empty, Status> {
        self.staged.lock().unwrap().push(request.clone());
        self.begin("stage", &request.volume_id).await?;
        let path = Path::new(&request.staging_target_path);
        if !path.is_dir() {
            return Err(Status::invalid_argument("the staging path is no directory"));
        }
        let is_block = request.volume_capability.is_some_and(|capability| capability.block.is_some());
        if self.mounts && !is_block && !is_mounted(path) {
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).map_err(failed)?;
        }
        Ok(Empty {})
    }

    async fn unstage(&self, request: UnstageRequest) -> Result<Empty, Status> {
        self.begin("unstage", &request.volume_id).await?;
        let path = Path::new(&request.staging_target_path);
        while is_mounted(path) {
            umount2(path, MntFlags::empty()).map_err(failed)?;
        }
        Ok(Empty {})
    }

    async fn publish(&self, request: PublishRequest) -> Result<Empty, Status> {
        self.published.lock().unwrap().push(request.clone());
        self.begin("publish", &request.volume_id).await?;
        let target = Path::new(&request.target_path);
        if !target.parent().is_some_and(Path::is_dir) {
            return Err(Status::invalid_argument("the target has no directory"));
        }
        if request.volume_capability.as_ref().is_some_and(|capability| capability.block.is_some()) {
            return std::fs::write(target, "a device").map(|()| Empty {}).map_err(io_failed);
        }
        std::fs::create_dir_all(target).map_err(io_failed)?;
        if self.mounts && !is_mounted(target) {
            if request.staging_target_path.is_empty() {
                mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), Some("size=1m"))
                    .map_err(failed)?;
            } else {
                let staging = Path::new(&request.staging_target_path);
                mount(Some(staging), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed)?;
            }
            if request.readonly {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                mount(None::<&str>, target, None::<&str>, flags, None::<&str>).map_err(failed)?;
            }
        }
        Ok(Empty {})
    }

    async fn unpublish(&self, request: UnpublishRequest) -> Result<Empty, Status> {
        self.begin("unpublish", &request.volume_id).await?;
        let target = Path::new(&request.target_path);
        while is_mounted(target) {
            umount2(target, MntFlags::empty()).map_err(failed)?;
        }
        let removed =
            if target.is_dir() { std::fs::remove_dir(target) } else { std::fs::remove_file(target) };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_failed(error)),
            _ => Ok(Empty {}),
        }
    }

    async fn expand(&self, request: ExpandRequest) -> Result<ExpandResponse, Status> {
        self.expanded.lock().unwrap().push(request.clone());
        self.begin("expand", &request.volume_id).await?;
        Ok(ExpandResponse { capacity_bytes: request.capacity_range.map_or(0, |range| range.required_bytes) })
    }

    async fn stats(&self, request: StatsRequest) -> Result<StatsResponse, Status> {
        self.begin("stats", &request.volume_id).await?;
        let usage = |unit: Unit, total| Usage { available: total - 1, total, used: 1, unit: unit as i32 };
        let abnormal = *self.abnormal.lock().unwrap();
        Ok(StatsResponse {
            usage: vec![usage(Unit::Bytes, 1 << 20), usage(Unit::Inodes, 100)],
            condition: Some(VolumeCondition { abnormal, message: "a disk is broken".to_owned() }),
        })
    }

    fn info(&self) -> InfoResponse {
        let segments =
            BTreeMap::from([(format!("topology.{}/zone", self.registration.name), "z1".to_owned())]);
        InfoResponse {
            node_id: self.node_id.lock().unwrap().clone(),
            max_volumes_per_node: 7,
            accessible_topology: Some(Topology { segments }),
        }
    }

    fn capabilities(&self) -> CapabilitiesResponse {
        let capability =
            |kind: &NodeCapability| Capability { rpc: Some(CapabilityRpc { kind: *kind as i32 }) };
        CapabilitiesResponse { capabilities: self.capabilities.iter().map(capability).collect() }
    }
}

fn failed(errno: nix::errno::Errno) -> Status {
    Status::internal(errno.to_string())
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn io_failed(error: std::io::Error) -> Status {
    Status::internal(error.to_string())
}

#[derive(Clone)]
struct Driver(Arc<Shared>);

impl Methods for Driver {
    const NAME: &'static str = wire::NODE;

    async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
        let shared = self.0;
        match request.uri().path() {
            wire::STAGE => answer(request, move |asked| async move { shared.stage(asked).await }).await,
            wire::UNSTAGE => answer(request, move |asked| async move { shared.unstage(asked).await }).await,
            wire::PUBLISH => answer(request, move |asked| async move { shared.publish(asked).await }).await,
            wire::UNPUBLISH => {
                answer(request, move |asked| async move { shared.unpublish(asked).await }).await
            }
            wire::EXPAND => answer(request, move |asked| async move { shared.expand(asked).await }).await,
            wire::STATS => answer(request, move |asked| async move { shared.stats(asked).await }).await,
            wire::INFO => answer(request, move |_: Empty| async move { Ok(shared.info()) }).await,
            wire::CAPABILITIES => {
                answer(request, move |_: Empty| async move { Ok(shared.capabilities()) }).await
            }
            _ => unimplemented(),
        }
    }
}
