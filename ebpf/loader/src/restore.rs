//! Reads back, after a restart, which services the maps hold. Ids live in the maps alone, so a new process finds the
//! old ones instead of renumbering what clients are using.
//!
//! Trusts nothing it reads: an extent or backend that lies outside its array, or is claimed twice, is ignored, and
//! its service is written anew.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ebpf_common::{ExtentHeader, FrontendKey, NetAddr};

use crate::{
    alloc::Range,
    known::{HeldBackend, Known, place},
    memory::{Memory, MemoryError},
    room::{BackendKey, Room},
    table::ServiceKey,
};

/// Services found in the maps whose name is not known yet. They keep answering until claimed or removed.
#[derive(Debug, Default)]
pub(crate) struct Orphans {
    by_id: BTreeMap<u32, Known>,
    by_frontend: HashMap<FrontendKey, u32>,
    /// How many of these frontends are on each NodePort.
    node_ports: BTreeMap<u16, usize>,
}

impl Orphans {
    /// Reads all services that a frontend leads to, and takes their room.
    pub(crate) fn read<M: Memory>(memory: &mut M, room: &mut Room) -> Result<Self, MemoryError> {
        let mut orphans = Self::default();
        let mut frontends: BTreeMap<u32, Vec<(FrontendKey, u32)>> = BTreeMap::new();
        for (frontend, value) in memory.frontends()? {
            if value.service == 0 || value.service >= room.services.capacity() {
                memory.remove_frontend(frontend)?;
                continue;
            }
            room.frontends_used += 1;
            frontends.entry(value.service).or_default().push((frontend, value.flags));
            orphans.by_frontend.insert(frontend, value.service);
            if frontend.scope == FrontendKey::SCOPE_NODE {
                *orphans.node_ports.entry(frontend.port.to_host()).or_default() += 1;
            }
        }
        let mut ranges: BTreeMap<u32, BTreeSet<(NetAddr, u8)>> = BTreeMap::new();
        for (service, range) in memory.ranges() {
            if frontends.contains_key(&service) {
                ranges.entry(service).or_default().insert(range);
                room.ranges_used += 1;
            } else {
                memory.remove_range(service, range)?;
            }
        }
        for (id, mut frontends) in frontends {
            frontends.sort_unstable();
            let ranges = ranges.remove(&id).unwrap_or_default().into_iter().collect();
            let known = Known { id, frontends: frontends.into(), ranges, ..Known::default() };
            orphans.by_id.insert(id, known);
        }
        for (id, known) in &mut orphans.by_id {
            room.services.reserve(Range { start: *id, len: 1 });
            read_service(memory, room, known);
        }
        Ok(orphans)
    }

    /// Hands out the service that answers one of these frontends.
    pub(crate) fn claim<'f>(
        &mut self,
        mut frontends: impl Iterator<Item = &'f FrontendKey>,
    ) -> Option<Known> {
        let id = frontends.find_map(|frontend| self.by_frontend.get(frontend).copied())?;
        let known = self.by_id.remove(&id)?;
        for (frontend, _) in &*known.frontends {
            self.forget(frontend);
        }
        Some(known)
    }

    /// Takes a frontend away from its service, because another one has it now. True where it had one.
    pub(crate) fn release(&mut self, frontend: &FrontendKey) -> bool {
        let Some(id) = self.forget(frontend) else {
            return false;
        };
        let Some(known) = self.by_id.get_mut(&id) else {
            return false;
        };
        let before = known.frontends.len();
        known.frontends = known.frontends.iter().copied().filter(|(other, _)| other != frontend).collect();
        known.frontends.len() < before
    }

    /// Which of these services are among them, by their names.
    pub(crate) fn named<M: Memory>(&self, memory: &M, keys: &BTreeSet<ServiceKey>) -> BTreeSet<ServiceKey> {
        if keys.is_empty() {
            return BTreeSet::new();
        }
        let names = self.by_id.keys().filter_map(|id| memory.name(*id).map(ServiceKey));
        names.filter(|name| keys.contains(name)).collect()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// The lowest and the highest NodePort of services that nobody has claimed.
    pub(crate) fn node_port_ends(&self) -> impl Iterator<Item = u16> + use<> {
        let ends = (self.node_ports.first_key_value(), self.node_ports.last_key_value());
        [ends.0, ends.1].map(|end| end.map(|(port, _)| *port)).into_iter().flatten()
    }

    fn forget(&mut self, frontend: &FrontendKey) -> Option<u32> {
        let service = self.by_frontend.remove(frontend)?;
        if frontend.scope == FrontendKey::SCOPE_NODE
            && let Some(uses) = self.node_ports.get_mut(&frontend.port.to_host())
        {
            *uses -= 1;
            if *uses == 0 {
                self.node_ports.remove(&frontend.port.to_host());
            }
        }
        Some(service)
    }

    /// Those that nobody claimed.
    pub(crate) fn into_iter(self) -> impl Iterator<Item = Known> {
        self.by_id.into_values()
    }
}

/// Reads a service's extent and backends, as far as they make sense.
fn read_service<M: Memory>(memory: &M, room: &mut Room, known: &mut Known) {
    let slot = memory.slot(known.id);
    let start = slot.extent();
    if start == 0 || start >= room.extents.capacity() {
        return;
    }
    let header = ExtentHeader(memory.extent_word(start));
    let extent = Range { start, len: header.words() };
    if !room.extents.reserve(extent) {
        return;
    }
    known.slot = slot;
    known.extent = Some(extent);
    // Which weights it has is not known.
    known.table = if header.slots() != 0 { u64::MAX } else { 0 };
    let mut held: Vec<HeldBackend> = Vec::new();
    let mut seen: BTreeSet<BackendKey> = BTreeSet::new();
    for position in 1..=header.all() {
        let Ok(id) = u32::try_from(memory.extent_word(start + position)) else {
            continue;
        };
        if id >= room.backends.capacity() || !room.backends.reserve(Range { start: id, len: 1 }) {
            continue;
        }
        let backend = memory.backend(id);
        let key: BackendKey = (backend.addr, backend.port);
        if backend.service != known.id || !seen.insert(key) {
            room.backends.release(Range { start: id, len: 1 });
            continue;
        }
        held.push((key, id, place(position, header)));
    }
    if held.len() < header.all() as usize {
        held.sort_unstable();
        known.salvaged = Some(held.into());
    }
}
