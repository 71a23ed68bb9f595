//! Bytes of a packet on the stack.

use core::mem::MaybeUninit;

use aya_ebpf::cty::{c_long, c_void};

/// A buffer for N bytes that a helper fills. Aligned, so that they are read by words; not cleared before.
#[repr(C, align(8))]
pub(crate) struct Bytes<const N: usize>([u8; N]);

impl<const N: usize> Bytes<N> {
    /// What `helper` wrote; nothing where it says by its result that it failed.
    #[inline(always)]
    pub(crate) fn fill(helper: impl FnOnce(*mut c_void) -> c_long) -> Option<[u8; N]> {
        let mut buffer = MaybeUninit::<Self>::uninit();
        if helper(buffer.as_mut_ptr().cast()) != 0 {
            return None;
        }
        // SAFETY: the helper has written all N bytes, or it would have failed.
        Some(unsafe { buffer.assume_init() }.0)
    }
}
