//! SPDY/3.1 and WebSocket server side of exec, attach and port-forward, and the relay of upgraded connections.
//!
//! In reading order: [`runtime`] (what a container runtime provides), [`server`] (URLs, negotiation), `exec_spdy`,
//! `websocket` and `port_forward` (one protocol each), [`spdy`] (the multiplexing below two of them), [`status`] (how
//! an exec's end is told), [`tokens`]; and [`relay`], which the API server and the agent use to pass an upgraded
//! connection on untouched.
//!
//! Everything is bounded: queues between tasks, frames, header blocks, streams, connections, waiting tokens. A client
//! that vanishes is noticed by its connection's end or, when we were waiting for somebody else, by a ping.

mod exec_spdy;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod port_forward;
pub mod relay;
pub mod runtime;
pub mod server;
pub mod spdy;
pub mod status;
pub mod tokens;
mod websocket;

/// Body of every response this crate makes or passes on.
pub type BoxBody = http_body_util::combinators::BoxBody<bytes::Bytes, BodyError>;

/// What can end a response body early.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
