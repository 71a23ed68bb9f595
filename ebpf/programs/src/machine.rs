//! The maps and routes as the packet decisions see them.

use aya_ebpf::{helpers::bpf_ktime_get_coarse_ns, maps::lpm_trie::Key};
use ebpf_common::{
    AffinityKey, AffinityValue, Backend, DeviceEntry, FlowKey, FlowValue, FragmentKey, FragmentPorts,
    FrontendKey, FrontendValue, NatConfig, NetAddr, NodeAddressUse, NodePortBounds, ServiceSlot, SourceRange,
    WayEntry, WayKey,
};
use ebpf_packet::{Count, Flows, Headers, Hop, Tables, Way};

use crate::maps::{
    DEVICES, FLOWS, FRAGMENTS, HOPS, KNOWN_HOPS, KernelTables, KnownHop, NAT_CONFIG, NEW_FLOWS,
    SOURCE_RANGES, WAYS, count, count_backend, signal_flow,
};

/// The maps and routes that a packet meets. `EARLY`: the hook is XDP.
///
/// Routes are those that the loader was told: the kernel's own lookup is for programs under another licence.
pub(crate) struct Machine<const EARLY: bool>;

/// How long a hop is believed without a look at the routes, which takes a third of a packet's time.
const KNOWN_NS: u64 = 10_000_000;

/// The way to an address.
#[inline(always)]
pub(crate) fn way_to(to: &NetAddr) -> Option<&'static WayEntry> {
    WAYS.get(Key::new(WayKey::ALL_BITS, WayKey(*to)))
}

/// Where the hop to an address is remembered: neighbours in one subnet have places of their own.
#[inline(always)]
fn place_of(to: &NetAddr) -> u32 {
    let word = to.0[3];
    (word ^ word >> 16 ^ word >> 24) % KNOWN_HOPS
}

impl<const EARLY: bool> Tables for Machine<EARLY> {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        KernelTables.frontend(key)
    }

    #[inline(always)]
    fn service(&self, id: u32) -> Option<ServiceSlot> {
        KernelTables.service(id)
    }

    #[inline(always)]
    fn extent_word(&self, index: u32) -> Option<u64> {
        KernelTables.extent_word(index)
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<&Backend> {
        TABLES.backend(id)
    }

    #[inline(always)]
    fn node_address(&self, addr: &NetAddr) -> NodeAddressUse {
        KernelTables.node_address(addr)
    }

    #[inline(always)]
    fn node_port_bounds(&self) -> NodePortBounds {
        KernelTables.node_port_bounds()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        KernelTables.affinity(key)
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, value: &AffinityValue) {
        KernelTables.set_affinity(key, value);
    }
}

static TABLES: KernelTables = KernelTables;

impl<const EARLY: bool> Flows for Machine<EARLY> {
    const EARLY: bool = EARLY;

    #[inline(always)]
    fn hop(&self, headers: &Headers, to: &NetAddr, now_ns: u64) -> Option<Hop> {
        let known = HOPS.get_ptr_mut(place_of(to))?;
        // SAFETY: the element is this CPU's own, and packets of one CPU come one after the other.
        let known = unsafe { &mut *known };
        if known.to != *to || now_ns >= known.until_ns {
            let way = way_to(to)?;
            // SAFETY: the memory stays an element's of this map as long as the program runs, as for `shortcut_to`; another
            // device's flags would cost a frame.
            let entry = unsafe { DEVICES.get(way.device) }?;
            if way.to == [0; 6] || entry.flags & DeviceEntry::FLAG_XDP == 0 {
                return None;
            }
            let hop = Hop { device: way.device, to: way.to, from: way.from };
            *known = KnownHop { to: *to, until_ns: now_ns + KNOWN_NS, mtu: way.mtu, hop };
        }
        (headers.len <= known.mtu).then_some(known.hop)
    }

