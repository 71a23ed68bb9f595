//! What a socket remembers about its translated peers, and which client stays with which backend.

use crate::{NetAddr, NetPort};

/// One translation of one socket: the frontend it dialled and the backend that answers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Peer {
    /// The address the program dialled.
    pub frontend: NetAddr,
    /// The address the packets go to.
    pub backend: NetAddr,
    /// The port the program dialled.
    pub frontend_port: NetPort,
    /// The port the packets go to; 0 marks an empty entry.
    pub backend_port: NetPort,
    /// The backend's id.
    pub backend_id: u32,
}

/// How many frontends an unconnected datagram socket can talk to at once and still see each reply come from the
/// address it dialled; beyond that the oldest entry is replaced.
pub const DATAGRAM_PEERS: usize = 4;

/// The last translations of a datagram socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DatagramPeers {
    /// The entries; replaced in a circle.
    pub peers: [Peer; DATAGRAM_PEERS],
    /// The entry to replace next.
    pub next: u32,
    /// Padding, 0.
    pub padding: u32,
}

/// Who stays with a backend: a pod (its network namespace's cookie) or a client outside (its address), and a service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    /// The client's address, or the cookie in its first two words.
    pub client: NetAddr,
    /// Service id.
    pub service: u32,
    /// 0 for a cookie, 1 for an address.
    pub kind: u32,
}

impl AffinityKey {
    /// A pod, by its network namespace's cookie.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the two halves of the cookie")]
    pub const fn pod(cookie: u64, service: u32) -> Self {
        Self { client: NetAddr([cookie as u32, (cookie >> 32) as u32, 0, 0]), service, kind: 0 }
    }

    /// A client outside, by its address.
    #[inline(always)]
    #[must_use]
    pub const fn address(client: NetAddr, service: u32) -> Self {
        Self { client, service, kind: 1 }
    }
}

/// With which backend, and when last.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct AffinityValue {
    /// `CLOCK_MONOTONIC` nanoseconds of the last use.
    pub last_used_ns: u64,
    /// Backend id.
    pub backend_id: u32,
    /// Padding, 0.
    pub padding: u32,
}

const _: () = assert!(size_of::<Peer>() == 40 && align_of::<Peer>() == 4);
const _: () = assert!(size_of::<DatagramPeers>() == 168);
const _: () = assert!(size_of::<AffinityKey>() == 24);
const _: () = assert!(size_of::<AffinityValue>() == 16);
