//! CRI v1 messages and services, wire-compatible with cri-api 1.36.
//!
//! Input: `proto/runtime/v1/api.proto`, our own file of the public names, numbers and types. Output: [`v1`], generated
//! once and checked in, so that users of this crate need no protoc; the test `tests/codegen.rs` fails when the two differ.
//! Maps are ordered. This crate does no IO and holds no behaviour beyond keeping credentials out of `Debug`.

mod redact;

/// The protobuf package `runtime.v1`: every CRI message, client and server.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    reason = "generated code; the meaning of each item is told by cri-api"
)]
pub mod v1 {
    include!("gen/runtime.v1.rs");
}
