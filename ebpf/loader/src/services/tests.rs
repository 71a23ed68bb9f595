//! The order of writes, proved by a memory that asks the programs' own decision after every single one of them.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ebpf_common::{AffinityKey, AffinityValue, Backend, NetAddr, NodeAddressUse, Protocol};
use ebpf_packet::{Caller, Destination, Tables, Verdict, resolve};
use proptest::prelude::*;

use super::*;
use crate::table::{DesiredBackend, DesiredFrontend, Family, Listen};

const CAPACITY: Capacity = Capacity { frontends: 64, services: 16, backends: 64, extent_words: 128 };

/// Maps as plain collections; after every write, the expectations are checked.
struct Fake {
    frontends: BTreeMap<FrontendKey, FrontendValue>,
    slots: Vec<ServiceSlot>,
    extents: Vec<u64>,
    backends: Vec<Backend>,
    bounds: NodePortBounds,
    names: BTreeMap<u32, String>,
    ranges: BTreeSet<(u32, (NetAddr, u8))>,
    writes: usize,
    /// Frontends that wait for the rest.
    collected: Option<Vec<(FrontendKey, FrontendValue)>>,
    /// There is no memory for this one.
    no_memory_for: Option<FrontendKey>,
    /// Frontends that must answer at every moment, and who may.
    expected: BTreeMap<FrontendKey, HashSet<SocketAddr>>,
}

impl Default for Fake {
    fn default() -> Self {
        Self {
            frontends: BTreeMap::new(),
            slots: vec![ServiceSlot::default(); 16],
            extents: vec![0; 128],
            backends: vec![Backend::default(); 64],
            bounds: NodePortBounds::NONE,
            names: BTreeMap::new(),
            ranges: BTreeSet::new(),
            writes: 0,
            collected: None,
            no_memory_for: None,
            expected: BTreeMap::new(),
        }
    }
}

impl Tables for Fake {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }
    fn service(&self, id: u32) -> Option<ServiceSlot> {
        self.slots.get(id as usize).copied()
    }
    fn extent_word(&self, index: u32) -> Option<u64> {
        self.extents.get(index as usize).copied()
    }
    fn backend(&self, id: u32) -> Option<&Backend> {
        self.backends.get(id as usize)
    }
    fn node_address(&self, _addr: &NetAddr) -> NodeAddressUse {
        NodeAddressUse(NodeAddressUse::OWN | NodeAddressUse::NODE_PORTS)
    }
    fn node_port_bounds(&self) -> NodePortBounds {
        self.bounds
    }
    fn affinity(&self, _key: &AffinityKey) -> Option<AffinityValue> {
        None
    }
    fn set_affinity(&self, _key: &AffinityKey, _value: &AffinityValue) {}
}

/// A caller whose next random word is set.
struct Client(u32);

impl Caller for Client {
    fn random(&self) -> u32 {
        self.0
    }
    fn in_host_netns(&self) -> bool {
        true
    }
    fn netns_cookie(&self) -> u64 {
        1
    }
    fn now_ns(&self) -> u64 {
        1
    }
    fn last_backend(&self, _dst: &Destination) -> Option<u32> {
        None
    }
}

impl Fake {
    /// Everybody who can answer this frontend now; `None` where it is refused or not a service.
    fn answers(&self, frontend: &FrontendKey) -> Option<HashSet<SocketAddr>> {
        let addr = match frontend.scope {
            FrontendKey::SCOPE_NODE => NetAddr::from(IpAddr::from([192, 0, 2, 1])),
            _ => frontend.addr,
        };
        let dst = Destination { addr, port: frontend.port, proto: Protocol::Tcp };
        let mut all = HashSet::new();
        for step in 0..16_u32 {
            match resolve(self, &Client(step << 28), &dst) {
                Verdict::Forward(target) => {
                    let ip = IpAddr::from(target.backend.addr);
                    all.insert(SocketAddr::new(ip, target.backend.port.to_host()));
                }
                Verdict::Pass | Verdict::Refuse(_) => return None,
            }
        }
        Some(all)
    }

