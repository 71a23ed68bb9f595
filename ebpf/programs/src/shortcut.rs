//! The handlers of what a pod sends and of what the tunnel brings: a packet for another pod of the same bridge goes straight
//! into that one's namespace, one for a pod of another node straight into the tunnel.
//!
//! On the bridge the frame's own destination decides, so whoever answers ARP or neighbour discovery gets the packets, and an
//! address that moves takes them along. Between nodes it is the pods' addresses as the loader was told; one that a pod
//! contradicts by what it sends is forgotten until the loader has looked again. Everything else, and everything in doubt, is
//! left to bridge and stack.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::{bpf_ktime_get_coarse_ns, bpf_redirect_peer, bpf_skb_change_type},
    programs::TcContext,
};
use ebpf_common::{FarPod, LinkAddress, NetAddr, PodRouter};
use ebpf_packet::{
    Difference, ETHERNET, ETHERTYPE_V4, ETHERTYPE_V6, FarTables, Fix, Packet, Way, from_far_pod, to_far_pod,
};

use crate::{
    machine::way_to,
    maps::{FAR_PODS, POD_ROUTER, shortcut_to, shortcuts_end},
    packet::{ethertype, fix_header, load, send, store},
};

/// `EtherType` of ARP.
const ETHERTYPE_ARP: u16 = 0x0806;
/// Where an ARP packet for IPv4 has its sender's address.
const ARP_SENDER: u32 = ETHERNET + 14;
/// Where an IPv6 packet without extension headers has its next header, its ICMPv6 type, and a neighbour advertisement the address
/// that it is about.
const NEXT_HEADER: u32 = ETHERNET + 6;
const ICMP_V6_TYPE: u32 = ETHERNET + 40;
const ADVERTISED: u32 = ETHERNET + 48;
const ICMP_V6: u8 = 58;
const ADVERTISEMENT: u8 = 136;

/// A packet for the host that sees it: frames for others are so until somebody takes them.
const PACKET_HOST: u32 = 0;

/// A packet that a pod has sent, on the host's side of its link.
#[inline(always)]
pub(crate) fn leave_pod(ctx: &TcContext) -> i32 {
    hand_over(ctx.skb.skb).unwrap_or(TC_ACT_UNSPEC)
}

/// A packet that came by the tunnel.
#[inline(always)]
pub(crate) fn reach_pod(ctx: &TcContext) -> i32 {
    reach(ctx.skb.skb).unwrap_or(TC_ACT_UNSPEC)
}

#[inline(always)]
fn hand_over(skb: *mut __sk_buff) -> Option<i32> {
    let kind = ethertype(skb);
    // SAFETY: the context is valid for the run, and the fields are readable in every packet hook.
    let (tagged, from) =
        unsafe { (read_volatile(addr_of!((*skb).vlan_present)), read_volatile(addr_of!((*skb).ifindex))) };
    if tagged != 0 {
        return None;
    }
    // ARP, and whatever else is no IP, is the bridge's.
    if !matches!(kind, ETHERTYPE_V4 | ETHERTYPE_V6) {
        if kind == ETHERTYPE_ARP {
            let sender = load::<4>(skb, ARP_SENDER)?;
            doubt(&NetAddr::from_v4_word(u32::from_ne_bytes(sender)), from);
        }
        return None;
    }
    let to = load::<6>(skb, 0)?;
    let Some(peer) = shortcut_to(&LinkAddress::new(to)) else {
        return route(skb, kind, to, from);
    };
    // What is sent to itself comes back by the bridge, if it does; and without somebody who follows the pods' coming and
    // going nobody knows whether the other one is still there.
    if peer == from || !are_trusted() {
        return None;
    }
    redirect_to_pod(skb, peer)
}

/// Whether somebody follows the pods' coming and going.
#[inline(always)]
fn are_trusted() -> bool {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_coarse_ns() <= shortcuts_end() }
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "a verdict is a small number")]
fn redirect_to_pod(skb: *mut __sk_buff, link: u32) -> Option<i32> {
    // SAFETY: the context is valid for the run.
    if unsafe { bpf_skb_change_type(skb, PACKET_HOST) } != 0 {
        return None;
    }
    // SAFETY: the helper takes numbers.
    Some(unsafe { bpf_redirect_peer(link, 0) } as i32)
}

