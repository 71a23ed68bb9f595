//! Packets in, packets out: whatever is translated has right checksums, and comes back as what it was.

use std::{
    boxed::Box,
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    vec::Vec,
};

use ebpf_common::{
    AffinityKey, AffinityValue, Backend, ExtentHeader, FlowKey, FlowValue, FragmentKey, FragmentPorts,
    FrontendKey, FrontendValue, NetPort, NodeAddressUse, NodePortBounds, ServiceSlot,
};
use proptest::prelude::*;

use super::*;
use crate::parse::{Difference, ETHERNET, ETHERTYPE_V4, ETHERTYPE_V6, Fix, adjusted};

/// A frame in a vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame(pub(crate) Vec<u8>);

impl Packet for Frame {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.get(offset as usize..offset as usize + N)?.try_into().ok()
    }
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Option<()> {
        self.0.get_mut(offset as usize..offset as usize + N)?.copy_from_slice(bytes);
        Some(())
    }
    fn fix_header(&mut self, checksum: u32, by: Difference) -> Option<()> {
        let old = u16::from_ne_bytes(self.load(checksum)?);
        self.store(checksum, &adjusted(old, by).to_ne_bytes())
    }
    fn fix_transport(&mut self, checksum: u32, by: Difference, fix: Fix) -> Option<()> {
        let old = u16::from_ne_bytes(self.load(checksum)?);
        if fix.may_be_absent && old == 0 {
            return Some(());
        }
        let new = adjusted(old, by);
        let new = if fix.may_be_absent && new == 0 { 0xffff } else { new };
        self.store(checksum, &new.to_ne_bytes())
    }
}

fn sum(bytes: &[u8], start: u32) -> u32 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    words.fold(start, |sum, word| sum + word)
}

fn fold(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[allow(clippy::cast_possible_truncation, reason = "folded to sixteen bits")]
    let folded = sum as u16;
    !folded
}

/// Sum over the pseudo header.
fn pseudo(src: &NetAddr, dst: &NetAddr, proto: u8, len: usize) -> u32 {
    let from = if src.is_v4() { 12 } else { 0 };
    let start = u32::from(proto) + u32::try_from(len).unwrap();
    sum(&dst.octets()[from..], sum(&src.octets()[from..], start))
}

/// A packet with everything right.
pub(crate) fn build(src: (NetAddr, u16), dst: (NetAddr, u16), proto: u8, flags: u8, payload: &[u8]) -> Frame {
    let mut l4 = Vec::new();
    l4.extend(src.1.to_be_bytes());
    l4.extend(dst.1.to_be_bytes());
    if proto == TCP {
        l4.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    } else {
        l4.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
        l4.extend([0, 0]);
    }
    l4.extend(payload);
    let at = if proto == TCP { 16 } else { 6 };
    let check = fold(sum(&l4, pseudo(&src.0, &dst.0, proto, l4.len())));
    l4[at..at + 2].copy_from_slice(&check.to_be_bytes());
    network(src.0, dst.0, proto, &l4)
}

fn network(src: NetAddr, dst: NetAddr, proto: u8, l4: &[u8]) -> Frame {
    let mut frame = std::vec![0; ETHERNET as usize];
    let len = u16::try_from(l4.len()).unwrap();
    if src.is_v4() {
        let mut header = std::vec![0x45, 0];
        header.extend((len + 20).to_be_bytes());
        header.extend([0, 1, 0, 0, 64, proto, 0, 0]);
        header.extend(&src.octets()[12..]);
        header.extend(&dst.octets()[12..]);
        let check = fold(sum(&header, 0));
        header[10..12].copy_from_slice(&check.to_be_bytes());
        frame.extend(header);
    } else {
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(len.to_be_bytes());
        frame.extend([proto, 64]);
        frame.extend(src.octets());
        frame.extend(dst.octets());
    }
    frame.extend(l4);
    Frame(frame)
}

pub(crate) fn ethertype(addr: &NetAddr) -> u16 {
    if addr.is_v4() { ETHERTYPE_V4 } else { ETHERTYPE_V6 }
}

