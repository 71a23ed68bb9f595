//! Keys and values of every BPF map, shared by the programs and user space.
//!
//! Everything here is `repr(C)` or `repr(transparent)`, made of integers only, with its padding written out and its
//! size asserted, so that both sides and every compiler agree on each byte. Change a layout and you must raise
//! [`LAYOUT_VERSION`]: the loader then fills new maps and switches the programs over, instead of misreading old ones.
//!
//! How a lookup walks the maps: [`FrontendKey`] → [`FrontendWord`] → [`ServiceSlot`] → extent in the backend index
//! ([`ExtentHeader`], then one word per backend id) → [`Backend`]. Everything a reader needs to be consistent lives
//! behind the one 64-bit [`ServiceSlot`], which user space replaces with a single store.
//!
//! This crate has no IO and no behaviour beyond packing and unpacking.
#![no_std]
#![allow(
    clippy::inline_always,
    reason = "BPF programs have no calls worth keeping: the verifier checks one function best"
)]

mod address;
mod flow;
mod meta;
mod service;
mod shortcut;
mod socket;

pub use address::{NetAddr, NetPort, Protocol};
pub use flow::{
    DeviceEntry, FLOWS_PER_SIGNAL, FlowKey, FlowValue, FragmentKey, FragmentPorts, NatConfig, UNTRACKED_MARK,
    WayEntry, WayKey,
};
pub use meta::{Meta, NodeAddressUse, NodePortBounds};
pub use service::{
    Backend, BackendStats, COUNTER_BLOCK, ExtentHeader, FrontendKey, FrontendValue, FrontendWord, NAME_BYTES,
    SHORT_NAME_BYTES, SLOTS_PER_WORD, ServiceName, ServiceSlot, ServiceStats, ShortName, SourceRange,
    TABLE_SLOTS, counter_of,
};
pub use shortcut::{FarPod, FarPodEntry, LinkAddress, PodLink, PodRouter};
pub use socket::{AffinityKey, AffinityValue, DATAGRAM_PEERS, DatagramPeers, Peer};

/// Raised whenever a layout below, or the meaning of a field, changes.
pub const LAYOUT_VERSION: u32 = 4;

