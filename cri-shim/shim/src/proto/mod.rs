//! Messages of the protocols the shim speaks, written from their public definitions (names, types and field numbers of
//! containerd's `api/` and cgroups' `stats/` at v2.1, wire-compatible with 1.6). Only data, no behaviour.
//!
//! prost structs of our own instead of generated clients: those bring tonic, which is too heavy for a process per pod.

pub mod events;
pub mod metrics;
pub mod task;
pub mod ttrpc;

use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;

/// A point in time as protobuf carries it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
    }
}
