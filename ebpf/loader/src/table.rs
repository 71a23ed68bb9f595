//! What a caller wants the data plane to do: services, their frontends and their backends. Plain values.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
};

use ebpf_common::{FrontendKey, FrontendValue, NetAddr, NetPort, Protocol};

/// Name of one service, opaque to the data plane (the proxy uses `namespace/name:port/protocol`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey(pub String);

/// All services.
pub type ServiceTable = BTreeMap<ServiceKey, DesiredService>;

/// One service: where it listens, who answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredService {
    /// Addresses and ports that clients dial.
    pub frontends: Vec<DesiredFrontend>,
    /// Endpoints that may answer.
    pub backends: Vec<DesiredBackend>,
    /// Seconds a client stays with its backend; 0 without affinity.
    pub affinity_secs: u32,
}

/// One address and port that clients dial.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DesiredFrontend {
    /// Which address.
    pub listen: Listen,
    /// Which port.
    pub port: u16,
    /// Which protocol.
    pub protocol: Protocol,
    /// Which backends may answer there.
    pub policy: Policy,
}

/// The address of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    /// All of them.
    All,
    /// Only those of this node; none means refusal.
    Local,
    /// Those near this node, all where none is near.
    Near,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DesiredBackend {
    /// Where it runs, seen from this node.
    pub place: Place,
    /// Address and port.
    pub address: SocketAddr,
}

/// Where an endpoint runs, seen from this node; the order is the order of the backend index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// On this node.
    Local,
    /// Preferred for this node by traffic distribution.
    Near,
    /// Anywhere else.
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

impl DesiredFrontend {
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
        match self.policy {
            Policy::All => 0,
            Policy::Local => FrontendValue::FLAG_LOCAL,
            Policy::Near => FrontendValue::FLAG_NEAR,
        }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A frontend key as a person reads it: `10.96.0.1:443/TCP`, `node:30000/UDP`.
pub(crate) fn describe(key: &FrontendKey) -> String {
    let protocol = if key.proto == Protocol::Udp.number() { "UDP" } else { "TCP" };
    let port = key.port.to_host();
    if key.scope == FrontendKey::SCOPE_NODE {
        return format!("node:{port}/{protocol}");
    }
    format!("{}/{protocol}", SocketAddr::new(IpAddr::from(key.addr), port))
}
