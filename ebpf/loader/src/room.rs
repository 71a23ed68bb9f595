//! The room in the maps: which indices are free, which were freed and wait, and taking all that an update needs
//! before its first write. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use ebpf_common::{NetAddr, NetPort};

use crate::{
    alloc::{Quarantine, Range, RangeAllocator},
    maglev::{self, Table},
    memory::{Capacity, Memory},
    services::{Known, Refused},
    table::{DesiredBackend, DesiredService, Place},
};

/// One endpoint as the maps know it.
pub(crate) type BackendKey = (NetAddr, NetPort);

/// Free and freed indices of the three arrays, and the frontend hash's count.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) services: RangeAllocator,
    pub(crate) backends: RangeAllocator,
    pub(crate) extents: RangeAllocator,
    pub(crate) freed_services: Quarantine,
    pub(crate) freed_backends: Quarantine,
    pub(crate) freed_extents: Quarantine,
    pub(crate) frontends_used: u32,
    pub(crate) frontends_capacity: u32,
    pub(crate) ranges_used: u32,
}

/// Source ranges of all services together.
pub(crate) const SOURCE_RANGES: u32 = 65_536;

/// The next state of one service, with all its room taken and nothing written.
pub(crate) struct Prepared {
    pub(crate) extent: Option<Range>,
    /// All backends in index order: by place.
    pub(crate) order: Vec<(BackendKey, u32, Place)>,
    /// Ids that nobody used before.
    pub(crate) fresh: BTreeSet<u32>,
    /// The table behind the ids, where hashing is consistent.
    pub(crate) table: Option<Table>,
}

impl Room {
    pub(crate) fn new(capacity: Capacity) -> Self {
        Self {
            services: RangeAllocator::new(capacity.services),
            backends: RangeAllocator::new(capacity.backends),
            extents: RangeAllocator::new(capacity.extent_words),
            freed_services: Quarantine::default(),
            freed_backends: Quarantine::default(),
            freed_extents: Quarantine::default(),
            frontends_used: 0,
            frontends_capacity: capacity.frontends,
            ranges_used: 0,
        }
    }

    pub(crate) fn check_frontends(&self, added: usize) -> Result<(), Refused> {
        let needed = u32::try_from(added).unwrap_or(u32::MAX);
        let free = self.frontends_capacity.saturating_sub(self.frontends_used);
        if needed <= free {
            return Ok(());
        }
        Err(Refused::Full { what: "frontends", needed, free, capacity: self.frontends_capacity })
    }

    pub(crate) fn check_ranges(&self, added: usize) -> Result<(), Refused> {
        let needed = u32::try_from(added).unwrap_or(u32::MAX);
        let free = SOURCE_RANGES.saturating_sub(self.ranges_used);
        if needed <= free {
            return Ok(());
        }
        Err(Refused::Full { what: "source ranges", needed, free, capacity: SOURCE_RANGES })
    }

    pub(crate) fn take_service<M: Memory>(&mut self, memory: &M, now: Instant) -> Result<Range, Refused> {
        take(memory, &mut self.services, &mut self.freed_services, 1, "services", now)
    }

    /// Takes an extent and ids for new backends; on failure nothing stays taken.
    pub(crate) fn prepare<M: Memory>(
        &mut self,
        memory: &M,
        known: &Known,
        desired: &DesiredService,
        now: Instant,
    ) -> Result<Prepared, Refused> {
        let wanted = by_address(&desired.backends);
        if wanted.len() > usize::from(u16::MAX) {
            return Err(Refused::TooManyBackends { count: wanted.len() });
        }
        let mut prepared = Prepared {
            extent: None,
            order: Vec::with_capacity(wanted.len()),
            fresh: BTreeSet::new(),
            table: None,
        };
        match self.fill(memory, known, &wanted, desired, now, &mut prepared) {
            Ok(()) => Ok(prepared),
            Err(why) => {
                for id in prepared.fresh {
                    self.backends.release(Range { start: id, len: 1 });
                }
                Err(why)
            }
        }
    }

    fn fill<M: Memory>(
        &mut self,
        memory: &M,
        known: &Known,
        wanted: &BTreeMap<BackendKey, Place>,
        desired: &DesiredService,
        now: Instant,
        prepared: &mut Prepared,
    ) -> Result<(), Refused> {
        for (key, place) in wanted {
            let id = if let Some((id, _)) = known.backends.get(key) {
                *id
            } else {
                let taken = take(memory, &mut self.backends, &mut self.freed_backends, 1, "backends", now)?;
                prepared.fresh.insert(taken.start);
                taken.start
            };
            prepared.order.push((*key, id, *place));
        }
        prepared.order.sort_by_key(|(_, _, place)| *place);
        if !prepared.order.is_empty() {
            prepared.table = desired.consistent.then(|| table(&prepared.order, desired)).flatten();
            let table = prepared.table.as_ref().map_or(0, |table| maglev::words_of(table.kind));
            let ids = u32::try_from(prepared.order.len()).unwrap_or(u32::MAX);
            let words = ids.saturating_add(1).saturating_add(table);
            let extents = (&mut self.extents, &mut self.freed_extents);
            prepared.extent =
                Some(take(memory, extents.0, extents.1, words, "words of the backend index", now)?);
        }
        Ok(())
    }
}

/// The table over the backends for policy `Cluster`, which are those from the first that is not `Local` alone.
fn table(order: &[(BackendKey, u32, Place)], desired: &DesiredService) -> Option<Table> {
    let weights: BTreeMap<BackendKey, u16> = desired
        .weights
        .iter()
        .map(|(at, weight)| ((NetAddr::from(at.ip()), NetPort::from_host(at.port())), *weight))
        .collect();
    let cluster = order.iter().filter(|(_, _, place)| *place != Place::LocalOnly);
    let weighed: Vec<(BackendKey, u16)> =
        cluster.map(|(key, ..)| (*key, weights.get(key).copied().unwrap_or(1))).collect();
    (!weighed.is_empty()).then(|| maglev::build(&weighed))
}

/// Takes `len` indices, from the quarantine too where nothing else is left, after all readers have finished.
fn take<M: Memory>(
    memory: &M,
    allocator: &mut RangeAllocator,
    freed: &mut Quarantine,
    len: u32,
    what: &'static str,
    now: Instant,
) -> Result<Range, Refused> {
    freed.drain(allocator, now);
    if let Some(range) = allocator.alloc(len) {
        return Ok(range);
    }
    if !freed.is_empty() {
        memory.wait_for_readers();
        freed.drain_all(allocator);
    }
    let (free, capacity) = (allocator.available(), allocator.capacity());
    allocator.alloc(len).ok_or(Refused::Full { what, needed: len, free, capacity })
}

/// Each endpoint once, at its nearest place.
pub(crate) fn by_address(desired: &[DesiredBackend]) -> BTreeMap<BackendKey, Place> {
    let mut wanted = BTreeMap::new();
    for backend in desired {
        let key = (NetAddr::from(backend.address.ip()), NetPort::from_host(backend.address.port()));
        let place = wanted.entry(key).or_insert(backend.place);
        *place = backend.place.min(*place);
    }
    wanted
}
