//! From a dialled address to a backend, for sockets on this node.

use ebpf_common::{
    AffinityKey, AffinityValue, Backend, ExtentHeader, FrontendKey, FrontendValue, NetAddr, NetPort,
    NodeAddressUse, NodePortBounds, Protocol, SLOTS_PER_WORD, ServiceSlot,
};

/// Read access to the maps of the data plane.
pub trait Tables {
    /// Looks a frontend up.
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue>;
    /// Reads a service's slot in one load.
    fn service(&self, id: u32) -> Option<ServiceSlot>;
    /// Reads one word of the backend index.
    fn extent_word(&self, index: u32) -> Option<u64>;
    /// Reads a backend.
    fn backend(&self, id: u32) -> Option<&Backend>;
    /// What the address is for, where it belongs to this node.
    fn node_address(&self, addr: &NetAddr) -> NodeAddressUse;
    /// The range of NodePorts in use.
    fn node_port_bounds(&self) -> NodePortBounds;
    /// The backend a client last used.
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue>;
    /// Notes the backend a client uses. Best effort: a full map loses stickiness, never a connection.
    fn set_affinity(&self, key: &AffinityKey, value: &AffinityValue);
}

/// What the decision may ask about the calling socket and the machine; each call costs a kernel helper, so each is
/// made only where its answer matters.
pub trait Caller {
    /// A random word.
    fn random(&self) -> u32;
    /// Whether the socket lives in the node's own network namespace.
    fn in_host_netns(&self) -> bool;
    /// Cookie of the socket's network namespace.
    fn netns_cookie(&self) -> u64;
    /// Monotonic nanoseconds.
    fn now_ns(&self) -> u64;
    /// The backend that the same socket used last for this destination, if it remembers one.
    fn last_backend(&self, dst: &Destination) -> Option<u32>;
}

/// Where the socket wants to go.
#[derive(Clone, Copy, Debug)]
pub struct Destination {
    /// Dialled address.
    pub addr: NetAddr,
    /// Dialled port.
    pub port: NetPort,
    /// Protocol of the socket.
    pub proto: Protocol,
}

/// The backend that shall answer.
#[derive(Clone, Copy, Debug)]
pub struct Target<'t> {
    /// Service it was chosen for.
    pub service: u32,
    /// Its id.
    pub backend_id: u32,
    /// Its address and port.
    pub backend: &'t Backend,
    /// Why this one.
    pub why: Why,
}

/// Why a backend was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// By chance.
    Chosen,
    /// The client had it before, and the service has session affinity.
    Affinity,
    /// The same socket had it before.
    SameSocket,
    /// By chance, because the one that the same socket had before is gone.
    Healed,
}

/// What happens to the call.
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'t> {
    /// Not a service: leave the destination alone.
    Pass,
    /// A service of this id without a usable backend: refuse at once.
    Refuse(u32),
    /// Send it there.
    Forward(Target<'t>),
}

const NANOS_PER_SEC: u64 = 1_000_000_000;

/// Decides where a call goes. The backend that the socket itself used last is kept for as long as it is usable, so
/// that the datagrams of one exchange meet one server.
#[inline(always)]
pub fn resolve<'t, T: Tables, C: Caller>(tables: &'t T, caller: &C, dst: &Destination) -> Verdict<'t> {
    let Some(frontend) = find_frontend(tables, caller, dst) else {
        return Verdict::Pass;
    };
    let service = frontend.service;
    let local = frontend.flags & FrontendValue::FLAG_LOCAL != 0;
    let last = caller.last_backend(dst);
    if let Some(backend_id) = last
        && let Some(backend) = usable(tables, service, local, backend_id)
    {
        return Verdict::Forward(Target { service, backend_id, backend, why: Why::SameSocket });
    }
    let Some(slot) = tables.service(service) else {
        return Verdict::Refuse(service);
    };
    if slot.affinity_secs() != 0 {
        let key = AffinityKey::pod(caller.netns_cookie(), service);
        return match pick_with_affinity(tables, &key, caller.now_ns(), caller.random(), local, slot) {
            Some(target) => Verdict::Forward(target),
            None => Verdict::Refuse(service),
        };
    }
    match pick(tables, caller.random(), local, slot) {
        Some((backend_id, backend)) => {
            let why = if last.is_some() { Why::Healed } else { Why::Chosen };
            Verdict::Forward(Target { service, backend_id, backend, why })
        }
        None => Verdict::Refuse(service),
    }
}

/// Whether a socket of the node itself may not be bound to this address and port, because they are a NodePort.
#[inline(always)]
pub fn is_reserved<T: Tables>(tables: &T, addr: &NetAddr, port: NetPort, proto: Protocol) -> bool {
    if !tables.node_port_bounds().contains(port.to_host()) {
        return false;
    }
    let any = *addr == NetAddr::ANY_V4 || *addr == NetAddr::ANY_V6;
    if !any && !serves_node_ports(tables, addr) {
        return false;
    }
    let mut key =
        FrontendKey { addr: NetAddr::ANY_V4, port, proto: proto.number(), scope: FrontendKey::SCOPE_NODE };
    // A socket on `::` hears IPv4 too.
    if (addr.is_v4() || any) && tables.frontend(&key).is_some() {
        return true;
    }
    if addr.is_v4() {
        return false;
    }
    key.addr = NetAddr::ANY_V6;
    tables.frontend(&key).is_some()
}

