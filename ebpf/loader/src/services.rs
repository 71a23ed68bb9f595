//! The synchroniser: turns changes into writes, in an order in which no reader ever meets a half-made service.
//!
//! For each service: write new backends and a new extent where nobody looks yet, publish both with one store of the
//! service's slot, add frontends, remove frontends, and free what nobody reaches any more, through a quarantine.
//! Room is taken before the first write, so an update that does not fit leaves the old service answering.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use ebpf_common::{FrontendKey, FrontendValue, NetAddr, NodePortBounds, ServiceSlot};

use crate::{
    alloc::Range,
    extent::{retire_backend, write_backends},
    known::{Book, HeldBackend, Known},
    memory::{Capacity, Memory, MemoryError, Unwritten},
    report::{Refused, SyncReport},
    restore::Orphans,
    room::{BackendKey, Prepared, Room, by_address},
    table::{Change, DesiredService, Place, ServiceKey, ServiceTable, SourcePrefix, describe},
};

/// Services whose frontends are written with one call, where that can be.
const TOGETHER: usize = 2048;

/// All services as the maps hold them, and what is free.
#[derive(Debug)]
pub(crate) struct Services {
    known: Book,
    /// The id of the service that has a frontend.
    owners: HashMap<FrontendKey, u32>,
    /// Services that were refused a frontend or room, with what they want; tried again when anything is freed.
    waiting: BTreeMap<ServiceKey, DesiredService>,
    freed: bool,
    /// A service asked for session affinity.
    sticky: bool,
    node_ports: BTreeMap<u16, usize>,
    retired_datagram: Vec<SocketAddr>,
    orphans: Orphans,
    pub(crate) room: Room,
}

impl Services {
    /// Reads what the maps hold. Services found there keep answering; they are claimed by [`Self::replace_all`].
    pub(crate) fn restore<M: Memory>(memory: &mut M, capacity: Capacity) -> Result<Self, MemoryError> {
        let mut room = Room::new(capacity);
        let orphans = Orphans::read(memory, &mut room)?;
        Ok(Self {
            known: Book::default(),
            owners: HashMap::new(),
            waiting: BTreeMap::new(),
            freed: false,
            sticky: false,
            node_ports: BTreeMap::new(),
            retired_datagram: Vec::new(),
            orphans,
            room,
        })
    }

    /// Makes the maps hold exactly this table: everything not in it is removed. Only for callers who know all
    /// services and all endpoints.
    pub(crate) fn replace_all<M: Memory>(
        &mut self,
        memory: &mut M,
        table: &ServiceTable,
        now: Instant,
    ) -> SyncReport {
        let mut report = SyncReport::default();
        self.waiting.retain(|key, _| table.contains_key(key));
        for print in self.known.others(table.keys()) {
            self.remove_print(memory, print, now, &mut report);
        }
        self.write_all(memory, table.iter(), now, &mut report);
        self.drop_orphans(memory, now, &mut report);
        self.settle(memory, now, &mut report);
        report
    }

    /// Makes the maps hold this table and lets everything else stand that they hold already. A service of which
    /// `unsure` says that its endpoints may not be known yet stays as it is where the maps have it.
    pub(crate) fn add_all<M: Memory, S: Borrow<ServiceKey>, D: Borrow<DesiredService>>(
        &mut self,
        memory: &mut M,
        table: impl Iterator<Item = (S, D)>,
        unsure: &BTreeSet<ServiceKey>,
        now: Instant,
    ) -> SyncReport {
        let mut report = SyncReport::default();
        let left = self.orphans.named(memory, unsure);
        let sure = table.filter(|(key, _)| !left.contains::<ServiceKey>(key.borrow()));
        self.write_all(memory, sure, now, &mut report);
        self.settle(memory, now, &mut report);
        report
    }

    /// Removes what the maps held before this process and nobody has claimed since.
    pub(crate) fn remove_unclaimed<M: Memory>(&mut self, memory: &mut M, now: Instant) -> SyncReport {
        let mut report = SyncReport::default();
        self.drop_orphans(memory, now, &mut report);
        self.settle(memory, now, &mut report);
        report
    }

    /// How many services the maps held before this process that nobody has claimed.
    pub(crate) fn unclaimed(&self) -> usize {
        self.orphans.len()
    }