/// Fails where a checksum is wrong.
#[track_caller]
pub(crate) fn check_sums(frame: &Frame) {
    let v4 = frame.0[14] >> 4 == 4;
    let headers = parse(frame, ETHERNET, if v4 { ETHERTYPE_V4 } else { ETHERTYPE_V6 }, true).unwrap();
    let l4 = &frame.0[headers.transport as usize..];
    if v4 {
        assert_eq!(fold(sum(&frame.0[14..34], 0)), 0, "header checksum");
    }
    let start = match headers.proto {
        ICMP => 0,
        _ => pseudo(&headers.src, &headers.dst, headers.proto, l4.len()),
    };
    assert_eq!(fold(sum(l4, start)), 0, "transport checksum of protocol {}", headers.proto);
}

/// One service with one backend, and the flows that were made; with `EARLY`, as the driver's hook sees them.
#[derive(Default)]
struct WorldOf<const EARLY: bool> {
    frontends: HashMap<FrontendKey, FrontendValue>,
    backends: BTreeMap<u32, Backend>,
    own: Vec<NetAddr>,
    /// Addresses that every node knows as a node's.
    shared: Vec<NetAddr>,
    extents: Vec<u64>,
    config: NatConfig,
    flows: RefCell<HashMap<FlowKey, &'static FlowValue>>,
    begun: RefCell<HashMap<FlowKey, &'static FlowValue>>,
    fragments: RefCell<HashMap<FragmentKey, FragmentPorts>>,
    counts: RefCell<Vec<Count>>,
    hop: Option<Hop>,
    /// Connection tracking sees the backend's answers as they come.
    tracked: bool,
    now: u64,
}

type World = WorldOf<false>;

impl<const EARLY: bool> Tables for WorldOf<EARLY> {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }
    fn service(&self, _id: u32) -> Option<ServiceSlot> {
        Some(ServiceSlot::new(u32::from(!self.backends.is_empty()), 0))
    }
    fn extent_word(&self, index: u32) -> Option<u64> {
        self.extents.get(index as usize).copied()
    }
    fn backend(&self, id: u32) -> Option<&Backend> {
        self.backends.get(&id)
    }
    fn node_address(&self, addr: &NetAddr) -> NodeAddressUse {
        let own = if self.own.contains(addr) { NodeAddressUse::OWN | NodeAddressUse::NODE_PORTS } else { 0 };
        NodeAddressUse(own | if self.shared.contains(addr) { NodeAddressUse::SHARED } else { 0 })
    }
    fn node_port_bounds(&self) -> NodePortBounds {
        NodePortBounds::new(30000, 30010)
    }
    fn affinity(&self, _key: &AffinityKey) -> Option<AffinityValue> {
        None
    }
    fn set_affinity(&self, _key: &AffinityKey, _value: &AffinityValue) {}
}

impl<const EARLY: bool> Flows for WorldOf<EARLY> {
    const EARLY: bool = EARLY;

    fn hop(&self, _headers: &Headers, _to: &NetAddr, _now_ns: u64) -> Option<Hop> {
        self.hop
    }
    fn way(&self, to: &NetAddr) -> Option<Way> {
        Some(Way { device: 9, via: *to })
    }
    fn established(&self, key: &FlowKey) -> Option<&FlowValue> {
        self.flows.borrow().get(key).copied()
    }
    fn begun(&self, key: &FlowKey) -> Option<&FlowValue> {
        self.begun.borrow().get(key).copied()
    }
    fn establish(&self, flow: &FlowValue) {
        // Tests are short: what a map would own is simply kept.
        let kept: &'static FlowValue = Box::leak(Box::new(*flow));
        self.flows.borrow_mut().extend([(flow.forward_key(), kept), (flow.reply_key(), kept)]);
    }
    fn begin(&self, flow: &FlowValue) {
        let kept: &'static FlowValue = Box::leak(Box::new(*flow));
        self.begun.borrow_mut().extend([(flow.forward_key(), kept), (flow.reply_key(), kept)]);
    }
    fn note_use(&self, key: &FlowKey, now_ns: u64, flags: u8) {
        for map in [&self.flows, &self.begun] {
            if let Some(found) = map.borrow_mut().get_mut(key) {
                let noted = FlowValue { last_used_ns: now_ns, flags: found.flags | flags, ..**found };
                *found = Box::leak(Box::new(noted));
            }
        }
    }
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.fragments.borrow().get(key).copied()
    }
    fn note_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        self.fragments.borrow_mut().insert(*key, *ports);
    }
    fn nat_config(&self) -> NatConfig {
        self.config
    }
    fn source_for(&self, _backend: &NetAddr) -> (NetAddr, bool) {
        (self.config.source_v4, self.tracked)
    }
    fn in_source_ranges(&self, _service: u32, client: &NetAddr) -> bool {
        client.octets()[15] < 100
    }
    fn now(&self) -> u64 {
        self.now
    }
    fn count(&self, _service: u32, what: Count) {
        self.counts.borrow_mut().push(what);
    }
    fn count_backend(&self, _backend: u32) {}
}

