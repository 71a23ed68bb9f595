//! SPDY/3.1, the server side, as far as Kubernetes' streaming uses it: streams opened by the client, over one connection.
//!
//! In reading order: [`connection`] (tasks and streams), [`frame`] (bytes and frames), [`headers`] (compressed lists).
//! No push, no priorities, no credentials: clients of exec, attach and port-forward use none.

pub mod connection;
mod dictionary;
pub mod frame;
pub mod headers;

pub use self::connection::{Connection, Output, Stream};

/// What a peer did that ends the connection.
#[derive(Debug, thiserror::Error)]
pub enum SpdyError {
    /// A frame's body does not have its documented form.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// Something exceeds its bound.
    #[error("{0} is too long")]
    TooLong(&'static str),
    /// The zlib stream of the headers is broken.
    #[error("the header compression is broken")]
    Compression,
    /// Another version of the protocol.
    #[error("the peer speaks SPDY version {0}, not 3")]
    Version(u32),
    /// A stream id that clients may not use, or that goes backwards.
    #[error("the peer opened stream {0} out of turn")]
    StreamId(u32),
    /// The peer makes us answer but does not read the answers.
    #[error("the peer does not read its answers")]
    Flood,
    /// A window grew beyond what the protocol allows.
    #[error("the window of stream {0} overflowed")]
    Window(u32),
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[from] std::io::Error),
}
