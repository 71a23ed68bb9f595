//! What became of an update: what was written, and what was not, and why.

use std::net::SocketAddr;

use thiserror::Error;

use crate::{memory::MemoryError, table::ServiceKey};

/// Why a service, or a part of it, is not programmed. The rest of the update went on.
#[derive(Debug, Error)]
pub enum Refused {
    /// A map is full; the service keeps answering as before the update.
    #[error("no room for {needed} more {what}: {free} of {capacity} are free")]
    Full {
        /// Which resource.
        what: &'static str,
        /// How many it takes.
        needed: u32,
        /// How many there are.
        free: u32,
        /// The resource's size.
        capacity: u32,
    },
    /// An extent counts its backends in sixteen bits.
    #[error("{count} endpoints are more than the 65535 one service may have")]
    TooManyBackends {
        /// How many were wanted.
        count: usize,
    },
    /// Another service has the frontend; it moves here when that one lets go.
    #[error("{frontend} belongs to service {owner} already")]
    Conflict {
        /// Which frontend.
        frontend: String,
        /// Whose it is.
        owner: ServiceKey,
    },
    /// The kernel refused a write.
    #[error("the kernel refused a write")]
    Memory(#[from] MemoryError),
}

/// What an update did.
#[derive(Debug, Default)]
pub struct SyncReport {
    /// Services that were written.
    pub written: usize,
    /// Services that were removed.
    pub removed: usize,
    /// Services that were looked at and needed no write.
    pub unchanged: usize,
    /// What could not be done, by service.
    pub refused: Vec<(ServiceKey, Refused)>,
    /// Endpoints that answer a UDP service no more: connected sockets may still send there.
    pub retired_datagram: Vec<SocketAddr>,
}