const PORT: u16 = 80;
const BACKEND_PORT: u16 = 8080;

/// Addresses of client, service, backend and node.
fn addresses(v4: bool) -> [NetAddr; 4] {
    let make = |last: u8| {
        if v4 {
            NetAddr::from_v4_word(u32::from_ne_bytes([203, 0, 113, last]))
        } else {
            let mut octets = [0; 16];
            (octets[0], octets[1], octets[15]) = (0xfd, 1, last);
            NetAddr::from_octets(octets)
        }
    };
    [make(2), make(10), make(20), make(1)]
}

fn world<const EARLY: bool>(v4: bool, flags: u32) -> WorldOf<EARLY> {
    let [_, vip, backend, node] = addresses(v4);
    let mut world = WorldOf::<EARLY> { own: std::vec![node], ..WorldOf::default() };
    for proto in [TCP, UDP] {
        let key = FrontendKey { addr: vip, port: NetPort::from_host(PORT), proto, scope: 0 };
        world.frontends.insert(key, FrontendValue { service: 1, flags });
    }
    let flags = Backend::FLAG_CLUSTER | Backend::FLAG_LOCAL;
    world
        .backends
        .insert(1, Backend { addr: backend, port: NetPort::from_host(BACKEND_PORT), flags, service: 1 });
    world.extents = std::vec![0, ExtentHeader::new(1, 1, 0).0, 1];
    (world.config.source_v4, world.config.source_v6) = (node, node);
    (world.config.first_port, world.config.ports) = (1024, 1000);
    world
}

fn arrive<const EARLY: bool>(world: &WorldOf<EARLY>, frame: &mut Frame) -> Action {
    let v4 = frame.0[14] >> 4 == 4;
    ingress(frame, world, ETHERNET, if v4 { ETHERTYPE_V4 } else { ETHERTYPE_V6 }, false)
}

/// What becomes of a rewritten packet of a flow whose client the backend sees, or does not.
fn rewritten(local: bool) -> Action {
    if local { Action::Deliver } else { Action::Untracked }
}

fn depart<const EARLY: bool>(world: &WorldOf<EARLY>, frame: &mut Frame) -> Action {
    let v4 = frame.0[14] >> 4 == 4;
    egress(frame, world, ETHERNET, if v4 { ETHERTYPE_V4 } else { ETHERTYPE_V6 }, false)
}

/// The other direction of a packet: what the backend answers.
fn answer(frame: &Frame, flags: u8) -> Frame {
    let v4 = frame.0[14] >> 4 == 4;
    let h = parse(frame, ETHERNET, if v4 { ETHERTYPE_V4 } else { ETHERTYPE_V6 }, false).unwrap();
    build((h.dst, h.dst_port.to_host()), (h.src, h.src_port.to_host()), h.proto, flags, b"answer")
}

