//! What clients outside meet: devices, connections, and where one would go.

use std::{
    cell::Cell,
    net::{IpAddr, SocketAddr},
};

use aya::maps::{
    Array, HashMap, MapData,
    lpm_trie::{Key, LpmTrie},
};
use ebpf_common::{
    AffinityKey, AffinityValue, Backend, DeviceEntry, FlowKey, FlowValue, FragmentKey, FragmentPorts,
    FrontendKey, FrontendValue, NatConfig, NetAddr, NetPort, NodeAddressUse, NodePortBounds, Protocol,
    ServiceSlot, SourceRange, map_names,
};
use ebpf_packet::{Action, Count, Flows, Headers, Hop, Part, Tables, Way, new_flow};

use super::{Trace, View};
use crate::{
    devices,
    maps::{MapsError, pinned},
};

/// A device that packet programs run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenDevice {
    /// The kernel's number.
    pub index: u32,
    /// Its name; empty where it is gone.
    pub name: String,
    /// Clients there are outside.
    pub outer: bool,
    /// Behind which of its addresses clients are hidden.
    pub sources: Vec<IpAddr>,
    /// How the programs hang on it.
    pub how: Vec<&'static str>,
}

/// A connection from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenFlow {
    /// Its protocol.
    pub protocol: &'static str,
    /// Who dialled.
    pub client: SocketAddr,
    /// What was dialled.
    pub frontend: SocketAddr,
    /// Whom the endpoint sees.
    pub source: SocketAddr,
    /// Who answers.
    pub endpoint: SocketAddr,
    /// The service's name.
    pub service: String,
    /// One end has said goodbye.
    pub closing: bool,
    /// Packets of both directions were seen.
    pub established: bool,
}

impl View {
    /// The devices that clients outside are served through.
    pub fn devices(&self) -> Result<Vec<SeenDevice>, MapsError> {
        let map: HashMap<MapData, u32, DeviceEntry> = pinned(&super::dir(&self.pin_dir), map_names::DEVICES)?;
        let links = self.pin_dir.join("links");
        let mut seen: Vec<SeenDevice> = map
            .iter()
            .filter_map(Result::ok)
            .map(|(index, entry)| SeenDevice {
                index,
                name: nix::net::if_::if_indextoname(index)
                    .map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default(),
                outer: entry.flags & DeviceEntry::FLAG_OUTER != 0,
                sources: [entry.source_v4, entry.source_v6]
                    .into_iter()
                    .filter(|source| *source != NetAddr::ANY_V6)
                    .map(IpAddr::from)
                    .collect(),
                how: devices::how(&links, index),
            })
            .collect();
        seen.sort_by_key(|device| device.index);
        Ok(seen)
    }

    /// The connections from outside that are known, at most so many.
    pub fn flows(&self, limit: usize) -> Result<Vec<SeenFlow>, MapsError> {
        let mut seen = Vec::new();
        for (name, established) in [(map_names::FLOWS, true), (map_names::NEW_FLOWS, false)] {
            let map: HashMap<MapData, FlowKey, FlowValue> = pinned(&super::dir(&self.pin_dir), name)?;
            let forward =
                map.iter().filter_map(Result::ok).filter(|(key, _)| key.direction == FlowKey::FORWARD);
            for (_, flow) in forward.filter(|(_, flow)| !flow.is_own()) {
                if seen.len() == limit {
                    return Ok(seen);
                }
                seen.push(self.seen_flow(&flow, established));
            }
        }
        seen.sort_by_key(|flow| (flow.service.clone(), flow.client));
        // One that stands in both maps is established.
        seen.dedup_by(|b, a| (a.client, a.frontend, a.protocol) == (b.client, b.frontend, b.protocol));
        Ok(seen)
    }

    fn seen_flow(&self, flow: &FlowValue, established: bool) -> SeenFlow {
        let at = |addr: NetAddr, port: NetPort| SocketAddr::new(IpAddr::from(addr), port.to_host());
        SeenFlow {
            protocol: Protocol::from_number(flow.proto).map_or("?", Protocol::name),
            client: at(flow.client, flow.client_port),
            frontend: at(flow.frontend, flow.frontend_port),
            source: at(flow.source, flow.source_port),
            endpoint: at(flow.backend, flow.backend_port),
            service: self.name_of(flow.service),
            closing: flow.flags & FlowValue::FLAG_CLOSING != 0,
            established,
        }
    }

