//! Which backend a new connection from outside gets, and behind which address of this node its client is hidden.

use ebpf_common::{
    AffinityKey, Backend, FlowValue, FrontendKey, FrontendValue, NatConfig, NetAddr, NetPort, NodeAddressUse,
    Protocol,
};

use super::{Action, Count, DATAGRAM_IDLE_NS, Flows};
use crate::{
    parse::{Headers, SCTP, SYN, TCP},
    resolve::{Tables, is_consistent, pick, pick_consistently, pick_with_affinity},
};

/// A connection of which nothing was heard for this long is over, as connection tracking has it: five days.
const ESTABLISHED_IDLE_NS: u64 = 432_000_000_000_000;
/// A port is used again this long after its connection was closed.
const CLOSED_IDLE_NS: u64 = 2_000_000_000;
/// Source ports that are tried for a new flow.
const TRIES: u32 = 8;

/// The flow that this packet starts; else what becomes of the packet.
#[inline(always)]
pub fn new_flow<M: Tables + Flows>(maps: &M, headers: &Headers, inner: bool) -> Result<FlowValue, Action> {
    let frontend = frontend_of(maps, headers).ok_or(Action::Pass)?;
    let service = frontend.service;
    if inner && frontend.flags & FrontendValue::FLAG_GUARDED != 0 && !is_own(maps, &headers.dst) {
        return Err(Action::Pass);
    }
    if !inner
        && frontend.flags & FrontendValue::FLAG_SOURCE_RANGES != 0
        && !maps.in_source_ranges(service, &headers.src)
    {
        maps.count(service, Count::Denied);
        return Err(Action::Drop);
    }
    let flag = if inner { FrontendValue::FLAG_LOCAL } else { FrontendValue::FLAG_EXTERNAL_LOCAL };
    let local = frontend.flags & flag != 0;
    let slot = maps.service(service).ok_or(Action::Pass)?;
    let config = maps.nat_config();
    let sticky = slot.affinity_secs() != 0;
    let consistent = is_consistent(maps, slot);
    // With a table, a client's stickiness is its hash's: every node then sends it the same way.
    let hash = hash(headers, config.seed, sticky && consistent);
    let chosen = if sticky && !consistent {
        let key = AffinityKey::address(headers.src, service);
        pick_with_affinity(maps, &key, maps.now(), hash, local, slot)
            .map(|target| (target.backend_id, target.backend))
    } else {
        pick_consistently(maps, hash, local, slot)
    };
    let Some((backend_id, backend)) = chosen else {
        maps.count(service, Count::Refused);
        // Another node may have endpoints for policy Local; the balancer tries that one.
        if local && pick(maps, hash, false, slot).is_some() {
            return Err(Action::Drop);
        }
        return refusal(maps, headers, service, &config);
    };
    let mut flow = FlowValue {
        client: headers.src,
        frontend: headers.dst,
        backend: backend.addr,
        source: headers.src,
        client_port: headers.src_port,
        frontend_port: headers.dst_port,
        backend_port: backend.port,
        source_port: headers.src_port,
        service,
        backend_id,
        proto: headers.proto,
        flags: 0,
        padding: [0; 6],
        last_used_ns: maps.now(),
    };
    // A changed port needs a new checksum over the whole packet, which is not to be had here.
    if headers.proto == SCTP && backend.port != headers.dst_port {
        return Err(Action::Drop);
    }
    let here = backend.flags & Backend::FLAG_LOCAL != 0;
    let direct = frontend.flags & FrontendValue::FLAG_DIRECT != 0 && consistent;
    if direct && !here && maps.way(&flow.backend).is_some() {
        flow.flags = FlowValue::FLAG_RELAYED;
    } else {
        let shown = local || direct && here || is_own(maps, &backend.addr);
        if !shown {
            hide(maps, &mut flow, &config);
        }
        find_port(maps, &mut flow, &config, hash)?;
    }
    let open = headers.proto == TCP && headers.flags & SYN == 0;
    maps.count(service, if open { Count::FoundAgain } else { Count::Connection });
    maps.count_backend(backend_id);
    Ok(flow)
}

/// Nobody answers: an address of the node refuses by itself; for any other one, a port of the node's that nothing can
/// listen on refuses in its name.
#[inline(always)]
fn refusal<M: Tables + Flows>(
    maps: &M,
    headers: &Headers,
    service: u32,
    config: &NatConfig,
) -> Result<FlowValue, Action> {
    let own = if headers.v4 { config.source_v4 } else { config.source_v6 };
    if is_own(maps, &headers.dst) {
        return Err(Action::Pass);
    }
    if own == NetAddr::ANY_V6 || headers.proto == SCTP {
        return Err(Action::Drop);
    }
    Ok(FlowValue {
        client: headers.src,
        frontend: headers.dst,
        backend: own,
        source: headers.src,
        client_port: headers.src_port,
        frontend_port: headers.dst_port,
        backend_port: NetPort(0),
        source_port: headers.src_port,
        service,
        backend_id: 0,
        proto: headers.proto,
        flags: FlowValue::FLAG_CLOSING,
        padding: [0; 6],
        last_used_ns: maps.now(),
    })
}

/// Gives the flow an address of this node as its source.
#[inline(always)]
fn hide<M: Flows>(maps: &M, flow: &mut FlowValue, config: &NatConfig) {
    let (own, tracked) = maps.source_for(&flow.backend);
    // Without an address of the family, backends see the client and answer as they can.
    if own != NetAddr::ANY_V6 && config.ports != 0 {
        flow.source = own;
        if tracked {
            flow.flags = FlowValue::FLAG_TRACKED;
        }
    }
}

