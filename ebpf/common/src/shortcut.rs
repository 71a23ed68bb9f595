//! Pods of one bridge that hand their packets straight to each other, and to the tunnel that leads to other nodes' pods.

use crate::NetAddr;

/// Address of a network interface, with room up to eight bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LinkAddress {
    /// The address.
    pub bytes: [u8; 6],
    /// Padding, 0.
    pub padding: [u8; 2],
}

impl LinkAddress {
    /// An Ethernet address.
    #[inline(always)]
    #[must_use]
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self { bytes, padding: [0; 2] }
    }
}

/// The host's side of a pod's link, and a part of the address that it stands under, in one word.
///
/// A kernel may give the memory of an element that was removed to another one at once, while a program still reads it
/// (from 6.1 on, hashes without preallocation have an allocator of their own). What is read with one load tells whether it
/// belongs to the address that was asked for.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodLink(pub u64);

impl PodLink {
    /// The device of this number, for this address.
    #[inline(always)]
    #[must_use]
    pub const fn new(address: &LinkAddress, index: u32) -> Self {
        Self(index as u64 | (fold(address) as u64) << 32)
    }

    /// The device's number, if the word belongs to this address.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the two halves are what is asked for")]
    pub const fn index_for(self, address: &LinkAddress) -> Option<u32> {
        if (self.0 >> 32) as u32 == fold(address) { Some(self.0 as u32) } else { None }
    }
}

/// How packets between pods of this node and others' are routed without the stack; the single element of its map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PodRouter {
    /// Index of the tunnel's device; 0 while the stack routes them.
    pub tunnel: u32,
    /// Bytes that a packet for a pod of this node may have.
    pub mtu: u32,
    /// The bridge's own address: what is sent to it is to be routed.
    pub mac: [u8; 6],
    /// Padding, 0.
    pub padding: [u8; 2],
}

/// A pod of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FarPod {
    /// Index of the host's side of its link.
    pub link: u32,
    /// The address that its own side has.
    pub mac: [u8; 6],
}

/// The same as it stands in the map under the pod's address: two words, each read with one load, of which the first tells whose
/// it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FarPodEntry {
    /// The link's number, and a part of the pod's address.
    pub link: u64,
    /// The pod's link address.
    pub mac: u64,
}

impl FarPodEntry {
    /// The entry of a pod that has this address.
    #[must_use]
    pub const fn new(address: &NetAddr, pod: &FarPod) -> Self {
        let mac = pod.mac;
        Self {
            link: pod.link as u64 | (fold_ip(address) as u64) << 32,
            mac: u64::from_ne_bytes([mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0]),
        }
    }

    /// The pod, if the entry belongs to this address.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the two halves are what is asked for")]
    pub const fn pod_for(self, address: &NetAddr) -> Option<FarPod> {
        if (self.link >> 32) as u32 != fold_ip(address) {
            return None;
        }
        let mac = self.mac.to_ne_bytes();
        Some(FarPod { link: self.link as u32, mac: [mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]] })
    }
}

/// An IP address in four bytes. Those of one node's pods differ there.
#[inline(always)]
const fn fold_ip(address: &NetAddr) -> u32 {
    let [a, b, c, d] = address.0;
    a.rotate_left(3) ^ b.rotate_left(7) ^ c.rotate_left(11) ^ d
}

/// An address in four bytes. Those of one node's pods differ there: plugins number, or draw, the last ones.
#[inline(always)]
const fn fold(address: &LinkAddress) -> u32 {
    let bytes = address.bytes;
    u32::from_ne_bytes([bytes[2], bytes[3], bytes[4], bytes[5]])
        ^ u32::from_ne_bytes([bytes[0], bytes[1], 0, 0])
}

const _: () = assert!(size_of::<PodRouter>() == 16);
const _: () = assert!(size_of::<FarPodEntry>() == 16 && align_of::<FarPodEntry>() == 8);
const _: () = assert!(size_of::<PodLink>() == 8 && align_of::<PodLink>() == 8);
const _: () = assert!(size_of::<LinkAddress>() == 8 && align_of::<LinkAddress>() == 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_answers_for_its_address_alone() {
        let address = LinkAddress::new([2, 0, 10, 244, 0, 7]);
        let link = PodLink::new(&address, 42);
        assert_eq!(link.index_for(&address), Some(42));
        for place in 0..6 {
            let mut other = address;
            other.bytes[place] ^= 1;
            assert_eq!(link.index_for(&other), None, "{other:?}");
        }
        assert_eq!(PodLink(0).index_for(&address), None);
    }

    #[test]
    fn an_entry_answers_for_its_address_alone() {
        let pod = FarPod { link: 42, mac: [2, 0, 10, 244, 0, 7] };
        for address in [NetAddr::from_v4_word(0x0700_f40a), NetAddr([1, 2, 3, 4])] {
            let entry = FarPodEntry::new(&address, &pod);
            assert_eq!(entry.pod_for(&address), Some(pod));
            for place in 0..4 {
                let mut other = address;
                other.0[place] ^= 1 << 24;
                assert_eq!(entry.pod_for(&other), None, "{other:?}");
            }
        }
    }
}