/// A packet that a pod sends to somebody beyond its bridge.
#[inline(always)]
fn route(skb: *mut __sk_buff, kind: u16, to: [u8; 6], from: u32) -> Option<i32> {
    if kind == ETHERTYPE_V6
        && load::<1>(skb, NEXT_HEADER)? == [ICMP_V6]
        && load::<1>(skb, ICMP_V6_TYPE)? == [ADVERTISEMENT]
    {
        doubt(&NetAddr::from_octets(load::<16>(skb, ADVERTISED)?), from);
        return None;
    }
    let router = FAR.router().filter(|router| router.mac == to)?;
    if !are_trusted() {
        return None;
    }
    let way = to_far_pod(&mut Frame { skb, kind }, &FAR, &router, kind, from, segment(skb))?;
    Some(send(&way))
}

#[inline(always)]
#[allow(clippy::many_single_char_names, reason = "one store of both addresses; a copy of slices could panic")]
fn reach(skb: *mut __sk_buff) -> Option<i32> {
    let kind = ethertype(skb);
    let router = FAR.router()?;
    if !are_trusted() {
        return None;
    }
    let frame = &mut Frame { skb, kind };
    let FarPod { link, mac } = from_far_pod(frame, &FAR, &router, kind, segment(skb))?;
    let [a, b, c, d, e, f] = mac;
    let [g, h, i, j, k, l] = router.mac;
    let addressed = store(skb, 0, &[a, b, c, d, e, f, g, h, i, j, k, l], 0);
    // A hop is off already.
    Some(addressed.and_then(|()| redirect_to_pod(skb, link)).unwrap_or(TC_ACT_SHOT))
}

/// Forgets who has an address, when somebody else uses it.
#[inline(always)]
fn doubt(address: &NetAddr, link: u32) {
    if FAR.pod(address).is_some_and(|pod| pod.link != link) {
        FAR.forget(address);
    }
}

/// What one segment carries of a packet that stands for several.
#[inline(always)]
fn segment(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid for the run, and the field is readable in every packet hook.
    unsafe { read_volatile(addr_of!((*skb).gso_size)) }
}

/// A packet that is routed.
struct Frame {
    skb: *mut __sk_buff,
    kind: u16,
}

impl Packet for Frame {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        load(self.skb, offset)
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Option<()> {
        // Only IPv4 has a header's checksum, which evens out what the device has summed up over the whole packet.
        let flags = if self.kind == ETHERTYPE_V6 { u64::from(BPF_F_RECOMPUTE_CSUM) } else { 0 };
        store(self.skb, offset, bytes, flags)
    }

    #[inline(always)]
    fn fix_header(&mut self, checksum: u32, by: Difference) -> Option<()> {
        fix_header(self.skb, checksum, by)
    }

    #[inline(always)]
    fn fix_transport(&mut self, _checksum: u32, _by: Difference, _fix: Fix) -> Option<()> {
        // Ports and addresses stay.
        None
    }
}

/// The maps of what is routed.
struct Far;

static FAR: Far = Far;

impl FarTables for Far {
    #[inline(always)]
    fn router(&self) -> Option<PodRouter> {
        POD_ROUTER.get(0).copied().filter(|router| router.tunnel != 0)
    }

    #[inline(always)]
    fn pod(&self, address: &NetAddr) -> Option<FarPod> {
        let entry = FAR_PODS.get_ptr(address)?;
        // SAFETY: as for `shortcut_to`.
        unsafe { read_volatile(entry) }.pod_for(address)
    }

    #[inline(always)]
    fn route(&self, to: &NetAddr) -> Option<(Way, u32)> {
        let entry = way_to(to)?;
        Some((Way { device: entry.device, via: entry.via }, entry.mtu))
    }

    #[inline(always)]
    fn forget(&self, address: &NetAddr) {
        // Somebody else was faster.
        if FAR_PODS.remove(address).is_err() {}
    }
}
