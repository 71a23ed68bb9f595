//! The C library's allocator, kept small: one arena, and memory given back after work.

/// Uses one arena for all threads and gives back what is freed at the top. To be called before threads are made.
pub fn economize() {
    // SAFETY: mallopt takes two numbers and may be called at any time; no other thread allocates yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
    }
}

/// Gives memory that is free back to the kernel.
pub fn trim() {
    // SAFETY: malloc_trim takes a number, locks the allocator itself and touches only memory that is free.
    unsafe { libc::malloc_trim(0) };
}
