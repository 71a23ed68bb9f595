//! Packets from clients that no socket hook serves: from outside the node, or from pods without hooks.
//!
//! [`ingress`] sees every packet that arrives at a device, [`egress`] every one that leaves. A flow has one value behind
//! two keys, its direction to the backend and back; either is enough to make the other anew. A flow of which only the
//! first packet was seen stands in a map of its own, so that a flood of such packets costs other such flows only.

mod choose;
mod errors;

use ebpf_common::{FlowKey, FlowValue, FragmentKey, FragmentPorts, NatConfig, NetAddr};

pub use self::choose::new_flow;
use self::{
    choose::is_own_frontend,
    errors::{egress_error, ingress_error, own_error},
};
use crate::{
    parse::{
        ACK, FIN, Headers, ICMP, ICMP_V6, Packet, Part, RST, SCTP, SYN, TCP, UDP, count_hop, parse,
        protocol_of, set_ends, set_link,
    },
    resolve::{Tables, usable},
};

/// How a packet leaves at once, without the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// By this device.
    pub device: u32,
    /// To this neighbour's link address; all zero where the device finds it.
    pub to: [u8; 6],
    /// From this link address.
    pub from: [u8; 6],
}

/// A way that the routes know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// The device.
    pub device: u32,
    /// The neighbour there.
    pub via: NetAddr,
}

/// The maps of flows.
pub trait Flows {
    /// The hook comes before another one that does the same: new flows, and what cannot leave at once, are left to that
    /// one, unchanged.
    const EARLY: bool;
    /// How a packet of this size leaves at once for an address; nothing where the stack has to see to it.
    fn hop(&self, headers: &Headers, to: &NetAddr, now_ns: u64) -> Option<Hop>;
    /// An established flow by one of its keys.
    fn established(&self, key: &FlowKey) -> Option<&FlowValue>;
    /// A flow of which one direction was seen.
    fn begun(&self, key: &FlowKey) -> Option<&FlowValue>;
    /// Puts a flow, under both keys, into the established ones.
    fn establish(&self, flow: &FlowValue);
    /// Puts a flow, under both keys, into those of which one direction was seen.
    fn begin(&self, flow: &FlowValue);
    /// Notes the time of a packet, and flags, in the entry of this key.
    fn note_use(&self, key: &FlowKey, now_ns: u64, flags: u8);
    /// The ports of a packet in fragments.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    /// Notes them.
    fn note_fragment(&self, key: &FragmentKey, ports: &FragmentPorts);
    /// How clients are hidden.
    fn nat_config(&self) -> NatConfig;
    /// The way to an address; nothing where none is known.
    fn way(&self, to: &NetAddr) -> Option<Way>;
    /// The address of this node that stands for a client before this backend: one that the backend's answers find
    /// back to, whichever way leads to it. [`NetAddr::ANY_V6`] where there is none. And whether connection tracking sees
    /// its answers before they are rewritten.
    fn source_for(&self, backend: &NetAddr) -> (NetAddr, bool);
    /// Whether a client may dial the service, by its source ranges.
    fn in_source_ranges(&self, service: u32, client: &NetAddr) -> bool;
    /// Monotonic nanoseconds, some milliseconds late at most.
    fn now(&self) -> u64;
    /// Counts something of a service.
    fn count(&self, service: u32, what: Count);
    /// Counts a new connection of a backend.
    fn count_backend(&self, backend: u32);
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// A new flow.
    Connection,
    /// The same for a connection that is open, and of which nothing is known here any more: a full table pushed it out, or
    /// another node had it before.
    FoundAgain,
    /// No backend was there.
    Refused,
    /// The client was in no source range.
    Denied,
    /// A packet to a backend, with its bytes.
    In(u32),
    /// A packet from a backend, with its bytes.
    Out(u32),
}

/// What becomes of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It goes on as it is.
    Pass,
    /// It was rewritten, and the stack routes it: so its hops are counted, filters see it, and what is too long is told.
    Deliver,
    /// The same, and its connection's other direction is rewritten before connection tracking sees it, too: the stack
    /// routes it without that, to which it would be a packet of no connection.
    Untracked,
    /// It was rewritten, and leaves by this device without the stack.
    Send(u32),
    /// It leaves with one hop less, and otherwise as it is, by this way: the node there knows what to do with it.
    Relay(Way),
    /// It goes nowhere.
    Drop,
}

/// Datagram flows end after this long without a packet.
const DATAGRAM_IDLE_NS: u64 = 120_000_000_000;
/// An entry's time is written at most this often.
const USE_STEP_NS: u64 = 1_000_000_000;

