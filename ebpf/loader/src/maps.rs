//! Typed handles of the maps, and the memory-mapped arrays through which most writes go without a system call.

#![allow(unsafe_code, reason = "memory-mapped kernel arrays")]

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use aya::{
    Ebpf,
    maps::{
        Array, HashMap, IterableMap, Map, MapData, MapError, PerCpuArray, PerCpuValues, RingBuf,
        lpm_trie::{Key, LpmTrie},
    },
};
use ebpf_common::{
    AffinityKey, AffinityValue, Backend, BackendStats, FrontendKey, FrontendValue, FrontendWord, Meta,
    NatConfig, NetAddr, NodeAddressUse, NodePortBounds, PodRouter, ServiceSlot, ServiceStats, SourceRange,
    WayEntry, WayKey, counter_of, map_names,
};
use thiserror::Error;

use crate::{
    addresses::Addresses,
    devices::DeviceMap,
    flows::FlowMap,
    memory::{Memory, MemoryError, Unwritten},
    names::Names,
    shortcuts::{FarPodMap, ShortcutMap},
    sys,
    table::describe,
};

/// A map of the object that is missing or not what this library was built for.
#[derive(Debug, Error)]
pub enum MapsError {
    /// The object has no such map.
    #[error("the BPF object has no map {0}")]
    Absent(&'static str),
    /// The map has another type or other sizes.
    #[error("map {name} is not of the expected kind")]
    Kind {
        /// Which map.
        name: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// A pinned map cannot be opened.
    #[error("the pinned map {name} cannot be opened")]
    Pinned {
        /// Which map.
        name: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// What a map holds cannot be moved to another.
    #[error("cannot copy map {name}")]
    Copy {
        /// Which map.
        name: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// The kernel does not map the array into memory.
    #[error("cannot map array {name} into memory")]
    Mmap {
        /// Which map.
        name: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The maps that user space writes or reads.
pub(crate) struct Maps {
    frontends: HashMap<MapData, FrontendKey, FrontendWord>,
    node_addresses: HashMap<MapData, NetAddr, NodeAddressUse>,
    stats: PerCpuArray<MapData, ServiceStats>,
    backend_stats: Mapped<BackendStats>,
    signals: RingBuf<MapData>,
    names: Names,
    ranges: LpmTrie<MapData, SourceRange, u32>,
    nat_config: Array<MapData, NatConfig>,
    pub(crate) devices: DeviceMap,
    pub(crate) flows: FlowMap,
    pub(crate) shortcuts: ShortcutMap,
    pub(crate) far_pods: FarPodMap,
    pod_router: Array<MapData, PodRouter>,
    affinity: HashMap<MapData, AffinityKey, AffinityValue>,
    shortcuts_end: Array<MapData, u64>,
    ways: LpmTrie<MapData, WayKey, WayEntry>,
    meta: Array<MapData, Meta>,
    slots: Mapped<ServiceSlot>,
    extents: Mapped<u64>,
    backends: Mapped<Backend>,
    node_ports: Mapped<NodePortBounds>,
    /// Ids of services that are gone: what counted them is another's next.
    freed: BTreeSet<u32>,
    /// Another process, or other maps, had ids before, and nobody knows which.
    inherited: bool,
    /// Frontends to be written together.
    collected: Option<Vec<(FrontendKey, FrontendWord)>>,
}

impl Maps {
    /// Takes the maps out of a loaded object.
    pub(crate) fn take(object: &mut Ebpf) -> Result<Self, MapsError> {
        Ok(Self {
            frontends: take(object, map_names::FRONTENDS)?,
            node_addresses: take(object, map_names::NODE_ADDRESSES)?,
            stats: take(object, map_names::SERVICE_STATS)?,
            backend_stats: Mapped::open(object, map_names::BACKEND_STATS)?,
            signals: take(object, map_names::FLOW_SIGNALS)?,
            names: Names::take(object)?,
            ranges: take(object, map_names::SOURCE_RANGES)?,
            nat_config: take(object, map_names::NAT_CONFIG)?,
            devices: take(object, map_names::DEVICES)?,
            flows: take(object, map_names::FLOWS)?,
            affinity: take(object, map_names::AFFINITY)?,
            shortcuts: take(object, map_names::POD_LINKS)?,
            far_pods: take(object, map_names::FAR_PODS)?,
            pod_router: take(object, map_names::POD_ROUTER)?,
            shortcuts_end: take(object, map_names::SHORTCUTS_END)?,
            ways: take(object, map_names::WAYS)?,
            meta: take(object, map_names::META)?,
            slots: Mapped::open(object, map_names::SERVICES)?,
            extents: Mapped::open(object, map_names::EXTENTS)?,
            backends: Mapped::open(object, map_names::BACKENDS)?,
            node_ports: Mapped::open(object, map_names::NODE_PORT_BOUNDS)?,
            freed: BTreeSet::new(),
            inherited: true,
            collected: None,
        })
    }

    /// They were just made: nothing in them was anybody's before.
    pub(crate) fn made_anew(&mut self) {
        self.inherited = false;
    }

    /// Has a service count from nothing.
    fn forget_stats(&mut self, service: u32) -> Result<(), MapError> {
        if self.stats(service)? == ServiceStats::default() {
            return Ok(());
        }
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
        self.stats.set(service, PerCpuValues::try_from(vec![ServiceStats::default(); cpus])?, 0)
    }

    /// Takes over what smaller maps of the same layout hold: every id stays what it is.
    pub(crate) fn copy_from(&mut self, dir: &Path) -> Result<(), MapsError> {
        let copy = |name: &'static str| move |source| MapsError::Copy { name, source };
        for item in &pinned::<HashMap<_, FrontendKey, FrontendWord>>(dir, map_names::FRONTENDS)? {
            let (key, value) = item.map_err(copy(map_names::FRONTENDS))?;
            self.frontends.insert(key, value, 0).map_err(copy(map_names::FRONTENDS))?;
        }
        for item in &pinned::<HashMap<_, NetAddr, NodeAddressUse>>(dir, map_names::NODE_ADDRESSES)? {
            let (key, value) = item.map_err(copy(map_names::NODE_ADDRESSES))?;
            self.node_addresses.insert(key, value, 0).map_err(copy(map_names::NODE_ADDRESSES))?;
        }
        self.names.copy_from(&Names::pinned(dir)?)?;
        for key in pinned::<LpmTrie<_, SourceRange, u32>>(dir, map_names::SOURCE_RANGES)?.keys() {
            let key = key.map_err(copy(map_names::SOURCE_RANGES))?;
            self.ranges.insert(&key, 1, 0).map_err(copy(map_names::SOURCE_RANGES))?;
        }
        self.slots.copy_from(&Mapped::pinned(dir, map_names::SERVICES)?);
        self.extents.copy_from(&Mapped::pinned(dir, map_names::EXTENTS)?);
        self.backends.copy_from(&Mapped::pinned(dir, map_names::BACKENDS)?);
        self.node_ports.copy_from(&Mapped::pinned(dir, map_names::NODE_PORT_BOUNDS)?);
        Ok(())
    }

    /// Marks the maps as complete.
    pub(crate) fn write_meta(&mut self, meta: Meta) -> Result<(), MapError> {
        self.meta.set(0, meta, 0)
    }

    /// Says how clients outside are hidden.
    pub(crate) fn write_nat_config(&mut self, config: NatConfig) -> Result<(), MapError> {
        self.nat_config.set(0, config, 0)
    }

    /// Makes the programs know exactly these ways, each with the bits of its prefix among 128; those that find no room
    /// are left out, and one failure is told.
    pub(crate) fn replace_ways(
        &mut self,
        wanted: &BTreeMap<(NetAddr, u32), WayEntry>,
    ) -> Result<(), MapError> {
        let present: BTreeMap<(NetAddr, u32), WayEntry> = self
            .ways
            .iter()
            .filter_map(Result::ok)
            .map(|(key, way)| ((key.data().0, key.prefix_len()), way))
            .collect();
        // What leads nowhere any more goes first, and makes room; one that fails keeps none of the others away.
        let mut outcome = Ok(());
        for (addr, bits) in present.keys().filter(|prefix| !wanted.contains_key(prefix)) {
            outcome = ignore_absent(self.ways.remove(&Key::new(*bits, WayKey(*addr)))).and(outcome);
        }
        for ((addr, bits), way) in wanted.iter().filter(|(prefix, way)| present.get(prefix) != Some(way)) {
            outcome = self.ways.insert(&Key::new(*bits, WayKey(*addr)), way, 0).and(outcome);
        }
        outcome
    }

    /// Says how packets between this node's pods and others' are routed.
    pub(crate) fn route_pods(&mut self, router: PodRouter) -> Result<(), MapError> {
        self.pod_router.set(0, router, 0)
    }

    /// Says until when the shortcuts hold true.
    pub(crate) fn trust_shortcuts(&mut self, until_ns: u64) -> Result<(), MapError> {
        self.shortcuts_end.set(0, until_ns, 0)
    }

    /// Clients that there is room for in the map of affinity.
    pub(crate) fn affinity_capacity(&self) -> u32 {
        self.affinity.map().info().map_or(u32::MAX, |info| info.max_entries())
    }

    /// Entries that there is room for in the map of flows.
    pub(crate) fn flow_capacity(&self) -> Option<u32> {
        self.flows.map().info().ok().map(|info| info.max_entries())
    }

    /// Makes the programs know what addresses are for.
    pub(crate) fn replace_node_addresses(&mut self, addresses: &Addresses) -> Result<(), MapError> {
        let present: BTreeMap<NetAddr, u32> = self
            .node_addresses
            .iter()
            .map(|item| item.map(|(address, uses)| (address, uses.0)))
            .collect::<Result<_, _>>()?;
        let wanted = addresses.wanted(&present);
        for (address, uses) in &wanted {
            if present.get(address) != Some(uses) {
                self.node_addresses.insert(address, NodeAddressUse(*uses), 0)?;
            }
        }
        for address in present.keys().filter(|address| !wanted.contains_key(*address)) {
            self.node_addresses.remove(address)?;
        }
        Ok(())
    }

    /// What wakes whoever makes room for flows.
    pub(crate) fn signals(&self) -> io::Result<OwnedFd> {
        self.signals.as_fd().try_clone_to_owned()
    }

    /// Takes the signals off; how many there were.
    pub(crate) fn take_signals(&mut self) -> u32 {
        let mut count = 0;
        while self.signals.next().is_some() {
            count += 1;
        }
        count
    }

    /// Counters of a service, summed over all CPUs.
    pub(crate) fn stats(&self, service: u32) -> Result<ServiceStats, MapError> {
        let mut sum = ServiceStats::default();
        for cpu in self.stats.get(&service, 0)?.iter() {
            add(&mut sum, cpu);
        }
        Ok(sum)
    }

    /// Counters of all services by id, read with few calls.
    pub(crate) fn all_stats(&self) -> io::Result<Vec<ServiceStats>> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        sys::sums_of_array(self.stats.map().fd().as_fd(), self.slots.len(), cpus, add)
    }

    /// Connections that a backend's id was given.
    pub(crate) fn backend_connections(&self, backend: u32) -> u64 {
        self.backend_stats.read(counter_of(backend)).connections
    }
}

impl Memory for Maps {
    fn publish_slot(&mut self, service: u32, slot: ServiceSlot) {
        self.slots.word(service).store(slot.0, Ordering::Release);
    }

    fn slot(&self, service: u32) -> ServiceSlot {
        ServiceSlot(self.slots.word(service).load(Ordering::Acquire))
    }

    fn write_extent_word(&mut self, index: u32, word: u64) {
        self.extents.word(index).store(word, Ordering::Release);
    }

    fn extent_word(&self, index: u32) -> u64 {
        self.extents.word(index).load(Ordering::Acquire)
    }

    fn write_backend(&mut self, id: u32, backend: Backend) {
        let former = self.backends.read(id);
        if (former.addr, former.port, former.service) != (backend.addr, backend.port, backend.service)
            && former != Backend::default()
        {
            // The counter was another endpoint's.
            self.backend_stats.write(counter_of(id), BackendStats::default());
        }
        self.backends.write(id, backend);
    }

    fn backend(&self, id: u32) -> Backend {
        self.backends.read(id)
    }

    fn insert_frontend(&mut self, key: FrontendKey, value: FrontendValue) -> Result<(), MemoryError> {
        let word = FrontendWord::new(&key, value);
        if let Some(collected) = &mut self.collected {
            collected.push((key, word));
            return Ok(());
        }
        self.frontends
            .insert(key, word, 0)
            .map_err(|source| MemoryError::WriteFrontend { frontend: describe(&key), source })
    }

    fn remove_frontend(&mut self, key: FrontendKey) -> Result<(), MemoryError> {
        ignore_absent(self.frontends.remove(&key))
            .map_err(|source| MemoryError::RemoveFrontend { frontend: describe(&key), source })
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MemoryError> {
        let all = self.frontends.iter().filter_map(|item| match item {
            // What says to be another one's was never written by us; its service is written anew.
            Ok((key, word)) => word.value_for(&key).map(|value| Ok((key, value))),
            Err(error) => Some(Err(error)),
        });
        all.collect::<Result<_, _>>().map_err(MemoryError::ListFrontends)
    }

    fn collect(&mut self) {
        self.collected = Some(Vec::new());
    }

    fn flush(&mut self) -> Vec<Unwritten> {
        let frontends = self.collected.take().unwrap_or_default();
        // Where the kernel does not take them together (before 5.6, or because it has no memory for one of them), each is
        // tried.
        if batch(self.frontends.map(), &frontends).is_ok() {
            return Vec::new();
        }
        let each = frontends.into_iter().filter_map(|(frontend, word)| {
            let value = word.value_for(&frontend)?;
            let why = self.insert_frontend(frontend, value).err()?;
            Some(Unwritten { service: value.service, frontend, why })
        });
        each.collect()
    }

    fn write_name(&mut self, service: u32, name: &str) -> Result<(), MemoryError> {
        let is_anothers =
            self.freed.remove(&service) || self.inherited && self.name(service).as_deref() != Some(name);
        if is_anothers && let Err(error) = self.forget_stats(service) {
            tracing::warn!(name, %error, "a service goes on counting where a former one ended");
        }
        let failed = |source| MemoryError::WriteService { what: "name", service, source };
        self.names.write(service, name).map_err(failed)
    }

    fn remove_name(&mut self, service: u32) -> Result<(), MemoryError> {
        self.freed.insert(service);
        let failed = |source| MemoryError::WriteService { what: "name", service, source };
        self.names.remove(service).map_err(failed)
    }

    fn name(&self, service: u32) -> Option<String> {
        self.names.get(service)
    }

    fn insert_range(&mut self, service: u32, range: (NetAddr, u8)) -> Result<(), MemoryError> {
        let failed = |source| MemoryError::WriteService { what: "source range", service, source };
        self.ranges.insert(&range_key(service, range), 1, 0).map_err(failed)
    }

    fn remove_range(&mut self, service: u32, range: (NetAddr, u8)) -> Result<(), MemoryError> {
        let failed = |source| MemoryError::WriteService { what: "source range", service, source };
        ignore_absent(self.ranges.remove(&range_key(service, range))).map_err(failed)
    }

    fn ranges(&self) -> Vec<(u32, (NetAddr, u8))> {
        let keys = self.ranges.keys().filter_map(Result::ok);
        let parts = keys.map(|key| {
            let bits = key.prefix_len().saturating_sub(SourceRange::SERVICE_BITS);
            let data = key.data();
            (u32::from_be(data.service), (data.addr, u8::try_from(bits).unwrap_or(128)))
        });
        parts.collect()
    }

    fn publish_node_ports(&mut self, bounds: NodePortBounds) {
        self.node_ports.word(0).store(bounds.0, Ordering::Release);
    }

    fn wait_for_readers(&self) {
        sys::wait_for_grace_period();
    }
}

/// Writes many elements with one call. Some of them may be written where it fails.
fn batch<K: aya::Pod, V: aya::Pod>(map: &MapData, elements: &[(K, V)]) -> io::Result<()> {
    if elements.is_empty() {
        return Ok(());
    }
    let (keys, values): (Vec<K>, Vec<V>) = elements.iter().copied().unzip();
    sys::map_update_batch(map.fd().as_fd(), &keys, &values)
}

/// Adds one CPU's counters to a sum.
pub(crate) fn add(sum: &mut ServiceStats, cpu: &ServiceStats) {
    sum.forwarded += cpu.forwarded;
    sum.refused += cpu.refused;
    sum.affinity_hits += cpu.affinity_hits;
    sum.healed += cpu.healed;
    sum.external += cpu.external;
    sum.denied += cpu.denied;
    sum.packets_in += cpu.packets_in;
    sum.bytes_in += cpu.bytes_in;
    sum.packets_out += cpu.packets_out;
    sum.bytes_out += cpu.bytes_out;
    sum.found_again += cpu.found_again;
}

/// Removing what is not there is done.
pub(crate) fn ignore_absent(outcome: Result<(), MapError>) -> Result<(), MapError> {
    match outcome {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn range_key(service: u32, (addr, bits): (NetAddr, u8)) -> Key<SourceRange> {
    let prefix = SourceRange::SERVICE_BITS + u32::from(bits);
    Key::new(prefix, SourceRange { service: service.to_be(), addr })
}

/// Opens a pinned map.
pub(crate) fn pinned<M: TryFrom<Map, Error = MapError>>(
    dir: &Path,
    name: &'static str,
) -> Result<M, MapsError> {
    let data = MapData::from_pin(dir.join(name)).map_err(|source| MapsError::Pinned { name, source })?;
    let map = Map::from_map_data(data).map_err(|source| MapsError::Pinned { name, source })?;
    M::try_from(map).map_err(|source| MapsError::Kind { name, source })
}

pub(crate) fn take<M: TryFrom<Map, Error = MapError>>(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<M, MapsError> {
    let map = object.take_map(name).ok_or(MapsError::Absent(name))?;
    M::try_from(map).map_err(|source| MapsError::Kind { name, source })
}

/// An array of the kernel, mapped into our memory. Its stores are seen by programs at once.
pub(crate) struct Mapped<T> {
    base: NonNull<T>,
    len: u32,
    bytes: usize,
    /// Keeps the element type; the map itself is kept alive by the mapping.
    element: PhantomData<T>,
}

// SAFETY: the mapping is plain shared memory that belongs to this value; no thread-local state is involved.
unsafe impl<T: Send> Send for Mapped<T> {}

impl<T: Copy + aya::Pod> Mapped<T> {
    /// Takes an array out of a loaded object.
    pub(crate) fn open(object: &mut Ebpf, name: &'static str) -> Result<Self, MapsError> {
        let map = object.take_map(name).ok_or(MapsError::Absent(name))?;
        Self::of(&map, name)
    }

    /// Maps a pinned array.
    pub(crate) fn pinned(dir: &Path, name: &'static str) -> Result<Self, MapsError> {
        let data = MapData::from_pin(dir.join(name)).map_err(|source| MapsError::Pinned { name, source })?;
        let map = Map::from_map_data(data).map_err(|source| MapsError::Pinned { name, source })?;
        Self::of(&map, name)
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Takes over the elements of a shorter array.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        for index in 0..other.len.min(self.len) {
            self.write(index, other.read(index));
        }
    }

    fn of(map: &Map, name: &'static str) -> Result<Self, MapsError> {
        // The conversion checks key and value sizes.
        let array = Array::<&MapData, T>::try_from(map).map_err(|source| MapsError::Kind { name, source })?;
        let len = array.len();
        let Map::Array(data) = map else {
            return Err(MapsError::Absent(name));
        };
        // The kernel's stride is the size rounded up to eight; every element type is a multiple of eight already.
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let bytes = (len as usize * size_of::<T>()).next_multiple_of(page_size());
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = data.fd().as_fd().as_raw_fd();
        // SAFETY: a fresh shared mapping of a descriptor that is open during the call, at an address the kernel
        // chooses; it touches no memory of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, 0) };
        match NonNull::new(base) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED => {
                Ok(Self { base: base.cast(), len, bytes, element: PhantomData })
            }
            _ => Err(MapsError::Mmap { name, source: io::Error::last_os_error() }),
        }
    }

    fn element(&self, index: u32) -> NonNull<T> {
        assert!(index < self.len, "the allocators hand out indices below the capacity only");
        // SAFETY: `index` is below the number of elements that the mapping holds.
        unsafe { self.base.add(index as usize) }
    }

    /// The element as one atomic word; only for types of eight bytes.
    fn word(&self, index: u32) -> &AtomicU64 {
        const { assert!(size_of::<T>() == 8) };
        // SAFETY: the element is eight bytes, aligned to eight by the page-aligned base, and only ever accessed by
        // whole-word loads and stores, here and in the programs.
        unsafe { self.element(index).cast::<AtomicU64>().as_ref() }
    }

    pub(crate) fn write(&mut self, index: u32, value: T) {
        // SAFETY: the element lies within the mapping; readers reach it only through a word published later, or
        // tolerate a change of its flags.
        unsafe { self.element(index).write_volatile(value) };
    }

    pub(crate) fn read(&self, index: u32) -> T {
        // SAFETY: the element lies within the mapping and `Pod` makes every bit pattern a value.
        unsafe { self.element(index).read_volatile() }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `open`; no reference into it outlives this value.
        if unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) } != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "cannot unmap a BPF array");
        }
    }
}

fn page_size() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(4096)
}
