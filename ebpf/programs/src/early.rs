//! The XDP hook: packets that go from one wire to another, before the kernel has made anything of them.
//!
//! Bytes are read and written in place: a helper for each of the twenty that a packet takes would be a third of its time.

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    helpers::bpf_redirect,
    programs::XdpContext,
};
use ebpf_packet::{Action, Difference, ETHERNET, Fix, Packet, adjusted, ingress};

use crate::machine::Machine;

/// Where the type of an Ethernet frame stands.
const ETHERTYPE: u32 = 12;
/// Where the last byte that is looked at may stand: behind it are no headers that this hook knows.
const DEEPEST: u32 = 511;

static MACHINE: Machine<true> = Machine;

/// A frame of the driver.
struct Frame {
    xdp: *mut xdp_md,
}

impl Frame {
    /// N bytes at an offset; nothing where they are not in the frame's first buffer, and the stack sees to it.
    #[inline(always)]
    fn place<const N: usize>(&self, offset: u32) -> Option<*mut [u8; N]> {
        if offset > DEEPEST {
            return None;
        }
        // SAFETY: the context is valid for the run.
        let (data, end) = unsafe { ((*self.xdp).data as usize, (*self.xdp).data_end as usize) };
        let start = kept(data + offset as usize);
        (start + N <= end).then_some(start as *mut [u8; N])
    }

    /// Accounts for replaced words in the checksum at an offset.
    #[inline(always)]
    fn adjust(&mut self, checksum: u32, by: Difference, may_be_absent: bool) -> Option<()> {
        let old = u16::from_ne_bytes(self.load(checksum)?);
        if may_be_absent && old == 0 {
            return Some(());
        }
        let new = match adjusted(old, by) {
            0 if may_be_absent => 0xffff,
            new => new,
        };
        self.store(checksum, &new.to_ne_bytes())
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // SAFETY: the bytes are inside the frame, and nothing else writes them during the run.
        self.place(offset).map(|place| unsafe { place.read() })
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Option<()> {
        // SAFETY: as above.
        self.place(offset).map(|place| unsafe { place.write(*bytes) })
    }

    #[inline(always)]
    fn fix_header(&mut self, checksum: u32, by: Difference) -> Option<()> {
        self.adjust(checksum, by, false)
    }

    #[inline(always)]
    fn fix_transport(&mut self, checksum: u32, by: Difference, fix: Fix) -> Option<()> {
        self.adjust(checksum, by, fix.may_be_absent)
    }
}

/// The same, in one register from here on: the verifier knows by the register that was compared how far may be read, and
/// the compiler would compute the sum once for the comparison and once for the read.
#[inline(always)]
fn kept(mut place: usize) -> usize {
    // SAFETY: it does nothing. (An instruction all the same: the kernel refuses two lines of source at one.)
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) place, options(pure, nomem, nostack, preserves_flags));
    }
    place
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