    fn wrote(&mut self) {
        self.writes += 1;
        for (frontend, allowed) in &self.expected {
            let answers = self.answers(frontend);
            let answers = answers.unwrap_or_else(|| panic!("{} stopped answering", describe(frontend)));
            assert!(answers.is_subset(allowed), "{}: {answers:?} not in {allowed:?}", describe(frontend));
        }
    }
}

impl Memory for Fake {
    fn publish_slot(&mut self, service: u32, slot: ServiceSlot) {
        self.slots[service as usize] = slot;
        self.wrote();
    }
    fn slot(&self, service: u32) -> ServiceSlot {
        self.slots[service as usize]
    }
    fn write_extent_word(&mut self, index: u32, word: u64) {
        self.extents[index as usize] = word;
        self.wrote();
    }
    fn extent_word(&self, index: u32) -> u64 {
        self.extents[index as usize]
    }
    fn write_backend(&mut self, id: u32, backend: Backend) {
        self.backends[id as usize] = backend;
        self.wrote();
    }
    fn backend(&self, id: u32) -> Backend {
        self.backends[id as usize]
    }
    fn insert_frontend(&mut self, key: FrontendKey, value: FrontendValue) -> Result<(), MemoryError> {
        if let Some(collected) = &mut self.collected {
            collected.push((key, value));
            return Ok(());
        }
        if self.no_memory_for == Some(key) {
            let source = aya::maps::MapError::OutOfBounds { index: 0, max_entries: 0 };
            return Err(MemoryError::WriteFrontend { frontend: describe(&key), source });
        }
        self.frontends.insert(key, value);
        self.wrote();
        Ok(())
    }
    fn remove_frontend(&mut self, key: FrontendKey) -> Result<(), MemoryError> {
        self.frontends.remove(&key);
        self.wrote();
        Ok(())
    }
    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MemoryError> {
        Ok(self.frontends.iter().map(|(key, value)| (*key, *value)).collect())
    }
    fn collect(&mut self) {
        self.collected = Some(Vec::new());
    }
    fn flush(&mut self) -> Vec<Unwritten> {
        let collected = self.collected.take().unwrap_or_default();
        let refused = collected.into_iter().filter_map(|(key, value)| {
            let why = self.insert_frontend(key, value).err()?;
            Some(Unwritten { service: value.service, frontend: key, why })
        });
        refused.collect()
    }
    fn write_name(&mut self, service: u32, name: &str) -> Result<(), MemoryError> {
        self.names.insert(service, name.to_owned());
        Ok(())
    }
    fn remove_name(&mut self, service: u32) -> Result<(), MemoryError> {
        self.names.remove(&service);
        Ok(())
    }
    fn name(&self, service: u32) -> Option<String> {
        self.names.get(&service).cloned()
    }
    fn insert_range(&mut self, service: u32, range: (NetAddr, u8)) -> Result<(), MemoryError> {
        self.ranges.insert((service, range));
        Ok(())
    }
    fn remove_range(&mut self, service: u32, range: (NetAddr, u8)) -> Result<(), MemoryError> {
        self.ranges.remove(&(service, range));
        Ok(())
    }
    fn ranges(&self) -> Vec<(u32, (NetAddr, u8))> {
        self.ranges.iter().copied().collect()
    }
    fn publish_node_ports(&mut self, bounds: NodePortBounds) {
        self.bounds = bounds;
        self.wrote();
    }
    fn wait_for_readers(&self) {}
}

/// A service on 10.96.0.N:80, and on a NodePort where `node` says so, with these backends.
fn service(n: u8, node: bool, backends: &[u8]) -> DesiredService {
    let frontend = |listen, port| DesiredFrontend::new(listen, port, Protocol::Tcp);
    let mut frontends = vec![frontend(Listen::Address([10, 96, 0, n].into()), 80)];
    if node {
        frontends.push(frontend(Listen::Node(Family::V4), 30_000 + u16::from(n)));
    }
    let backend = |last: &u8| {
        let place = if last.is_multiple_of(3) { Place::Local } else { Place::Far };
        DesiredBackend { place, address: SocketAddr::from(([10, 244, n, *last], 8080)) }
    };
    DesiredService {
        frontends,
        backends: backends.iter().map(backend).collect(),
        ..DesiredService::default()
    }
}

