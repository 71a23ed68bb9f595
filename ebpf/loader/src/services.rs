//! The synchroniser: turns changes into writes, in an order in which no reader ever meets a half-made service.
//!
//! For each service: write new backends and a new extent where nobody looks yet, publish both with one store of the
//! service's slot, add frontends, remove frontends, and free what nobody reaches any more, through a quarantine.
//! Room is taken before the first write, so an update that does not fit leaves the old service answering.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use ebpf_common::{
    Backend, ExtentHeader, FrontendKey, FrontendValue, NetAddr, NodePortBounds, Protocol, ServiceSlot,
};
use thiserror::Error;

use crate::{
    alloc::Range,
    memory::{Capacity, Memory, MemoryError},
    restore::Orphans,
    room::{BackendKey, Prepared, Room, by_address},
    table::{
        Change, DesiredBackend, DesiredService, Place, ServiceKey, ServiceTable, SourcePrefix, describe,
    },
};

/// Why a service, or a part of it, is not programmed. The rest of the update went on.
#[derive(Debug, Error)]
pub enum Refused {
    /// A map is full; the service keeps answering as before the update.
    #[error("no room for {needed} more {what}: {free} of {capacity} are free")]
    Full {
        /// Which resource.
        what: &'static str,
        /// How many it takes.
        needed: u32,
        /// How many there are.
        free: u32,
        /// The resource's size.
        capacity: u32,
    },
    /// An extent counts its backends in sixteen bits.
    #[error("{count} endpoints are more than the 65535 one service may have")]
    TooManyBackends {
        /// How many were wanted.
        count: usize,
    },
    /// Another service has the frontend; it moves here when that one lets go.
    #[error("{frontend} belongs to service {owner} already")]
    Conflict {
        /// Which frontend.
        frontend: String,
        /// Whose it is.
        owner: ServiceKey,
    },
    /// The kernel refused a write.
    #[error("the kernel refused a write")]
    Memory(#[from] MemoryError),
}

/// What an update did.
#[derive(Debug, Default)]
pub struct SyncReport {
    /// Services that were written.
    pub written: usize,
    /// Services that were removed.
    pub removed: usize,
    /// Services that were looked at and needed no write.
    pub unchanged: usize,
    /// What could not be done, by service.
    pub refused: Vec<(ServiceKey, Refused)>,
    /// Endpoints that answer a UDP service no more: connected sockets may still send there.
    pub retired_datagram: Vec<SocketAddr>,
}

/// A service as the maps hold it.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) id: u32,
    pub(crate) slot: ServiceSlot,
    pub(crate) extent: Option<Range>,
    pub(crate) backends: BTreeMap<BackendKey, (u32, Place)>,
    pub(crate) frontends: BTreeMap<FrontendKey, u32>,
    pub(crate) ranges: BTreeSet<(NetAddr, u8)>,
    pub(crate) name: Option<String>,
    /// What its extent has of a table for consistent hashing: 0 for none, else what tells its weights.
    pub(crate) table: u64,
    /// The fingerprint of what was asked for last; `None` for a service found in the maps and not yet claimed.
    pub(crate) desired: Option<u128>,
}

