//! Services and EndpointSlices as bytes: about ten per endpoint, eighty per Service. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ebpf_common::Protocol;
use ebpf_loader::Family;

use super::{
    super::{
        choices::Choices,
        cidr::Cidr,
        facts::{EndpointFacts, EndpointState, ObjectName, PortFacts, ServiceFacts, SliceFacts},
    },
    store::{Called, Pack},
};

/// Appends values.
trait Write {
    fn byte(&mut self, byte: u8);
    fn number(&mut self, number: u64);
    fn text(&mut self, text: &str);
    fn ip(&mut self, ip: IpAddr);
    fn list<T>(&mut self, all: &[T], each: impl Fn(&mut Self, &T));
}

impl Write for Vec<u8> {
    fn byte(&mut self, byte: u8) {
        self.push(byte);
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.push(0x80 | low(number));
            number >>= 7;
        }
        self.push(low(number));
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.extend_from_slice(text.as_bytes());
    }

    fn ip(&mut self, ip: IpAddr) {
        match ip {
            IpAddr::V4(v4) => {
                self.push(4);
                self.extend_from_slice(&v4.octets());
            }
            IpAddr::V6(v6) => {
                self.push(6);
                self.extend_from_slice(&v6.octets());
            }
        }
    }

    fn list<T>(&mut self, all: &[T], each: impl Fn(&mut Self, &T)) {
        self.number(all.len() as u64);
        for one in all {
            each(self, one);
        }
    }
}

fn low(number: u64) -> u8 {
    number.to_le_bytes()[0]
}

/// Takes values off again. The bytes are our own, so that what is missing is never met; it would be 0.
struct Read<'b>(&'b [u8]);

impl<'b> Read<'b> {
    fn take(&mut self, len: usize) -> &'b [u8] {
        let (taken, rest) = self.0.split_at_checked(len).unwrap_or((self.0, &[]));
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.take(N).try_into().unwrap_or([0; N])
    }

    fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    fn number(&mut self) -> u64 {
        let (mut number, mut shift) = (0, 0);
        loop {
            let byte = self.byte();
            number |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 || shift > 63 {
                return number;
            }
        }
    }

    fn small<N: TryFrom<u64> + Default>(&mut self) -> N {
        N::try_from(self.number()).unwrap_or_default()
    }

    fn text(&mut self) -> String {
        let len = self.small();
        String::from_utf8_lossy(self.take(len)).into_owned()
    }

    fn ip(&mut self) -> IpAddr {
        if self.byte() == 6 { self.ip_of(Family::V6) } else { self.ip_of(Family::V4) }
    }

    fn ip_of(&mut self, family: Family) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::from(self.array::<4>()).into(),
            Family::V6 => Ipv6Addr::from(self.array::<16>()).into(),
        }
    }

    fn list<T>(&mut self, mut each: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.number()).map(|_| each(self)).collect()
    }
}

fn protocol(number: u8) -> Protocol {
    Protocol::from_number(number).unwrap_or(Protocol::Tcp)
}

/// Bits of a Service's first byte.
mod service_bits {
    pub(super) const INTERNAL_LOCAL: u8 = 1;
    pub(super) const EXTERNAL_LOCAL: u8 = 2;
    /// More than cluster addresses and ports follows.
    pub(super) const MORE: u8 = 4;
    pub(super) const CONSISTENT: u8 = 8;
    pub(super) const DIRECT: u8 = 16;
}

fn bit(on: bool, bit: u8) -> u8 {
    if on { bit } else { 0 }
}

impl Pack for ServiceFacts {
    const GROUPED: bool = false;