/// A packet that has arrived. `inner` devices lead to pods, the others out of the node.
#[inline(always)]
pub fn ingress<P: Packet, M: Tables + Flows>(
    packet: &mut P,
    maps: &M,
    network: u32,
    ethertype: u16,
    inner: bool,
) -> Action {
    let Some(mut headers) = parse(packet, network, ethertype, false) else {
        return Action::Pass;
    };
    if M::EARLY && (headers.part != Part::Whole || headers.hops <= 1) {
        return Action::Pass;
    }
    if matches!(headers.proto, ICMP | ICMP_V6) {
        if M::EARLY {
            return Action::Pass;
        }
        return ingress_error(packet, maps, &headers).unwrap_or(Action::Pass);
    }
    if !has_ports(headers.proto) || find_ports(maps, &mut headers).is_none() {
        return Action::Pass;
    }
    if is_hidden_reply(maps, &headers) {
        let key = reply_key(&headers);
        if let Some(flow) = find(maps, &key)
            && flow.hides_client()
        {
            return from_backend(packet, maps, &headers, &key, flow).unwrap_or(Action::Drop);
        }
    }
    to_backend(packet, maps, &headers, inner)
}

/// A packet that is leaving: what a backend answers a client whose address it saw. `rewritten`: it was a packet of a
/// flow when it arrived.
#[inline(always)]
pub fn egress<P: Packet, M: Tables + Flows>(
    packet: &mut P,
    maps: &M,
    network: u32,
    ethertype: u16,
    rewritten: bool,
) -> Action {
    // Of what was rewritten for both ends only errors may be for somebody else than they say.
    if rewritten && !matches!(protocol_of(packet, network, ethertype), Some(ICMP | ICMP_V6)) {
        return Action::Pass;
    }
    let Some(mut headers) = parse(packet, network, ethertype, false) else {
        return Action::Pass;
    };
    if matches!(headers.proto, ICMP | ICMP_V6) {
        return egress_error(packet, maps, &headers).unwrap_or(Action::Pass);
    }
    if !has_ports(headers.proto) || find_ports(maps, &mut headers).is_none() {
        return Action::Pass;
    }
    let key = reply_key(&headers);
    match find(maps, &key) {
        Some(flow) if !flow.hides_client() && !flow.is_own() => {
            note(maps, &key, flow, &headers, maps.now());
            promote_datagram(maps, &key, flow);
            maps.count(flow.service, Count::Out(headers.len));
            let (frontend, client) = ((&flow.frontend, flow.frontend_port), (&flow.client, flow.client_port));
            match set_ends(packet, &headers, frontend, client) {
                Some(()) => Action::Deliver,
                None => Action::Drop,
            }
        }
        Some(flow) if !flow.is_own() => Action::Pass,
        own => {
            let is_old = |flow: &FlowValue| maps.now().saturating_sub(flow.last_used_ns) > USE_STEP_NS;
            if own.is_none_or(is_old) {
                note_own(maps, &headers);
            }
            Action::Pass
        }
    }
}

/// Remembers a connection that leaves the node from a port that is a frontend's: one of the node's own, or of a pod that
/// is hidden behind the node's address. Its answers are no client's packets.
#[inline(always)]
fn note_own<M: Tables + Flows>(maps: &M, headers: &Headers) {
    let begins = match headers.proto {
        TCP => headers.flags & (SYN | ACK) == SYN,
        UDP => true,
        _ => false,
    };
    if !begins || headers.part == Part::Later || !is_own_frontend(maps, headers) {
        return;
    }
    // What is sent to a client whose packets are translated is no beginning.
    if find(maps, &reversed(headers, FlowKey::FORWARD)).is_some_and(|flow| !flow.is_own()) {
        return;
    }
    maps.establish(&FlowValue {
        client: headers.dst,
        frontend: headers.src,
        backend: headers.src,
        source: headers.dst,
        client_port: headers.dst_port,
        frontend_port: headers.src_port,
        backend_port: headers.src_port,
        source_port: headers.dst_port,
        service: 0,
        backend_id: 0,
        proto: headers.proto,
        flags: FlowValue::FLAG_OWN,
        padding: [0; 6],
        last_used_ns: maps.now(),
    });
}

/// A packet that the node sends to itself: only its stack's errors about rewritten packets are looked at.
#[inline(always)]
pub fn loopback<P: Packet, M: Tables + Flows>(
    packet: &mut P,
    maps: &M,
    network: u32,
    ethertype: u16,
) -> Action {
    match parse(packet, network, ethertype, false) {
        Some(headers) if matches!(headers.proto, ICMP | ICMP_V6) => {
            own_error(packet, maps, &headers).unwrap_or(Action::Pass)
        }
        _ => Action::Pass,
    }
}