/// Exact address first; then, for ports that can be NodePorts, any address of the node.
#[inline(always)]
fn find_frontend<T: Tables, C: Caller>(tables: &T, caller: &C, dst: &Destination) -> Option<FrontendValue> {
    let mut key = FrontendKey {
        addr: dst.addr,
        port: dst.port,
        proto: dst.proto.number(),
        scope: FrontendKey::SCOPE_ADDRESS,
    };
    if let Some(found) = tables.frontend(&key) {
        let guarded = found.flags & FrontendValue::FLAG_GUARDED != 0;
        let foreign = guarded && tables.node_address(&dst.addr).0 & NodeAddressUse::OWN == 0;
        // A host port on loopback is the node's, not every pod's.
        let passes = foreign || dst.addr.is_loopback() && !caller.in_host_netns();
        return (!passes).then_some(found);
    }
    if !tables.node_port_bounds().contains(dst.port.to_host()) {
        return None;
    }
    // A pod's loopback is its own, so it leads to NodePorts only from the node's network namespace.
    if !serves_node_ports(tables, &dst.addr) || (dst.addr.is_loopback() && !caller.in_host_netns()) {
        return None;
    }
    key.addr = if dst.addr.is_v4() { NetAddr::ANY_V4 } else { NetAddr::ANY_V6 };
    key.scope = FrontendKey::SCOPE_NODE;
    tables.frontend(&key)
}

/// Whether NodePorts answer on this address of the node.
#[inline(always)]
fn serves_node_ports<T: Tables>(tables: &T, addr: &NetAddr) -> bool {
    let asked = if !addr.is_loopback() {
        *addr
    } else if addr.is_v4() {
        NetAddr::LOOPBACK_V4
    } else {
        NetAddr::LOOPBACK_V6
    };
    tables.node_address(&asked).0 & NodeAddressUse::NODE_PORTS != 0
}

/// A backend of the range that the policy allows, at the place that `random` points to.
#[inline(always)]
pub(crate) fn pick<T: Tables>(
    tables: &T,
    random: u32,
    local: bool,
    slot: ServiceSlot,
) -> Option<(u32, &Backend)> {
    let extent = slot.extent();
    if extent == 0 {
        return None;
    }
    let header = ExtentHeader(tables.extent_word(extent)?);
    let (start, end) = if local { (0, header.local()) } else { (header.cluster(), header.all()) };
    if start >= end {
        return None;
    }
    // Multiply and shift: as even as a remainder for counts this small, without a division.
    let ordinal = (u64::from(random) * u64::from(end - start)) >> 32;
    #[allow(clippy::cast_possible_truncation, reason = "ordinal < count, ids are 32 bits wide")]
    let backend_id = tables.extent_word(extent + 1 + start + ordinal as u32)? as u32;
    Some((backend_id, tables.backend(backend_id)?))
}

/// The same by consistent hashing, for services that have a table of it: every node, and the next table, sends the same
/// flow to the same backend as far as that can be.
#[inline(always)]
pub(crate) fn pick_consistently<T: Tables>(
    tables: &T,
    hash: u32,
    local: bool,
    slot: ServiceSlot,
) -> Option<(u32, &Backend)> {
    let extent = slot.extent();
    if extent == 0 {
        return None;
    }
    let header = ExtentHeader(tables.extent_word(extent)?);
    let slots = header.slots();
    if local || slots == 0 {
        return pick(tables, hash, local, slot);
    }
    let place = hash % slots;
    let word = tables.extent_word(extent + 1 + header.all() + place / SLOTS_PER_WORD)?;
    #[allow(clippy::cast_possible_truncation, reason = "masked to sixteen bits")]
    let ordinal = (word >> (place % SLOTS_PER_WORD * 16) & 0xffff) as u32;
    #[allow(clippy::cast_possible_truncation, reason = "ids are 32 bits wide")]
    let backend_id = tables.extent_word(extent + 1 + header.cluster() + ordinal)? as u32;
    Some((backend_id, tables.backend(backend_id)?))
}

/// Whether a service has a table for consistent hashing.
#[inline(always)]
pub(crate) fn is_consistent<T: Tables>(tables: &T, slot: ServiceSlot) -> bool {
    slot.extent() != 0
        && tables.extent_word(slot.extent()).is_some_and(|word| ExtentHeader(word).slots() != 0)
}

/// The client's last backend while it is usable and recent; else a new one, noted.
#[inline(always)]
pub(crate) fn pick_with_affinity<'t, T: Tables>(
    tables: &'t T,
    key: &AffinityKey,
    now: u64,
    random: u32,
    local: bool,
    slot: ServiceSlot,
) -> Option<Target<'t>> {
    let timeout = u64::from(slot.affinity_secs()) * NANOS_PER_SEC;
    let kept = match tables.affinity(key) {
        Some(last) if now.saturating_sub(last.last_used_ns) < timeout => {
            usable(tables, key.service, local, last.backend_id).map(|backend| (last.backend_id, backend))
        }
        _ => None,
    };
    let (backend_id, backend, why) = if let Some((backend_id, backend)) = kept {
        (backend_id, backend, Why::Affinity)
    } else {
        let (backend_id, backend) = pick(tables, random, local, slot)?;
        (backend_id, backend, Why::Chosen)
    };
    tables.set_affinity(key, &AffinityValue { last_used_ns: now, backend_id, padding: 0 });
    Some(Target { service: key.service, backend_id, backend, why })
}

/// The backend of this id, if it still belongs to the service and may take new work under the policy.
#[inline(always)]
pub(crate) fn usable<T: Tables>(tables: &T, service: u32, local: bool, backend_id: u32) -> Option<&Backend> {
    let backend = tables.backend(backend_id)?;
    let wanted = if local { Backend::FLAG_LOCAL } else { Backend::FLAG_CLUSTER };
    (backend.service == service && backend.flags & wanted != 0).then_some(backend)
}

#[cfg(test)]
mod tests;