    /// Services come one by one, so that a caller who makes them on the way never holds all.
    fn write_all<M: Memory, S: Borrow<ServiceKey>, D: Borrow<DesiredService>>(
        &mut self,
        memory: &mut M,
        table: impl Iterator<Item = (S, D)>,
        now: Instant,
        report: &mut SyncReport,
    ) {
        // On fresh maps, which no program reads yet, frontends can wait for each other.
        let fresh = self.known.len() == 0 && self.orphans.is_empty();
        let mut table = table.peekable();
        while table.peek().is_some() {
            if fresh {
                memory.collect();
            }
            let mut together = Vec::with_capacity(TOGETHER);
            for (key, desired) in table.by_ref().take(TOGETHER) {
                self.upsert(memory, key.borrow(), desired.borrow(), now, report);
                together.push((key, desired));
            }
            for unwritten in memory.flush() {
                self.take_back(&together, unwritten, report);
            }
        }
    }

    /// What was written with others, and the kernel did not take: its service waits for memory.
    fn take_back<S: Borrow<ServiceKey>, D: Borrow<DesiredService>>(
        &mut self,
        together: &[(S, D)],
        unwritten: Unwritten,
        report: &mut SyncReport,
    ) {
        let Unwritten { service, frontend, why } = unwritten;
        let Some((key, desired)) = together.iter().find(|(key, _)| self.id(key.borrow()) == Some(service))
        else {
            return;
        };
        let (key, desired): (&ServiceKey, &DesiredService) = (key.borrow(), desired.borrow());
        if let Some(known) = self.known.get_mut(key) {
            known.desired = 0;
            known.frontends = known.frontends.iter().copied().filter(|(one, _)| *one != frontend).collect();
            self.room.frontends_used = self.room.frontends_used.saturating_sub(1);
        }
        self.disown(&frontend);
        if self.waiting.insert(key.clone(), desired.clone()).is_none() {
            report.written = report.written.saturating_sub(1);
        }
        report.refused.push((key.clone(), why.into()));
    }

    fn drop_orphans<M: Memory>(&mut self, memory: &mut M, now: Instant, report: &mut SyncReport) {
        for orphan in std::mem::take(&mut self.orphans).into_iter() {
            let print = self.known.print(&ServiceKey(format!("unclaimed-{}", orphan.id)));
            self.remove_known(memory, print, orphan, now, report);
        }
    }

    /// Carries changes out; removals first, so that what they free can be taken.
    pub(crate) fn apply<M: Memory>(
        &mut self,
        memory: &mut M,
        changes: &[Change],
        now: Instant,
    ) -> SyncReport {
        let mut report = SyncReport::default();
        for change in changes {
            if let Change::Remove(key) = change {
                self.waiting.remove(key);
                self.remove_print(memory, self.known.print(key), now, &mut report);
            }
        }
        for change in changes {
            if let Change::Upsert(key, desired) = change {
                self.upsert(memory, key, desired, now, &mut report);
            }
        }
        self.settle(memory, now, &mut report);
        report
    }

    /// How many services are known.
    pub(crate) fn len(&self) -> usize {
        self.known.len()
    }

    /// How many services, or parts of them, wait for room or for another service.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a service asked for session affinity.
    pub(crate) fn is_any_sticky(&self) -> bool {
        self.sticky
    }

    /// Services that wait, or parts of which wait, for room or for another service.
    pub(crate) fn refused(&self) -> impl Iterator<Item = &ServiceKey> {
        self.waiting.keys()
    }

    /// Endpoints of a service with their ids.
    pub(crate) fn backends<M: Memory>(&self, memory: &M, key: &ServiceKey) -> Vec<(SocketAddr, u32)> {
        let held = self.known.get(key).map(|known| known.backends(memory)).unwrap_or_default();
        held.iter().map(|(key, id, _)| (socket_address(key), *id)).collect()
    }

    /// The id of a service, for its counters.
    pub(crate) fn id(&self, key: &ServiceKey) -> Option<u32> {
        self.known.get(key).map(|known| known.id)
    }

    /// Tries again what was refused, if anything was freed since, and narrows the NodePort bounds.
    fn settle<M: Memory>(&mut self, memory: &mut M, now: Instant, report: &mut SyncReport) {
        if std::mem::take(&mut self.freed) {
            for (key, desired) in std::mem::take(&mut self.waiting) {
                if let Some(known) = self.known.get_mut(&key) {
                    known.desired = 0;
                }
                report.refused.retain(|(refused, _)| *refused != key);
                self.upsert(memory, &key, &desired, now, report);
            }
        }
        memory.publish_node_ports(self.node_port_bounds());
        report.retired_datagram.append(&mut self.retired_datagram);
    }