proptest! {
    #[test]
    fn what_is_translated_comes_back_with_right_checksums(
        v4: bool, tcp: bool, local: bool, port in 1_u16.., payload in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let [client, vip, backend, node] = addresses(v4);
        let world: World = world(v4, if local { FrontendValue::FLAG_EXTERNAL_LOCAL } else { 0 });
        let proto = if tcp { TCP } else { UDP };
        let mut frame = build((client, port), (vip, PORT), proto, SYN, &payload);
        prop_assert_eq!(arrive(&world, &mut frame), rewritten(local));
        check_sums(&frame);
        let sent = parse(&frame, ETHERNET, ethertype(&client), false).unwrap();
        prop_assert_eq!((sent.dst, sent.dst_port.to_host()), (backend, BACKEND_PORT));
        prop_assert_eq!(sent.src, if local { client } else { node });
        let mut reply = answer(&frame, SYN | ACK);
        let action = if local {
            depart(&world, &mut reply)
        } else {
            arrive(&world, &mut reply)
        };
        prop_assert_eq!(action, rewritten(local));
        check_sums(&reply);
        let seen = parse(&reply, ETHERNET, ethertype(&client), false).unwrap();
        prop_assert_eq!((seen.src, seen.src_port.to_host()), (vip, PORT));
        prop_assert_eq!((seen.dst, seen.dst_port.to_host()), (client, port));
    }

    #[test]
    fn no_bytes_make_the_code_fail(bytes in prop::collection::vec(any::<u8>(), 0..120), v4: bool, inner: bool) {
        let world: World = world(v4, 0);
        let mut frame = Frame(bytes);
        let ethertype = if v4 { ETHERTYPE_V4 } else { ETHERTYPE_V6 };
        ingress(&mut frame, &world, ETHERNET, ethertype, inner);
        egress(&mut frame, &world, ETHERNET, ethertype, inner);
    }
}

/// An ICMP error about the start of a packet.
fn error_about(frame: &Frame, speaker: NetAddr, v4: bool) -> Frame {
    let quoted = &frame.0[14..frame.0.len().min(14 + 60)];
    let about = parse(frame, ETHERNET, if v4 { ETHERTYPE_V4 } else { ETHERTYPE_V6 }, true).unwrap();
    let mut l4 = if v4 { std::vec![3, 3, 0, 0, 0, 0, 0, 0] } else { std::vec![1, 4, 0, 0, 0, 0, 0, 0] };
    l4.extend(quoted);
    let proto = if v4 { ICMP } else { ICMP_V6 };
    let start = if v4 { 0 } else { pseudo(&speaker, &about.src, proto, l4.len()) };
    let check = fold(sum(&l4, start));
    l4[2..4].copy_from_slice(&check.to_be_bytes());
    network(speaker, about.src, proto, &l4)
}

#[test]
fn errors_are_translated_outside_and_inside() {
    for (v4, local) in [(true, false), (false, false), (true, true), (false, true)] {
        let [client, vip, backend, _] = addresses(v4);
        let world: World = world(v4, if local { FrontendValue::FLAG_EXTERNAL_LOCAL } else { 0 });
        let original = build((client, 4000), (vip, PORT), UDP, 0, b"question");
        let mut frame = original.clone();
        assert_eq!(arrive(&world, &mut frame), rewritten(local));
        let mut error = error_about(&frame, backend, v4);
        check_sums(&error);
        let action = if local { depart(&world, &mut error) } else { arrive(&world, &mut error) };
        assert_eq!(action, rewritten(local), "v4 {v4}, local {local}");
        check_sums(&error);
        let outer = parse(&error, ETHERNET, ethertype(&client), false).unwrap();
        assert_eq!((outer.src, outer.dst), (vip, client), "the service speaks for its backend");
        let inner = parse(&error, outer.transport + 8, ethertype(&client), true).unwrap();
        assert_eq!((inner.src, inner.src_port.to_host()), (client, 4000));
        assert_eq!((inner.dst, inner.dst_port.to_host()), (vip, PORT));
    }
}

#[test]
fn a_flood_of_first_packets_makes_no_established_flow() {
    let [client, vip, ..] = addresses(true);
    let world: World = world(true, 0);
    for port in 1..500 {
        arrive(&world, &mut build((client, port), (vip, PORT), TCP, SYN, b""));
    }
    assert!(world.flows.borrow().is_empty());
    assert!(!world.begun.borrow().is_empty());
    // The client's own acknowledgement does.
    arrive(&world, &mut build((client, 7), (vip, PORT), TCP, ACK, b""));
    assert_eq!(world.flows.borrow().len(), 2, "both directions");
}