fn key(n: u8) -> ServiceKey {
    ServiceKey(format!("s{n}"))
}

fn answering(table: &ServiceTable) -> BTreeMap<FrontendKey, HashSet<SocketAddr>> {
    let mut all = BTreeMap::new();
    for desired in table.values().filter(|desired| !desired.backends.is_empty()) {
        for frontend in &desired.frontends {
            all.insert(frontend.key(), desired.backends.iter().map(|backend| backend.address).collect());
        }
    }
    all
}

/// What must hold during a change: whoever answered before and will answer after answers throughout, from either.
fn expect_between(memory: &mut Fake, before: &ServiceTable, after: &ServiceTable) {
    let (old, new) = (answering(before), answering(after));
    memory.expected = old
        .iter()
        .filter_map(|(frontend, a)| new.get(frontend).map(|b| (*frontend, a.union(b).copied().collect())))
        .collect();
}

fn expect_exactly(memory: &Fake, table: &ServiceTable) {
    let wanted: BTreeSet<FrontendKey> =
        table.values().flat_map(|desired| desired.frontends.iter().map(DesiredFrontend::key)).collect();
    assert_eq!(memory.frontends.keys().copied().collect::<BTreeSet<_>>(), wanted);
    for (frontend, backends) in answering(table) {
        assert_eq!(memory.answers(&frontend), Some(backends), "{}", describe(&frontend));
    }
}

fn arbitrary_service() -> impl Strategy<Value = (u8, bool, Vec<u8>)> {
    (0_u8..6, any::<bool>(), prop::collection::vec(0_u8..8, 0..5))
}

proptest! {
    #[test]
    fn no_reader_ever_meets_a_half_made_service(
        steps in prop::collection::vec((0_u8..8, arbitrary_service(), any::<bool>()), 1..60),
    ) {
        let mut memory = Fake::default();
        let mut services = Services::restore(&mut memory, CAPACITY).unwrap();
        let mut table = ServiceTable::new();
        let mut now = Instant::now();
        for (what, (n, node, mut backends), tick) in steps {
            backends.sort_unstable();
            backends.dedup();
            let before = table.clone();
            if tick {
                now += Duration::from_secs(3);
            }
            if what == 0 {
                table.remove(&key(n));
            } else {
                table.insert(key(n), service(n, node, &backends));
            }
            expect_between(&mut memory, &before, &table);
            let report = match what {
                0 => services.apply(&mut memory, &[Change::Remove(key(n))], now),
                1 => {
                    // A restart: everything known is read back from the maps.
                    services = Services::restore(&mut memory, CAPACITY).unwrap();
                    services.replace_all(&mut memory, &table, now)
                }
                _ => services.apply(&mut memory, &[Change::Upsert(key(n), table[&key(n)].clone())], now),
            };
            prop_assert!(report.refused.is_empty(), "{:?}", report.refused);
            expect_exactly(&memory, &table);
        }
        let used: usize = table.values().map(|desired| desired.frontends.len()).sum();
        prop_assert_eq!(services.room.frontends_used as usize, used);
    }
}

#[test]
fn the_same_table_again_writes_nothing_to_services() {
    let mut memory = Fake::default();
    let mut services = Services::restore(&mut memory, CAPACITY).unwrap();
    let table = ServiceTable::from([(key(1), service(1, true, &[1, 2])), (key(2), service(2, false, &[]))]);
    services.replace_all(&mut memory, &table, Instant::now());
    let before = memory.writes;
    let report = services.replace_all(&mut memory, &table, Instant::now());
    assert_eq!((report.unchanged, report.written, report.removed), (2, 0, 0));
    assert_eq!(memory.writes, before + 1, "the NodePort bounds alone are stored again");
    let mut again = Services::restore(&mut memory, CAPACITY).unwrap();
    let (slots, backends) = (memory.slots.clone(), memory.backends.clone());
    again.replace_all(&mut memory, &table, Instant::now());
    assert_eq!((&memory.slots, &memory.backends), (&slots, &backends), "a restart renumbers nothing");
}