    fn group(&self) -> &'static str {
        ""
    }

    fn pack(&self, out: &mut Vec<u8>) {
        let Self {
            uid,
            ports,
            cluster_ips,
            external_ips,
            balancer_ips,
            source_ranges,
            affinity_secs,
            internal_local,
            external_local,
            health_check_port,
            choices: Choices { consistent, direct, by_address, by_node },
            problems,
        } = self;
        let more = !(external_ips.is_empty()
            && balancer_ips.is_empty()
            && source_ranges.is_empty()
            && *affinity_secs == 0
            && health_check_port.is_none()
            && by_address.is_empty()
            && by_node.is_empty()
            && problems.is_empty());
        out.byte(
            bit(*internal_local, service_bits::INTERNAL_LOCAL)
                | bit(*external_local, service_bits::EXTERNAL_LOCAL)
                | bit(more, service_bits::MORE)
                | bit(*consistent, service_bits::CONSISTENT)
                | bit(*direct, service_bits::DIRECT),
        );
        out.text(uid);
        out.list(ports, |out, port| {
            out.text(&port.name);
            out.number(port.port.into());
            out.byte(port.protocol.number());
            out.number(port.node_port.unwrap_or_default().into());
        });
        let ips = |out: &mut Vec<u8>, all: &[IpAddr]| out.list(all, |out, ip| out.ip(*ip));
        ips(out, cluster_ips);
        if !more {
            return;
        }
        ips(out, external_ips);
        ips(out, balancer_ips);
        out.list(source_ranges, |out, range| {
            out.ip(range.network);
            out.byte(range.prefix);
        });
        out.number((*affinity_secs).into());
        out.number(health_check_port.unwrap_or_default().into());
        out.number(by_address.len() as u64);
        for (address, share) in by_address {
            out.ip(*address);
            out.number((*share).into());
        }
        out.number(by_node.len() as u64);
        for (node, share) in by_node {
            out.number((*node).into());
            out.number((*share).into());
        }
        out.list(problems, |out, problem| out.text(problem));
    }

    fn unpack(bytes: &[u8], _name: Called<'_>) -> Self {
        let mut bytes = Read(bytes);
        let bits = bytes.byte();
        let is = |bit: u8| bits & bit != 0;
        let uid = bytes.text();
        let ports = bytes.list(|bytes| PortFacts {
            name: bytes.text(),
            port: bytes.small(),
            protocol: protocol(bytes.byte()),
            node_port: Some(bytes.small()).filter(|number| *number != 0),
        });
        let mut facts = Self {
            uid,
            ports,
            cluster_ips: bytes.list(Read::ip),
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            affinity_secs: 0,
            internal_local: is(service_bits::INTERNAL_LOCAL),
            external_local: is(service_bits::EXTERNAL_LOCAL),
            health_check_port: None,
            choices: Choices {
                consistent: is(service_bits::CONSISTENT),
                direct: is(service_bits::DIRECT),
                ..Choices::default()
            },
            problems: Vec::new(),
        };
        if !is(service_bits::MORE) {
            return facts;
        }
        facts.external_ips = bytes.list(Read::ip);
        facts.balancer_ips = bytes.list(Read::ip);
        facts.source_ranges = bytes.list(|bytes| Cidr { network: bytes.ip(), prefix: bytes.byte() });
        facts.affinity_secs = bytes.small();
        facts.health_check_port = Some(bytes.small()).filter(|number| *number != 0);
        facts.choices.by_address =
            bytes.list(|bytes| (bytes.ip(), bytes.small())).into_iter().collect::<BTreeMap<_, _>>();
        facts.choices.by_node =
            bytes.list(|bytes| (bytes.small(), bytes.small())).into_iter().collect::<BTreeMap<_, _>>();
        facts.problems = bytes.list(Read::text);
        facts
    }
}

/// Bits of an endpoint's first byte.
mod endpoint_bits {
    pub(super) const LOCAL: u8 = 1;
    pub(super) const READY: u8 = 2;
    pub(super) const DRAINING: u8 = 4;
    pub(super) const NODE_HINT: u8 = 8;
    pub(super) const FOR_NODE: u8 = 16;
    pub(super) const ZONE_HINT: u8 = 32;
    /// It runs where the one before does.
    pub(super) const SAME_NODE: u8 = 64;
}

impl Pack for SliceFacts {
    const GROUPED: bool = true;

    fn group(&self) -> &str {
        &self.service.name
    }

