//! The C library's allocator, kept small: one arena for all threads, and free memory given back after bursts of work.
#![allow(unsafe_code, reason = "functions of the C library's allocator")]

/// Uses one arena for all threads. To be called before there are others.
pub fn economize() {
    // SAFETY: mallopt takes two numbers and may be called at any time; no other thread allocates yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives memory that is free back to the kernel: after a listing of many objects was read and forgotten.
pub fn trim() {
    // SAFETY: malloc_trim takes a number, locks the allocator itself and touches only memory that is free.
    unsafe { libc::malloc_trim(0) };
}
