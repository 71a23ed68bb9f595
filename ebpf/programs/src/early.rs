//! The XDP hook: packets that go from one wire to another, before the kernel has made anything of them.

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    helpers::{bpf_redirect, bpf_xdp_load_bytes, bpf_xdp_store_bytes},
    programs::XdpContext,
};
use ebpf_packet::{Action, ETHERNET, Fix, Packet, adjusted, ingress};

use crate::{bytes::Bytes, machine::Machine};

/// Where the type of an Ethernet frame stands.
const ETHERTYPE: u32 = 12;

static MACHINE: Machine<true> = Machine;

/// A frame of the driver.
struct Frame {
    xdp: *mut xdp_md,
}

impl Frame {
    /// Accounts for a replaced word in the checksum at an offset.
    #[inline(always)]
    fn adjust(&mut self, checksum: u32, from: u32, to: u32, may_be_absent: bool) -> Option<()> {
        let old = u16::from_ne_bytes(self.load(checksum)?);
        if may_be_absent && old == 0 {
            return Some(());
        }
        let new = match adjusted(old, from, to) {
            0 if may_be_absent => 0xffff,
            new => new,
        };
        self.store(checksum, &new.to_ne_bytes())
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // SAFETY: the helper writes as many bytes as it is told, or fails.
        Bytes::fill(|buffer| unsafe { bpf_xdp_load_bytes(self.xdp, offset, buffer, N as u32) })
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Option<()> {
        // SAFETY: the helper reads N bytes from a buffer of N bytes.
        let result =
            unsafe { bpf_xdp_store_bytes(self.xdp, offset, bytes.as_ptr().cast_mut().cast(), N as u32) };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn fix_header(&mut self, checksum: u32, from: u32, to: u32) -> Option<()> {
        self.adjust(checksum, from, to, false)
    }

    #[inline(always)]
    fn fix_transport(&mut self, checksum: u32, from: u32, to: u32, fix: Fix) -> Option<()> {
        self.adjust(checksum, from, to, fix.may_be_absent)
    }
}

/// A frame that arrived from outside.
#[inline(always)]
pub(crate) fn arrive(ctx: &XdpContext) -> u32 {
    let xdp = ctx.ctx;
    let mut frame = Frame { xdp };
    let Some(ethertype) = frame.load::<2>(ETHERTYPE).map(u16::from_be_bytes) else {
        return xdp_action::XDP_PASS;
    };
    // SAFETY: the context is valid for the run.
    let device = unsafe { (*xdp).ingress_ifindex };
    match ingress(&mut frame, &MACHINE, ETHERNET, ethertype, false) {
        Action::Send(to) if to == device => xdp_action::XDP_TX,
        // SAFETY: the helper takes integers.
        Action::Send(to) => unsafe { bpf_redirect(to, 0) as u32 },
        Action::Drop => xdp_action::XDP_DROP,
        // Later hooks and the stack do what cannot be done here; nothing was changed.
        Action::Pass | Action::Deliver | Action::Untracked | Action::Relay(_) => xdp_action::XDP_PASS,
    }
}
