//! What is routed loses a hop and nothing else; what the stack would answer, or somebody else has to see, is left as it is.

use std::{cell::RefCell, collections::HashMap, vec, vec::Vec};

use ebpf_common::{FarPod, NetAddr, PodRouter};

use super::*;
use crate::external::tests::{Frame, build, check_sums, ethertype};

const LINK: u32 = 5;
const TUNNEL: u32 = 9;
const POD: FarPod = FarPod { link: LINK, mac: [2, 0, 0, 0, 0, 5] };

fn v4(last: [u8; 4]) -> NetAddr {
    NetAddr::from_v4_word(u32::from_ne_bytes(last))
}

fn v6(last: u16) -> NetAddr {
    NetAddr::from_octets(std::net::Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, last).octets())
}

/// One pod of both families, and the pods of another node.
struct Node {
    pods: RefCell<HashMap<NetAddr, FarPod>>,
    far: Vec<NetAddr>,
    via: NetAddr,
}

impl Node {
    fn new() -> Self {
        let pods = [v4([10, 244, 0, 5]), v6(5)].map(|address| (address, POD));
        let far = vec![v4([10, 244, 1, 7]), v6(0x107)];
        Self { pods: RefCell::new(pods.into()), far, via: v4([10, 244, 1, 0]) }
    }
}

impl FarTables for Node {
    fn router(&self) -> Option<PodRouter> {
        Some(router())
    }
    fn pod(&self, address: &NetAddr) -> Option<FarPod> {
        self.pods.borrow().get(address).copied()
    }
    fn route(&self, to: &NetAddr) -> Option<(Way, u32)> {
        let device = if self.far.contains(to) { TUNNEL } else { 2 };
        Some((Way { device, via: self.via }, 1450))
    }
    fn forget(&self, address: &NetAddr) {
        self.pods.borrow_mut().remove(address);
    }
}

fn router() -> PodRouter {
    PodRouter { tunnel: TUNNEL, mtu: 1450, mac: [2; 6], padding: [0; 2] }
}

/// A packet between the pod and one of another node, in both families.
fn packets(proto: u8, out: bool) -> [(Frame, u16); 2] {
    [(v4([10, 244, 0, 5]), v4([10, 244, 1, 7])), (v6(5), v6(0x107))].map(|(here, there)| {
        let (src, dst) = if out { (here, there) } else { (there, here) };
        (build((src, 4000), (dst, 80), proto, 0x10, b"some bytes"), ethertype(&src))
    })
}

fn hops(frame: &Frame, kind: u16) -> u8 {
    frame.0[if kind == crate::ETHERTYPE_V4 { 22 } else { 21 }]
}

fn go_out(node: &Node, frame: &mut Frame, kind: u16, link: u32, segment: u32) -> Option<Way> {
    to_far_pod(frame, node, &router(), kind, link, segment)
}

#[test]
fn both_ways_take_a_hop_and_nothing_else() {
    let node = Node::new();
    for proto in [TCP, UDP] {
        for (before, kind) in packets(proto, true) {
            let mut frame = before.clone();
            let way = go_out(&node, &mut frame, kind, LINK, 0).expect("it is routed");
            assert_eq!(way, Way { device: TUNNEL, via: node.via });
            check_sums(&frame);
            assert_eq!(hops(&frame, kind), hops(&before, kind) - 1);
            let changed = frame.0.iter().zip(&before.0).filter(|(new, old)| new != old).count();
            assert!(changed <= 3, "the hops and a checksum");
        }
        for (mut frame, kind) in packets(proto, false) {
            let hops_before = hops(&frame, kind);
            assert_eq!(from_far_pod(&mut frame, &node, &router(), kind, 0), Some(POD));
            check_sums(&frame);
            assert_eq!(hops(&frame, kind), hops_before - 1);
        }
    }
}

