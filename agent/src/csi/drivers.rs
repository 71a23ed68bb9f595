//! The drivers that are registered on this node: how each is called, and what it can do.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonic::transport::Channel;

use super::wire::{self, CallError, CapabilitiesResponse, Empty, NodeCapability};
use crate::plugins::Plugin;
use crate::plugins::socket::channel;

/// What a driver can do on a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a capability of its own in the specification")]
pub(super) struct Capabilities {
    pub(super) stage: bool,
    pub(super) stats: bool,
    pub(super) expand: bool,
    pub(super) condition: bool,
    pub(super) single_node_multi_writer: bool,
    pub(super) volume_mount_group: bool,
}

impl From<CapabilitiesResponse> for Capabilities {
    fn from(answer: CapabilitiesResponse) -> Self {
        let mut found = Self::default();
        for rpc in answer.capabilities.into_iter().filter_map(|capability| capability.rpc) {
            match rpc.kind() {
                NodeCapability::Unknown => {}
                NodeCapability::StageUnstageVolume => found.stage = true,
                NodeCapability::GetVolumeStats => found.stats = true,
                NodeCapability::ExpandVolume => found.expand = true,
                NodeCapability::VolumeCondition => found.condition = true,
                NodeCapability::SingleNodeMultiWriter => found.single_node_multi_writer = true,
                NodeCapability::VolumeMountGroup => found.volume_mount_group = true,
            }
        }
        found
    }
}

/// A registered driver.
#[derive(Debug, Clone)]
pub(super) struct Driver {
    pub(super) channel: Channel,
    /// Its registration socket.
    socket: PathBuf,
    capabilities: Arc<tokio::sync::OnceCell<Capabilities>>,
}

impl Driver {
    pub(super) fn new(plugin: &Plugin) -> Self {
        Self {
            channel: channel(plugin.endpoint.clone()),
            socket: plugin.socket.clone(),
            capabilities: Arc::default(),
        }
    }

    /// What it can do: asked once for each registration.
    pub(super) async fn capabilities(
        &self,
        deadline: std::time::Duration,
    ) -> Result<Capabilities, CallError> {
        let ask = || async {
            let answer: CapabilitiesResponse =
                wire::call(&self.channel, wire::CAPABILITIES, Empty {}, deadline).await?;
            Ok(Capabilities::from(answer))
        };
        self.capabilities.get_or_try_init(ask).await.copied()
    }
}

/// All of them, by name.
#[derive(Debug, Default)]
pub(super) struct Drivers(Mutex<BTreeMap<String, Driver>>);

impl Drivers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Driver>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver, or upstream's words for its absence.
    pub(super) fn get(&self, name: &str) -> Result<Driver, String> {
        self.lock()
            .get(name)
            .cloned()
            .ok_or_else(|| format!("driver name {name} not found in the list of registered CSI drivers"))
    }

    pub(super) fn insert(&self, name: &str, driver: Driver) {
        self.lock().insert(name.to_owned(), driver);
    }

    /// Takes the driver out, unless another registration has its name by now; tells which.
    pub(super) fn remove(&self, plugin: &Plugin) -> bool {
        let mut drivers = self.lock();
        let is_it = drivers.get(&plugin.name).is_some_and(|driver| driver.socket == plugin.socket);
        if is_it {
            drivers.remove(&plugin.name);
        }
        is_it
    }
}