    fn upsert<M: Memory>(
        &mut self,
        memory: &mut M,
        key: &ServiceKey,
        desired: &DesiredService,
        now: Instant,
        report: &mut SyncReport,
    ) {
        let fingerprint = desired.fingerprint();
        if self.known.get(key).is_some_and(|known| known.desired == fingerprint) {
            report.unchanged += 1;
            return;
        }
        self.waiting.remove(key);
        match self.try_upsert(memory, key, (desired, fingerprint), now, report) {
            Ok(()) => report.written += 1,
            Err(why) => {
                self.waiting.insert(key.clone(), desired.clone());
                report.refused.push((key.clone(), why));
            }
        }
    }

    fn try_upsert<M: Memory>(
        &mut self,
        memory: &mut M,
        key: &ServiceKey,
        (desired, fingerprint): (&DesiredService, u64),
        now: Instant,
        report: &mut SyncReport,
    ) -> Result<(), Refused> {
        let frontends = self.claimable(memory, key, desired, report);
        let print = self.known.print(key);
        let mut known = match self.known.take(print).or_else(|| self.adopt(&frontends)) {
            Some(known) => known,
            None => self.create(memory, now)?,
        };
        let outcome = self.bring_to(memory, (key, print), &mut known, desired, &frontends, now);
        known.desired = if outcome.is_ok() { fingerprint } else { 0 };
        self.known.put(print, known);
        outcome
    }

    /// The frontends this service may have now, by key; the others are reported and waited for.
    fn claimable<M: Memory>(
        &mut self,
        memory: &M,
        key: &ServiceKey,
        desired: &DesiredService,
        report: &mut SyncReport,
    ) -> Vec<(FrontendKey, u32)> {
        let own = self.id(key);
        let mut frontends = Vec::with_capacity(desired.frontends.len());
        for frontend in &desired.frontends {
            let frontend_key = frontend.key();
            match self.owners.get(&frontend_key) {
                Some(owner) if Some(*owner) != own => {
                    self.waiting.insert(key.clone(), desired.clone());
                    let owner = name_of(memory, *owner);
                    let conflict = Refused::Conflict { frontend: describe(&frontend_key), owner };
                    report.refused.push((key.clone(), conflict));
                }
                _ => frontends.push((frontend_key, frontend.flags())),
            }
        }
        // Of two on one address the later counts, as in a map.
        frontends.reverse();
        frontends.sort_by_key(|(frontend, _)| *frontend);
        frontends.dedup_by_key(|(frontend, _)| *frontend);
        frontends
    }

    /// The service that the maps already hold under one of these frontends.
    fn adopt(&mut self, frontends: &[(FrontendKey, u32)]) -> Option<Known> {
        let orphan = self.orphans.claim(frontends.iter().map(|(frontend, _)| frontend))?;
        for (frontend, _) in &*orphan.frontends {
            self.own(*frontend, orphan.id);
        }
        Some(orphan)
    }

    fn create<M: Memory>(&mut self, memory: &M, now: Instant) -> Result<Known, Refused> {
        let id = self.room.take_service(memory, now)?;
        Ok(Known { id: id.start, ..Known::default() })
    }

