//! Scenario tables of the decision: who is dialled, who answers.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet, HashMap},
    vec::Vec,
};

use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct World {
    frontends: BTreeMap<FrontendKey, FrontendValue>,
    services: BTreeMap<u32, ServiceSlot>,
    extents: Vec<u64>,
    backends: BTreeMap<u32, Backend>,
    node_addresses: BTreeMap<NetAddr, u32>,
    affinity: RefCell<HashMap<AffinityKey, AffinityValue>>,
}

struct Pod {
    host: bool,
    cookie: u64,
    now: u64,
    random: Cell<u32>,
    last_backend: Option<u32>,
}

impl Tables for World {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }
    fn service(&self, id: u32) -> Option<ServiceSlot> {
        self.services.get(&id).copied()
    }
    fn extent_word(&self, index: u32) -> Option<u64> {
        self.extents.get(index as usize).copied()
    }
    fn backend(&self, id: u32) -> Option<&Backend> {
        self.backends.get(&id)
    }
    fn node_address(&self, addr: &NetAddr) -> NodeAddressUse {
        NodeAddressUse(self.node_addresses.get(addr).copied().unwrap_or_default())
    }
    fn node_port_bounds(&self) -> NodePortBounds {
        NodePortBounds::new(30000, 30010)
    }
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.borrow().get(key).copied()
    }
    fn set_affinity(&self, key: &AffinityKey, value: &AffinityValue) {
        self.affinity.borrow_mut().insert(*key, *value);
    }
}

impl Caller for Pod {
    fn random(&self) -> u32 {
        // Steps of the golden ratio walk the whole range evenly.
        self.random.set(self.random.get().wrapping_add(0x9e37_79b9));
        self.random.get()
    }
    fn in_host_netns(&self) -> bool {
        self.host
    }
    fn netns_cookie(&self) -> u64 {
        self.cookie
    }
    fn now_ns(&self) -> u64 {
        self.now
    }
    fn last_backend(&self, _dst: &Destination) -> Option<u32> {
        self.last_backend
    }
}

fn v4(text: [u8; 4]) -> NetAddr {
    NetAddr::from_v4_word(u32::from_ne_bytes(text))
}

const VIP: [u8; 4] = [10, 96, 0, 5];
const NODE: [u8; 4] = [192, 0, 2, 10];

/// One service of id 7 on VIP:80 and NodePort 30000 with `backends` ids 1.., the first `local` of them local.
fn world(backends: u16, local: u16, flags: u32, affinity_secs: u32) -> World {
    let mut world = World::default();
    let value = FrontendValue { service: 7, flags };
    let key = FrontendKey { addr: v4(VIP), port: NetPort::from_host(80), proto: 6, scope: 0 };
    world.frontends.insert(key, value);
    let key = FrontendKey { addr: NetAddr::ANY_V4, port: NetPort::from_host(30000), proto: 6, scope: 1 };
    world.frontends.insert(key, value);
    for addr in [v4(NODE), NetAddr::LOOPBACK_V4, NetAddr::LOOPBACK_V6] {
        world.node_addresses.insert(addr, NodeAddressUse::OWN | NodeAddressUse::NODE_PORTS);
    }
    world.extents = std::vec![0, ExtentHeader::new(backends, local, 0).0];
    for id in 1..=backends {
        let mut flags = Backend::FLAG_CLUSTER;
        if id <= local {
            flags |= Backend::FLAG_LOCAL;
        }
        let addr = v4([10, 244, 0, id.to_le_bytes()[0]]);
        let backend = Backend { addr, port: NetPort::from_host(8080), flags, service: 7 };
        world.backends.insert(u32::from(id), backend);
        world.extents.push(u64::from(id));
    }
    let extent = u32::from(backends > 0);
    world.services.insert(7, ServiceSlot::new(extent, affinity_secs));
    world
}

fn pod() -> Pod {
    Pod { host: false, cookie: 42, now: 1_000_000_000_000, random: Cell::new(0), last_backend: None }
}