    #[inline(always)]
    fn way(&self, to: &NetAddr) -> Option<Way> {
        let way = way_to(to)?;
        let via = if way.via == NetAddr::ANY_V6 { *to } else { way.via };
        Some(Way { device: way.device, via })
    }

    #[inline(always)]
    fn established(&self, key: &FlowKey) -> Option<&FlowValue> {
        // SAFETY: an entry that is recycled under our eyes is one of another flow: the packet is lost, no more.
        unsafe { FLOWS.get(key) }
    }

    #[inline(always)]
    fn begun(&self, key: &FlowKey) -> Option<&FlowValue> {
        // SAFETY: as above.
        unsafe { NEW_FLOWS.get(key) }
    }

    #[inline(always)]
    fn establish(&self, flow: &FlowValue) {
        // A full or busy map costs the client a retransmission.
        if FLOWS.insert(flow.reply_key(), flow, 0).is_ok()
            && FLOWS.insert(flow.forward_key(), flow, 0).is_err()
        {}
        signal_flow();
    }

    #[inline(always)]
    fn begin(&self, flow: &FlowValue) {
        if NEW_FLOWS.insert(flow.reply_key(), flow, 0).is_ok()
            && NEW_FLOWS.insert(flow.forward_key(), flow, 0).is_err()
        {}
    }

    #[inline(always)]
    fn note_use(&self, key: &FlowKey, now_ns: u64, flags: u8) {
        let found = match FLOWS.get_ptr_mut(key) {
            Some(found) => found,
            None => match NEW_FLOWS.get_ptr_mut(key) {
                Some(found) => found,
                None => return,
            },
        };
        // SAFETY: the entry lives as long as the program runs; packets of one flow may at worst lose one another's
        // note.
        unsafe {
            (*found).last_used_ns = now_ns;
            if flags != 0 {
                (*found).flags |= flags;
            }
        }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        // SAFETY: the value is copied out at once.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn note_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        // Without memory the later fragments are lost.
        if FRAGMENTS.insert(key, ports, 0).is_err() {}
    }

    #[inline(always)]
    fn nat_config(&self) -> NatConfig {
        NAT_CONFIG.get(0).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn source_for(&self, backend: &NetAddr) -> (NetAddr, bool) {
        let of = |v4: NetAddr, v6: NetAddr| if backend.is_v4() { v4 } else { v6 };
        let mut tracked = false;
        if let Some(Way { device, .. }) = self.way(backend) {
            // SAFETY: as above. Devices come and go so rarely that a program that met another one's address would cost one
            // connection.
            if let Some(entry) = unsafe { DEVICES.get(device) } {
                let flag =
                    if backend.is_v4() { DeviceEntry::FLAG_TRACKED_V4 } else { DeviceEntry::FLAG_TRACKED_V6 };
                tracked = entry.flags & flag != 0;
                let own = of(entry.source_v4, entry.source_v6);
                if own != NetAddr::ANY_V6 {
                    return (own, tracked);
                }
            }
        }
        let config = self.nat_config();
        (of(config.source_v4, config.source_v6), tracked)
    }

    #[inline(always)]
    fn in_source_ranges(&self, service: u32, client: &NetAddr) -> bool {
        let data = SourceRange { service: service.to_be(), addr: *client };
        SOURCE_RANGES.get(Key::new(SourceRange::ALL_BITS, data)).is_some()
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: the helper has no arguments.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn count(&self, service: u32, what: Count) {
        count(service, |stats| match what {
            Count::Connection => stats.external += 1,
            Count::FoundAgain => {
                stats.external += 1;
                stats.found_again += 1;
            }
            Count::Refused => stats.refused += 1,
            Count::Denied => stats.denied += 1,
            Count::In(bytes) => {
                stats.packets_in += 1;
                stats.bytes_in += u64::from(bytes);
            }
            Count::Out(bytes) => {
                stats.packets_out += 1;
                stats.bytes_out += u64::from(bytes);
            }
        });
    }

    #[inline(always)]
    fn count_backend(&self, backend: u32) {
        count_backend(backend);
    }
}
