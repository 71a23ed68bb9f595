//! The room in the maps: which indices are free, which were freed and wait, and taking all that an update needs
//! before its first write. Pure.

use std::{collections::BTreeMap, net::SocketAddr, time::Instant};

use ebpf_common::{NetAddr, NetPort};

use crate::{
    alloc::{Quarantine, Range, RangeAllocator},
    known::HeldBackend,
    maglev::{self, Table},
    memory::{Capacity, Memory},
    report::Refused,
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
    pub(crate) order: Vec<PreparedBackend>,
    /// The table behind the ids, where hashing is consistent.
    pub(crate) table: Option<Table>,
}

/// A backend of the next state.
#[derive(Clone, Copy)]
pub(crate) struct PreparedBackend {
    pub(crate) at: BackendKey,
    pub(crate) id: u32,
    pub(crate) place: Place,
    /// Nobody used the id before.
    pub(crate) fresh: bool,
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

    /// Takes an extent and ids for new backends; on failure nothing stays taken. Both lists are by address.
    pub(crate) fn prepare<M: Memory>(
        &mut self,
        memory: &M,
        held: &[HeldBackend],
        wanted: &[(BackendKey, Place)],
        desired: &DesiredService,
        now: Instant,
    ) -> Result<Prepared, Refused> {
        if wanted.len() > usize::from(u16::MAX) {
            return Err(Refused::TooManyBackends { count: wanted.len() });
        }
        let mut prepared = Prepared { extent: None, order: Vec::with_capacity(wanted.len()), table: None };
        match self.fill(memory, held, wanted, desired, now, &mut prepared) {
            Ok(()) => Ok(prepared),
            Err(why) => {
                for backend in prepared.order.iter().filter(|backend| backend.fresh) {
                    self.backends.release(Range { start: backend.id, len: 1 });
                }
                Err(why)
            }
        }
    }

    /// Takes some of so many ids, at least one.
    fn take_backends<M: Memory>(
        &mut self,
        memory: &M,
        wanted: usize,
        now: Instant,
    ) -> Result<Range, Refused> {
        self.freed_backends.drain(&mut self.backends, now);
        match self.backends.alloc_some(u32::try_from(wanted).unwrap_or(u32::MAX)) {
            Some(run) => Ok(run),
            None => take(memory, &mut self.backends, &mut self.freed_backends, 1, "backends", now),
        }
    }

    fn fill<M: Memory>(
        &mut self,
        memory: &M,
        held: &[HeldBackend],
        wanted: &[(BackendKey, Place)],
        desired: &DesiredService,
        now: Instant,
        prepared: &mut Prepared,
    ) -> Result<(), Refused> {
        let known = |at: &BackendKey| {
            held.binary_search_by(|(other, ..)| other.cmp(at)).ok().map(|index| held[index].1)
        };
        // New ids are taken as many at once as stand side by side.
        let mut missing = wanted.iter().filter(|(at, _)| known(at).is_none()).count();
        let mut run = Range { start: 0, len: 0 };
        for (at, place) in wanted {
            let former = known(at);
            let id = if let Some(id) = former {
                id
            } else {
                if run.len == 0 {
                    run = self.take_backends(memory, missing, now)?;
                }
                missing -= 1;
                run.len -= 1;
                run.start += 1;
                run.start - 1
            };
            prepared.order.push(PreparedBackend { at: *at, id, place: *place, fresh: former.is_none() });
        }
        prepared.order.sort_by_key(|backend| backend.place);
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
fn table(order: &[PreparedBackend], desired: &DesiredService) -> Option<Table> {
    let weights: BTreeMap<BackendKey, u16> = desired
        .weights
        .iter()
        .map(|(at, weight)| ((NetAddr::from(at.ip()), NetPort::from_host(at.port())), *weight))
        .collect();
    let cluster = order.iter().filter(|backend| backend.place != Place::LocalOnly);
    let weighed: Vec<(BackendKey, u16)> =
        cluster.map(|backend| (backend.at, weights.get(&backend.at).copied().unwrap_or(1))).collect();
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

/// Each endpoint once, at its nearest place, by address.
pub(crate) fn by_address(desired: &[DesiredBackend]) -> Vec<(BackendKey, Place)> {
    let key = |address: &SocketAddr| (NetAddr::from(address.ip()), NetPort::from_host(address.port()));
    let mut wanted: Vec<(BackendKey, Place)> =
        desired.iter().map(|backend| (key(&backend.address), backend.place)).collect();
    // The nearest place comes first.
    wanted.sort_unstable();
    wanted.dedup_by_key(|(at, _)| *at);
    wanted
}
