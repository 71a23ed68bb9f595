//! Connections from outside that are translated packet by packet.

use crate::{NetAddr, NetPort};

/// One direction of a flow, as its packets arrive.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// Source address.
    pub src: NetAddr,
    /// Destination address.
    pub dst: NetAddr,
    /// Source port.
    pub src_port: NetPort,
    /// Destination port.
    pub dst_port: NetPort,
    /// IP protocol number.
    pub proto: u8,
    /// [`Self::FORWARD`] or [`Self::REPLY`].
    pub direction: u8,
    /// Padding, 0.
    pub padding: u16,
}

impl FlowKey {
    /// From the client to the service.
    pub const FORWARD: u8 = 0;
    /// From the backend.
    pub const REPLY: u8 = 1;
}

/// Everything about a flow, the same behind both of its keys: either half is enough to make the other again.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FlowValue {
    /// The client.
    pub client: NetAddr,
    /// What it dialled.
    pub frontend: NetAddr,
    /// Who answers.
    pub backend: NetAddr,
    /// What the backend sees as the client: the client itself, or an address of this node.
    pub source: NetAddr,
    /// The client's port.
    pub client_port: NetPort,
    /// The dialled port.
    pub frontend_port: NetPort,
    /// The backend's port.
    pub backend_port: NetPort,
    /// The port beside [`Self::source`].
    pub source_port: NetPort,
    /// The service.
    pub service: u32,
    /// The backend's id.
    pub backend_id: u32,
    /// IP protocol number.
    pub proto: u8,
    /// `FLAG_*` bits.
    pub flags: u8,
    /// Padding, 0.
    pub padding: [u8; 6],
    /// `CLOCK_MONOTONIC` nanoseconds of the last packet.
    pub last_used_ns: u64,
}

impl FlowValue {
    /// The client or the backend has said goodbye; a new connection of the same client starts anew.
    pub const FLAG_CLOSING: u8 = 1;
    /// Packets are sent on as they are, to the backend's node.
    pub const FLAG_RELAYED: u8 = 2;
    /// Connection tracking sees the backend's answers before they are rewritten, and so both directions.
    pub const FLAG_TRACKED: u8 = 4;
    /// No client's: a connection of the node's own, or of a pod behind its address, from a port that is a frontend's.
    pub const FLAG_OWN: u8 = 8;
    /// The client began another connection between the same ports, which is not the service's any more.
    pub const FLAG_OVER: u8 = 16;

    /// The key of packets from the client.
    #[inline(always)]
    #[must_use]
    pub const fn forward_key(&self) -> FlowKey {
        FlowKey {
            src: self.client,
            dst: self.frontend,
            src_port: self.client_port,
            dst_port: self.frontend_port,
            proto: self.proto,
            direction: FlowKey::FORWARD,
            padding: 0,
        }
    }

    /// The key of packets from the backend.
    #[inline(always)]
    #[must_use]
    pub const fn reply_key(&self) -> FlowKey {
        FlowKey {
            src: self.backend,
            dst: self.source,
            src_port: self.backend_port,
            dst_port: self.source_port,
            proto: self.proto,
            direction: FlowKey::REPLY,
            padding: 0,
        }
    }

    /// Whether it is no client's.
    #[inline(always)]
    #[must_use]
    pub const fn is_own(&self) -> bool {
        self.flags & Self::FLAG_OWN != 0
    }

    /// Whether the backend sees another address than the client's.
    #[inline(always)]
    #[must_use]
    pub fn hides_client(&self) -> bool {
        self.source != self.client
    }
}

/// So many flows are established between two signals that they are.
pub const FLOWS_PER_SIGNAL: u32 = 256;

/// A packet that came in fragments.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub src: NetAddr,
    /// Destination address.
    pub dst: NetAddr,
    /// Identification of the packet.
    pub id: u32,
    /// IP protocol number.
    pub proto: u32,
}

/// The ports that its first fragment had.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FragmentPorts {
    /// Source port.
    pub src: NetPort,
    /// Destination port.
    pub dst: NetPort,
}

/// A network device whose packets are looked at.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DeviceEntry {
    /// Address of this node behind which clients are hidden from IPv4 backends that this device leads to; all zero
    /// where it has none of its own.
    pub source_v4: NetAddr,
    /// The same for IPv6.
    pub source_v6: NetAddr,
    /// `FLAG_*` bits.
    pub flags: u32,
    /// One more than the device's `accept_local` before it was changed; 0 where it was not.
    pub accept_local_before: u32,
    /// The same for `rp_filter`.
    pub rp_filter_before: u32,
    /// Padding, 0.
    pub padding: u32,
}

impl DeviceEntry {
    /// Clients behind it are outside.
    pub const FLAG_OUTER: u32 = 1;
    /// Its driver sends frames that an XDP program of another device redirects.
    pub const FLAG_XDP: u32 = 2;
    /// Connection tracking sees what arrives there before packet programs do (a bridge, with `br_netfilter`): IPv4.
    pub const FLAG_TRACKED_V4: u32 = 4;
    /// The same for IPv6.
    pub const FLAG_TRACKED_V6: u32 = 8;
}

/// The bit in the mark of packets that were rewritten in both directions before connection tracking sees them, which
/// therefore must leave them alone: it would call each direction's packets invalid.
pub const UNTRACKED_MARK: u32 = 0x1000;

/// A route of the node, for packets that do not come from a socket of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WayEntry {
    /// The neighbour that takes them; all zero where that is their destination itself.
    pub via: NetAddr,
    /// Index of the device.
    pub device: u32,
    /// Link address of the neighbour; all zero where it is not known.
    pub to: [u8; 6],
    /// Link address of the device.
    pub from: [u8; 6],
    /// Bytes that a packet may have there.
    pub mtu: u32,
}

/// Key of the trie of ways: the address, in its mapped form.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WayKey(pub NetAddr);

impl WayKey {
    /// Bits of a whole key.
    pub const ALL_BITS: u32 = 128;
}

/// How clients outside are hidden from backends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NatConfig {
    /// Address of this node that IPv4 backends see where the device that leads to them has none of its own; all zero
    /// where there is none.
    pub source_v4: NetAddr,
    /// The same for IPv6.
    pub source_v6: NetAddr,
    /// First port, in host order.
    pub first_port: u32,
    /// How many ports; 0 switches the translation off.
    pub ports: u32,
    /// What makes the hash of a flow this cluster's own.
    pub seed: u32,
    /// Padding, 0.
    pub padding: u32,
}

const _: () = assert!(size_of::<FlowKey>() == 40 && align_of::<FlowKey>() == 4);
const _: () = assert!(size_of::<FlowValue>() == 96 && align_of::<FlowValue>() == 8);
const _: () = assert!(size_of::<DeviceEntry>() == 48);
const _: () = assert!(size_of::<WayEntry>() == 36);
const _: () = assert!(size_of::<WayKey>() == 16);
const _: () = assert!(size_of::<FragmentKey>() == 40);
const _: () = assert!(size_of::<FragmentPorts>() == 4);
const _: () = assert!(size_of::<NatConfig>() == 48);
