//! The BPF object that was built into this library, or the stub in its place.

/// The object's bytes; empty where `cargo xtask build-ebpf` had not run when this library was built.
pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/keelson-bpf.o"));

/// Whether this binary carries the BPF programs.
#[must_use]
pub fn is_built() -> bool {
    !OBJECT.is_empty()
}