#[test]
fn a_connection_stays_with_its_backend_and_a_new_one_does_not() {
    let [client, vip, backend, _] = addresses(true);
    let mut world: World = world(true, 0);
    let mut first = build((client, 7), (vip, PORT), TCP, SYN, b"");
    arrive(&world, &mut first);
    arrive(&world, &mut build((client, 7), (vip, PORT), TCP, ACK, b""));
    world.backends.get_mut(&1).unwrap().flags = 0;
    let other = addresses(true)[3];
    let flags = Backend::FLAG_CLUSTER;
    world.backends.insert(2, Backend { addr: other, port: NetPort::from_host(1), flags, service: 1 });
    world.extents = std::vec![0, ExtentHeader::new(1, 0, 0).0, 2];
    let to = |mut frame: Frame| {
        arrive(&world, &mut frame);
        parse(&frame, ETHERNET, ETHERTYPE_V4, false).unwrap().dst
    };
    assert_eq!(to(build((client, 7), (vip, PORT), TCP, ACK, b"more")), backend);
    assert_eq!(to(build((client, 7), (vip, PORT), TCP, SYN, b"")), other);
}

#[test]
fn strangers_are_dropped_and_others_pass() {
    let [client, vip, _, node] = addresses(true);
    let stranger = NetAddr::from_v4_word(u32::from_ne_bytes([203, 0, 113, 200]));
    let ranged: World = world(true, FrontendValue::FLAG_SOURCE_RANGES);
    assert_eq!(arrive(&ranged, &mut build((stranger, 1), (vip, PORT), TCP, SYN, b"")), Action::Drop);
    assert_eq!(arrive(&ranged, &mut build((client, 1), (vip, PORT), TCP, SYN, b"")), Action::Untracked);
    assert_eq!(arrive(&ranged, &mut build((client, 1), (node, 22), TCP, SYN, b"")), Action::Pass);
    assert_eq!(*ranged.counts.borrow().first().unwrap(), Count::Denied);
}

const HOP: Hop = Hop { device: 4, to: [2; 6], from: [3; 6] };

#[test]
fn the_driver_sends_on_what_it_can_and_leaves_the_rest_as_it_is() {
    for v4 in [true, false] {
        let [client, vip, backend, node] = addresses(v4);
        let later: World = world(v4, 0);
        let mut driver: WorldOf<true> = world(v4, 0);
        driver.hop = Some(HOP);
        let original = build((client, 4000), (vip, PORT), TCP, SYN, b"");
        let mut frame = original.clone();
        assert_eq!(arrive(&driver, &mut frame), Action::Pass, "a new flow is the later hook's");
        assert_eq!(frame, original);
        assert_eq!(arrive(&later, &mut frame), Action::Untracked);
        let mut reply = answer(&frame, SYN | ACK);
        driver.begun = later.begun;
        driver.hop = None;
        let mut next = build((client, 4000), (vip, PORT), TCP, ACK, b"");
        let unchanged = next.clone();
        assert_eq!(arrive(&driver, &mut next), Action::Pass, "no way to send it");
        assert_eq!(next, unchanged);
        driver.hop = Some(HOP);
        assert_eq!(arrive(&driver, &mut next), Action::Send(4));
        check_sums(&next);
        let sent = parse(&next, ETHERNET, ethertype(&client), false).unwrap();
        assert_eq!((sent.src, sent.dst, sent.hops), (node, backend, 63));
        assert_eq!(next.0[..12], [2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]);
        assert_eq!(arrive(&driver, &mut reply), Action::Send(4));
        check_sums(&reply);
        let seen = parse(&reply, ETHERNET, ethertype(&client), false).unwrap();
        assert_eq!((seen.src, seen.dst, seen.dst_port.to_host()), (vip, client, 4000));
    }
}

