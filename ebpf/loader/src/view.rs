//! A look at pinned maps from any process, without holding or changing them: what is programmed, and what a client
//! would meet.

mod outside;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use aya::maps::{HashMap, MapData, PerCpuArray};
use ebpf_common::{
    AffinityKey, AffinityValue, Backend, BackendStats, ExtentHeader, FrontendKey, FrontendValue,
    FrontendWord, NetAddr, NetPort, NodeAddressUse, NodePortBounds, Protocol, ServiceSlot, ServiceStats,
    counter_of, map_names,
};
use ebpf_packet::{Caller, Destination, Tables, Verdict, resolve};

use crate::{
    maps::{Mapped, MapsError, add, pinned},
    names::Names,
    table::{DesiredService, ServiceKey, ServiceTable, describe},
};

pub use self::outside::{SeenDevice, SeenFlow};

/// Open maps of one data plane.
pub struct View {
    pin_dir: PathBuf,
    frontends: BTreeMap<FrontendKey, FrontendValue>,
    names: Names,
    node_addresses: BTreeMap<NetAddr, NodeAddressUse>,
    slots: Mapped<ServiceSlot>,
    extents: Mapped<u64>,
    backends: BTreeMap<u32, Backend>,
    node_ports: NodePortBounds,
    stats: PerCpuArray<MapData, ServiceStats>,
    backend_stats: Mapped<BackendStats>,
    affinity: HashMap<MapData, AffinityKey, AffinityValue>,
}

/// One programmed service.
#[derive(Clone, Debug)]
pub struct SeenService {
    /// Its id in the maps.
    pub id: u32,
    /// `namespace/name:port/protocol/family`.
    pub name: String,
    /// What clients dial, with the flags of each.
    pub frontends: Vec<(FrontendKey, FrontendValue)>,
    /// Who answers, in index order.
    pub backends: Vec<SeenBackend>,
    /// Seconds of session affinity; 0 without.
    pub affinity_secs: u32,
    /// Counters.
    pub stats: ServiceStats,
}

/// One programmed endpoint.
#[derive(Clone, Debug)]
pub struct SeenBackend {
    /// Its id in the maps.
    pub id: u32,
    /// Where it listens.
    pub address: SocketAddr,
    /// Policy `Cluster` sends there.
    pub cluster: bool,
    /// Policy `Local` sends there: it runs on this node.
    pub local: bool,
    /// Connections that it was given.
    pub connections: u64,
}

/// Who dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A client outside the node, by its address.
    Outside(SocketAddr),
    /// A process in the node's own network namespace.
    Host,
    /// A process in a pod.
    Pod,
}

/// What a client meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trace {
    /// No service: the packet goes where it was sent.
    NotAService,
    /// The service of this name refuses.
    Refused(String),
    /// The service of this name sends the client to one of these.
    Forwarded(String, Vec<SocketAddr>),
    /// The same for a client outside whose address the endpoint sees.
    Shown(String, Vec<SocketAddr>),
    /// The packets are dropped: the client is in no source range, or policy `Local` finds nobody here.
    Dropped(String, &'static str),
}

/// The current maps; before anything was attached for the first time, those that will be.
fn dir(pin_dir: &Path) -> PathBuf {
    let current = pin_dir.join("maps");
    if current.exists() { current } else { pin_dir.join("maps-next") }
}