/// Names of the maps, as they appear in the object and below `maps/` in the pin directory.
pub mod map_names {
    /// Hash: [`FrontendKey`](crate::FrontendKey) → [`FrontendWord`](crate::FrontendWord).
    pub const FRONTENDS: &str = "FRONTENDS";
    /// Memory-mapped array: service id → [`ServiceSlot`](crate::ServiceSlot).
    pub const SERVICES: &str = "SERVICES";
    /// Memory-mapped array of 64-bit words: the backend-index extents.
    pub const EXTENTS: &str = "EXTENTS";
    /// Memory-mapped array: backend id → [`Backend`](crate::Backend).
    pub const BACKENDS: &str = "BACKENDS";
    /// Hash: address of this node or another → [`NodeAddressUse`](crate::NodeAddressUse).
    pub const NODE_ADDRESSES: &str = "NODE_ADDRESSES";
    /// Memory-mapped array of one [`NodePortBounds`](crate::NodePortBounds).
    pub const NODE_PORT_BOUNDS: &str = "NODE_PORT_BOUNDS";
    /// LRU hash: [`AffinityKey`](crate::AffinityKey) → [`AffinityValue`](crate::AffinityValue).
    pub const AFFINITY: &str = "AFFINITY";
    /// Per-CPU array: service id → [`ServiceStats`](crate::ServiceStats).
    pub const SERVICE_STATS: &str = "SERVICE_STATS";
    /// Memory-mapped array: [`counter_of`](crate::counter_of) a backend id → [`BackendStats`](crate::BackendStats).
    pub const BACKEND_STATS: &str = "BACKEND_STATS";
    /// Memory-mapped array: service id → [`ShortName`](crate::ShortName), for people only.
    pub const NAMES: &str = "NAMES";
    /// Hash: service id → [`ServiceName`](crate::ServiceName) of those that are too long for it.
    pub const LONG_NAMES: &str = "LONG_NAMES";
    /// Trie: [`SourceRange`](crate::SourceRange) → 1.
    pub const SOURCE_RANGES: &str = "SOURCE_RANGES";
    /// LRU hash: both directions of every established flow from outside, [`FlowKey`](crate::FlowKey) →
    /// [`FlowValue`](crate::FlowValue).
    pub const FLOWS: &str = "FLOWS";
    /// The same for flows of which one direction only was seen.
    pub const NEW_FLOWS: &str = "NEW_FLOWS";
    /// Array of one number: how many flows were established.
    pub const FLOW_COUNT: &str = "FLOW_COUNT";
    /// Ring of signals to whoever makes room for flows: some were established.
    pub const FLOW_SIGNALS: &str = "FLOW_SIGNALS";
    /// LRU hash: ports of packets in fragments, [`FragmentKey`](crate::FragmentKey) →
    /// [`FragmentPorts`](crate::FragmentPorts).
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Array of one [`NatConfig`](crate::NatConfig).
    pub const NAT_CONFIG: &str = "NAT_CONFIG";
    /// Hash: index of a network device → [`DeviceEntry`](crate::DeviceEntry).
    pub const DEVICES: &str = "DEVICES";
    /// Trie: [`WayKey`](crate::WayKey) → [`WayEntry`](crate::WayEntry).
    pub const WAYS: &str = "WAYS";
    /// Hash: [`LinkAddress`](crate::LinkAddress) of a pod → [`PodLink`](crate::PodLink).
    pub const POD_LINKS: &str = "POD_LINKS";
    /// Hash: address of a pod of this node → [`FarPodEntry`](crate::FarPodEntry).
    pub const FAR_PODS: &str = "FAR_PODS";
    /// Array of one [`PodRouter`](crate::PodRouter).
    pub const POD_ROUTER: &str = "POD_ROUTER";
    /// Array of one number: nanoseconds of `CLOCK_MONOTONIC` until which the three above hold true.
    pub const SHORTCUTS_END: &str = "SHORTCUTS_END";
    /// Socket storage of stream sockets: one [`Peer`](crate::Peer).
    pub const STREAM_PEER: &str = "STREAM_PEER";
    /// Socket storage of datagram sockets: [`DatagramPeers`](crate::DatagramPeers).
    pub const DATAGRAM_PEER: &str = "DATAGRAM_PEER";
    /// Array of one [`Meta`](crate::Meta).
    pub const META: &str = "META";
    /// All of the above.
    pub const ALL: [&str; 27] = [
        FRONTENDS,
        SERVICES,
        EXTENTS,
        BACKENDS,
        NODE_ADDRESSES,
        NODE_PORT_BOUNDS,
        AFFINITY,
        SERVICE_STATS,
        BACKEND_STATS,
        NAMES,
        LONG_NAMES,
        SOURCE_RANGES,
        FLOWS,
        NEW_FLOWS,
        FLOW_COUNT,
        FLOW_SIGNALS,
        FRAGMENTS,
        NAT_CONFIG,
        DEVICES,
        WAYS,
        POD_LINKS,
        FAR_PODS,
        POD_ROUTER,
        SHORTCUTS_END,
        STREAM_PEER,
        DATAGRAM_PEER,
        META,
    ];
}

/// aya's `Pod` for the map types.
#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "Pod promises that any bit pattern is a value; it is an unsafe trait")]

    macro_rules! pod {
        ($($name:ident),* $(,)?) => {$(
            // SAFETY: `repr(C)`/`repr(transparent)` over integers with explicit padding, `Copy` and `'static`: every
            // bit pattern is a valid value and no byte is uninitialised.
            unsafe impl aya::Pod for crate::$name {}
        )*};
    }
    pod!(
        NetAddr,
        NetPort,
        FrontendKey,
        FrontendWord,
        ServiceSlot,
        ExtentHeader,
        Backend,
        ServiceStats,
        AffinityKey,
        AffinityValue,
        Peer,
        DatagramPeers,
        Meta,
        NodePortBounds,
        NodeAddressUse,
        BackendStats,
        ServiceName,
        ShortName,
        SourceRange,
        DeviceEntry,
        WayEntry,
        WayKey,
        FlowKey,
        FlowValue,
        FragmentKey,
        FragmentPorts,
        NatConfig,
        LinkAddress,
        PodLink,
        PodRouter,
        FarPodEntry,
    );
}