/// A table for consistent hashing that leads to the only backend.
fn with_table(world: &mut World, local: bool) {
    let header = ExtentHeader::new(1, u16::from(local), 0).with_table(1);
    world.extents = std::vec![0, header.0, 1];
    world.extents.extend([0; 63]);
    let flags = Backend::FLAG_CLUSTER | if local { Backend::FLAG_LOCAL } else { 0 };
    world.backends.get_mut(&1).unwrap().flags = flags;
}

#[test]
fn a_direct_packet_goes_on_as_it_is_until_it_is_where_its_endpoint_is() {
    for v4 in [true, false] {
        let [client, vip, backend, _] = addresses(v4);
        let mut world: World = world(v4, FrontendValue::FLAG_DIRECT);
        with_table(&mut world, false);
        let original = build((client, 4000), (vip, PORT), UDP, 0, b"question");
        let mut frame = original.clone();
        assert_eq!(arrive(&world, &mut frame), Action::Relay(Way { device: 9, via: backend }));
        check_sums(&frame);
        let hops = if v4 { 22 } else { 21 };
        assert_eq!(frame.0[hops], 63);
        assert_eq!(frame.0[hops + 4..], original.0[hops + 4..], "nothing else is changed");
        frame.0[hops] = 1;
        assert_eq!(arrive(&world, &mut frame), Action::Drop, "it does not circle");
        // On the endpoint's node, by whichever device it comes.
        let mut there: World = self::world(v4, FrontendValue::FLAG_DIRECT);
        with_table(&mut there, true);
        let mut frame = original.clone();
        let ethertype = ethertype(&client);
        assert_eq!(ingress(&mut frame, &there, ETHERNET, ethertype, true), Action::Deliver);
        check_sums(&frame);
        let seen = parse(&frame, ETHERNET, ethertype, false).unwrap();
        assert_eq!((seen.src, seen.dst), (client, backend), "the endpoint sees its client");
        let mut reply = answer(&frame, 0);
        assert_eq!(depart(&there, &mut reply), Action::Deliver);
        assert_eq!(parse(&reply, ETHERNET, ethertype, false).unwrap().src, vip);
    }
}

/// A NodePort that endpoints answer directly, on a node with this address of its own.
fn node_port_world(v4: bool, own: NetAddr, flags: u32, here: bool) -> World {
    let mut world: World = world(v4, flags);
    with_table(&mut world, here);
    world.own = std::vec![own];
    let (addr, scope) = (if v4 { NetAddr::ANY_V4 } else { NetAddr::ANY_V6 }, FrontendKey::SCOPE_NODE);
    let key = FrontendKey { addr, port: NetPort::from_host(NODE_PORT), proto: TCP, scope };
    world.frontends.insert(key, FrontendValue { service: 1, flags });
    world
}

const NODE_PORT: u16 = 30001;

#[test]
fn a_node_port_is_answered_directly_where_all_nodes_know_the_address() {
    for v4 in [true, false] {
        let [client, other, backend, node] = addresses(v4);
        let original = build((client, 4000), (node, NODE_PORT), TCP, SYN, b"");
        let dialled = node_port_world(v4, node, FrontendValue::FLAG_DIRECT, false);
        // An address that other nodes do not know: they would send the packet back.
        assert_eq!(arrive(&dialled, &mut original.clone()), Action::Untracked);
        let mut dialled_shared = node_port_world(v4, node, FrontendValue::FLAG_DIRECT, false);
        dialled_shared.shared = std::vec![node, other];
        let mut frame = original.clone();
        assert_eq!(arrive(&dialled_shared, &mut frame), Action::Relay(Way { device: 9, via: backend }));
        check_sums(&frame);
        // The endpoint's node gets it with the other node's address.
        let mut there = node_port_world(v4, other, FrontendValue::FLAG_DIRECT, true);
        assert_eq!(arrive(&there, &mut frame.clone()), Action::Pass, "not known as a node's yet");
        there.shared = std::vec![node, other];
        assert_eq!(arrive(&there, &mut frame), Action::Deliver);
        let seen = parse(&frame, ETHERNET, ethertype(&client), false).unwrap();
        assert_eq!((seen.src, seen.dst), (client, backend), "the endpoint sees its client");
        let mut reply = answer(&frame, SYN | ACK);
        assert_eq!(depart(&there, &mut reply), Action::Deliver);
        check_sums(&reply);
        let told = parse(&reply, ETHERNET, ethertype(&client), false).unwrap();
        assert_eq!((told.src, told.src_port.to_host()), (node, NODE_PORT));
        // What is not answered directly stays the business of the node that it was sent to.
        let mut plain = node_port_world(v4, other, 0, true);
        plain.shared = std::vec![node, other];
        assert_eq!(arrive(&plain, &mut original.clone()), Action::Pass);
        // Nor does a node answer on an address of its own that was left out.
        let mut left_out = node_port_world(v4, node, FrontendValue::FLAG_DIRECT, false);
        left_out.own = Vec::new();
        assert_eq!(arrive(&left_out, &mut original.clone()), Action::Pass);
    }
}

