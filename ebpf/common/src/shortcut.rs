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

const _: () = assert!(size_of::<LinkAddress>() == 8 && align_of::<LinkAddress>() == 1);