    fn bring_to<M: Memory>(
        &mut self,
        memory: &mut M,
        (key, print): (&ServiceKey, u64),
        known: &mut Known,
        desired: &DesiredService,
        frontends: &[(FrontendKey, u32)],
        now: Instant,
    ) -> Result<(), Refused> {
        self.sticky |= desired.affinity_secs != 0;
        let added = frontends.iter().filter(|(frontend, _)| flags_of(&known.frontends, frontend).is_none());
        self.room.check_frontends(added.count())?;
        let wanted = by_address(&desired.backends);
        let held = known.backends(memory);
        if differ(&held, &wanted) || known.table != desired.table_print() {
            let prepared = self.room.prepare(memory, &held, &wanted, desired, now)?;
            write_backends(memory, known.id, &prepared);
            self.publish(memory, known, &held, &prepared, desired.affinity_secs, now);
            known.table = desired.table_print();
        } else if known.slot.affinity_secs() != desired.affinity_secs {
            known.slot = ServiceSlot::new(known.slot.extent(), desired.affinity_secs);
            memory.publish_slot(known.id, known.slot);
        }
        if known.name != print {
            memory.write_name(known.id, &key.0)?;
            known.name = print;
        }
        let mut ranges: Vec<(NetAddr, u8)> = desired.source_ranges.iter().map(SourcePrefix::key).collect();
        ranges.sort_unstable();
        ranges.dedup();
        let fresh: Vec<(NetAddr, u8)> =
            ranges.iter().filter(|range| !known.ranges.contains(range)).copied().collect();
        self.room.check_ranges(fresh.len())?;
        // New ranges before the frontends that ask for them, old ones after.
        for range in fresh {
            memory.insert_range(known.id, range)?;
            self.room.ranges_used += 1;
            known.ranges = known.ranges.iter().copied().chain([range]).collect();
        }
        self.write_frontends(memory, known, frontends)?;
        self.retain_ranges(memory, known, &ranges)
    }

    /// Removes all source ranges but these.
    fn retain_ranges<M: Memory>(
        &mut self,
        memory: &mut M,
        known: &mut Known,
        wanted: &[(NetAddr, u8)],
    ) -> Result<(), Refused> {
        let gone: Vec<(NetAddr, u8)> =
            known.ranges.iter().filter(|range| !wanted.contains(range)).copied().collect();
        for range in gone {
            memory.remove_range(known.id, range)?;
            known.ranges = known.ranges.iter().copied().filter(|other| *other != range).collect();
            self.room.ranges_used = self.room.ranges_used.saturating_sub(1);
        }
        Ok(())
    }

    /// Moves readers to the new list with one store, then lets the old one go.
    fn publish<M: Memory>(
        &mut self,
        memory: &mut M,
        known: &mut Known,
        held: &[HeldBackend],
        prepared: &Prepared,
        affinity_secs: u32,
        now: Instant,
    ) {
        known.slot = ServiceSlot::new(prepared.extent.map_or(0, |extent| extent.start), affinity_secs);
        memory.publish_slot(known.id, known.slot);
        if let Some(old) = std::mem::replace(&mut known.extent, prepared.extent) {
            self.room.freed_extents.push(old, now);
        }
        known.salvaged = None;
        if held.is_empty() {
            return;
        }
        self.freed = true;
        let kept: HashSet<u32> = prepared.order.iter().map(|backend| backend.id).collect();
        for (key, id, _) in held.iter().filter(|(_, id, _)| !kept.contains(id)) {
            self.retire(memory, known, key, *id);
            self.room.freed_backends.push(Range { start: *id, len: 1 }, now);
        }
    }

    /// Marks an endpoint as gone and notes it for sockets that are connected to it.
    fn retire<M: Memory>(&mut self, memory: &mut M, known: &Known, key: &BackendKey, id: u32) {
        if known.takes_datagrams() {
            self.retired_datagram.push(socket_address(key));
        }
        retire_backend(memory, id);
    }

    /// Adds those that are not there, then removes those that are not wanted. What was done stays noted where a write
    /// fails.
    fn write_frontends<M: Memory>(
        &mut self,
        memory: &mut M,
        known: &mut Known,
        frontends: &[(FrontendKey, u32)],
    ) -> Result<(), Refused> {
        if *known.frontends == *frontends {
            return Ok(());
        }
        let mut present: BTreeMap<FrontendKey, u32> = known.frontends.iter().copied().collect();
        let outcome = self.change_frontends(memory, known.id, &mut present, frontends);
        known.frontends = present.into_iter().collect();
        outcome
    }

    fn change_frontends<M: Memory>(
        &mut self,
        memory: &mut M,
        id: u32,
        present: &mut BTreeMap<FrontendKey, u32>,
        wanted: &[(FrontendKey, u32)],
    ) -> Result<(), Refused> {
        for (frontend, flags) in wanted {
            if present.get(frontend) == Some(flags) {
                continue;
            }
            // A frontend may still stand under a service that nobody has claimed; it is this one's now.
            let counted = self.orphans.release(frontend);
            self.own(*frontend, id);
            if frontend.scope == FrontendKey::SCOPE_NODE {
                // Wider before the frontend exists, so that it is found from its first moment.
                memory.publish_node_ports(self.node_port_bounds());
            }
            memory.insert_frontend(*frontend, FrontendValue { service: id, flags: *flags })?;
            if present.insert(*frontend, *flags).is_none() && !counted {
                self.room.frontends_used += 1;
            }
        }
        let gone: Vec<FrontendKey> =
            present.keys().filter(|f| flags_of(wanted, f).is_none()).copied().collect();
        for frontend in gone {
            memory.remove_frontend(frontend)?;
            present.remove(&frontend);
            self.room.frontends_used = self.room.frontends_used.saturating_sub(1);
            self.freed = true;
            self.disown(&frontend);
        }
        Ok(())
    }