#[test]
fn errors_of_the_nodes_own_stack_reach_who_sent_the_packet() {
    for v4 in [true, false] {
        let [client, vip, backend, node] = addresses(v4);
        let world: World = world(v4, 0);
        let mut frame = build((client, 4000), (vip, PORT), UDP, 0, b"too long");
        assert_eq!(arrive(&world, &mut frame), Action::Untracked);
        // The stack finds it too long for the way to the backend, and tells whom it comes from: the node.
        let mut error = error_about(&frame, node, v4);
        let ethertype = ethertype(&client);
        let to = |addr| Action::Relay(Way { device: 9, via: addr });
        assert_eq!(loopback(&mut error, &world, ETHERNET, ethertype), to(client));
        check_sums(&error);
        let outer = parse(&error, ETHERNET, ethertype, false).unwrap();
        let inner = parse(&error, outer.transport + 8, ethertype, true).unwrap();
        assert_eq!((outer.dst, inner.src, inner.dst), (client, client, vip));
        // The same about an answer on its way to the client, which says to come from the service.
        let mut reply = answer(&frame, 0);
        assert_eq!(arrive(&world, &mut reply), Action::Untracked);
        let mut error = error_about(&reply, node, v4);
        assert_eq!(depart(&world, &mut error), to(backend));
        check_sums(&error);
        let outer = parse(&error, ETHERNET, ethertype, false).unwrap();
        let inner = parse(&error, outer.transport + 8, ethertype, true).unwrap();
        assert_eq!((outer.dst, inner.src, inner.dst), (backend, backend, node));
        // What the node tells itself otherwise is its own business.
        let mut other = build((node, 1), (node, 2), UDP, 0, b"x");
        assert_eq!(loopback(&mut other, &world, ETHERNET, ethertype), Action::Pass);
    }
}

#[test]
fn one_client_port_may_dial_the_same_backend_by_two_addresses() {
    for local in [false, true] {
        let [client, vip, backend, _] = addresses(true);
        let mut world: World = world(true, if local { FrontendValue::FLAG_EXTERNAL_LOCAL } else { 0 });
        let other = NetAddr::from_v4_word(u32::from_ne_bytes([203, 0, 113, 11]));
        let key = FrontendKey { addr: other, port: NetPort::from_host(PORT), proto: TCP, scope: 0 };
        let value = world.frontends.values().next().copied().unwrap();
        world.frontends.insert(key, value);
        let dial = |to: NetAddr, flags: u8| {
            let mut frame = build((client, 4000), (to, PORT), TCP, flags, b"");
            assert_eq!(arrive(&world, &mut frame), rewritten(local));
            let seen = parse(&frame, ETHERNET, ETHERTYPE_V4, false).unwrap();
            assert_eq!(seen.dst, backend);
            frame
        };
        let first = dial(vip, SYN);
        dial(vip, ACK);
        let second = dial(other, SYN);
        dial(other, ACK);
        for (frame, dialled) in [(first, vip), (second, other)] {
            let mut reply = answer(&frame, ACK);
            let action = if local { depart(&world, &mut reply) } else { arrive(&world, &mut reply) };
            assert_eq!(action, rewritten(local));
            check_sums(&reply);
            let seen = parse(&reply, ETHERNET, ETHERTYPE_V4, false).unwrap();
            assert_eq!(
                (seen.src, seen.dst, seen.dst_port.to_host()),
                (dialled, client, 4000),
                "local {local}"
            );
        }
    }
}

