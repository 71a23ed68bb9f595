//! Handlers of the socket hooks: translate what a program dials, and translate back what it is told.

use aya_ebpf::programs::{SockAddrContext, SockContext};
use ebpf_common::{NetAddr, NetPort, Peer, Protocol};
use ebpf_packet::{Destination, Target, Verdict, Why, find_by_backend, is_reserved, remember, resolve};

use crate::{
    context::{
        ALLOW, DENY, EADDRINUSE, ECONNREFUSED, Family, Socket, binding, fail_with, port, protocol, set_port,
    },
    maps::{DATAGRAM_PEER, KernelTables, STREAM_PEER, count, count_backend},
};

/// `connect`: picks the backend once for the life of the connection.
#[inline(always)]
pub(crate) fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let Some(dst) = destination::<F>(ctx) else {
        return ALLOW;
    };
    let verdict = translate::<F>(ctx, &dst, false);
    if let (Protocol::Udp, Verdict::Pass) = (dst.proto, &verdict) {
        forget(ctx, &dst);
    }
    code(&verdict)
}

/// A datagram with an address: picks a backend, the socket's last one first.
#[inline(always)]
pub(crate) fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    let Some(dst) = destination::<F>(ctx) else {
        return ALLOW;
    };
    code(&translate::<F>(ctx, &dst, true))
}

/// A received datagram: shows the address that the program dialled.
#[inline(always)]
pub(crate) fn recvmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    if let Some(peer) = datagram_peer(ctx, &F::read(ctx), port(ctx)) {
        show::<F>(ctx, peer);
    }
    ALLOW
}

/// `getpeername`: shows the address that the program dialled.
#[inline(always)]
pub(crate) fn getpeername<F: Family>(ctx: &SockAddrContext) -> i32 {
    let (addr, from) = (F::read(ctx), port(ctx));
    let peer = match protocol(ctx) {
        Some(Protocol::Tcp) => stream_peer(ctx, &addr, from),
        Some(Protocol::Udp) => datagram_peer(ctx, &addr, from),
        Some(Protocol::Sctp) | None => None,
    };
    if let Some(peer) = peer {
        show::<F>(ctx, peer);
    }
    ALLOW
}

/// A socket of the node that was just bound: not where a NodePort listens, whose packets it would take.
#[inline(always)]
pub(crate) fn post_bind<const V6: bool>(ctx: &SockContext) -> i32 {
    static TABLES: KernelTables = KernelTables;
    if let Some((addr, port, proto)) = binding::<V6>(ctx)
        && is_reserved(&TABLES, &addr, port, proto)
    {
        fail_with(EADDRINUSE);
        return DENY;
    }
    ALLOW
}

/// Where the call wants to go, if that can be a service at all. Port 0 is how libc asks for a source address, often,
/// and never reaches anything.
#[inline(always)]
fn destination<F: Family>(ctx: &SockAddrContext) -> Option<Destination> {
    let port = port(ctx);
    if port.0 == 0 {
        return None;
    }
    Some(Destination { addr: F::read(ctx), port, proto: protocol(ctx)? })
}

/// Resolves the destination and, where a backend answers, rewrites the call and notes how.
#[inline(always)]
fn translate<F: Family>(ctx: &SockAddrContext, dst: &Destination, sticky: bool) -> Verdict<'static> {
    static TABLES: KernelTables = KernelTables;
    let verdict = resolve(&TABLES, &Socket { ctx, sticky }, dst);
    match &verdict {
        Verdict::Pass => {}
        Verdict::Refuse(service) => {
            count(*service, |stats| stats.refused += 1);
            fail_with(ECONNREFUSED);
        }
        Verdict::Forward(target) => {
            note(ctx, dst, target);
            F::write(ctx, &target.backend.addr);
            set_port(ctx, target.backend.port);
            count(target.service, |stats| {
                stats.forwarded += 1;
                stats.affinity_hits += u64::from(target.why == Why::Affinity);
                stats.healed += u64::from(target.why == Why::Healed);
            });
            count_backend(target.backend_id);
        }
    }
    verdict
}

/// The kernel's number for a verdict.
#[inline(always)]
fn code(verdict: &Verdict<'_>) -> i32 {
    match verdict {
        Verdict::Pass | Verdict::Forward(_) => ALLOW,
        Verdict::Refuse(_) => DENY,
    }
}

/// Remembers the translation in the socket. Best effort: without memory the connection works, and only
/// `getpeername` shows the backend.
#[inline(always)]
fn note(ctx: &SockAddrContext, dst: &Destination, target: &Target<'_>) {
    let peer = Peer {
        frontend: dst.addr,
        backend: target.backend.addr,
        frontend_port: dst.port,
        backend_port: target.backend.port,
        backend_id: target.backend_id,
    };
    // SAFETY: both storages belong to the socket of this context and live as long as it; hooks of one socket run
    // under its lock (connect) or may at worst mix two translations of concurrent sends.
    unsafe {
        match dst.proto {
            Protocol::Tcp => {
                if let Some(slot) = STREAM_PEER.get_or_insert_ptr_mut(ctx, None).as_mut() {
                    *slot = peer;
                }
            }
            Protocol::Udp => {
                if let Some(peers) = DATAGRAM_PEER.get_or_insert_ptr_mut(ctx, None).as_mut() {
                    remember(peers, &peer);
                }
            }
            Protocol::Sctp => {}
        }
    }
}

/// A datagram socket now talks to this address itself, so replies from it are no longer translated.
#[inline(always)]
fn forget(ctx: &SockAddrContext, dst: &Destination) {
    // SAFETY: the storage belongs to the socket of this context.
    let Some(peers) = (unsafe { DATAGRAM_PEER.get_ptr_mut(ctx).as_mut() }) else {
        return;
    };
    for peer in &mut peers.peers {
        if peer.backend_port == dst.port && peer.backend == dst.addr {
            peer.backend_port = NetPort(0);
        }
    }
}

/// The translation of a connected stream socket, if this is still its peer.
#[inline(always)]
fn stream_peer(ctx: &SockAddrContext, addr: &NetAddr, from: NetPort) -> Option<&'static Peer> {
    // SAFETY: the storage belongs to the socket of this context.
    let peer = unsafe { STREAM_PEER.get_ptr_mut(ctx).as_ref() }?;
    (peer.backend_port == from && peer.backend == *addr).then_some(peer)
}

/// The translation of a datagram socket whose backend is this address.
#[inline(always)]
fn datagram_peer(ctx: &SockAddrContext, addr: &NetAddr, from: NetPort) -> Option<&'static Peer> {
    // SAFETY: the storage belongs to the socket of this context.
    let peers = unsafe { DATAGRAM_PEER.get_ptr_mut(ctx).as_ref() }?;
    find_by_backend(peers, addr, from)
}

/// Puts the dialled address into the context.
#[inline(always)]
fn show<F: Family>(ctx: &SockAddrContext, peer: &Peer) {
    F::write(ctx, &peer.frontend);
    set_port(ctx, peer.frontend_port);
}
