//! Frontends, services, extents and backends.

use crate::{NetAddr, NetPort};

/// What a client dials: the key of the frontend hash.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The service's address; [`NetAddr::ANY_V4`] or [`NetAddr::ANY_V6`] in scope [`Self::SCOPE_NODE`].
    pub addr: NetAddr,
    /// The service's port.
    pub port: NetPort,
    /// IP protocol number.
    pub proto: u8,
    /// [`Self::SCOPE_ADDRESS`] or [`Self::SCOPE_NODE`].
    pub scope: u8,
}

impl FrontendKey {
    /// Matches exactly its address.
    pub const SCOPE_ADDRESS: u8 = 0;
    /// Matches every address of the node: NodePorts.
    pub const SCOPE_NODE: u8 = 1;
}

/// Which service answers a frontend, and how.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct FrontendValue {
    /// Index into the service array; never 0.
    pub service: u32,
    /// `FLAG_*` bits.
    pub flags: u32,
}

impl FrontendValue {
    /// Only backends of this node may answer (traffic policy `Local`).
    pub const FLAG_LOCAL: u32 = 1;
    /// Backends near this node answer, where there are any (traffic distribution).
    pub const FLAG_NEAR: u32 = 2;
}

/// The one word that publishes a service: where its extent starts, and its affinity timeout.
///
/// Bits 0..32 hold the offset of the extent in the backend index (0: no endpoints), bits 32..64 the ClientIP
/// affinity timeout in seconds (0: none). One store of this word moves every client to the new list of backends.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct ServiceSlot(pub u64);

impl ServiceSlot {
    /// Packs a slot.
    #[must_use]
    pub const fn new(extent: u32, affinity_secs: u32) -> Self {
        Self(extent as u64 | (affinity_secs as u64) << 32)
    }

    /// Offset of the extent's header; 0 where the service has no backend.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
    pub const fn extent(self) -> u32 {
        self.0 as u32
    }

    /// Seconds a client stays with its backend; 0 without affinity.
    #[inline(always)]
    #[must_use]
    pub const fn affinity_secs(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// First word of an extent: how many backend ids follow, and how many of the first of them are local or near.
///
/// Ids are ordered local, near, rest, so that every traffic policy is a range that starts at the first id. The
/// counts stand in the extent, not beside its offset, so that a reader can never pair an old count with a new list.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct ExtentHeader(pub u64);

impl ExtentHeader {
    /// Packs a header. `local <= near <= all`.
    #[must_use]
    pub const fn new(all: u16, near: u16, local: u16) -> Self {
        Self(all as u64 | (near as u64) << 16 | (local as u64) << 32)
    }

    /// Number of backends.
    #[inline(always)]
    #[must_use]
    pub const fn all(self) -> u32 {
        (self.0 & 0xffff) as u32
    }

    /// Number of backends that are local or near.
    #[inline(always)]
    #[must_use]
    pub const fn near(self) -> u32 {
        (self.0 >> 16 & 0xffff) as u32
    }

    /// Number of backends of this node.
    #[inline(always)]
    #[must_use]
    pub const fn local(self) -> u32 {
        (self.0 >> 32 & 0xffff) as u32
    }
}

/// One endpoint of one service. Endpoints are not shared between services, so that an id proves membership.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Backend {
    /// Address of the endpoint.
    pub addr: NetAddr,
    /// Port of the endpoint.
    pub port: NetPort,
    /// `FLAG_*` bits; 0 once the endpoint is gone.
    pub flags: u16,
    /// The service it belongs to.
    pub service: u32,
}

impl Backend {
    /// New connections and datagrams may go there.
    pub const FLAG_USABLE: u16 = 1;
    /// It runs on this node.
    pub const FLAG_LOCAL: u16 = 2;
}

/// Counters of one service on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ServiceStats {
    /// Connections (or datagram peers) sent to a backend.
    pub forwarded: u64,
    /// Connections refused because no backend was usable.
    pub refused: u64,
}

const _: () = assert!(size_of::<FrontendKey>() == 20 && align_of::<FrontendKey>() == 4);
const _: () = assert!(size_of::<FrontendValue>() == 8);
const _: () = assert!(size_of::<ServiceSlot>() == 8 && align_of::<ServiceSlot>() == 8);
const _: () = assert!(size_of::<ExtentHeader>() == 8 && align_of::<ExtentHeader>() == 8);
// The kernel rounds array elements up to eight bytes; 24 keeps the mapped stride equal to the size.
const _: () = assert!(size_of::<Backend>() == 24 && align_of::<Backend>() == 4);
const _: () = assert!(size_of::<ServiceStats>() == 16);