#[test]
fn a_second_owner_of_a_frontend_waits_and_takes_over() {
    let mut memory = Fake::default();
    let mut services = Services::restore(&mut memory, CAPACITY).unwrap();
    let now = Instant::now();
    services.apply(&mut memory, &[Change::Upsert(key(1), service(1, true, &[1]))], now);
    let mut rival = service(2, false, &[2]);
    rival.frontends.push(service(1, true, &[]).frontends[1].clone());
    let report = services.apply(&mut memory, &[Change::Upsert(key(2), rival.clone())], now);
    assert_eq!(report.refused[0].1.to_string(), "node:30001/TCP belongs to service s1 already");
    assert!(memory.answers(&rival.frontends[0].key()).is_some(), "its own address works meanwhile");
    let report = services.apply(&mut memory, &[Change::Remove(key(1))], now);
    assert!(report.refused.is_empty());
    assert_eq!(memory.answers(&rival.frontends[1].key()), Some(HashSet::from([rival.backends[0].address])));
}

#[test]
fn nonsense_in_the_maps_is_survived() {
    let mut memory = Fake::default();
    let good = service(1, false, &[1, 2]);
    let table = ServiceTable::from([(key(1), good.clone())]);
    Services::restore(&mut memory, CAPACITY).unwrap().replace_all(&mut memory, &table, Instant::now());
    let id = memory.frontends[&good.frontends[0].key()].service;
    for slot in [ServiceSlot::new(u32::MAX, 7), ServiceSlot::new(127, 0)] {
        memory.slots[id as usize] = slot;
        memory.extents[127] = u64::MAX;
        let stray = service(3, false, &[]).frontends[0].key();
        memory.frontends.insert(stray, FrontendValue { service: 9999, flags: 0 });
        let mut services = Services::restore(&mut memory, CAPACITY).unwrap();
        services.replace_all(&mut memory, &table, Instant::now());
        expect_exactly(&memory, &table);
    }
}

#[test]
fn an_update_that_does_not_fit_leaves_the_old_one_answering() {
    let mut memory = Fake::default();
    let capacity = Capacity { backends: 4, ..CAPACITY };
    let mut services = Services::restore(&mut memory, capacity).unwrap();
    let old = service(1, false, &[1, 2]);
    services.apply(&mut memory, &[Change::Upsert(key(1), old.clone())], Instant::now());
    let report = services.apply(
        &mut memory,
        &[Change::Upsert(key(1), service(1, false, &[3, 4, 5, 6]))],
        Instant::now(),
    );
    assert_eq!(report.refused[0].1.to_string(), "no room for 1 more backends: 0 of 4 are free");
    let answers = memory.answers(&old.frontends[0].key()).unwrap();
    assert_eq!(answers, old.backends.iter().map(|backend| backend.address).collect());
}

#[test]
fn what_the_kernel_has_no_memory_for_waits_and_the_rest_answers() {
    let mut memory = Fake::default();
    let mut services = Services::restore(&mut memory, CAPACITY).unwrap();
    let (now, one, two) = (Instant::now(), service(1, true, &[1]), service(2, false, &[2]));
    let table = ServiceTable::from([(key(1), one.clone()), (key(2), two.clone())]);
    memory.no_memory_for = Some(one.frontends[0].key());
    let report = services.replace_all(&mut memory, &table, now);
    assert_eq!((report.refused.len(), report.written, services.waiting()), (1, 1, 1), "{:?}", report.refused);
    assert_eq!(report.refused[0].0, key(1));
    for frontend in [one.frontends[1].key(), two.frontends[0].key()] {
        assert!(memory.answers(&frontend).is_some(), "{}", describe(&frontend));
    }
    memory.no_memory_for = None;
    let report = services.apply(&mut memory, &[Change::Remove(key(2))], now);
    assert!(report.refused.is_empty(), "{:?}", report.refused);
    expect_exactly(&memory, &ServiceTable::from([(key(1), one)]));
    assert_eq!((services.room.frontends_used, services.waiting()), (2, 0));
}
