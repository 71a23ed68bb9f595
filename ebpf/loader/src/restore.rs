//! Reads back, after a restart, which services the maps hold. Ids live in the maps alone, so a new process finds the
//! old ones instead of renumbering what clients are using.
//!
//! Trusts nothing it reads: an extent or backend that lies outside its array, or is claimed twice, is ignored, and
//! its service is written anew.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ebpf_common::{ExtentHeader, FrontendKey};

use crate::{
    alloc::Range,
    memory::{Memory, MemoryError},
    room::{BackendKey, Room},
    services::Known,
    table::{Place, ServiceKey},
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
        for (frontend, value) in memory.frontends()? {
            if value.service == 0 || value.service >= room.services.capacity() {
                memory.remove_frontend(frontend)?;
                continue;
            }
            room.frontends_used += 1;
            let known = orphans.by_id.entry(value.service).or_default();
            known.frontends.insert(frontend, value.flags);
            orphans.by_frontend.insert(frontend, value.service);
            if frontend.scope == FrontendKey::SCOPE_NODE {
                *orphans.node_ports.entry(frontend.port.to_host()).or_default() += 1;
            }
        }
        for (service, range) in memory.ranges() {
            match orphans.by_id.get_mut(&service) {
                Some(known) => {
                    known.ranges.insert(range);
                    room.ranges_used += 1;
                }
                None => memory.remove_range(service, range)?,
            }
        }
        for (id, known) in &mut orphans.by_id {
            known.name = memory.name(*id);
            known.id = *id;
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
        for frontend in known.frontends.keys() {
            self.forget(frontend);
        }
        Some(known)
    }

    /// Takes a frontend away from its service, because another one has it now. True where it had one.
    pub(crate) fn release(&mut self, frontend: &FrontendKey) -> bool {
        let Some(id) = self.forget(frontend) else {
            return false;
        };
        self.by_id.get_mut(&id).is_some_and(|known| known.frontends.remove(frontend).is_some())
    }

    /// Which of these services are among them, by their names.
    pub(crate) fn named(&self, keys: &BTreeSet<ServiceKey>) -> BTreeSet<ServiceKey> {
        let names: BTreeSet<&str> = self.by_id.values().filter_map(|known| known.name.as_deref()).collect();
        keys.iter().filter(|key| names.contains(key.0.as_str())).cloned().collect()
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
    for index in start + 1..=start + header.all() {
        let Ok(id) = u32::try_from(memory.extent_word(index)) else {
            continue;
        };
        if id >= room.backends.capacity() || !room.backends.reserve(Range { start: id, len: 1 }) {
            continue;
        }
        let backend = memory.backend(id);
        let key: BackendKey = (backend.addr, backend.port);
        let place = place(index - start, header);
        if backend.service != known.id || known.backends.contains_key(&key) {
            room.backends.release(Range { start: id, len: 1 });
            continue;
        }
        known.backends.insert(key, (id, place));
    }
}

/// Which policies a backend answers, from its position in the index (1-based).
fn place(position: u32, header: ExtentHeader) -> Place {
    if position <= header.cluster() {
        Place::LocalOnly
    } else if position <= header.local() {
        Place::Local
    } else {
        Place::Far
    }
}
