//! What a caller wants the data plane to do: services, their frontends and their backends. Plain values.

use std::{
    collections::BTreeMap,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
};

use ebpf_common::{FrontendKey, FrontendValue, NetAddr, NetPort, Protocol, WayEntry};

/// Name of one service, opaque to the data plane (the proxy uses `namespace/name:port/protocol`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey(pub String);

/// All services.
pub type ServiceTable = BTreeMap<ServiceKey, DesiredService>;

/// One service: where it listens, who answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct DesiredService {
    /// Addresses and ports that clients dial.
    pub frontends: Vec<DesiredFrontend>,
    /// Endpoints that may answer.
    pub backends: Vec<DesiredBackend>,
    /// Seconds a client stays with its backend; 0 without affinity.
    pub affinity_secs: u32,
    /// Where clients outside must come from, on frontends that ask for it.
    pub source_ranges: Vec<SourcePrefix>,
    /// Clients outside are spread by consistent hashing, the same on every node.
    pub consistent: bool,
    /// Shares of endpoints that have another than 1, where hashing is consistent.
    pub weights: BTreeMap<SocketAddr, u16>,
}

/// Addresses that share their first bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourcePrefix {
    /// The first address.
    pub address: IpAddr,
    /// How many bits are shared.
    pub bits: u8,
}

impl SourcePrefix {
    /// The first address in its mapped form, and its bits among 128.
    pub(crate) fn key(&self) -> (NetAddr, u8) {
        let mapped = if self.address.is_ipv4() { 96 } else { 0 };
        (NetAddr::from(self.address), self.bits.saturating_add(mapped).min(128))
    }
}

impl DesiredService {
    /// Tells this service from any other for all practice, in a fraction of its size; never 0.
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish().max(1)
    }
}

/// A route of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DesiredWay {
    /// Where it leads.
    pub to: SourcePrefix,
    /// Index of the device.
    pub device: u32,
    /// The neighbour that takes packets; `None`: their destination itself.
    pub via: Option<IpAddr>,
    /// Link addresses of the neighbour and the device, where they are known.
    pub link: Option<([u8; 6], [u8; 6])>,
    /// Bytes that a packet may have there.
    pub mtu: u32,
}

impl DesiredWay {
    pub(crate) fn prefix(&self) -> (NetAddr, u32) {
        let (addr, bits) = self.to.key();
        (addr, u32::from(bits))
    }

    pub(crate) fn entry(&self) -> WayEntry {
        let (to, from) = self.link.unwrap_or_default();
        let via = self.via.map(NetAddr::from).unwrap_or_default();
        WayEntry { via, device: self.device, to, from, mtu: self.mtu }
    }
}

/// One address and port that clients dial.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DesiredFrontend {
    /// Which address.
    pub listen: Listen,
    /// Which port.
    pub port: u16,
    /// Which protocol.
    pub protocol: Protocol,
    /// Which backends may answer clients inside the cluster.
    pub policy: Policy,
    /// Which backends may answer clients outside; [`Policy::Local`] keeps their address.
    pub external: Policy,
    /// Clients outside must come from the service's source ranges.
    pub ranged: bool,
    /// Clients inside are served only where the address is this node's.
    pub guarded: bool,
    /// Clients outside are sent on, as they are, to the node of their endpoint; needs consistent hashing.
    pub direct: bool,
}

/// The address of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Listen {
    /// Exactly this one.
    Address(IpAddr),
    /// Every address of this family that the node has, loopback included for the node's own processes: a NodePort.
    Node(Family),
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Which backends may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Policy {
    /// All of them.
    All,
    /// Only those of this node; none means refusal.
    Local,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DesiredBackend {
    /// Where it runs, seen from this node.
    pub place: Place,
    /// Address and port.
    pub address: SocketAddr,
}

/// Which policies an endpoint answers; the order is the order of the backend index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// On this node, and only policy [`Policy::Local`] still sends there: it drains, and others need not use it.
    LocalOnly,
    /// On this node; both policies send there.
    Local,
    /// Only policy [`Policy::All`] sends there.
    Far,
}

/// One step of an update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Make the service be so.
    Upsert(ServiceKey, DesiredService),
    /// Remove the service.
    Remove(ServiceKey),
}

impl DesiredService {
    /// 0 without a table for consistent hashing; else what tells its weights from others.
    pub(crate) fn table_print(&self) -> u64 {
        if !self.consistent || self.backends.is_empty() {
            return 0;
        }
        let mut hasher = DefaultHasher::new();
        self.weights.hash(&mut hasher);
        hasher.finish() | 1
    }

    /// Words of the backend index that its table for consistent hashing takes.
    #[must_use]
    pub fn table_words(&self) -> usize {
        let kind = if self.consistent { crate::maglev::kind_for(self.backends.len()) } else { 0 };
        crate::maglev::words_of(kind) as usize
    }
}

impl DesiredFrontend {
    /// A frontend on one address that all backends answer to everybody.
    #[must_use]
    pub fn new(listen: Listen, port: u16, protocol: Protocol) -> Self {
        let (policy, external) = (Policy::All, Policy::All);
        Self { listen, port, protocol, policy, external, ranged: false, guarded: false, direct: false }
    }

    /// The key under which programs find it.
    pub(crate) fn key(&self) -> FrontendKey {
        let (addr, scope) = match self.listen {
            Listen::Address(address) => (NetAddr::from(address), FrontendKey::SCOPE_ADDRESS),
            Listen::Node(Family::V4) => (NetAddr::ANY_V4, FrontendKey::SCOPE_NODE),
            Listen::Node(Family::V6) => (NetAddr::ANY_V6, FrontendKey::SCOPE_NODE),
        };
        FrontendKey { addr, port: NetPort::from_host(self.port), proto: self.protocol.number(), scope }
    }

    /// The flags of its value.
    pub(crate) fn flags(&self) -> u32 {
        let bit = |on: bool, flag: u32| if on { flag } else { 0 };
        bit(self.policy == Policy::Local, FrontendValue::FLAG_LOCAL)
            | bit(self.external == Policy::Local, FrontendValue::FLAG_EXTERNAL_LOCAL)
            | bit(self.ranged, FrontendValue::FLAG_SOURCE_RANGES)
            | bit(self.guarded, FrontendValue::FLAG_GUARDED)
            | bit(self.direct, FrontendValue::FLAG_DIRECT)
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A frontend key as a person reads it: `10.96.0.1:443/TCP`, `node:30000/UDP`.
pub fn describe(key: &FrontendKey) -> String {
    let protocol = Protocol::from_number(key.proto).map_or("?", Protocol::name);
    let port = key.port.to_host();
    if key.scope == FrontendKey::SCOPE_NODE {
        let family = if key.addr.is_v4() { "node" } else { "node6" };
        return format!("{family}:{port}/{protocol}");
    }
    format!("{}/{protocol}", SocketAddr::new(IpAddr::from(key.addr), port))
}