    fn pack(&self, out: &mut Vec<u8>) {
        let Self { service: _, family, ports, endpoints, triggered, problems } = self;
        out.byte(bit(*family == Family::V6, 1) | bit(triggered.is_some(), 2));
        if let Some(triggered) = triggered {
            out.extend_from_slice(&triggered.as_nanosecond().to_le_bytes());
        }
        out.list(ports, |out, (name, protocol, number)| {
            out.text(name);
            out.byte(protocol.number());
            out.number((*number).into());
        });
        out.list(problems, |out, problem| out.text(problem));
        out.number(endpoints.len() as u64);
        let mut before = 0;
        for endpoint in endpoints {
            pack_endpoint(out, endpoint, before);
            before = endpoint.node;
        }
    }

    fn unpack(bytes: &[u8], name: Called<'_>) -> Self {
        let mut bytes = Read(bytes);
        let bits = bytes.byte();
        let family = if bits & 1 != 0 { Family::V6 } else { Family::V4 };
        let triggered = (bits & 2 != 0)
            .then(|| jiff::Timestamp::from_nanosecond(i128::from_le_bytes(bytes.array())).ok())
            .flatten();
        let ports = bytes.list(|bytes| (bytes.text(), protocol(bytes.byte()), bytes.small()));
        let problems = bytes.list(Read::text);
        let mut before = 0;
        let endpoints = bytes.list(|bytes| {
            let endpoint = unpack_endpoint(bytes, family, before);
            before = endpoint.node;
            endpoint
        });
        let service = ObjectName { namespace: name.namespace.to_owned(), name: name.group.to_owned() };
        Self { service, family, ports, endpoints, triggered, problems }
    }
}

fn pack_endpoint(out: &mut Vec<u8>, endpoint: &EndpointFacts, node_before: u32) {
    let EndpointFacts { address, local, node, state, for_node, for_zones } = endpoint;
    out.byte(
        bit(*local, endpoint_bits::LOCAL)
            | match state {
                EndpointState::Ready => endpoint_bits::READY,
                EndpointState::Draining => endpoint_bits::DRAINING,
                EndpointState::Unready => 0,
            }
            | bit(for_node.is_some(), endpoint_bits::NODE_HINT)
            | bit(*for_node == Some(true), endpoint_bits::FOR_NODE)
            | bit(for_zones.is_some(), endpoint_bits::ZONE_HINT)
            | bit(*node == node_before, endpoint_bits::SAME_NODE),
    );
    match address {
        IpAddr::V4(v4) => out.extend_from_slice(&v4.octets()),
        IpAddr::V6(v6) => out.extend_from_slice(&v6.octets()),
    }
    if *node != node_before {
        out.extend_from_slice(&node.to_le_bytes());
    }
    if let Some(zones) = for_zones {
        out.list(zones, |out, zone| out.text(zone));
    }
}