impl View {
    /// Opens the maps below a pin directory.
    pub fn open(pin_dir: &Path) -> Result<Self, MapsError> {
        let dir = dir(pin_dir);
        let copy = |name: &'static str| move |source| MapsError::Copy { name, source };
        let frontends: HashMap<_, FrontendKey, FrontendWord> = pinned(&dir, map_names::FRONTENDS)?;
        let node_addresses: HashMap<_, NetAddr, NodeAddressUse> = pinned(&dir, map_names::NODE_ADDRESSES)?;
        let node_ports: Mapped<NodePortBounds> = Mapped::pinned(&dir, map_names::NODE_PORT_BOUNDS)?;
        let frontends = frontends.iter().filter_map(|item| match item {
            Ok((key, word)) => word.value_for(&key).map(|value| Ok((key, value))),
            Err(error) => Some(Err(error)),
        });
        let mut view = Self {
            pin_dir: pin_dir.to_owned(),
            frontends: frontends.collect::<Result<_, _>>().map_err(copy(map_names::FRONTENDS))?,
            names: Names::pinned(&dir)?,
            node_addresses: node_addresses
                .iter()
                .collect::<Result<_, _>>()
                .map_err(copy(map_names::NODE_ADDRESSES))?,
            slots: Mapped::pinned(&dir, map_names::SERVICES)?,
            extents: Mapped::pinned(&dir, map_names::EXTENTS)?,
            backends: BTreeMap::new(),
            node_ports: node_ports.read(0),
            stats: pinned(&dir, map_names::SERVICE_STATS)?,
            backend_stats: Mapped::pinned(&dir, map_names::BACKEND_STATS)?,
            affinity: pinned(&dir, map_names::AFFINITY)?,
        };
        let all: Mapped<Backend> = Mapped::pinned(&dir, map_names::BACKENDS)?;
        let services: Vec<u32> = view.frontends.values().map(|value| value.service).collect();
        for service in services {
            for id in view.backend_ids(service).0 {
                if id < all.len() {
                    view.backends.insert(id, all.read(id));
                }
            }
        }
        Ok(view)
    }