/// Gives the flow a source port with which no other one's answers are mistaken for its own. The client's port stays where
/// its address does, if that is possible: the same client may have dialled the same backend by another address.
#[inline(always)]
fn find_port<M: Flows>(maps: &M, flow: &mut FlowValue, config: &NatConfig, hash: u32) -> Result<(), Action> {
    let hidden = flow.hides_client();
    let mut attempt = 0;
    while attempt < TRIES {
        if hidden && flow.proto != SCTP || attempt > 0 {
            let mut step = hash.wrapping_add(attempt.wrapping_mul(0x9e37_79b9));
            // A client that tries again shall not meet the same ports again.
            if attempt >= TRIES / 2 {
                #[allow(clippy::cast_possible_truncation, reason = "bits that change within a second")]
                let moment = (maps.now() >> 28) as u32;
                step = step.wrapping_add(moment.wrapping_mul(0x85eb_ca6b));
            }
            #[allow(clippy::cast_possible_truncation, reason = "both are below 65,536: ports, and how many")]
            let (first, offset) =
                (config.first_port as u16, ((u64::from(step) * u64::from(config.ports)) >> 32) as u16);
            flow.source_port = NetPort::from_host(first.wrapping_add(offset));
        }
        if !is_taken(maps, flow, attempt >= TRIES / 2) {
            return Ok(());
        }
        // Another port would need another checksum over the whole packet.
        if flow.proto == SCTP || config.ports == 0 {
            break;
        }
        attempt += 1;
    }
    Err(Action::Drop)
}

/// Whether the answers of another flow would come to the same port. In need, what has seen no answer yet gives way: a
/// flood shall not take every port.
#[inline(always)]
fn is_taken<M: Flows>(maps: &M, flow: &FlowValue, in_need: bool) -> bool {
    let key = flow.reply_key();
    let other = match maps.established(&key) {
        Some(other) => Some(other),
        None if in_need => None,
        None => maps.begun(&key),
    };
    other.is_some_and(|other| !is_same_exchange(other, flow) && !is_over(maps, other))
}

/// Whether both are the same client's connection to the same frontend.
#[inline(always)]
fn is_same_exchange(a: &FlowValue, b: &FlowValue) -> bool {
    a.client == b.client
        && a.client_port == b.client_port
        && a.frontend == b.frontend
        && a.frontend_port == b.frontend_port
}

/// Whether the backend has said goodbye, or nothing was ever opened, and nothing has come since for so long that its port
/// can be another connection's.
#[inline(always)]
fn is_over<M: Flows>(maps: &M, flow: &FlowValue) -> bool {
    let idle = maps.now().saturating_sub(flow.last_used_ns);
    let closed = flow.flags & FlowValue::FLAG_CLOSING != 0 && idle > CLOSED_IDLE_NS;
    closed || idle > if flow.proto == TCP { ESTABLISHED_IDLE_NS } else { DATAGRAM_IDLE_NS }
}

/// Whether a packet leaves from an address and port of this node that are a frontend's.
#[inline(always)]
pub(super) fn is_own_frontend<M: Tables>(maps: &M, headers: &Headers) -> bool {
    let (addr, port) = (&headers.src, headers.src_port);
    frontend_at(maps, headers.proto, addr, port).is_some() && is_own(maps, addr)
}

#[inline(always)]
fn is_own<M: Tables>(maps: &M, addr: &NetAddr) -> bool {
    maps.node_address(addr).0 & NodeAddressUse::OWN != 0
}

#[inline(always)]
fn frontend_of<M: Tables>(maps: &M, headers: &Headers) -> Option<FrontendValue> {
    frontend_at(maps, headers.proto, &headers.dst, headers.dst_port)
}

#[inline(always)]
fn frontend_at<M: Tables>(maps: &M, proto: u8, addr: &NetAddr, port: NetPort) -> Option<FrontendValue> {
    let proto = Protocol::from_number(proto)?.number();
    let mut key = FrontendKey { addr: *addr, port, proto, scope: FrontendKey::SCOPE_ADDRESS };
    if let Some(found) = maps.frontend(&key) {
        return Some(found);
    }
    if !maps.node_port_bounds().contains(port.to_host()) {
        return None;
    }
    let uses = maps.node_address(addr).0;
    // On loopback, and on an address of the node's own that was left out, there are none for anybody outside.
    let own = uses & NodeAddressUse::NODE_PORTS != 0;
    let shared = uses & NodeAddressUse::SHARED != 0;
    if !own && !shared {
        return None;
    }
    key.addr = if addr.is_v4() { NetAddr::ANY_V4 } else { NetAddr::ANY_V6 };
    key.scope = FrontendKey::SCOPE_NODE;
    let mut found = maps.frontend(&key)?;
    if !shared {
        // Other nodes would take it for nothing of theirs.
        found.flags &= !FrontendValue::FLAG_DIRECT;
    }
    // What is for another node is looked at only where that one sends packets on.
    (own || found.flags & FrontendValue::FLAG_DIRECT != 0).then_some(found)
}

/// A number that every packet of the flow, on every node, gives alike; or every flow of the client to the frontend.
#[inline(always)]
fn hash(headers: &Headers, seed: u32, of_client: bool) -> u32 {
    let mut state = seed ^ u32::from(headers.proto);
    let mut word = 0;
    while word < 4 {
        state = mix(state, headers.src.0[word]);
        state = mix(state, headers.dst.0[word]);
        word += 1;
    }
    let src_port = if of_client { 0 } else { u32::from(headers.src_port.0) };
    state = mix(state, src_port << 16 | u32::from(headers.dst_port.0));
    state ^= state >> 16;
    state = state.wrapping_mul(0x85eb_ca6b);
    state ^= state >> 13;
    state = state.wrapping_mul(0xc2b2_ae35);
    state ^ state >> 16
}

#[inline(always)]
fn mix(state: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (state ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}
