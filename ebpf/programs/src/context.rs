//! Typed access to the context of the socket-address hooks.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_set_retval},
    programs::{SockAddrContext, SockContext},
};
use ebpf_common::{NetAddr, NetPort, Protocol};
use ebpf_packet::{Caller, Destination, find_by_frontend};

use crate::maps::{DATAGRAM_PEER, host_netns_cookie};

/// Let the call go on.
pub(crate) const ALLOW: i32 = 1;
/// Fail the call with the errno given by [`fail_with`].
pub(crate) const DENY: i32 = 0;
/// "Connection refused".
pub(crate) const ECONNREFUSED: i32 = 111;
/// "Address already in use".
pub(crate) const EADDRINUSE: i32 = 98;

const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
const IPPROTO_MPTCP: u32 = 262;

/// Where a family keeps the address of a call.
pub(crate) trait Family {
    /// Reads the address.
    fn read(ctx: &SockAddrContext) -> NetAddr;
    /// Replaces it.
    fn write(ctx: &SockAddrContext, addr: &NetAddr);
}

/// IPv4 hooks.
pub(crate) struct V4;
/// IPv6 hooks.
pub(crate) struct V6;

impl Family for V4 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> NetAddr {
        // SAFETY: the context is valid for the run; `user_ip4` is readable in every IPv4 hook.
        NetAddr::from_v4_word(unsafe { read_volatile(addr_of!((*ctx.sock_addr).user_ip4)) })
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, addr: &NetAddr) {
        // SAFETY: the context is valid for the run; `user_ip4` is writable in every IPv4 hook.
        unsafe { write_volatile(addr_of_mut!((*ctx.sock_addr).user_ip4), addr.v4_word()) };
    }
}

impl Family for V6 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> NetAddr {
        // SAFETY: the context is valid for the run; the words of `user_ip6` are readable in every IPv6 hook.
        unsafe {
            let words = addr_of!((*ctx.sock_addr).user_ip6).cast::<u32>();
            NetAddr([
                read_volatile(words),
                read_volatile(words.add(1)),
                read_volatile(words.add(2)),
                read_volatile(words.add(3)),
            ])
        }
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, addr: &NetAddr) {
        // SAFETY: the context is valid for the run; the words of `user_ip6` are writable in every IPv6 hook.
        unsafe {
            let words = addr_of_mut!((*ctx.sock_addr).user_ip6).cast::<u32>();
            write_volatile(words, addr.0[0]);
            write_volatile(words.add(1), addr.0[1]);
            write_volatile(words.add(2), addr.0[2]);
            write_volatile(words.add(3), addr.0[3]);
        }
    }
}

/// The port of the call.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the port stands in the low half of the field")]
pub(crate) fn port(ctx: &SockAddrContext) -> NetPort {
    // SAFETY: the context is valid for the run; `user_port` is readable in every hook.
    NetPort(unsafe { read_volatile(addr_of!((*ctx.sock_addr).user_port)) } as u16)
}

/// Replaces the port of the call.
#[inline(always)]
pub(crate) fn set_port(ctx: &SockAddrContext, port: NetPort) {
    // SAFETY: the context is valid for the run; `user_port` is writable in every hook.
    unsafe { write_volatile(addr_of_mut!((*ctx.sock_addr).user_port), u32::from(port.0)) };
}

/// The socket's protocol, where services know it.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> Option<Protocol> {
    // SAFETY: the context is valid for the run; `protocol` is readable in every hook.
    match unsafe { read_volatile(addr_of!((*ctx.sock_addr).protocol)) } {
        IPPROTO_TCP | IPPROTO_MPTCP => Some(Protocol::Tcp),
        IPPROTO_UDP => Some(Protocol::Udp),
        _ => None,
    }
}

/// Address, port and protocol of a socket of the node itself that was just bound; nothing for those of pods, whose
/// addresses are their own.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the port field is wider than a port")]
pub(crate) fn binding<const V6: bool>(ctx: &SockContext) -> Option<(NetAddr, NetPort, Protocol)> {
    // SAFETY: the helper takes the hook's own context.
    if unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } != host_netns_cookie() {
        return None;
    }
    let sock = ctx.sock;
    // SAFETY: the context is valid for the run; these fields are readable in the post_bind hook of their family.
    unsafe {
        let proto = match read_volatile(addr_of!((*sock).protocol)) {
            IPPROTO_TCP | IPPROTO_MPTCP => Protocol::Tcp,
            IPPROTO_UDP => Protocol::Udp,
            _ => return None,
        };
        let port = NetPort::from_host(read_volatile(addr_of!((*sock).src_port)) as u16);
        let addr = if V6 {
            let words = addr_of!((*sock).src_ip6).cast::<u32>();
            NetAddr([
                read_volatile(words),
                read_volatile(words.add(1)),
                read_volatile(words.add(2)),
                read_volatile(words.add(3)),
            ])
        } else {
            NetAddr::from_v4_word(read_volatile(addr_of!((*sock).src_ip4)))
        };
        Some((addr, port, proto))
    }
}

/// Sets the errno of a denied call.
#[inline(always)]
pub(crate) fn fail_with(errno: i32) {
    // SAFETY: the helper takes a plain integer; it cannot fail in these hooks for a valid negative errno.
    unsafe { bpf_set_retval(-errno) };
}

/// The calling socket.
pub(crate) struct Socket<'c> {
    /// The hook's context.
    pub(crate) ctx: &'c SockAddrContext,
    /// Whether the socket's earlier choices bind this call: only for datagrams sent with an address.
    pub(crate) sticky: bool,
}

impl Caller for Socket<'_> {
    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper has no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn in_host_netns(&self) -> bool {
        self.netns_cookie() == host_netns_cookie()
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        // SAFETY: the helper takes the hook's own context.
        unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) }
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: the helper has no arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn last_backend(&self, dst: &Destination) -> Option<u32> {
        if !self.sticky {
            return None;
        }
        // SAFETY: the storage belongs to the socket of this context and lives as long as it.
        let peers = unsafe { DATAGRAM_PEER.get_ptr_mut(self.ctx).as_ref() }?;
        find_by_frontend(peers, &dst.addr, dst.port).map(|peer| peer.backend_id)
    }
}