    fn remove_print<M: Memory>(&mut self, memory: &mut M, print: u64, now: Instant, report: &mut SyncReport) {
        if let Some(known) = self.known.take(print) {
            self.remove_known(memory, print, known, now, report);
        }
    }

    fn remove_known<M: Memory>(
        &mut self,
        memory: &mut M,
        print: u64,
        mut known: Known,
        now: Instant,
        report: &mut SyncReport,
    ) {
        let datagrams = known.takes_datagrams();
        let held = known.backends(memory);
        if let Err(why) = self.write_frontends(memory, &mut known, &[]) {
            report.refused.push((name_of(memory, known.id), why));
            self.known.put(print, known);
            return;
        }
        let leftovers = self.retain_ranges(memory, &mut known, &[]);
        if let Err(why) = leftovers.and_then(|()| memory.remove_name(known.id).map_err(Refused::from)) {
            // What stays is keyed by an id that nobody uses, and is overwritten by the id's next service.
            report.refused.push((name_of(memory, known.id), why));
        }
        memory.publish_slot(known.id, ServiceSlot::default());
        if let Some(extent) = known.extent {
            self.room.freed_extents.push(extent, now);
        }
        for (address, id, _) in held {
            if datagrams {
                report.retired_datagram.push(socket_address(&address));
            }
            retire_backend(memory, id);
            self.room.freed_backends.push(Range { start: id, len: 1 }, now);
        }
        self.room.freed_services.push(Range { start: known.id, len: 1 }, now);
        self.freed = true;
        report.removed += 1;
    }

    fn own(&mut self, frontend: FrontendKey, service: u32) {
        let before = self.owners.insert(frontend, service);
        if before.is_none() && frontend.scope == FrontendKey::SCOPE_NODE {
            *self.node_ports.entry(frontend.port.to_host()).or_default() += 1;
        }
    }

    fn disown(&mut self, frontend: &FrontendKey) {
        if self.owners.remove(frontend).is_none() || frontend.scope != FrontendKey::SCOPE_NODE {
            return;
        }
        if let Some(uses) = self.node_ports.get_mut(&frontend.port.to_host()) {
            *uses -= 1;
            if *uses == 0 {
                self.node_ports.remove(&frontend.port.to_host());
            }
        }
    }

    /// Bounds of all NodePorts, those of services not yet claimed included.
    fn node_port_bounds(&self) -> NodePortBounds {
        let (first, last) = (self.node_ports.first_key_value(), self.node_ports.last_key_value());
        let own = first.into_iter().chain(last).map(|(port, _)| *port);
        let ports = own.chain(self.orphans.node_port_ends());
        let (lowest, highest) =
            ports.fold((u16::MAX, 0), |(low, high), port| (low.min(port), high.max(port)));
        NodePortBounds::new(lowest, highest)
    }
}

/// What people call a service.
fn name_of<M: Memory>(memory: &M, id: u32) -> ServiceKey {
    ServiceKey(memory.name(id).unwrap_or_else(|| format!("service {id}")))
}

/// The flags of a frontend, in a list by key.
fn flags_of(frontends: &[(FrontendKey, u32)], key: &FrontendKey) -> Option<u32> {
    frontends.binary_search_by(|(frontend, _)| frontend.cmp(key)).ok().map(|index| frontends[index].1)
}

/// Both are by address.
fn differ(held: &[HeldBackend], wanted: &[(BackendKey, Place)]) -> bool {
    held.len() != wanted.len()
        || held.iter().zip(wanted).any(|((at, _, place), wanted)| (*at, *place) != *wanted)
}

fn socket_address((addr, port): &BackendKey) -> SocketAddr {
    SocketAddr::new(IpAddr::from(*addr), port.to_host())
}

#[cfg(test)]
mod tests;