#[test]
fn what_the_stack_would_answer_is_left_to_it() {
    type Change = fn(&mut Frame, u16);
    let changes: [(Change, &str); 2] = [
        (|frame, kind| frame.0[if kind == crate::ETHERTYPE_V4 { 22 } else { 21 }] = 1, "no hop is left"),
        (
            |frame, kind| {
                let at = if kind == crate::ETHERTYPE_V4 { 16 } else { 18 };
                frame.0[at..at + 2].copy_from_slice(&1451_u16.to_be_bytes());
            },
            "too long",
        ),
    ];
    for (change, what) in changes {
        let node = Node::new();
        for (mut frame, kind) in packets(TCP, true) {
            change(&mut frame, kind);
            let before = frame.clone();
            assert_eq!(go_out(&node, &mut frame, kind, LINK, 0), None, "{what}");
            assert_eq!(frame, before, "{what}: unchanged");
        }
        for (mut frame, kind) in packets(TCP, false) {
            change(&mut frame, kind);
            let before = frame.clone();
            assert_eq!(from_far_pod(&mut frame, &node, &router(), kind, 0), None, "{what}");
            assert_eq!(frame, before, "{what}: unchanged");
        }
    }
}

#[test]
fn headers_that_routers_read_are_left_to_the_stack() {
    let node = Node::new();
    let [(mut frame, kind), (mut six, kind_six)] = packets(UDP, true);
    // An IPv4 header with one word of options (no operations), its own sum left wrong: nobody looks at it.
    frame.0[14] = 0x46;
    frame.0.splice(34..34, [1, 1, 1, 1]);
    assert_eq!(go_out(&node, &mut frame, kind, LINK, 0), None);
    // Options for every hop.
    six.0.splice(54..54, [UDP, 0, 1, 4, 0, 0, 0, 0]);
    six.0[20] = 0;
    assert_eq!(go_out(&node, &mut six, kind_six, LINK, 0), None);
}

#[test]
fn a_large_packet_is_judged_by_its_segments() {
    let node = Node::new();
    for (frame, kind) in packets(TCP, true) {
        let header = if kind == crate::ETHERTYPE_V4 { 20 } else { 40 };
        let fits = 1450 - header - 20;
        let mut large = frame.clone();
        // What the header says of the whole does not matter then.
        let at = if kind == crate::ETHERTYPE_V4 { 16 } else { 18 };
        large.0[at..at + 2].copy_from_slice(&60000_u16.to_be_bytes());
        assert!(go_out(&node, &mut large.clone(), kind, LINK, fits).is_some());
        assert_eq!(go_out(&node, &mut large, kind, LINK, fits + 1), None);
    }
}

#[test]
fn an_address_that_another_pod_uses_is_forgotten() {
    for (mut frame, kind) in packets(UDP, true) {
        let node = Node::new();
        assert_eq!(go_out(&node, &mut frame, kind, LINK + 1, 0), None);
        assert_eq!(go_out(&node, &mut frame, kind, LINK, 0), None, "nobody has it now");
        assert_eq!(node.pods.borrow().len(), 1, "the other family's is not concerned");
    }
}

#[test]
fn only_what_is_between_pods_takes_the_tunnel() {
    let mut node = Node::new();
    node.far.clear();
    for (mut frame, kind) in packets(TCP, true) {
        assert_eq!(go_out(&node, &mut frame, kind, LINK, 0), None, "it leads elsewhere");
    }
    for (mut frame, kind) in packets(TCP, false) {
        assert_eq!(from_far_pod(&mut frame, &node, &router(), kind, 0), None, "the sender is elsewhere");
    }
    let node = Node { via: NetAddr::ANY_V6, ..Node::new() };
    for (mut frame, kind) in packets(TCP, true) {
        assert_eq!(go_out(&node, &mut frame, kind, LINK, 0), None, "no node takes it");
    }
    let node = Node::new();
    node.pods.borrow_mut().clear();
    for (mut frame, kind) in packets(TCP, false) {
        assert_eq!(from_far_pod(&mut frame, &node, &router(), kind, 0), None, "no pod of ours");
    }
}