    /// Where a connection from outside would go, by the code that decides it in the kernel.
    pub(super) fn trace_outside(&self, from: SocketAddr, to: SocketAddr, protocol: Protocol) -> Trace {
        let maps = Outside { view: self, denied: Cell::new(None), refused: Cell::new(None) };
        let headers = Headers {
            src: from.ip().into(),
            dst: to.ip().into(),
            src_port: NetPort::from_host(from.port()),
            dst_port: NetPort::from_host(to.port()),
            network: 0,
            transport: 0,
            id: 0,
            len: 0,
            v4: to.is_ipv4(),
            proto: protocol.number(),
            flags: 0,
            hops: 64,
            part: Part::Whole,
        };
        let outcome = new_flow(&maps, &headers, false);
        if let Some(service) = maps.denied.get() {
            return Trace::Dropped(self.name_of(service), "the client is in no source range");
        }
        if let Some(service) = maps.refused.get() {
            let name = self.name_of(service);
            return match outcome {
                Err(Action::Drop) => Trace::Dropped(
                    name,
                    "policy Local finds no endpoint on this node, and other nodes have some",
                ),
                _ => Trace::Refused(name),
            };
        }
        match outcome {
            Err(_) => Trace::NotAService,
            Ok(flow) => {
                let seen = self.service_of(flow.service);
                let dst =
                    ebpf_packet::Destination { addr: headers.dst, port: headers.dst_port, proto: protocol };
                let flags = self.frontend_of(&dst).map_or(0, |value| value.flags);
                let local = flags & FrontendValue::FLAG_EXTERNAL_LOCAL != 0;
                let direct = flow.flags & FlowValue::FLAG_RELAYED != 0 || !flow.hides_client();
                let shown = local || flags & FrontendValue::FLAG_DIRECT != 0 && direct;
                let may = seen
                    .backends
                    .iter()
                    .filter(|backend| if local { backend.local } else { backend.cluster });
                let answers = may.map(|backend| backend.address).collect();
                if shown { Trace::Shown(seen.name, answers) } else { Trace::Forwarded(seen.name, answers) }
            }
        }
    }
}

/// The maps as the packet programs see them; nothing is written.
struct Outside<'v> {
    view: &'v View,
    denied: Cell<Option<u32>>,
    refused: Cell<Option<u32>>,
}

impl Tables for Outside<'_> {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.view.frontend(key)
    }
    fn service(&self, id: u32) -> Option<ServiceSlot> {
        Tables::service(self.view, id)
    }
    fn extent_word(&self, index: u32) -> Option<u64> {
        self.view.extent_word(index)
    }
    fn backend(&self, id: u32) -> Option<&Backend> {
        self.view.backend(id)
    }
    fn node_address(&self, addr: &NetAddr) -> NodeAddressUse {
        self.view.node_address(addr)
    }
    fn node_port_bounds(&self) -> NodePortBounds {
        self.view.node_port_bounds()
    }
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.view.affinity(key)
    }
    fn set_affinity(&self, _key: &AffinityKey, _value: &AffinityValue) {}
}

impl Flows for Outside<'_> {
    const EARLY: bool = false;

    fn hop(&self, _headers: &Headers, _to: &NetAddr, _now_ns: u64) -> Option<Hop> {
        None
    }
    fn way(&self, to: &NetAddr) -> Option<Way> {
        Some(Way { device: 0, via: *to })
    }
    fn established(&self, _key: &FlowKey) -> Option<&FlowValue> {
        None
    }
    fn begun(&self, _key: &FlowKey) -> Option<&FlowValue> {
        None
    }
    fn establish(&self, _flow: &FlowValue) {}
    fn begin(&self, _flow: &FlowValue) {}
    fn note_use(&self, _key: &FlowKey, _now_ns: u64, _flags: u8) {}
    fn fragment(&self, _key: &FragmentKey) -> Option<FragmentPorts> {
        None
    }
    fn note_fragment(&self, _key: &FragmentKey, _ports: &FragmentPorts) {}
    fn nat_config(&self) -> NatConfig {
        let map = pinned::<Array<MapData, NatConfig>>(&super::dir(&self.view.pin_dir), map_names::NAT_CONFIG);
        map.ok().and_then(|map| map.get(&0, 0).ok()).unwrap_or_default()
    }
    fn source_for(&self, backend: &NetAddr) -> (NetAddr, bool) {
        let config = self.nat_config();
        (if backend.is_v4() { config.source_v4 } else { config.source_v6 }, false)
    }
    fn in_source_ranges(&self, service: u32, client: &NetAddr) -> bool {
        let dir = super::dir(&self.view.pin_dir);
        let data = SourceRange { service: service.to_be(), addr: *client };
        pinned::<LpmTrie<MapData, SourceRange, u32>>(&dir, map_names::SOURCE_RANGES)
            .is_ok_and(|map| map.get(&Key::new(SourceRange::ALL_BITS, data), 0).is_ok())
    }
    fn now(&self) -> u64 {
        0
    }
    fn count(&self, service: u32, what: Count) {
        match what {
            Count::Denied => self.denied.set(Some(service)),
            Count::Refused => self.refused.set(Some(service)),
            _ => {}
        }
    }
    fn count_backend(&self, _backend: u32) {}
}
