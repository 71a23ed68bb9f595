//! The maps, and the view of them that the decisions take.
//!
//! Every map has one writer, named in its doc. Capacities here are placeholders: the loader sets its own.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
};
use ebpf_common::{
    AffinityKey, AffinityValue, Backend, BackendStats, DatagramPeers, DeviceEntry, FLOWS_PER_SIGNAL,
    FarPodEntry, FlowKey, FlowValue, FragmentKey, FragmentPorts, FrontendKey, FrontendValue, FrontendWord,
    LinkAddress, Meta, NatConfig, NetAddr, NodeAddressUse, NodePortBounds, Peer, PodLink, PodRouter,
    ServiceName, ServiceSlot, ServiceStats, ShortName, SourceRange, WayEntry, WayKey, counter_of,
};
use ebpf_packet::{Hop, Tables};

/// Written by the loader.
#[map]
static FRONTENDS: HashMap<FrontendKey, FrontendWord> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Written by the loader, through its memory mapping.
#[map]
static SERVICES: Array<ServiceSlot> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Written by the loader, through its memory mapping.
#[map]
static EXTENTS: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Written by the loader, through its memory mapping.
#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Written by the loader.
#[map]
static NODE_ADDRESSES: HashMap<NetAddr, NodeAddressUse> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Written by the loader, through its memory mapping.
#[map]
static NODE_PORT_BOUNDS: Array<NodePortBounds> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Written by the programs.
#[map]
static AFFINITY: LruHashMap<AffinityKey, AffinityValue> = LruHashMap::with_max_entries(1, 0);
/// Written by the programs.
#[map]
pub(crate) static FLOWS: LruHashMap<FlowKey, FlowValue> = LruHashMap::with_max_entries(1, 0);
/// Written by the programs.
#[map]
pub(crate) static NEW_FLOWS: LruHashMap<FlowKey, FlowValue> = LruHashMap::with_max_entries(1, 0);
/// Written by the programs.
#[map]
static FLOW_COUNT: Array<u64> = Array::with_max_entries(1, 0);
/// Written by the programs; the loader's caller sleeps on it.
#[map]
static FLOW_SIGNALS: RingBuf = RingBuf::with_byte_size(4096, 0);
/// Written by the programs.
#[map]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts> = LruHashMap::with_max_entries(1, 0);
/// Written by the loader.
#[map]
pub(crate) static NAT_CONFIG: Array<NatConfig> = Array::with_max_entries(1, 0);
/// Written by the loader.
#[map]
pub(crate) static DEVICES: HashMap<u32, DeviceEntry> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Written by the loader.
#[map]
pub(crate) static WAYS: LpmTrie<WayKey, WayEntry> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Written by the programs, and of these ones only: another load has its own.
#[map]
pub(crate) static HOPS: PerCpuArray<KnownHop> = PerCpuArray::with_max_entries(KNOWN_HOPS, 0);
/// Written by the loader.
#[map]
static POD_LINKS: HashMap<LinkAddress, PodLink> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Written by the loader; the programs remove what is in doubt.
#[map]
pub(crate) static FAR_PODS: HashMap<NetAddr, FarPodEntry> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Written by the loader.
#[map]
pub(crate) static POD_ROUTER: Array<PodRouter> = Array::with_max_entries(1, 0);
/// Written by the loader.
#[map]
static SHORTCUTS_END: Array<u64> = Array::with_max_entries(1, 0);
/// Written by the programs.
#[map]
static SERVICE_STATS: PerCpuArray<ServiceStats> = PerCpuArray::with_max_entries(1, 0);
/// Written by the programs.
#[map]
static BACKEND_STATS: Array<BackendStats> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Written by the loader, through its memory mapping; the programs only keep it alive.
#[map]
static NAMES: Array<ShortName> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Written by the loader; the programs only keep it alive.
#[map]
static LONG_NAMES: HashMap<u32, ServiceName> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Written by the loader.
#[map]
pub(crate) static SOURCE_RANGES: LpmTrie<SourceRange, u32> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Written by the loader; the programs only keep it alive.
#[map]
static META: Array<Meta> = Array::with_max_entries(1, 0);
/// Written by the programs; freed with the socket.
#[btf_map]
pub(crate) static STREAM_PEER: SkStorage<Peer> = SkStorage::new();
/// Written by the programs; freed with the socket.
#[btf_map]
pub(crate) static DATAGRAM_PEER: SkStorage<DatagramPeers> = SkStorage::new();

/// Number of hops that a CPU remembers.
pub(crate) const KNOWN_HOPS: u32 = 256;

/// A hop that was looked up a moment ago.
#[repr(C)]
pub(crate) struct KnownHop {
    /// The address that it leads to.
    pub(crate) to: NetAddr,
    /// Until when that is believed.
    pub(crate) until_ns: u64,
    /// The hop itself.
    pub(crate) hop: Hop,
    /// Longest packet that it takes.
    pub(crate) mtu: u32,
}

/// Cookie of the node's network namespace, set by the loader.
#[unsafe(no_mangle)]
static HOST_NETNS_COOKIE: Global<u64> = Global::new(0);

/// Cookie of the node's network namespace.
#[inline(always)]
pub(crate) fn host_netns_cookie() -> u64 {
    HOST_NETNS_COOKIE.load()
}