fn unpack_endpoint(bytes: &mut Read<'_>, family: Family, node_before: u32) -> EndpointFacts {
    let bits = bytes.byte();
    let is = |bit: u8| bits & bit != 0;
    let address = bytes.ip_of(family);
    let node = if is(endpoint_bits::SAME_NODE) { node_before } else { u32::from_le_bytes(bytes.array()) };
    let state = match (is(endpoint_bits::READY), is(endpoint_bits::DRAINING)) {
        (true, _) => EndpointState::Ready,
        (false, true) => EndpointState::Draining,
        (false, false) => EndpointState::Unready,
    };
    let for_node = is(endpoint_bits::NODE_HINT).then(|| is(endpoint_bits::FOR_NODE));
    let for_zones = is(endpoint_bits::ZONE_HINT).then(|| bytes.list(Read::text));
    EndpointFacts { address, local: is(endpoint_bits::LOCAL), node, state, for_node, for_zones }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: Called<'_> = Called { namespace: "ns", name: "web-1", group: "web" };

    fn again<F: Pack>(facts: &F) -> F {
        let mut bytes = Vec::new();
        facts.pack(&mut bytes);
        F::unpack(&bytes, NAME)
    }

    fn plain() -> ServiceFacts {
        ServiceFacts {
            uid: "a2b9f1c0-0000-4000-8000-000000000001".into(),
            ports: vec![PortFacts {
                name: "http".into(),
                port: 80,
                protocol: Protocol::Tcp,
                node_port: None,
            }],
            cluster_ips: vec!["10.96.0.5".parse().unwrap()],
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            affinity_secs: 0,
            internal_local: false,
            external_local: false,
            health_check_port: None,
            choices: Choices::default(),
            problems: Vec::new(),
        }
    }

    #[test]
    fn services_come_back_as_they_were() {
        assert_eq!(again(&plain()), plain());
        let mut full = plain();
        full.ports.push(PortFacts {
            name: String::new(),
            port: 65535,
            protocol: Protocol::Sctp,
            node_port: Some(32767),
        });
        full.cluster_ips.push("fd00::5".parse().unwrap());
        full.external_ips = vec!["192.0.2.1".parse().unwrap()];
        full.balancer_ips = vec!["2001:db8::1".parse().unwrap(), "198.51.100.1".parse().unwrap()];
        full.source_ranges = vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        (full.affinity_secs, full.internal_local, full.external_local) = (10_800, true, true);
        full.health_check_port = Some(30_001);
        full.choices.consistent = true;
        full.choices.direct = true;
        full.choices.by_address.insert("10.244.0.1".parse().unwrap(), 0);
        full.choices.by_node.insert(u32::MAX, 1000);
        full.problems = vec!["spec.ports[2].port: 0 is not a port number".into()];
        assert_eq!(again(&full), full);
        let only_health = ServiceFacts { health_check_port: Some(1), ..plain() };
        assert_eq!(again(&only_health), only_health);
    }

    #[test]
    fn slices_come_back_as_they_were_and_are_small() {
        let endpoint = |last: u8, state, node| EndpointFacts {
            address: [10, 244, 0, last].into(),
            local: last == 2,
            node,
            state,
            for_node: None,
            for_zones: None,
        };
        let mut facts = SliceFacts {
            service: ObjectName { namespace: "ns".into(), name: "web".into() },
            family: Family::V4,
            ports: vec![("http".into(), Protocol::Tcp, 8080), (String::new(), Protocol::Udp, 65535)],
            endpoints: vec![
                endpoint(1, EndpointState::Ready, 7),
                endpoint(2, EndpointState::Draining, 7),
                endpoint(3, EndpointState::Unready, u32::MAX),
                EndpointFacts {
                    for_node: Some(true),
                    for_zones: Some(vec!["z1".into(), String::new()]),
                    ..endpoint(4, EndpointState::Ready, 0)
                },
                EndpointFacts {
                    for_node: Some(false),
                    for_zones: Some(vec![]),
                    ..endpoint(5, EndpointState::Ready, 0)
                },
            ],
            triggered: Some("2026-11-22T00:00:00.123456789Z".parse().unwrap()),
            problems: vec!["EndpointSlice web-1: ports[2]: 0 is not a port number".into()],
        };
        assert_eq!(again(&facts), facts);
        facts.family = Family::V6;
        facts.endpoints = vec![EndpointFacts {
            address: "fd00::1".parse().unwrap(),
            ..endpoint(1, EndpointState::Ready, 7)
        }];
        (facts.triggered, facts.problems) = (None, Vec::new());
        assert_eq!(again(&facts), facts);
        facts.family = Family::V4;
        facts.endpoints =
            (0..100).map(|last| endpoint(last, EndpointState::Ready, 1000 + u32::from(last))).collect();
        let mut bytes = Vec::new();
        facts.pack(&mut bytes);
        assert!(bytes.len() < 950, "{} bytes for 100 endpoints", bytes.len());
    }

    #[test]
    fn numbers_of_every_size_come_back() {
        for number in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut bytes = Vec::new();
            bytes.number(number);
            assert_eq!(Read(&bytes).number(), number);
        }
    }
}
