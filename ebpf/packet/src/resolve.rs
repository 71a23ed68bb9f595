//! From a dialled address to a backend.

use ebpf_common::{
    AffinityKey, AffinityValue, Backend, ExtentHeader, FrontendKey, FrontendValue, NetAddr, NetPort,
    NodePortBounds, Protocol, ServiceSlot,
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
    /// Whether the address belongs to this node.
    fn is_node_address(&self, addr: &NetAddr) -> bool;
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
    if let Some(backend_id) = caller.last_backend(dst)
        && let Some(backend) = usable(tables, &frontend, backend_id)
    {
        return Verdict::Forward(Target { service: frontend.service, backend_id, backend });
    }
    let Some(slot) = tables.service(frontend.service) else {
        return Verdict::Refuse(frontend.service);
    };
    let chosen = if slot.affinity_secs() == 0 {
        pick(tables, caller, &frontend, slot)
    } else {
        pick_with_affinity(tables, caller, &frontend, slot)
    };
    match chosen {
        Some((backend_id, backend)) => {
            Verdict::Forward(Target { service: frontend.service, backend_id, backend })
        }
        None => Verdict::Refuse(frontend.service),
    }
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
        return Some(found);
    }
    if !tables.node_port_bounds().contains(dst.port.to_host()) || !reaches_node(tables, caller, &dst.addr) {
        return None;
    }
    key.addr = if dst.addr.is_v4() { NetAddr::ANY_V4 } else { NetAddr::ANY_V6 };
    key.scope = FrontendKey::SCOPE_NODE;
    tables.frontend(&key)
}

/// A pod's loopback is its own, so it leads to NodePorts only from the node's network namespace.
#[inline(always)]
fn reaches_node<T: Tables, C: Caller>(tables: &T, caller: &C, addr: &NetAddr) -> bool {
    if addr.is_loopback() { caller.in_host_netns() } else { tables.is_node_address(addr) }
}

/// A uniformly random backend of the range that the frontend's traffic policy allows.
#[inline(always)]
fn pick<'t, T: Tables, C: Caller>(
    tables: &'t T,
    caller: &C,
    frontend: &FrontendValue,
    slot: ServiceSlot,
) -> Option<(u32, &'t Backend)> {
    let extent = slot.extent();
    if extent == 0 {
        return None;
    }
    let count = range(frontend, ExtentHeader(tables.extent_word(extent)?));
    if count == 0 {
        return None;
    }
    // Multiply and shift: as even as a remainder for counts this small, without a division.
    let ordinal = (u64::from(caller.random()) * u64::from(count)) >> 32;
    #[allow(clippy::cast_possible_truncation, reason = "ordinal < count, ids are 32 bits wide")]
    let backend_id = tables.extent_word(extent + 1 + ordinal as u32)? as u32;
    Some((backend_id, tables.backend(backend_id)?))
}

/// How many of the extent's first ids may answer this frontend.
#[inline(always)]
fn range(frontend: &FrontendValue, header: ExtentHeader) -> u32 {
    if frontend.flags & FrontendValue::FLAG_LOCAL != 0 {
        return header.local();
    }
    if frontend.flags & FrontendValue::FLAG_NEAR != 0 && header.near() != 0 {
        return header.near();
    }
    header.all()
}

/// The client's last backend while it is usable and recent; else a new one, noted.
#[inline(always)]
fn pick_with_affinity<'t, T: Tables, C: Caller>(
    tables: &'t T,
    caller: &C,
    frontend: &FrontendValue,
    slot: ServiceSlot,
) -> Option<(u32, &'t Backend)> {
    let key = AffinityKey { client: caller.netns_cookie(), service: frontend.service, padding: 0 };
    let now = caller.now_ns();
    let timeout = u64::from(slot.affinity_secs()) * NANOS_PER_SEC;
    let kept = match tables.affinity(&key) {
        Some(last) if now.saturating_sub(last.last_used_ns) < timeout => {
            usable(tables, frontend, last.backend_id).map(|backend| (last.backend_id, backend))
        }
        _ => None,
    };
    let (backend_id, backend) = match kept {
        Some(kept) => kept,
        None => pick(tables, caller, frontend, slot)?,
    };
    tables.set_affinity(&key, &AffinityValue { last_used_ns: now, backend_id, padding: 0 });
    Some((backend_id, backend))
}

/// The backend of this id, if it still belongs to the service and may take new work under the frontend's policy.
#[inline(always)]
fn usable<'t, T: Tables>(tables: &'t T, frontend: &FrontendValue, backend_id: u32) -> Option<&'t Backend> {
    let backend = tables.backend(backend_id)?;
    let mut wanted = Backend::FLAG_USABLE;
    if frontend.flags & FrontendValue::FLAG_LOCAL != 0 {
        wanted |= Backend::FLAG_LOCAL;
    }
    (backend.service == frontend.service && backend.flags & wanted == wanted).then_some(backend)
}

#[cfg(test)]
mod tests;
