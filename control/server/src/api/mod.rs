//! The resource API: what each verb does, over the store and the watch cache.
//!
//! [`Api`] holds everything a request handler needs and is shared by all of them. `dispatch` picks the handler; `read`, `watch`, `write`,
//! `patch` and `delete` are the verbs; `render` makes answers. Nothing here knows of connections or TLS.

pub(crate) mod delete;
pub(crate) mod dispatch;
pub(crate) mod options;
mod patch;
mod read;
pub(crate) mod render;
mod token;
mod watch;
pub(crate) mod write;

use std::sync::{Arc, atomic::AtomicBool};

use control_store::Store;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::allocator::Allocator, auth::tokens::TokenAuthority, cache::WatchCache, config::ServerConfig,
    metrics::Metrics, random::Random, relay::KubeletClient,
};

/// Everything that request handlers share.
pub(crate) struct Api {
    /// Settings.
    pub config: ServerConfig,
    /// Where objects are kept.
    pub store: Arc<dyn Store>,
    /// Where they are read from.
    pub cache: Arc<WatchCache>,
    /// Service addresses and node ports.
    pub allocator: Allocator,
    /// Service account tokens.
    pub tokens: TokenAuthority,
    /// Connections to kubelets.
    pub kubelets: KubeletClient,
    /// Counters.
    pub metrics: Metrics,
    /// Random identity.
    pub random: Random,
    /// Start-up is complete.
    pub ready: AtomicBool,
    /// Cancelled when the server is to stop; ends watches.
    pub shutdown: CancellationToken,
}
