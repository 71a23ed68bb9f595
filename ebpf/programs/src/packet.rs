//! Handlers of the packet hooks, and a packet as the kernel's helpers give it.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC,
        bpf_redir_neigh as Neighbour,
    },
    helpers::{
        bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect_neigh, bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use ebpf_common::UNTRACKED_MARK;
use ebpf_packet::{Action, Difference, ETHERNET, Fix, Packet, Way, egress, ingress, loopback};

use crate::{bytes::Bytes, machine::Machine};

/// Address families, as the kernel numbers them.
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// A packet of the kernel.
struct SkbPacket {
    skb: *mut __sk_buff,
}

impl Packet for SkbPacket {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        load(self.skb, offset)
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Option<()> {
        store(self.skb, offset, bytes, 0)
    }

    #[inline(always)]
    fn fix_header(&mut self, checksum: u32, by: Difference) -> Option<()> {
        fix_header(self.skb, checksum, by)
    }

    #[inline(always)]
    fn fix_transport(&mut self, checksum: u32, by: Difference, fix: Fix) -> Option<()> {
        // Of no size: a difference.
        let mut flags = 0;
        if fix.pseudo {
            flags |= u64::from(BPF_F_PSEUDO_HDR);
        }
        if fix.may_be_absent {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        // SAFETY: the helper takes integers.
        let result =
            unsafe { bpf_l4_csum_replace(self.skb.cast(), checksum, 0, u64::from(by.word()), flags) };
        (result == 0).then_some(())
    }
}

/// Reads bytes of a packet.
#[inline(always)]
pub(crate) fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    // SAFETY: the helper writes as many bytes as it is told, or fails.
    Bytes::fill(|buffer| unsafe { bpf_skb_load_bytes(skb.cast(), offset, buffer, N as u32) })
}

/// Replaces bytes of a packet.
#[inline(always)]
pub(crate) fn store<const N: usize>(
    skb: *mut __sk_buff,
    offset: u32,
    bytes: &[u8; N],
    flags: u64,
) -> Option<()> {
    // SAFETY: the helper reads N bytes from a buffer of N bytes.
    let result = unsafe { bpf_skb_store_bytes(skb.cast(), offset, bytes.as_ptr().cast(), N as u32, flags) };
    (result == 0).then_some(())
}

/// Accounts for replaced words in the checksum of an IPv4 header.
#[inline(always)]
pub(crate) fn fix_header(skb: *mut __sk_buff, checksum: u32, by: Difference) -> Option<()> {
    // SAFETY: the helper takes integers.
    let result = unsafe { bpf_l3_csum_replace(skb.cast(), checksum, 0, u64::from(by.word()), 0) };
    (result == 0).then_some(())
}

/// A packet that arrived at a device.
#[inline(always)]
pub(crate) fn arrive<const INNER: bool>(ctx: &TcContext, network: u32) -> i32 {
    let skb = ctx.skb.skb;
    let action = ingress(&mut SkbPacket { skb }, &MACHINE, network, ethertype(skb), INNER);
    if action == Action::Untracked {
        // SAFETY: the context is valid for the run, and the mark is writable in packet hooks.
        unsafe { write_volatile(addr_of_mut!((*skb).mark), mark(skb) | UNTRACKED_MARK) };
    }
    verdict(action)
}

/// A packet that is about to leave through a device.
#[inline(always)]
pub(crate) fn leave(ctx: &TcContext, network: u32) -> i32 {
    let skb = ctx.skb.skb;
    let rewritten = mark(skb) & UNTRACKED_MARK != 0;
    verdict(egress(&mut SkbPacket { skb }, &MACHINE, network, ethertype(skb), rewritten))
}

/// A packet that the node sends to itself.
#[inline(always)]
pub(crate) fn come_back(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    verdict(loopback(&mut SkbPacket { skb }, &MACHINE, ETHERNET, ethertype(skb)))
}

static MACHINE: Machine<false> = Machine;

/// The kernel's number for an action. What is not ours is left to the next program on the device.
#[inline(always)]
fn verdict(action: Action) -> i32 {
    match action {
        Action::Pass => TC_ACT_UNSPEC,
        Action::Deliver | Action::Untracked => TC_ACT_OK,
        Action::Relay(way) => send(&way),
        // Only the early hook sends by itself.
        Action::Send(_) | Action::Drop => TC_ACT_SHOT,
    }
}

/// Sends the packet to a neighbour, whose link address the kernel finds.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "verdicts are small")]
pub(crate) fn send(way: &Way) -> i32 {
    // SAFETY: the structure is made of integers, for which zeros are values.
    let mut neighbour: Neighbour = unsafe { core::mem::zeroed() };
    if way.via.is_v4() {
        neighbour.nh_family = AF_INET;
        neighbour.__bindgen_anon_1.ipv4_nh = way.via.v4_word();
    } else {
        neighbour.nh_family = AF_INET6;
        neighbour.__bindgen_anon_1.ipv6_nh = way.via.0;
    }
    // SAFETY: the helper reads a structure of the size that is told.
    unsafe { bpf_redirect_neigh(way.device, &raw mut neighbour, size_of::<Neighbour>() as i32, 0) as i32 }
}

/// The packet's mark.
#[inline(always)]
fn mark(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid for the run, and the field is readable in every packet hook.
    unsafe { read_volatile(addr_of!((*skb).mark)) }
}

/// The packet's protocol, in host order.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the field holds sixteen bits")]
pub(crate) fn ethertype(skb: *mut __sk_buff) -> u16 {
    // SAFETY: the context is valid for the run, and the field is readable in every packet hook.
    u16::from_be(unsafe { (*skb).protocol } as u16)
}
