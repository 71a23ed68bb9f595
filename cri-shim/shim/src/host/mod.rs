//! What safe crates do not offer: the C library's allocator, waiting for children of this thread only, any signal to a pidfd.

#![allow(unsafe_code, reason = "calls into the C library and the kernel that no safe crate wraps")]

pub mod memory;
pub mod orphans;
pub mod signal;
