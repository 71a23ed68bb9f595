//! The data plane as its one user sees it: open, fill, attach, change.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError},
};
use ebpf_common::{COUNTER_BLOCK, NatConfig, NetAddr, ServiceStats, WayEntry, map_names};
use thiserror::Error;

use crate::{
    addresses::Addresses,
    devices::{self, Device, PacketHook, Side},
    flows::{self, FlowStock},
    layout::{capacity_of, fits, meta, read_meta},
    links::{self, Attached, LinkError},
    maps::{Maps, MapsError},
    memory::{Capacity, MemoryError},
    object::OBJECT,
    pins::{PinDir, PinError},
    probe,
    report::SyncReport,
    room,
    services::Services,
    shortcuts::{self, Routed},
    sys::{self, TestRun},
    table::{Change, DesiredService, DesiredWay, ServiceKey, ServiceTable},
};

/// Entries of the affinity map, once a service asks for affinity; the least recently used client loses its backend beyond
/// that. Before, hardly any.
const AFFINITY_ENTRIES: u32 = 16_384;
const AFFINITY_AT_FIRST: u32 = 1024;
/// Addresses that the nodes of a cluster may have.
const NODE_ADDRESS_ENTRIES: u32 = 8192;
/// Routes that are known.
const WAY_ENTRIES: u32 = 16_384;
/// Pods of this node that hand their packets to each other.
const SHORTCUT_ENTRIES: u32 = 4096;
/// Devices that are served.
const DEVICE_ENTRIES: u32 = 4096;
/// Both directions of flows from outside of which one direction was seen: a flood of them costs others of them only.
const NEW_FLOW_ENTRIES: u32 = 8192;
/// Packets in fragments that are on their way at once.
const FRAGMENT_ENTRIES: u32 = 4096;
/// Ports behind which clients are hidden: below NodePorts, which are below what the kernel gives its own connections.
const FIRST_PORT: u32 = 1024;
const PORTS: u32 = 28_976;

/// Where and how big.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where maps and links are pinned, one directory per instance.
    pub pin_dir: PathBuf,
    /// Processes below this cgroup2 directory are served.
    pub cgroup_dir: PathBuf,
    /// Sizes of the maps.
    pub capacity: Capacity,
}