#[test]
fn where_connection_tracking_sees_both_directions_it_keeps_them() {
    let [client, vip, ..] = addresses(true);
    let mut world: World = world(true, 0);
    world.tracked = true;
    let mut frame = build((client, 4000), (vip, PORT), TCP, SYN, b"");
    assert_eq!(arrive(&world, &mut frame), Action::Deliver);
    assert_eq!(arrive(&world, &mut answer(&frame, SYN | ACK)), Action::Deliver);
}

/// A service behind a port of the node.
fn with_node_port(world: &mut World, v4: bool) {
    let addr = if v4 { NetAddr::ANY_V4 } else { NetAddr::ANY_V6 };
    for proto in [TCP, UDP] {
        let key =
            FrontendKey { addr, port: NetPort::from_host(30000), proto, scope: FrontendKey::SCOPE_NODE };
        world.frontends.insert(key, FrontendValue { service: 1, flags: 0 });
    }
}

#[test]
fn answers_to_the_nodes_own_connections_are_its_own_whatever_their_port() {
    for (v4, proto) in [(true, TCP), (true, UDP), (false, TCP), (false, UDP)] {
        let [server, _, backend, node] = addresses(v4);
        let mut world: World = world(v4, 0);
        with_node_port(&mut world, v4);
        let dialled = build((node, 30000), (server, 443), proto, SYN, b"");
        let mut leaving = dialled.clone();
        assert_eq!((depart(&world, &mut leaving), &leaving), (Action::Pass, &dialled));
        for flags in [SYN | ACK, ACK, ACK | FIN] {
            let mut reply = answer(&dialled, flags);
            let unchanged = reply.clone();
            assert_eq!(
                (arrive(&world, &mut reply), reply),
                (Action::Pass, unchanged),
                "{v4} {proto} {flags}"
            );
        }
        // Another client, from the same place, and the same one as it begins a connection itself, are clients.
        let mut other = build((server, 444), (node, 30000), proto, SYN, b"");
        assert_eq!(arrive(&world, &mut other), Action::Untracked);
        if proto == UDP {
            world.now += DATAGRAM_IDLE_NS + 2;
        }
        let mut same = build((server, 443), (node, 30000), proto, SYN, b"");
        assert_eq!(arrive(&world, &mut same), Action::Untracked, "{v4} {proto}");
        assert_eq!(parse(&same, ETHERNET, ethertype(&node), false).unwrap().dst, backend);
        // What goes out to a client is no connection of the node's.
        let mut reply = answer(&same, SYN | ACK);
        assert_eq!(arrive(&world, &mut reply), Action::Untracked);
        assert_eq!(depart(&world, &mut reply), Action::Pass);
        let mut next = build((server, 443), (node, 30000), proto, ACK, b"");
        assert_eq!(arrive(&world, &mut next), Action::Untracked, "{v4} {proto}");
    }
}

#[test]
fn a_connection_to_what_took_a_services_port_is_left_to_it() {
    let [client, vip, ..] = addresses(true);
    let mut world: World = world(true, 0);
    let packet = |flags| build((client, 4000), (vip, PORT), TCP, flags, b"");
    for flags in [SYN, ACK, FIN | ACK] {
        assert_eq!(arrive(&world, &mut packet(flags)), Action::Untracked);
    }
    let frontends = std::mem::take(&mut world.frontends);
    assert_eq!(arrive(&world, &mut packet(ACK)), Action::Untracked, "a connection ends where it was");
    for flags in [SYN, ACK, ACK] {
        assert_eq!(arrive(&world, &mut packet(flags)), Action::Pass);
    }
    world.frontends = frontends;
    for flags in [SYN, ACK] {
        assert_eq!(arrive(&world, &mut packet(flags)), Action::Untracked, "the service is back");
    }
}