fn dial(addr: [u8; 4], port: u16) -> Destination {
    Destination { addr: v4(addr), port: NetPort::from_host(port), proto: Protocol::Tcp }
}

/// The answer in one word: "pass", "refuse" or the backend's id.
fn answer(world: &World, pod: &Pod, dst: &Destination) -> std::string::String {
    match resolve(world, pod, dst) {
        Verdict::Pass => "pass".into(),
        Verdict::Refuse(_) => "refuse".into(),
        Verdict::Forward(target) => std::format!("{}", target.backend_id),
    }
}

#[track_caller]
fn check(world: &World, pod: &Pod, dst: &Destination, expected: &str) {
    assert_eq!(answer(world, pod, dst), expected, "{dst:?}");
}

#[test]
fn who_reaches_what() {
    let one = world(1, 1, 0, 0);
    let host = Pod { host: true, ..pod() };
    check(&one, &pod(), &dial(VIP, 80), "1");
    check(&one, &pod(), &dial(VIP, 81), "pass");
    check(&one, &pod(), &dial([10, 244, 0, 1], 8080), "pass");
    check(&one, &pod(), &dial(NODE, 30000), "1");
    check(&one, &host, &dial(NODE, 30000), "1");
    check(&one, &host, &dial([127, 0, 0, 1], 30000), "1");
    check(&one, &host, &dial([127, 1, 2, 3], 30000), "1");
    check(&one, &pod(), &dial([127, 0, 0, 1], 30000), "pass");
    check(&one, &pod(), &dial([192, 0, 2, 11], 30000), "pass");
    check(&one, &host, &dial(NODE, 80), "pass");
    check(&one, &pod(), &Destination { proto: Protocol::Udp, ..dial(VIP, 80) }, "pass");
    let v6_loopback = NetAddr::from_octets([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    check(&one, &host, &Destination { addr: v6_loopback, ..dial(NODE, 30000) }, "pass");
}

#[test]
fn no_endpoints_refuses_instead_of_timing_out() {
    check(&world(0, 0, 0, 0), &pod(), &dial(VIP, 80), "refuse");
    check(&world(3, 0, FrontendValue::FLAG_LOCAL, 0), &pod(), &dial(VIP, 80), "refuse");
}

#[test]
fn each_policy_meets_its_own_backends_only() {
    let pod = pod();
    let local = world(5, 2, FrontendValue::FLAG_LOCAL, 0);
    for _ in 0..100 {
        assert!(["1", "2"].contains(&answer(&local, &pod, &dial(VIP, 80)).as_str()));
    }
    // Backends 1 and 2 are draining on this node: policy Local still uses them, policy Cluster the others.
    let mut draining = world(5, 2, 0, 0);
    draining.extents[1] = ExtentHeader::new(5, 2, 2).0;
    for _ in 0..100 {
        assert!(["3", "4", "5"].contains(&answer(&draining, &pod, &dial(VIP, 80)).as_str()));
    }
    for value in draining.frontends.values_mut() {
        value.flags = FrontendValue::FLAG_LOCAL;
    }
    for _ in 0..100 {
        assert!(["1", "2"].contains(&answer(&draining, &pod, &dial(VIP, 80)).as_str()));
    }
}

#[test]
fn a_guarded_address_is_followed_only_where_it_is_the_nodes() {
    let mut guarded = world(1, 0, FrontendValue::FLAG_GUARDED, 0);
    check(&guarded, &pod(), &dial(VIP, 80), "pass");
    guarded.node_addresses.insert(v4(VIP), NodeAddressUse::OWN);
    check(&guarded, &pod(), &dial(VIP, 80), "1");
}

#[test]
fn node_ports_are_reserved_on_the_addresses_that_serve_them() {
    let one = world(1, 1, 0, 0);
    let reserved =
        |addr: NetAddr, port: u16, proto| is_reserved(&one, &addr, NetPort::from_host(port), proto);
    for addr in [NetAddr::ANY_V4, NetAddr::ANY_V6, v4(NODE), v4([127, 0, 0, 1]), v4([127, 0, 0, 9])] {
        assert!(reserved(addr, 30000, Protocol::Tcp), "{addr:?}");
    }
    assert!(!reserved(v4([192, 0, 2, 99]), 30000, Protocol::Tcp), "not the node's");
    assert!(!reserved(NetAddr::LOOPBACK_V6, 30000, Protocol::Tcp), "the service is of the other family");
    assert!(!reserved(NetAddr::ANY_V4, 30000, Protocol::Udp));
    assert!(!reserved(NetAddr::ANY_V4, 30001, Protocol::Tcp));
}

#[test]
fn affinity_keeps_the_backend_until_it_expires_or_goes() {
    let mut world = world(5, 0, 0, 60);
    let mut pod = pod();
    let first = answer(&world, &pod, &dial(VIP, 80));
    for _ in 0..50 {
        check(&world, &pod, &dial(VIP, 80), &first);
    }
    let id: u32 = first.parse().unwrap();
    pod.now += 61 * NANOS_PER_SEC;
    let after: BTreeSet<_> = (0..50)
        .map(|_| {
            pod.now += 61 * NANOS_PER_SEC;
            answer(&world, &pod, &dial(VIP, 80))
        })
        .collect();
    assert!(after.len() > 1, "an expired entry binds nobody");
    world.affinity.borrow_mut().clear();
    world.set_affinity(
        &AffinityKey::pod(42, 7),
        &AffinityValue { last_used_ns: pod.now, backend_id: id, padding: 0 },
    );
    world.backends.get_mut(&id).unwrap().flags = 0;
    world.extents = std::vec![0, ExtentHeader::new(1, 0, 0).0, if id == 1 { 2 } else { 1 }];
    assert_ne!(answer(&world, &pod, &dial(VIP, 80)), first, "a removed backend gets no new client");
}

#[test]
fn a_datagram_stays_with_its_backend_only_while_that_one_lives() {
    let mut world = world(3, 0, 0, 0);
    let socket = Pod { last_backend: Some(3), ..pod() };
    assert_eq!(answer(&world, &socket, &dial(VIP, 80)), "3");
    world.backends.get_mut(&3).unwrap().flags = 0;
    world.extents[1] = ExtentHeader::new(2, 0, 0).0;
    assert_ne!(answer(&world, &socket, &dial(VIP, 80)), "3");
    world.backends.get_mut(&3).unwrap().flags = Backend::FLAG_CLUSTER;
    world.backends.get_mut(&3).unwrap().service = 8;
    assert_ne!(answer(&world, &socket, &dial(VIP, 80)), "3", "an id reused by another service");
}

proptest! {
    #[test]
    fn every_choice_is_a_backend_of_the_service(backends in 1_u16..200, local in 0_u16..200, seed: u32, flags in 0_u32..2) {
        let local = local.min(backends);
        let world = world(backends, local, flags, 0);
        let pod = Pod { random: Cell::new(seed), ..pod() };
        match resolve(&world, &pod, &dial(VIP, 80)) {
            Verdict::Pass => prop_assert!(false, "a service is never passed through"),
            Verdict::Refuse(_) => prop_assert!(flags & FrontendValue::FLAG_LOCAL != 0 && local == 0),
            Verdict::Forward(target) => {
                prop_assert_eq!(target.backend.service, 7);
                if flags & FrontendValue::FLAG_LOCAL != 0 {
                    prop_assert!(target.backend.flags & Backend::FLAG_LOCAL != 0);
                }
            }
        }
    }

    #[test]
    fn random_choice_spreads_evenly(backends in 1_u16..20) {
        let world = world(backends, 0, 0, 0);
        let pod = pod();
        let mut hits = BTreeMap::<_, u32>::new();
        for _ in 0..2000 {
            *hits.entry(answer(&world, &pod, &dial(VIP, 80))).or_default() += 1;
        }
        let expected = 2000 / u32::from(backends);
        for (id, n) in hits {
            prop_assert!(n > expected / 2 && n < expected * 2, "backend {} answered {} of 2000", id, n);
        }
    }
}
