//! ICMP and `ICMPv6` errors about packets of translated flows: rewritten outside and inside, so that each end hears of
//! the packet that it sent itself.

use ebpf_common::{FlowKey, NetAddr, NetPort};

use super::{Action, Flows, find, has_ports, is_untracked, reversed};
use crate::{
    parse::{End, Fix, Headers, Packet, Part, parse, set_address, set_port},
    resolve::Tables,
};

/// The packet that an ICMP error quotes.
#[inline(always)]
fn quoted<P: Packet>(packet: &P, headers: &Headers) -> Option<Headers> {
    let [kind] = packet.load::<1>(headers.transport)?;
    let is_error = if headers.v4 { matches!(kind, 3 | 11 | 12) } else { matches!(kind, 1..=4) };
    if !is_error || headers.part != Part::Whole {
        return None;
    }
    let ethertype = if headers.v4 { crate::parse::ETHERTYPE_V4 } else { crate::parse::ETHERTYPE_V6 };
    let inner = parse(packet, headers.transport + 8, ethertype, true)?;
    (has_ports(inner.proto) && inner.part != Part::Later).then_some(inner)
}

/// An ICMP error that arrives, about a packet of a flow in either direction.
#[inline(always)]
pub(super) fn ingress_error<P: Packet, M: Tables + Flows>(
    packet: &mut P,
    maps: &M,
    outer: &Headers,
) -> Option<Action> {
    let inner = quoted(packet, outer)?;
    let (_, untracked) = translate(packet, maps, outer, &inner)?;
    Some(if untracked { Action::Untracked } else { Action::Deliver })
}

/// An ICMP error that the node's own stack makes about a packet that was rewritten before it got there: too long, no hops
/// left, nobody there. It is addressed to whom the packet says to come from, which may be the node itself.
#[inline(always)]
pub(super) fn own_error<P: Packet, M: Tables + Flows>(
    packet: &mut P,
    maps: &M,
    outer: &Headers,
) -> Option<Action> {
    let inner = quoted(packet, outer)?;
    let (to, _) = translate(packet, maps, outer, &inner)?;
    Some(maps.way(&to).map_or(Action::Drop, Action::Relay))
}

/// Rewrites an error for the end that sent what it is about; that end's address, and whether connection tracking knows
/// nothing of the flow.
#[inline(always)]
fn translate<P: Packet, M: Tables + Flows>(
    packet: &mut P,
    maps: &M,
    outer: &Headers,
    inner: &Headers,
) -> Option<(NetAddr, bool)> {
    // About what we sent to a backend in the client's name.
    if let Some(flow) = find(maps, &reversed(inner, FlowKey::REPLY))
        && flow.hides_client()
    {
        let speaker = if outer.src == flow.backend { flow.frontend } else { outer.src };
        let ends = [(flow.client, flow.client_port), (flow.frontend, flow.frontend_port)];
        let (client, untracked) = (flow.client, is_untracked(flow));
        rewrite_error(packet, outer, inner, &speaker, &client, ends)?;
        return Some((client, untracked));
    }
    // About what we sent to the client in the service's name.
    let flow = find(maps, &reversed(inner, FlowKey::FORWARD)).filter(|flow| !flow.is_own())?;
    let ends = [(flow.backend, flow.backend_port), (flow.source, flow.source_port)];
    let (backend, untracked) = (flow.backend, is_untracked(flow));
    rewrite_error(packet, outer, inner, &outer.src, &backend, ends)?;
    Some((backend, untracked))
}

/// An ICMP error that leaves, about a packet that a backend got from a client it knows; or one of the node's own stack
/// about what a backend sent.
#[inline(always)]
pub(super) fn egress_error<P: Packet, M: Tables + Flows>(
    packet: &mut P,
    maps: &M,
    outer: &Headers,
) -> Option<Action> {
    let inner = quoted(packet, outer)?;
    let Some(flow) = find(maps, &reversed(&inner, FlowKey::REPLY)).filter(|flow| !flow.hides_client()) else {
        let (to, _) = translate(packet, maps, outer, &inner)?;
        return Some(maps.way(&to).map_or(Action::Drop, Action::Relay));
    };
    let speaker = if outer.src == flow.backend { flow.frontend } else { outer.src };
    let ends = [(flow.client, flow.client_port), (flow.frontend, flow.frontend_port)];
    rewrite_error(packet, outer, &inner, &speaker, &outer.dst, ends)?;
    Some(Action::Deliver)
}

/// Replaces the addresses of an error, and source and destination of what it quotes. The checksum of a quoted IPv4
/// header makes up for its addresses, so ICMP's own sees the ports alone; ICMPv6's sees everything.
#[inline(always)]
fn rewrite_error<P: Packet>(
    packet: &mut P,
    outer: &Headers,
    inner: &Headers,
    src: &NetAddr,
    dst: &NetAddr,
    ends: [(NetAddr, NetPort); 2],
) -> Option<()> {
    let checksum = outer.transport + 2;
    let content = Fix { pseudo: false, may_be_absent: false };
    let quoted_addresses = if outer.v4 { None } else { Some((checksum, content)) };
    let [source, destination] = ends;
    set_address(packet, inner, End::Source, &source.0, quoted_addresses)?;
    set_port(packet, inner, End::Source, source.1, Some((checksum, false)))?;
    set_address(packet, inner, End::Destination, &destination.0, quoted_addresses)?;
    set_port(packet, inner, End::Destination, destination.1, Some((checksum, false)))?;
    let pseudo = Fix { pseudo: true, may_be_absent: false };
    let own = if outer.v4 { None } else { Some((checksum, pseudo)) };
    set_address(packet, outer, End::Source, src, own)?;
    set_address(packet, outer, End::Destination, dst, own)
}
