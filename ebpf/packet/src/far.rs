//! Packets between a pod of this node and one of another, which are routed without the stack: what the stack would have done.

use ebpf_common::{FarPod, NetAddr, PodRouter};

use crate::{
    external::Way,
    parse::{Headers, Packet, Part, TCP, UDP, count_hop, parse},
};

/// Extension header that every router reads.
const HOP_BY_HOP: u8 = 0;
/// Sizes of headers.
const V4_HEADER: u32 = 20;
const UDP_HEADER: u32 = 8;

/// What the programs know of pods and routes.
pub trait FarTables {
    /// How packets between nodes are routed; nothing while they are not.
    fn router(&self) -> Option<PodRouter>;
    /// A pod of this node by its address.
    fn pod(&self, address: &NetAddr) -> Option<FarPod>;
    /// The node's route to an address, and how long a packet may be there.
    fn route(&self, to: &NetAddr) -> Option<(Way, u32)>;
    /// The pod's address is in doubt.
    fn forget(&self, address: &NetAddr);
}

/// A packet that a pod sends to the bridge's own address, by the link of this number: the way of the tunnel that it takes, with a
/// hop less. Nothing where the stack has to see to it, and it is unchanged. `segment`: what one segment of a larger one carries, 0
/// for one that is no larger one.
#[inline(always)]
pub fn to_far_pod<P: Packet, T: FarTables>(
    packet: &mut P,
    tables: &T,
    router: &PodRouter,
    ethertype: u16,
    link: u32,
    segment: u32,
) -> Option<Way> {
    let headers = parse(packet, crate::ETHERNET, ethertype, true)?;
    let own = tables.pod(&headers.src)?;
    if own.link != link {
        // It has moved, or somebody pretends to be it.
        tables.forget(&headers.src);
        return None;
    }
    let (way, mtu) = tables.route(&headers.dst)?;
    if way.device != router.tunnel || way.via == NetAddr::ANY_V6 {
        return None;
    }
    hop(packet, &headers, segment, mtu)?;
    Some(way)
}

/// A packet that arrived by the tunnel: the pod of this node that it is for. As above.
#[inline(always)]
pub fn from_far_pod<P: Packet, T: FarTables>(
    packet: &mut P,
    tables: &T,
    router: &PodRouter,
    ethertype: u16,
    segment: u32,
) -> Option<FarPod> {
    let headers = parse(packet, crate::ETHERNET, ethertype, true)?;
    let pod = tables.pod(&headers.dst)?;
    // Nobody behind the tunnel has an address that is elsewhere.
    if tables.route(&headers.src)?.0.device != router.tunnel {
        return None;
    }
    hop(packet, &headers, segment, router.mtu)?;
    Some(pod)
}

/// Takes a hop off, where the packet fits and nobody else has to look at it.
#[inline(always)]
fn hop<P: Packet>(packet: &mut P, headers: &Headers, segment: u32, mtu: u32) -> Option<()> {
    // The network header has something in it that routers read, or there is an answer to be given.
    let plain = if headers.v4 {
        headers.transport == headers.network + V4_HEADER
    } else {
        packet.load::<1>(headers.network + 6)? != [HOP_BY_HOP]
    };
    if !plain || headers.hops <= 1 {
        return None;
    }
    let len = match (segment, headers.proto) {
        (0, _) => headers.len,
        (_, TCP) if headers.part == Part::Whole => {
            let [offset] = packet.load::<1>(headers.transport + 12)?;
            headers.transport - headers.network + u32::from(offset >> 4) * 4 + segment
        }
        (_, UDP) if headers.part == Part::Whole => headers.transport - headers.network + UDP_HEADER + segment,
        _ => return None,
    };
    if len > mtu {
        return None;
    }
    count_hop(packet, headers)
}

#[cfg(test)]
mod tests;