    /// Every programmed service, by name.
    #[must_use]
    pub fn services(&self) -> Vec<SeenService> {
        let mut found: BTreeMap<u32, SeenService> = BTreeMap::new();
        for (key, value) in &self.frontends {
            let seen = found.entry(value.service).or_insert_with(|| self.service_of(value.service));
            seen.frontends.push((*key, *value));
        }
        let mut all: Vec<SeenService> = found.into_values().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Where a client's connection goes.
    #[must_use]
    pub fn trace(&self, source: Source, to: SocketAddr, protocol: Protocol) -> Trace {
        if let Source::Outside(from) = source {
            return self.trace_outside(from, to, protocol);
        }
        let dst = Destination { addr: to.ip().into(), port: NetPort::from_host(to.port()), proto: protocol };
        match resolve(self, &Asked(source), &dst) {
            Verdict::Pass => Trace::NotAService,
            Verdict::Refuse(id) => Trace::Refused(self.name_of(id)),
            Verdict::Forward(target) => {
                let frontend = self.frontend_of(&dst);
                let local = frontend.is_some_and(|value| value.flags & FrontendValue::FLAG_LOCAL != 0);
                let seen = self.service_of(target.service);
                let may = seen
                    .backends
                    .iter()
                    .filter(|backend| if local { backend.local } else { backend.cluster });
                Trace::Forwarded(seen.name.clone(), may.map(|backend| backend.address).collect())
            }
        }
    }

    /// Whether the address is the node's.
    #[must_use]
    pub fn is_own(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.node_address(&NetAddr::from(address)).0 & NodeAddressUse::OWN != 0
    }

    /// What differs between the maps and what should be there, one sentence each.
    #[must_use]
    pub fn differences(&self, wanted: &ServiceTable) -> Vec<String> {
        let seen: BTreeMap<String, SeenService> =
            self.services().into_iter().map(|service| (service.name.clone(), service)).collect();
        let mut found = Vec::new();
        for (key, desired) in wanted.iter().filter(|(_, desired)| !desired.frontends.is_empty()) {
            match seen.get(&key.0) {
                None => found.push(format!("{key}: is not programmed")),
                Some(seen) => compare(key, desired, seen, &mut found),
            }
        }
        for name in seen.keys().filter(|name| !wanted.contains_key(&ServiceKey((*name).clone()))) {
            found.push(format!("{name}: is programmed, and the API has no such Service"));
        }
        found
    }

    fn frontend_of(&self, dst: &Destination) -> Option<&FrontendValue> {
        let (port, proto) = (dst.port, dst.proto.number());
        let exact = FrontendKey { addr: dst.addr, port, proto, scope: FrontendKey::SCOPE_ADDRESS };
        let any = if dst.addr.is_v4() { NetAddr::ANY_V4 } else { NetAddr::ANY_V6 };
        let node = FrontendKey { addr: any, port, proto, scope: FrontendKey::SCOPE_NODE };
        self.frontends.get(&exact).or_else(|| self.frontends.get(&node))
    }

    fn name_of(&self, service: u32) -> String {
        self.names.get(service).unwrap_or_else(|| format!("service {service}"))
    }

    fn service_of(&self, service: u32) -> SeenService {
        let (ids, affinity_secs) = self.backend_ids(service);
        let mut stats = ServiceStats::default();
        if let Ok(cpus) = self.stats.get(&service, 0) {
            cpus.iter().for_each(|cpu| add(&mut stats, cpu));
        }
        let backends = ids.into_iter().filter_map(|id| {
            let backend = self.backends.get(&id)?;
            let counter = counter_of(id);
            let counted = (counter < self.backend_stats.len()).then(|| self.backend_stats.read(counter));
            Some(SeenBackend {
                id,
                address: SocketAddr::new(IpAddr::from(backend.addr), backend.port.to_host()),
                cluster: backend.flags & Backend::FLAG_CLUSTER != 0,
                local: backend.flags & Backend::FLAG_LOCAL != 0,
                connections: counted.map_or(0, |counted| counted.connections),
            })
        });
        let backends = backends.collect();
        SeenService {
            id: service,
            name: self.name_of(service),
            frontends: Vec::new(),
            backends,
            affinity_secs,
            stats,
        }
    }

    fn backend_ids(&self, service: u32) -> (Vec<u32>, u32) {
        let Some(slot) = Tables::service(self, service) else {
            return (Vec::new(), 0);
        };
        let start = slot.extent();
        let count = match self.extent_word(start) {
            Some(word) if start != 0 => ExtentHeader(word).all(),
            _ => 0,
        };
        let ids =
            (start + 1..=start + count).filter_map(|index| u32::try_from(self.extent_word(index)?).ok());
        (ids.collect(), slot.affinity_secs())
    }
}

/// Compares one service.
fn compare(key: &ServiceKey, desired: &DesiredService, seen: &SeenService, found: &mut Vec<String>) {
    let wanted: BTreeMap<FrontendKey, u32> =
        desired.frontends.iter().map(|frontend| (frontend.key(), frontend.flags())).collect();
    let present: BTreeMap<FrontendKey, u32> =
        seen.frontends.iter().map(|(key, value)| (*key, value.flags)).collect();
    for (frontend, flags) in &wanted {
        match present.get(frontend) {
            None => found.push(format!("{key}: does not listen on {}", describe(frontend))),
            Some(other) if other != flags => {
                found.push(format!("{key}: {} follows another policy", describe(frontend)));
            }
            Some(_) => {}
        }
    }
    for frontend in present.keys().filter(|frontend| !wanted.contains_key(*frontend)) {
        found.push(format!("{key}: still listens on {}", describe(frontend)));
    }
    let endpoints: BTreeSet<SocketAddr> = desired.backends.iter().map(|backend| backend.address).collect();
    for address in &endpoints {
        if !seen.backends.iter().any(|backend| backend.address == *address) {
            found.push(format!("{key}: endpoint {address} is missing"));
        }
    }
    for backend in seen.backends.iter().filter(|backend| !endpoints.contains(&backend.address)) {
        found.push(format!("{key}: {} still answers", backend.address));
    }
    if desired.affinity_secs != seen.affinity_secs {
        found.push(format!(
            "{key}: session affinity lasts {} s instead of {} s",
            seen.affinity_secs, desired.affinity_secs
        ));
    }
}

impl Tables for View {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }

    fn service(&self, id: u32) -> Option<ServiceSlot> {
        (id < self.slots.len()).then(|| self.slots.read(id))
    }

    fn extent_word(&self, index: u32) -> Option<u64> {
        (index < self.extents.len()).then(|| self.extents.read(index))
    }

    fn backend(&self, id: u32) -> Option<&Backend> {
        self.backends.get(&id)
    }

    fn node_address(&self, addr: &NetAddr) -> NodeAddressUse {
        self.node_addresses.get(addr).copied().unwrap_or_default()
    }

    fn node_port_bounds(&self) -> NodePortBounds {
        self.node_ports
    }

    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.get(key, 0).ok()
    }

    /// A look changes nothing.
    fn set_affinity(&self, _key: &AffinityKey, _value: &AffinityValue) {}
}

/// A client that is only asked about.
struct Asked(Source);

impl Caller for Asked {
    fn random(&self) -> u32 {
        0
    }

    fn in_host_netns(&self) -> bool {
        self.0 == Source::Host
    }

    fn netns_cookie(&self) -> u64 {
        0
    }

    fn now_ns(&self) -> u64 {
        0
    }

    fn last_backend(&self, _dst: &Destination) -> Option<u32> {
        None
    }
}