/// The data plane cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The binary was built without the programs.
    #[error(
        "this binary was built without its BPF programs: run `cargo xtask build-ebpf`, then build it again"
    )]
    NotBuilt,
    /// The machine lacks something.
    #[error("this machine cannot run the service data plane: {}", missing.join("; "))]
    Missing {
        /// One line per missing feature.
        missing: Vec<String>,
    },
    /// The pin directory is of no use.
    #[error("the pin directory cannot be used")]
    Pins(#[from] PinError),
    /// The object does not load.
    #[error("the BPF object cannot be loaded")]
    Load(#[source] EbpfError),
    /// A map is not what it should be.
    #[error("the BPF maps cannot be used")]
    Maps(#[from] MapsError),
    /// A program does not load.
    #[error("the BPF programs cannot be loaded")]
    Programs(#[from] LinkError),
    /// The maps' own description cannot be written.
    #[error("cannot mark the maps as complete")]
    Meta(#[source] MapError),
    /// What is pinned cannot be read back.
    #[error("cannot read what the maps hold")]
    Restore(#[from] MemoryError),
    /// The map of flows cannot be read.
    #[error("cannot read the map of connections from outside")]
    Flows(#[source] std::io::Error),
    /// A map cannot be pinned once more.
    #[error("cannot pin map {name} again")]
    Pin {
        /// Which map.
        name: &'static str,
        /// Why.
        #[source]
        source: aya::pin::PinError,
    },
    /// The network namespace does not tell its cookie.
    #[error("cannot find out which network namespace this is")]
    Netns(#[source] std::io::Error),
}

/// How full the maps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Services known.
    pub services: usize,
    /// Frontends in the hash.
    pub frontends: u32,
    /// Backend ids in use or waiting for reuse.
    pub backends: u32,
    /// Words of the backend index in use or waiting for reuse.
    pub extent_words: u32,
    /// Services that are not or only partly programmed.
    pub refused: usize,
    /// Connections of clients outside that are remembered, as last counted.
    pub flows: FlowStock,
    /// Devices that lead out of the node and are served.
    pub outer_devices: usize,
    /// Devices that lead to pods and are served.
    pub inner_devices: usize,
    /// Pods of this node that hand their packets straight to each other.
    pub shortcuts: usize,
    /// Addresses of pods of this node that exchange packets with the tunnel to other nodes without bridge and stack.
    pub far_pods: usize,
    /// The maps' sizes.
    pub capacity: Capacity,
}

/// Loaded programs and their maps. Dropping it changes nothing in the kernel: everything is pinned.
pub struct DataPlane {
    config: Config,
    pub(crate) pins: PinDir,
    pub(crate) object: Ebpf,
    pub(crate) maps: Maps,
    services: Services,
    adopted: bool,
    addresses: Addresses,
    /// The devices that are served.
    devices: Vec<Device>,
    flow_stock: FlowStock,
    /// Pods that hand their packets straight to each other.
    pub(crate) shortcuts: usize,
    /// Pods' addresses between which and the tunnel they are routed.
    pub(crate) routed: Routed,
    /// Why clients outside cannot be served, if so.
    external: Result<(), String>,
}

impl DataPlane {
    /// Loads the programs, on the pinned maps where those fit, on new ones otherwise. What is attached keeps
    /// running on what it has until [`Self::attach`]. Maps that have grown beyond the configured capacity fit.
    pub fn open(config: Config) -> Result<Self, OpenError> {
        if OBJECT.is_empty() {
            return Err(OpenError::NotBuilt);
        }
        let missing = probe::missing(&probe::probe(&config.pin_dir, &config.cgroup_dir));
        if !missing.is_empty() {
            return Err(OpenError::Missing { missing });
        }
        let pins = PinDir::open(&config.pin_dir)?;
        Self::open_in(config, pins)
    }

    fn open_in(mut config: Config, pins: PinDir) -> Result<Self, OpenError> {
        let cookie = netns_cookie().map_err(OpenError::Netns)?;
        let found = [pins.maps(), pins.next_maps()].into_iter().find_map(|dir| {
            let capacity = read_meta(&dir).and_then(|meta| capacity_of(&meta))?;
            capacity.holds(&config.capacity).then_some((dir, capacity))
        });
        let adopted = found.is_some();
        let dir = match found {
            Some((dir, capacity)) => {
                config.capacity = capacity;
                if dir == pins.maps() {
                    // A process that was filling others has died; promoted later, they would not be those in use.
                    pins.discard_next_maps()?;
                }
                dir
            }
            None => start_maps(&pins, config.capacity)?,
        };
        let mut object = load_object(&dir, config.capacity, None, cookie)?;
        // Programs name their maps by descriptor until they are loaded, so they come before the maps are taken.
        links::load(&mut object)?;
        let external = devices::load(&mut object).map_err(|error| describe_chain(&error));
        shortcuts::load(&mut object);
        let mut maps = Maps::take(&mut object)?;
        if !adopted {
            if fits(&pins.maps(), config.capacity) {
                maps.copy_from(&pins.maps())?;
            } else {
                maps.made_anew();
            }
            maps.write_meta(meta(config.capacity)).map_err(OpenError::Meta)?;
        }
        let services = Services::restore(&mut maps, config.capacity)?;
        let (devices, addresses) = (Vec::new(), Addresses::default());
        let capacity = maps.flow_capacity().unwrap_or(flows::FEWEST);
        let flow_stock = FlowStock { capacity, ..FlowStock::default() };
        let (shortcuts, routed) = (0, Routed::default());
        Ok(Self {
            config,
            pins,
            object,
            maps,
            services,
            adopted,
            addresses,
            devices,
            flow_stock,
            shortcuts,
            routed,
            external,
        })
    }

    /// Forgets connections of clients outside that are over at a moment of `CLOCK_MONOTONIC`, and makes room for more
    /// where many are open. None is lost by that.
    pub fn tidy_flows(&mut self, now: Duration) -> Result<FlowStock, OpenError> {
        let capacity = self.flow_stock.capacity;
        self.flow_stock = flows::tidy(&mut self.maps.flows, capacity, now).map_err(OpenError::Flows)?;
        let limit = flows::limit_for(flows::machine_memory());
        if let Some(entries) = self.flow_stock.wanted(limit) {
            self.grow_flows(entries)?;
        }
        Ok(self.flow_stock)
    }

    /// A descriptor that is readable when some flows were established since [`Self::take_flow_signals`]: it is time to
    /// see whether there is room for more. It serves until the data plane is dropped, however the maps grow.
    pub fn flow_signals(&self) -> std::io::Result<OwnedFd> {
        self.maps.signals()
    }

    /// Makes that descriptor wait for more of them; whether there may be so many now that [`Self::tidy_flows`] would make
    /// more room.
    pub fn take_flow_signals(&mut self) -> bool {
        let signals = self.maps.take_signals();
        self.flow_stock.entries =
            self.flow_stock.entries.saturating_add(signals.saturating_mul(flows::ENTRIES_PER_SIGNAL));
        self.flow_stock.wanted(flows::limit_for(flows::machine_memory())).is_some()
    }

    /// Exchanges the map of flows for a larger one, and nothing else: programs that use it take over from those that
    /// use the present one, and what those still noted meanwhile follows. Before they are attached, nothing happens.
    pub fn grow_flows(&mut self, entries: u32) -> Result<(), OpenError> {
        let copy =
            |from: &Maps, to: &mut Maps| flows::copy(&from.flows, &mut to.flows).map_err(OpenError::Flows);
        if let Some(former) = self.exchange(map_names::FLOWS, entries, copy)? {
            copy(&former, &mut self.maps)?;
            self.flow_stock.capacity = self.maps.flow_capacity().unwrap_or(entries);
        }
        Ok(())
    }

    /// Makes room for clients that stay with their endpoint, once a service asks for that; true where there was none
    /// before. The same holds as for flows, but for the few clients that the small map knows: they are sent anew.
    pub fn make_room_for_affinity(&mut self) -> Result<bool, OpenError> {
        if !self.services.is_any_sticky() || self.maps.affinity_capacity() >= AFFINITY_ENTRIES {
            return Ok(false);
        }
        Ok(self.exchange(map_names::AFFINITY, AFFINITY_ENTRIES, |_, _| Ok(()))?.is_some())
    }

    /// Has the programs use a map of another size in the place of one, filled from the former ones first; those are
    /// returned. Nothing, where the programs are not attached yet.
    fn exchange(
        &mut self,
        exchanged: &'static str,
        entries: u32,
        fill: impl FnOnce(&Maps, &mut Maps) -> Result<(), OpenError>,
    ) -> Result<Option<Maps>, OpenError> {
        if !self.pins.maps().exists() {
            return Ok(None);
        }
        let cookie = netns_cookie().map_err(OpenError::Netns)?;
        let dir = self.pins.start_next_maps()?;
        for name in map_names::ALL.into_iter().filter(|name| *name != exchanged) {
            let pinned = MapData::from_pin(self.pins.maps().join(name));
            let again = pinned.map_err(|source| MapsError::Pinned { name, source })?;
            again.pin(dir.join(name)).map_err(|source| OpenError::Pin { name, source })?;
        }
        let mut object = load_object(&dir, self.config.capacity, Some((exchanged, entries)), cookie)?;
        links::load(&mut object)?;
        self.external = devices::load(&mut object).map_err(|error| describe_chain(&error));
        shortcuts::load(&mut object);
        let mut maps = Maps::take(&mut object)?;
        fill(&self.maps, &mut maps)?;
        self.object = object;
        let former = std::mem::replace(&mut self.maps, maps);
        self.attach()?;
        Ok(Some(former))
    }

    /// Moves everything to larger maps. Clients are served throughout: by the old maps until every hook runs on the
    /// new ones, which hold the same services under the same ids. `None`, and everything as before, where the kernel
    /// has no memory for them.
    pub fn grow(
        &mut self,
        capacity: Capacity,
        table: impl IntoIterator<Item = (ServiceKey, DesiredService)>,
    ) -> Result<Option<SyncReport>, OpenError> {
        let config = Config { capacity, ..self.config.clone() };
        let mut larger = match Self::open_in(config, self.pins.share()) {
            Ok(larger) => larger,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the service maps cannot grow");
                return Ok(None);
            }
        };
        // What an earlier process left, and nobody has named yet, moves along.
        let report = larger.add_all(table, &BTreeSet::new());
        larger.devices.clone_from(&self.devices);
        larger.addresses.clone_from(&self.addresses);
        larger.shortcuts = self.shortcuts;
        larger.routed = std::mem::take(&mut self.routed);
        larger.attach()?;
        std::mem::swap(self, &mut larger);
        Ok(Some(report))
    }

    /// Whether maps of an earlier process were taken over.
    #[must_use]
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// Makes the maps hold exactly this table. Removes what is not in it, so only for callers who know everything.
    pub fn replace_all(&mut self, table: &ServiceTable) -> SyncReport {
        self.services.replace_all(&mut self.maps, table, Instant::now())
    }

    /// Makes the maps hold this table and removes nothing: what else they hold goes on until
    /// [`Self::remove_unclaimed`]. A service that is in `unsure`, because its endpoints may not be known yet, stays as
    /// it is where the maps have it.
    ///
    /// Services are taken one by one: a caller who makes them on the way never holds all of them.
    pub fn add_all(
        &mut self,
        table: impl IntoIterator<Item = (ServiceKey, DesiredService)>,
        unsure: &BTreeSet<ServiceKey>,
    ) -> SyncReport {
        self.services.add_all(&mut self.maps, table.into_iter(), unsure, Instant::now())
    }

    /// Removes what an earlier process left in the maps and no table or change has named since.
    pub fn remove_unclaimed(&mut self) -> SyncReport {
        self.services.remove_unclaimed(&mut self.maps, Instant::now())
    }

    /// How many services of an earlier process no table or change has named so far.
    #[must_use]
    pub fn unclaimed(&self) -> usize {
        self.services.unclaimed()
    }

    /// Carries out changes; costs what changed, whatever the number of services.
    pub fn apply(&mut self, changes: &[Change]) -> SyncReport {
        self.services.apply(&mut self.maps, changes, Instant::now())
    }

    /// Says which addresses the node has, and which of them lead to NodePorts. Loopback addresses stand for the whole
    /// loopback network.
    pub fn set_node_addresses(
        &mut self,
        own: &BTreeSet<IpAddr>,
        node_ports: &BTreeSet<IpAddr>,
    ) -> Result<(), MapError> {
        self.addresses.own.clone_from(own);
        self.addresses.node_ports.clone_from(node_ports);
        self.maps.replace_node_addresses(&self.addresses)
    }

    /// Says which addresses all nodes have, so that packets for NodePorts whose endpoints answer directly can be sent on as
    /// they are, and taken from other nodes; none where they are not. Before the first time it is as it was with the
    /// process before.
    pub fn share_node_ports(&mut self, nodes: BTreeSet<IpAddr>) -> Result<(), MapError> {
        self.addresses.shared = Some(nodes);
        self.maps.replace_node_addresses(&self.addresses)
    }

    /// Makes every hook run these programs on these maps, replacing an earlier process's programs in place.
    pub fn attach(&mut self) -> Result<Attached, OpenError> {
        let attached = links::attach(&self.object, &self.pins, &self.config.cgroup_dir)?;
        if !self.devices.is_empty() {
            let devices = std::mem::take(&mut self.devices);
            for (device, why) in self.serve_devices(devices) {
                tracing::warn!(device, why, "clients outside are not served through this device any more");
            }
        }
        self.pins.promote_next_maps()?;
        Ok(attached)
    }

    /// Serves clients outside through these devices, and no others. Those that cannot be served are returned with the
    /// reason.
    pub fn serve_devices(&mut self, devices: Vec<Device>) -> Vec<(String, String)> {
        if let Err(why) = &self.external {
            return devices.into_iter().map(|device| (device.name, why.clone())).collect();
        }
        let failed = devices::serve(&mut self.object, &self.pins, &mut self.maps.devices, &devices);
        self.devices = devices;
        failed.into_iter().map(|(name, error)| (name, describe_chain(&error))).collect()
    }

    /// Says behind which addresses of this node clients outside are hidden from endpoints that are not told who they
    /// are, where the device that leads to the endpoint has no address of its own.
    pub fn hide_clients(&mut self, v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> Result<(), MapError> {
        let config = NatConfig {
            source_v4: v4.map(|v4| NetAddr::from(IpAddr::V4(v4))).unwrap_or_default(),
            source_v6: v6.map(|v6| NetAddr::from(IpAddr::V6(v6))).unwrap_or_default(),
            first_port: FIRST_PORT,
            ports: PORTS,
            seed: 0x6b65_656c,
            padding: 0,
        };
        self.maps.write_nat_config(config)
    }

    /// Says by which ways packets reach endpoints and clients: the node's routes. Where none is known, clients are hidden
    /// behind the node's own address, and packets take the stack's way.
    pub fn set_ways(&mut self, ways: &[DesiredWay]) -> Result<(), MapError> {
        let wanted: BTreeMap<(NetAddr, u32), WayEntry> =
            ways.iter().map(|way| (way.prefix(), way.entry())).collect();
        self.maps.replace_ways(&wanted)
    }

    /// Runs a packet program on a frame that arrives at the device of this number, so many times.
    pub fn try_packet(
        &mut self,
        hook: PacketHook,
        device: u32,
        frame: &[u8],
        repeat: u32,
    ) -> Result<TestRun, LinkError> {
        devices::try_out(&mut self.object, hook, device, frame, repeat)
    }

    /// Counters of a service; `None` for one that is not programmed.
    pub fn stats(&self, key: &ServiceKey) -> Option<ServiceStats> {
        self.services.id(key).and_then(|id| self.maps.stats(id).ok())
    }

    /// Counters of many services, in their order; read with few system calls, whatever their number.
    pub fn stats_of_all(&self, keys: &[ServiceKey]) -> Vec<Option<ServiceStats>> {
        match self.maps.all_stats() {
            Ok(all) => {
                let of = |key| all.get(self.services.id(key)? as usize).copied();
                keys.iter().map(of).collect()
            }
            Err(error) => {
                tracing::debug!(%error, "counters are read one by one");
                keys.iter().map(|key| self.stats(key)).collect()
            }
        }
    }

    /// Connections that each endpoint of a service was given.
    pub fn backend_connections(&self, key: &ServiceKey) -> Vec<(SocketAddr, u64)> {
        let backends = self.services.backends(&self.maps, key);
        let count = |id| self.maps.backend_connections(id);
        backends.into_iter().map(|(address, id)| (address, count(id))).collect()
    }

    /// Services that are not or only partly programmed.
    pub fn refused(&self) -> impl Iterator<Item = &ServiceKey> {
        self.services.refused()
    }

    /// How full the maps are.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let room = &self.services.room;
        Usage {
            services: self.services.len(),
            frontends: room.frontends_used,
            backends: room.backends.capacity() - 1 - room.backends.available(),
            extent_words: room.extents.capacity() - 1 - room.extents.available(),
            refused: self.services.waiting(),
            flows: self.flow_stock,
            outer_devices: self.devices.iter().filter(|device| device.side == Side::Outer).count(),
            inner_devices: self.devices.iter().filter(|device| device.side == Side::Inner).count(),
            shortcuts: self.shortcuts,
            far_pods: self.routed.count(),
            capacity: self.config.capacity,
        }
    }
}

/// Cookie of the calling thread's network namespace: the namespace whose loopback leads to NodePorts.
pub fn netns_cookie() -> std::io::Result<u64> {
    // Any socket tells; this one is never bound to a port anybody could meet.
    sys::socket_netns_cookie(UdpSocket::bind((IpAddr::from([127, 0, 0, 1]), 0))?.as_fd())
}

/// An error with all its causes, in one line.
fn describe_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Makes room for new maps. Maps whose size does not depend on the capacity are kept: socket storage where its layout
/// is the same, so that open sockets still know whom they dialled; and, where ids stay what they are, affinity.
fn start_maps(pins: &PinDir, capacity: Capacity) -> Result<PathBuf, OpenError> {
    let dir = pins.start_next_maps()?;
    let same_ids = fits(&pins.maps(), capacity);
    for (name, size, has_ids) in [
        (map_names::STREAM_PEER, size_of::<ebpf_common::Peer>(), false),
        (map_names::DATAGRAM_PEER, size_of::<ebpf_common::DatagramPeers>(), false),
        (map_names::AFFINITY, size_of::<ebpf_common::AffinityValue>(), true),
        (map_names::FLOWS, size_of::<ebpf_common::FlowValue>(), true),
        (map_names::NEW_FLOWS, size_of::<ebpf_common::FlowValue>(), true),
        (map_names::FLOW_COUNT, size_of::<u64>(), false),
        (map_names::FLOW_SIGNALS, 0, false),
        (map_names::FRAGMENTS, size_of::<ebpf_common::FragmentPorts>(), false),
        (map_names::NAT_CONFIG, size_of::<NatConfig>(), false),
        (map_names::DEVICES, size_of::<ebpf_common::DeviceEntry>(), false),
        (map_names::WAYS, size_of::<WayEntry>(), false),
        (map_names::POD_LINKS, size_of::<ebpf_common::PodLink>(), false),
        (map_names::FAR_PODS, size_of::<ebpf_common::FarPodEntry>(), false),
        (map_names::POD_ROUTER, size_of::<ebpf_common::PodRouter>(), false),
        (map_names::SHORTCUTS_END, size_of::<u64>(), false),
    ] {
        let Ok(old) = MapData::from_pin(pins.maps().join(name)) else {
            continue;
        };
        if (same_ids || !has_ids)
            && old.info().is_ok_and(|info| info.value_size() as usize == size)
            && let Err(error) = old.pin(dir.join(name))
        {
            tracing::warn!(map = name, %error, "cannot keep a map; its clients may be told other addresses");
        }
    }
    Ok(dir)
}

/// The object with its maps below a directory: those that are there, others made anew, one of them of another size.
fn load_object(
    dir: &Path,
    capacity: Capacity,
    other: Option<(&'static str, u32)>,
    cookie: u64,
) -> Result<Ebpf, OpenError> {
    let mut loader = EbpfLoader::new();
    for name in map_names::ALL {
        loader.map_pin_path(name, dir.join(name));
    }
    for (name, entries) in [
        (map_names::FRONTENDS, capacity.frontends),
        (map_names::SERVICES, capacity.services),
        (map_names::SERVICE_STATS, capacity.services),
        (map_names::NAMES, capacity.services),
        (map_names::LONG_NAMES, capacity.services),
        (map_names::BACKEND_STATS, capacity.backends.next_multiple_of(COUNTER_BLOCK)),
        (map_names::SOURCE_RANGES, room::SOURCE_RANGES),
        (map_names::BACKENDS, capacity.backends),
        (map_names::EXTENTS, capacity.extent_words),
        (map_names::AFFINITY, AFFINITY_AT_FIRST),
        (map_names::FLOWS, flows::FEWEST),
        (map_names::NEW_FLOWS, NEW_FLOW_ENTRIES),
        (map_names::FRAGMENTS, FRAGMENT_ENTRIES),
        (map_names::NODE_ADDRESSES, NODE_ADDRESS_ENTRIES),
        (map_names::DEVICES, DEVICE_ENTRIES),
        (map_names::WAYS, WAY_ENTRIES),
        (map_names::POD_LINKS, SHORTCUT_ENTRIES),
        (map_names::FAR_PODS, SHORTCUT_ENTRIES),
    ] {
        let other = other.filter(|(other, _)| *other == name).map(|(_, entries)| entries);
        loader.map_max_entries(name, other.unwrap_or(entries));
    }
    loader.override_global("HOST_NETNS_COOKIE", &cookie, true);
    loader.load(OBJECT).map_err(OpenError::Load)
}