/// All services as the maps hold them, and what is free.
#[derive(Debug)]
pub(crate) struct Services {
    known: HashMap<ServiceKey, Known>,
    owners: HashMap<FrontendKey, ServiceKey>,
    /// Services that were refused a frontend or room, with what they want; tried again when anything is freed.
    waiting: BTreeMap<ServiceKey, DesiredService>,
    freed: bool,
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
            known: HashMap::new(),
            owners: HashMap::new(),
            waiting: BTreeMap::new(),
            freed: false,
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
        let gone: Vec<ServiceKey> =
            self.known.keys().filter(|key| !table.contains_key(*key)).cloned().collect();
        for key in gone {
            self.remove(memory, &key, now, &mut report);
        }
        self.write_all(memory, table.iter(), now, &mut report);
        self.drop_orphans(memory, now, &mut report);
        self.settle(memory, now, &mut report);
        report
    }

    /// Makes the maps hold this table and lets everything else stand that they hold already. A service of which
    /// `unsure` says that its endpoints may not be known yet stays as it is where the maps have it.
    pub(crate) fn add_all<M: Memory>(
        &mut self,
        memory: &mut M,
        table: &ServiceTable,
        unsure: &BTreeSet<ServiceKey>,
        now: Instant,
    ) -> SyncReport {
        let mut report = SyncReport::default();
        let left = self.orphans.named(unsure);
        let sure = table.iter().filter(|(key, _)| !left.contains(*key));
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

    fn write_all<'t, M: Memory>(
        &mut self,
        memory: &mut M,
        table: impl Iterator<Item = (&'t ServiceKey, &'t DesiredService)>,
        now: Instant,
        report: &mut SyncReport,
    ) {
        // On fresh maps, which no program reads yet, frontends can wait for each other.
        if self.known.is_empty() && self.orphans.is_empty() {
            memory.collect();
        }
        for (key, desired) in table {
            self.upsert(memory, key, desired, now, report);
        }
        if let Err(why) = memory.flush() {
            let whole = ServiceKey("all services".to_owned());
            report.refused.push((whole, why.into()));
        }
    }

    fn drop_orphans<M: Memory>(&mut self, memory: &mut M, now: Instant, report: &mut SyncReport) {
        for (index, orphan) in std::mem::take(&mut self.orphans).into_iter().enumerate() {
            let key = ServiceKey(format!("unclaimed-{index}"));
            self.known.insert(key.clone(), orphan);
            self.remove(memory, &key, now, report);
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
                self.remove(memory, key, now, &mut report);
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

    /// Services that wait, or parts of which wait, for room or for another service.
    pub(crate) fn refused(&self) -> impl Iterator<Item = &ServiceKey> {
        self.waiting.keys()
    }

    /// Endpoints of a service with their ids.
    pub(crate) fn backends(&self, key: &ServiceKey) -> impl Iterator<Item = (SocketAddr, u32)> + use<'_> {
        let backends = self.known.get(key).into_iter().flat_map(|known| &known.backends);
        backends.map(|(key, (id, _))| (socket_address(key), *id))
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
                    known.desired = None;
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
        if self.known.get(key).is_some_and(|known| known.desired == Some(fingerprint)) {
            report.unchanged += 1;
            return;
        }
        self.waiting.remove(key);
        match self.try_upsert(memory, key, desired, now, report) {
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
        desired: &DesiredService,
        now: Instant,
        report: &mut SyncReport,
    ) -> Result<(), Refused> {
        let frontends = self.claimable(key, desired, report);
        let mut known = match self.known.remove(key).or_else(|| self.adopt(key, &frontends)) {
            Some(known) => known,
            None => self.create(memory, now)?,
        };
        let outcome = self.bring_to(memory, key, &mut known, desired, &frontends, now);
        known.desired = outcome.is_ok().then(|| desired.fingerprint());
        self.known.insert(key.clone(), known);
        outcome
    }

    /// The frontends this service may have now; the others are reported and waited for.
    fn claimable(
        &mut self,
        key: &ServiceKey,
        desired: &DesiredService,
        report: &mut SyncReport,
    ) -> BTreeMap<FrontendKey, u32> {
        let mut frontends = BTreeMap::new();
        for frontend in &desired.frontends {
            let frontend_key = frontend.key();
            match self.owners.get(&frontend_key) {
                Some(owner) if owner != key => {
                    self.waiting.insert(key.clone(), desired.clone());
                    let conflict =
                        Refused::Conflict { frontend: describe(&frontend_key), owner: owner.clone() };
                    report.refused.push((key.clone(), conflict));
                }
                _ => {
                    frontends.insert(frontend_key, frontend.flags());
                }
            }
        }
        frontends
    }

    /// The service that the maps already hold under one of these frontends.
    fn adopt(&mut self, key: &ServiceKey, frontends: &BTreeMap<FrontendKey, u32>) -> Option<Known> {
        let orphan = self.orphans.claim(frontends.keys())?;
        for frontend in orphan.frontends.keys() {
            self.own(*frontend, key);
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
        key: &ServiceKey,
        known: &mut Known,
        desired: &DesiredService,
        frontends: &BTreeMap<FrontendKey, u32>,
        now: Instant,
    ) -> Result<(), Refused> {
        let added = frontends.keys().filter(|frontend| !known.frontends.contains_key(*frontend)).count();
        self.room.check_frontends(added)?;
        if backends_differ(known, &desired.backends) || known.table != desired.table_print() {
            let prepared = self.room.prepare(memory, known, desired, now)?;
            write_backends(memory, known.id, &prepared);
            self.publish(memory, known, prepared, desired.affinity_secs, now);
            known.table = desired.table_print();
        } else if known.slot.affinity_secs() != desired.affinity_secs {
            known.slot = ServiceSlot::new(known.slot.extent(), desired.affinity_secs);
            memory.publish_slot(known.id, known.slot);
        }
        if known.name.as_deref() != Some(&key.0) {
            memory.write_name(known.id, &key.0)?;
            known.name = Some(key.0.clone());
        }
        let ranges: BTreeSet<(NetAddr, u8)> = desired.source_ranges.iter().map(SourcePrefix::key).collect();
        self.room.check_ranges(ranges.difference(&known.ranges).count())?;
        // New ranges before the frontends that ask for them, old ones after.
        for range in ranges.iter().copied() {
            if known.ranges.insert(range) {
                self.room.ranges_used += 1;
                memory.insert_range(known.id, range)?;
            }
        }
        self.write_frontends(memory, key, known, frontends)?;
        self.retain_ranges(memory, known, &ranges)
    }

    /// Removes all source ranges but these.
    fn retain_ranges<M: Memory>(
        &mut self,
        memory: &mut M,
        known: &mut Known,
        wanted: &BTreeSet<(NetAddr, u8)>,
    ) -> Result<(), Refused> {
        let gone: Vec<(NetAddr, u8)> = known.ranges.difference(wanted).copied().collect();
        for range in gone {
            memory.remove_range(known.id, range)?;
            known.ranges.remove(&range);
            self.room.ranges_used = self.room.ranges_used.saturating_sub(1);
        }
        Ok(())
    }

    /// Moves readers to the new list with one store, then lets the old one go.
    fn publish<M: Memory>(
        &mut self,
        memory: &mut M,
        known: &mut Known,
        prepared: Prepared,
        affinity_secs: u32,
        now: Instant,
    ) {
        known.slot = ServiceSlot::new(prepared.extent.map_or(0, |extent| extent.start), affinity_secs);
        memory.publish_slot(known.id, known.slot);
        if let Some(old) = std::mem::replace(&mut known.extent, prepared.extent) {
            self.room.freed_extents.push(old, now);
        }
        let old = std::mem::take(&mut known.backends);
        known.backends = prepared.order.into_iter().map(|(key, id, place)| (key, (id, place))).collect();
        for (key, (id, _)) in old {
            self.freed = true;
            if !known.backends.contains_key(&key) {
                self.retire(memory, known, &key, id);
                self.room.freed_backends.push(Range { start: id, len: 1 }, now);
            }
        }
    }

    /// Marks an endpoint as gone and notes it for sockets that are connected to it.
    fn retire<M: Memory>(&mut self, memory: &mut M, known: &Known, key: &BackendKey, id: u32) {
        if takes_datagrams(known) {
            self.retired_datagram.push(socket_address(key));
        }
        retire_backend(memory, id);
    }

    fn write_frontends<M: Memory>(
        &mut self,
        memory: &mut M,
        key: &ServiceKey,
        known: &mut Known,
        frontends: &BTreeMap<FrontendKey, u32>,
    ) -> Result<(), Refused> {
        for (frontend, flags) in frontends {
            if known.frontends.get(frontend) == Some(flags) {
                continue;
            }
            // A frontend may still stand under a service that nobody has claimed; it is this one's now.
            let counted = self.orphans.release(frontend);
            self.own(*frontend, key);
            if frontend.scope == FrontendKey::SCOPE_NODE {
                // Wider before the frontend exists, so that it is found from its first moment.
                memory.publish_node_ports(self.node_port_bounds());
            }
            memory.insert_frontend(*frontend, FrontendValue { service: known.id, flags: *flags })?;
            if known.frontends.insert(*frontend, *flags).is_none() && !counted {
                self.room.frontends_used += 1;
            }
        }
        let gone: Vec<FrontendKey> =
            known.frontends.keys().filter(|f| !frontends.contains_key(*f)).copied().collect();
        for frontend in gone {
            memory.remove_frontend(frontend)?;
            known.frontends.remove(&frontend);
            self.room.frontends_used = self.room.frontends_used.saturating_sub(1);
            self.freed = true;
            self.disown(&frontend);
        }
        Ok(())
    }

    fn remove<M: Memory>(&mut self, memory: &mut M, key: &ServiceKey, now: Instant, report: &mut SyncReport) {
        let Some(mut known) = self.known.remove(key) else {
            return;
        };
        self.waiting.remove(key);
        let datagrams = takes_datagrams(&known);
        if let Err(why) = self.write_frontends(memory, key, &mut known, &BTreeMap::new()) {
            report.refused.push((key.clone(), why));
            self.known.insert(key.clone(), known);
            return;
        }
        let leftovers = self.retain_ranges(memory, &mut known, &BTreeSet::new());
        if let Err(why) = leftovers.and_then(|()| memory.remove_name(known.id).map_err(Refused::from)) {
            // What stays is keyed by an id that nobody uses, and is overwritten by the id's next service.
            report.refused.push((key.clone(), why));
        }
        memory.publish_slot(known.id, ServiceSlot::default());
        if let Some(extent) = known.extent {
            self.room.freed_extents.push(extent, now);
        }
        for (address, (id, _)) in std::mem::take(&mut known.backends) {
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

    fn own(&mut self, frontend: FrontendKey, key: &ServiceKey) {
        let before = self.owners.insert(frontend, key.clone());
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

fn backends_differ(known: &Known, desired: &[DesiredBackend]) -> bool {
    let wanted = by_address(desired);
    wanted.len() != known.backends.len()
        || wanted.iter().any(|(key, place)| known.backends.get(key).map(|(_, place)| place) != Some(place))
}

/// Writes the new backends and the new extent. Nothing points at either yet, except for backends whose place alone
/// changed, which stay valid throughout.
fn write_backends<M: Memory>(memory: &mut M, service: u32, prepared: &Prepared) {
    let Some(extent) = prepared.extent else {
        return;
    };
    let (mut local_only, mut local) = (0_u16, 0_u16);
    for (index, ((addr, port), id, place)) in (extent.start + 1..).zip(&prepared.order) {
        let flags = match place {
            Place::LocalOnly => Backend::FLAG_LOCAL,
            Place::Local => Backend::FLAG_LOCAL | Backend::FLAG_CLUSTER,
            Place::Far => Backend::FLAG_CLUSTER,
        };
        local_only += u16::from(*place == Place::LocalOnly);
        local += u16::from(*place <= Place::Local);
        let backend = Backend { addr: *addr, port: *port, flags, service };
        if prepared.fresh.contains(id) || memory.backend(*id) != backend {
            memory.write_backend(*id, backend);
        }
        memory.write_extent_word(index, u64::from(*id));
    }
    let all = u16::try_from(prepared.order.len()).unwrap_or(u16::MAX);
    let mut header = ExtentHeader::new(all, local, local_only);
    if let Some(table) = &prepared.table {
        header = header.with_table(table.kind);
        for (index, word) in (extent.start + 1 + u32::from(all)..).zip(&table.words) {
            memory.write_extent_word(index, *word);
        }
    }
    memory.write_extent_word(extent.start, header.0);
}

fn socket_address((addr, port): &BackendKey) -> SocketAddr {
    SocketAddr::new(IpAddr::from(*addr), port.to_host())
}

fn takes_datagrams(known: &Known) -> bool {
    known.frontends.keys().any(|frontend| frontend.proto == Protocol::Udp.number())
}

/// Marks a backend as gone, for sockets and clients that remember it; its address stays readable until reuse.
fn retire_backend<M: Memory>(memory: &mut M, id: u32) {
    let backend = memory.backend(id);
    memory.write_backend(id, Backend { flags: 0, ..backend });
}

#[cfg(test)]
mod tests;
