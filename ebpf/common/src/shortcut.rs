//! Pods of one bridge that hand their packets straight to each other.

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

/// An address in four bytes. Those of one node's pods differ there: plugins number, or draw, the last ones.
#[inline(always)]
const fn fold(address: &LinkAddress) -> u32 {
    let bytes = address.bytes;
    u32::from_ne_bytes([bytes[2], bytes[3], bytes[4], bytes[5]])
        ^ u32::from_ne_bytes([bytes[0], bytes[1], 0, 0])
}

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
}