#[inline(always)]
fn has_ports(proto: u8) -> bool {
    matches!(proto, TCP | UDP | SCTP)
}

/// Completes the headers of a fragment, or notes those of the first one.
#[inline(always)]
fn find_ports<M: Flows>(maps: &M, headers: &mut Headers) -> Option<()> {
    if headers.part == Part::Whole {
        return Some(());
    }
    let key =
        FragmentKey { src: headers.src, dst: headers.dst, id: headers.id, proto: u32::from(headers.proto) };
    if headers.part == Part::First {
        maps.note_fragment(&key, &FragmentPorts { src: headers.src_port, dst: headers.dst_port });
        return Some(());
    }
    let ports = maps.fragment(&key)?;
    (headers.src_port, headers.dst_port) = (ports.src, ports.dst);
    Some(())
}

#[inline(always)]
fn reply_key(headers: &Headers) -> FlowKey {
    key(headers, FlowKey::REPLY)
}

#[inline(always)]
fn key(headers: &Headers, direction: u8) -> FlowKey {
    FlowKey {
        src: headers.src,
        dst: headers.dst,
        src_port: headers.src_port,
        dst_port: headers.dst_port,
        proto: headers.proto,
        direction,
        padding: 0,
    }
}

/// The key of the packets that an ICMP error's quoted packet answers, or is answered by.
#[inline(always)]
fn reversed(headers: &Headers, direction: u8) -> FlowKey {
    FlowKey {
        src: headers.dst,
        dst: headers.src,
        src_port: headers.dst_port,
        dst_port: headers.src_port,
        proto: headers.proto,
        direction,
        padding: 0,
    }
}

#[inline(always)]
fn find<'m, M: Flows>(maps: &'m M, key: &FlowKey) -> Option<&'m FlowValue> {
    match maps.established(key) {
        Some(flow) => Some(flow),
        None => maps.begun(key),
    }
}

/// Whether the packet may answer a flow whose client is hidden behind an address of this node: the port says so at
/// little cost. SCTP keeps the client's port.
#[inline(always)]
fn is_hidden_reply<M: Flows>(maps: &M, headers: &Headers) -> bool {
    let config = maps.nat_config();
    let port = u32::from(headers.dst_port.to_host());
    headers.proto == SCTP || port >= config.first_port && port - config.first_port < config.ports
}

/// Notes the packet in its flow, if there is anything new about it; whether there was.
#[inline(always)]
fn note<M: Flows>(maps: &M, key: &FlowKey, flow: &FlowValue, headers: &Headers, now: u64) -> bool {
    let closing = headers.proto == TCP && headers.flags & (FIN | RST) != 0;
    let news = closing || now.saturating_sub(flow.last_used_ns) > USE_STEP_NS;
    if news {
        maps.note_use(key, now, if closing { FlowValue::FLAG_CLOSING } else { 0 });
    }
    news
}

/// A backend has answered: the flow is no flood.
#[inline(always)]
fn promote_datagram<M: Flows>(maps: &M, key: &FlowKey, flow: &FlowValue) {
    if flow.proto != TCP && maps.established(key).is_none() {
        maps.establish(flow);
    }
}

/// A packet from a backend that does not know its client.
#[inline(always)]
fn from_backend<P: Packet, M: Flows>(
    packet: &mut P,
    maps: &M,
    headers: &Headers,
    key: &FlowKey,
    flow: &FlowValue,
) -> Option<Action> {
    let now = maps.now();
    let hop = if M::EARLY { Some(maps.hop(headers, &flow.client, now)) } else { None };
    if hop == Some(None) {
        return Some(Action::Pass);
    }
    note(maps, key, flow, headers, now);
    promote_datagram(maps, key, flow);
    maps.count(flow.service, Count::Out(headers.len));
    set_ends(packet, headers, (&flow.frontend, flow.frontend_port), (&flow.client, flow.client_port))?;
    leave(packet, headers, hop.flatten(), is_untracked(flow))
}

/// The packet goes to the backend's node, which chooses the same backend.
#[inline(always)]
fn relay<P: Packet, M: Flows>(
    packet: &mut P,
    maps: &M,
    headers: &Headers,
    flow: &FlowValue,
    hop: Option<Hop>,
) -> Option<Action> {
    if hop.is_some() {
        return leave(packet, headers, hop, false);
    }
    // Tables of two nodes may differ for a moment, and a packet shall not circle then.
    if headers.hops <= 1 {
        return None;
    }
    let way = maps.way(&flow.backend)?;
    count_hop(packet, headers)?;
    Some(Action::Relay(way))
}