/// The host's side of the link of the pod that has this address.
#[inline(always)]
pub(crate) fn shortcut_to(address: &LinkAddress) -> Option<u32> {
    let link = POD_LINKS.get_ptr(address)?;
    // SAFETY: the memory of an element stays one of an element of this map as long as the program runs, which may be
    // another pod's by now: the kernel's allocator for hashes without preallocation (6.1) gives it on at once, and lets it
    // go only after a grace period. So it is read with one load, as it is written with one store, and says itself whose it
    // is.
    unsafe { core::ptr::read_volatile(link) }.index_for(address)
}

/// Until when those are true.
#[inline(always)]
pub(crate) fn shortcuts_end() -> u64 {
    // SAFETY: array elements live as long as the map.
    SHORTCUTS_END.get_ptr(0).map_or(0, |end| unsafe { core::ptr::read_volatile(end) })
}

/// Adds one to a counter of the service; silent where there is none.
#[inline(always)]
pub(crate) fn count(service: u32, bump: impl FnOnce(&mut ServiceStats)) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: the pointer is this CPU's own slot, which no other CPU writes, and the program is not preempted by
        // another run of itself on the same element in a way that could do more than lose one count.
        bump(unsafe { &mut *stats });
    }
}

/// Counts a connection of the backend; silent where there is no counter.
#[inline(always)]
pub(crate) fn count_backend(backend: u32) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(counter_of(backend)) {
        // SAFETY: array elements live as long as the map, and all programs add to them by atomic operations alone.
        unsafe { add_one(&raw mut (*stats).connections) };
    }
}

/// Adds one to a number that all CPUs add to.
///
/// # Safety
///
/// The pointer is that of a map's element.
#[inline(always)]
unsafe fn add_one(number: *mut u64) {
    // Rust has no atomic additions for this target, which lacks an exchange that can fail.
    #[cfg(target_arch = "bpf")]
    // SAFETY: the instruction adds to the eight bytes that the caller vouches for, and touches nothing else.
    unsafe {
        core::arch::asm!("lock *(u64 *)({at} + 0) += {one}", at = in(reg) number, one = in(reg) 1_u64);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller vouches; only lints see this.
    unsafe {
        *number += 1;
    }
}

/// A flow was established: after some of them somebody is to look whether there is room for more. A function of its own:
/// its callers have hardly any registers and stack to spare.
#[inline(never)]
pub(crate) fn signal_flow() {
    let Some(count) = FLOW_COUNT.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: array elements live as long as the map. Flows that come at the same moment may be counted as one.
    let now = unsafe { core::ptr::read_volatile(count) }.wrapping_add(1);
    // SAFETY: as above.
    unsafe { core::ptr::write_volatile(count, now) };
    // A ring that is full has signals enough in it.
    if now % u64::from(FLOWS_PER_SIGNAL) == 0 && FLOW_SIGNALS.output::<u64>(&now, 0).is_err() {}
}

/// The maps as the decisions see them.
pub(crate) struct KernelTables;

impl Tables for KernelTables {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        let mut attempt = 0;
        while attempt < 2 {
            let word = FRONTENDS.get_ptr(key)?;
            // SAFETY: as for `shortcut_to`: the memory of some element of this map, read with one load, which says itself
            // whose it is.
            let found = unsafe { core::ptr::read_volatile(word) }.value_for(key);
            if found.is_some() {
                return found;
            }
            // The element was replaced, or removed, under our eyes.
            attempt += 1;
        }
        None
    }

    #[inline(always)]
    fn service(&self, id: u32) -> Option<ServiceSlot> {
        // SAFETY: array elements live as long as the map; the volatile read is the single load that the format needs.
        SERVICES.get_ptr(id).map(|slot| unsafe { core::ptr::read_volatile(slot) })
    }

    #[inline(always)]
    fn extent_word(&self, index: u32) -> Option<u64> {
        // SAFETY: as above.
        EXTENTS.get_ptr(index).map(|word| unsafe { core::ptr::read_volatile(word) })
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<&Backend> {
        BACKENDS.get(id)
    }

    #[inline(always)]
    fn node_address(&self, addr: &NetAddr) -> NodeAddressUse {
        // SAFETY: as for frontends: at worst these are the uses that another address has just got.
        unsafe { NODE_ADDRESSES.get(addr) }.copied().unwrap_or_default()
    }

    #[inline(always)]
    fn node_port_bounds(&self) -> NodePortBounds {
        // SAFETY: as for the other arrays.
        NODE_PORT_BOUNDS
            .get_ptr(0)
            .map_or(NodePortBounds::NONE, |bounds| unsafe { core::ptr::read_volatile(bounds) })
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        // SAFETY: an entry recycled under our eyes yields a backend id that is checked before use.
        unsafe { AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, value: &AffinityValue) {
        // A full or busy LRU costs stickiness only.
        if AFFINITY.insert(key, value, 0).is_err() {}
    }
}

/// Keeps these maps in the object: nothing in the programs reads them.
#[used]
static KEEP_META: &Array<Meta> = &META;
#[used]
static KEEP_NAMES: &Array<ShortName> = &NAMES;
#[used]
static KEEP_LONG_NAMES: &HashMap<u32, ServiceName> = &LONG_NAMES;
