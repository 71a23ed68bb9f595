//! The BPF programs: entry, handler, verdict.
//!
//! Each hook is one entry function of a line or two that calls one handler in [`socket`], [`packet`] or [`early`] and returns its
//! verdict. Decisions are made by `ebpf-packet`; the maps they read are in [`maps`].
//!
//! The verdict on every internal failure is "allow": a program that cannot do its bookkeeping must never break a
//! connection that would work without it.
//!
//! Entries and handlers are inlined: on Linux 6.1 the frames of a chain of calls share 512 bytes of stack, and each costs at
//! least 32 of them. `cargo xtask build-ebpf` checks it.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![allow(
    clippy::inline_always,
    reason = "BPF programs have no calls worth keeping: the verifier checks one function best"
)]
#![allow(unsafe_code, reason = "BPF helpers and context fields are raw by nature")]
#![allow(unreachable_pub, reason = "the entry macros need `pub` in a binary")]
#![allow(
    missing_docs,
    clippy::needless_pass_by_value,
    reason = "the entry macros drop docs and pass by value"
)]

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};
use context::{V4, V6};
use ebpf_packet::ETHERNET;

mod bytes;
mod context;
mod early;
mod machine;
mod maps;
mod packet;
mod shortcut;
mod socket;

/// TCP and UDP `connect` of IPv4 sockets.
#[cgroup_sock_addr(connect4)]
pub fn kl_connect4(ctx: SockAddrContext) -> i32 {
    socket::connect::<V4>(&ctx)
}

/// TCP and UDP `connect` of IPv6 sockets, v4-mapped destinations included.
#[cgroup_sock_addr(connect6)]
pub fn kl_connect6(ctx: SockAddrContext) -> i32 {
    socket::connect::<V6>(&ctx)
}

/// Datagrams sent with an IPv4 address.
#[cgroup_sock_addr(sendmsg4)]
pub fn kl_sendmsg4(ctx: SockAddrContext) -> i32 {
    socket::sendmsg::<V4>(&ctx)
}

/// Datagrams sent with an IPv6 address.
#[cgroup_sock_addr(sendmsg6)]
pub fn kl_sendmsg6(ctx: SockAddrContext) -> i32 {
    socket::sendmsg::<V6>(&ctx)
}

/// The source address of a received IPv4 datagram.
#[cgroup_sock_addr(recvmsg4)]
pub fn kl_recvmsg4(ctx: SockAddrContext) -> i32 {
    socket::recvmsg::<V4>(&ctx)
}

/// The source address of a received IPv6 datagram.
#[cgroup_sock_addr(recvmsg6)]
pub fn kl_recvmsg6(ctx: SockAddrContext) -> i32 {
    socket::recvmsg::<V6>(&ctx)
}

/// `getpeername` of IPv4 sockets.
#[cgroup_sock_addr(getpeername4)]
pub fn kl_getpeername4(ctx: SockAddrContext) -> i32 {
    socket::getpeername::<V4>(&ctx)
}

/// `getpeername` of IPv6 sockets.
#[cgroup_sock_addr(getpeername6)]
pub fn kl_getpeername6(ctx: SockAddrContext) -> i32 {
    socket::getpeername::<V6>(&ctx)
}

/// Sockets of the node that were bound to an IPv4 address.
#[cgroup_sock(post_bind4)]
pub fn kl_post_bind4(ctx: SockContext) -> i32 {
    socket::post_bind::<false>(&ctx)
}

/// Sockets of the node that were bound to an IPv6 address.
#[cgroup_sock(post_bind6)]
pub fn kl_post_bind6(ctx: SockContext) -> i32 {
    socket::post_bind::<true>(&ctx)
}

/// Frames that arrive at a device that leads out of the node, as its driver has them.
#[xdp]
pub fn kl_early(ctx: XdpContext) -> u32 {
    early::arrive(&ctx)
}

/// Packets that arrive at a device that leads out of the node.
#[classifier]
#[inline(always)]
pub fn kl_arrive_outer(ctx: TcContext) -> i32 {
    packet::arrive::<false>(&ctx, ETHERNET)
}

/// Packets that arrive at a device that leads to pods.
#[classifier]
#[inline(always)]
pub fn kl_arrive_inner(ctx: TcContext) -> i32 {
    packet::arrive::<true>(&ctx, ETHERNET)
}

/// Packets that leave through a device.
#[classifier]
#[inline(always)]
pub fn kl_leave(ctx: TcContext) -> i32 {
    packet::leave(&ctx, ETHERNET)
}

/// Packets that the node sends to itself.
#[classifier]
#[inline(always)]
pub fn kl_come_back(ctx: TcContext) -> i32 {
    packet::come_back(&ctx)
}

/// As [`kl_arrive_outer`], for devices without Ethernet headers: tunnels, WireGuard.
#[classifier]
#[inline(always)]
pub fn kl_bare_outer(ctx: TcContext) -> i32 {
    packet::arrive::<false>(&ctx, 0)
}

/// As [`kl_arrive_inner`], for devices without Ethernet headers.
#[classifier]
#[inline(always)]
pub fn kl_bare_inner(ctx: TcContext) -> i32 {
    packet::arrive::<true>(&ctx, 0)
}

/// As [`kl_leave`], for devices without Ethernet headers.
#[classifier]
#[inline(always)]
pub fn kl_bare_leave(ctx: TcContext) -> i32 {
    packet::leave(&ctx, 0)
}

/// Packets that a pod sends to its bridge.
#[classifier]
#[inline(always)]
pub fn kl_pod(ctx: TcContext) -> i32 {
    shortcut::leave_pod(&ctx)
}

/// Packets that arrive by the tunnel from other nodes' pods.
#[classifier]
#[inline(always)]
pub fn kl_far(ctx: TcContext) -> i32 {
    shortcut::reach_pod(&ctx)
}

// None of the helpers used asks for a GPL program.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // Nothing in here can panic; the verifier would refuse the endless loop if something did.
    loop {}
}