/// Whether connection tracking sees neither direction of the flow as it is sent.
#[inline(always)]
fn is_untracked(flow: &FlowValue) -> bool {
    flow.flags & FlowValue::FLAG_TRACKED == 0 && flow.hides_client()
}

/// The rewritten packet goes on.
#[inline(always)]
fn leave<P: Packet>(packet: &mut P, headers: &Headers, hop: Option<Hop>, untracked: bool) -> Option<Action> {
    let Some(hop) = hop else {
        return Some(if untracked { Action::Untracked } else { Action::Deliver });
    };
    count_hop(packet, headers)?;
    set_link(packet, &hop.to, &hop.from)?;
    Some(Action::Send(hop.device))
}

/// A packet that may be for a service.
#[inline(always)]
fn to_backend<P: Packet, M: Tables + Flows>(
    packet: &mut P,
    maps: &M,
    headers: &Headers,
    inner: bool,
) -> Action {
    let now = maps.now();
    let key = key(headers, FlowKey::FORWARD);
    let opening = headers.proto == TCP && headers.flags & (SYN | ACK) == SYN;
    let established = maps.established(&key);
    let known = match established {
        Some(flow) => Some(flow),
        None => maps.begun(&key),
    };
    if let Some(flow) = known
        && is_current(maps, flow, opening, now)
    {
        let noted = note(maps, &key, flow, headers, now);
        if flow.is_own() {
            return Action::Pass;
        }
        // The client has seen an answer; or the other half of the flow was pushed out of the map, which does not happen to
        // one that was used a moment ago.
        if headers.proto == TCP && !opening && established.is_none()
            || noted && established.is_some() && maps.established(&flow.reply_key()).is_none()
        {
            maps.establish(flow);
        }
        return send(packet, maps, headers, flow, now);
    }
    // Choosing takes more room than the early hook has beside the rest. An answer begins nothing: it is for a connection
    // of the node's own, whose port happens to be a frontend's.
    if M::EARLY || headers.proto == TCP && headers.flags & (SYN | ACK) == SYN | ACK {
        return Action::Pass;
    }
    match new_flow(maps, headers, inner) {
        Ok(flow) => {
            // What is left of a former flow would be found first.
            if established.is_some() || maps.established(&flow.reply_key()).is_some() {
                maps.establish(&flow);
            } else {
                maps.begin(&flow);
            }
            send(packet, maps, headers, &flow, now)
        }
        Err(action) => {
            // What had these ports before is over, and its later packets belong to whoever gets this one.
            if opening && known.is_some() {
                maps.note_use(&key, now, FlowValue::FLAG_OVER);
            }
            action
        }
    }
}

/// Whether the flow's next packet goes to the same backend. Connections stay with theirs whatever becomes of it;
/// datagrams, and new connections between the same ports, do not.
#[inline(always)]
fn is_current<M: Tables + Flows>(maps: &M, flow: &FlowValue, opening: bool, now: u64) -> bool {
    if flow.flags & FlowValue::FLAG_OVER != 0 {
        return false;
    }
    if flow.proto == TCP && !opening {
        return true;
    }
    // Who opens a connection to a port of the node's own takes it for a service's.
    if opening && flow.flags & (FlowValue::FLAG_CLOSING | FlowValue::FLAG_OWN) != 0 {
        return false;
    }
    if flow.proto != TCP && now.saturating_sub(flow.last_used_ns) > DATAGRAM_IDLE_NS {
        return false;
    }
    if flow.is_own() {
        return true;
    }
    usable(maps, flow.service, false, flow.backend_id).is_some()
        || usable(maps, flow.service, true, flow.backend_id).is_some()
}

/// Rewrites a packet to the backend.
#[inline(always)]
fn send<P: Packet, M: Flows>(
    packet: &mut P,
    maps: &M,
    headers: &Headers,
    flow: &FlowValue,
    now: u64,
) -> Action {
    let hop = if M::EARLY { Some(maps.hop(headers, &flow.backend, now)) } else { None };
    if hop == Some(None) {
        return Action::Pass;
    }
    maps.count(flow.service, Count::In(headers.len));
    if flow.flags & FlowValue::FLAG_RELAYED != 0 {
        return relay(packet, maps, headers, flow, hop.flatten()).unwrap_or(Action::Drop);
    }
    let (source, backend) = ((&flow.source, flow.source_port), (&flow.backend, flow.backend_port));
    let rewritten = set_ends(packet, headers, source, backend);
    let untracked = is_untracked(flow);
    rewritten.and_then(|()| leave(packet, headers, hop.flatten(), untracked)).unwrap_or(Action::Drop)
}

#[cfg(test)]
pub(crate) mod tests;
