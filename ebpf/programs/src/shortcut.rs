//! The handler of what a pod sends: a packet for another pod of the same bridge goes straight into that one's namespace.
//!
//! It does what the bridge would do, and only that: the frame's own destination decides, so whoever answers ARP or
//! neighbour discovery gets the packets, and an address that moves takes them along. Everything else, and everything in
//! doubt, is left to the bridge.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_UNSPEC},
    helpers::{bpf_ktime_get_coarse_ns, bpf_redirect_peer, bpf_skb_change_type, bpf_skb_load_bytes},
    programs::TcContext,
};
use ebpf_common::LinkAddress;
use ebpf_packet::{ETHERTYPE_V4, ETHERTYPE_V6};

use crate::{
    bytes::Bytes,
    maps::{shortcut_to, shortcuts_end},
    packet::ethertype,
};

/// A packet for the host that sees it: frames for others are so until somebody takes them.
const PACKET_HOST: u32 = 0;

/// A packet that a pod has sent, on the host's side of its link.
#[inline(always)]
pub(crate) fn leave_pod(ctx: &TcContext) -> i32 {
    hand_over(ctx.skb.skb).unwrap_or(TC_ACT_UNSPEC)
}

#[inline(always)]
fn hand_over(skb: *mut __sk_buff) -> Option<i32> {
    // ARP, and whatever else is no IP, is the bridge's.
    if !matches!(ethertype(skb), ETHERTYPE_V4 | ETHERTYPE_V6) {
        return None;
    }
    // SAFETY: the context is valid for the run, and the fields are readable in every packet hook.
    let (tagged, from) =
        unsafe { (read_volatile(addr_of!((*skb).vlan_present)), read_volatile(addr_of!((*skb).ifindex))) };
    if tagged != 0 {
        return None;
    }
    // SAFETY: the helper writes as many bytes as it is told, or fails.
    let to = Bytes::<6>::fill(|buffer| unsafe { bpf_skb_load_bytes(skb.cast(), 0, buffer, 6) })?;
    let peer = shortcut_to(&LinkAddress::new(to))?;
    // What is sent to itself comes back by the bridge, if it does; and without somebody who follows the pods' coming and
    // going nobody knows whether the other one is still there.
    // SAFETY: the helper has no arguments.
    if peer == from || unsafe { bpf_ktime_get_coarse_ns() } > shortcuts_end() {
        return None;
    }
    // SAFETY: the context is valid for the run.
    if unsafe { bpf_skb_change_type(skb, PACKET_HOST) } != 0 {
        return None;
    }
    // SAFETY: the helper takes numbers.
    #[allow(clippy::cast_possible_truncation, reason = "a verdict is a small number")]
    Some(unsafe { bpf_redirect_peer(peer, 0) } as i32)
}
