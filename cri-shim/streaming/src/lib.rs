//! SPDY/3.1 and WebSocket server side of exec, attach and port-forward, and the relay of upgraded connections.
//!
//! Reading order: [`relay`] forwards an HTTP upgrade untouched.

pub mod relay;

/// Body of every response this crate makes or passes on.
pub type BoxBody = http_body_util::combinators::BoxBody<bytes::Bytes, BodyError>;

/// What can end a response body early.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
