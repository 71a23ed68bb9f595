//! What `keelson-cri` and the shim say to each other on the shim's own socket, beside containerd.
//!
//! One connection per request: a request frame, then any number of output frames, then one that says how it ended. A
//! client that closes its connection gives its request up. A frame is its payload's length (four bytes, big-endian), its
//! kind (one byte) and the payload. Data only; both sides move the bytes themselves.

/// Annotation of a container that names the socket of its pod's shim.
pub const SOCKET_ANNOTATION: &str = "io.keelson.cri.shim-socket";
/// Scheme of a stream that is written to a CRI log file by the shim; the file's absolute path follows, or nothing when
/// output is only for those who attach.
pub const LOG_SCHEME: &str = "keelson-log://";
/// Most bytes of each stream that ExecSync gives.
pub const MAX_OUTPUT: usize = 16 << 20;
/// Largest payload of a frame.
pub const MAX_FRAME: usize = 1 << 20;
/// Bytes before the payload.
pub const HEADER: usize = 5;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A [`Request`].
    Request = 0,
    /// Bytes of standard output.
    Stdout = 1,
    /// Bytes of standard error.
    Stderr = 2,
    /// The end: an [`Ended`].
    Ended = 3,
    /// The end: a [`Failed`].
    Failed = 4,
}

impl Kind {
    /// The kind with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Request, Self::Stdout, Self::Stderr, Self::Ended, Self::Failed]
            .get(usize::from(number))
            .copied()
    }
}

/// The bytes before a payload of `length`.
pub fn header(kind: Kind, length: usize) -> [u8; HEADER] {
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [a, b, c, d, kind as u8]
}

/// Kind and payload length that a header tells; `None` when no peer of ours sent it.
pub fn parse_header(header: [u8; HEADER]) -> Option<(Kind, usize)> {
    let [a, b, c, d, kind] = header;
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    (length <= MAX_FRAME).then_some((Kind::from_number(kind)?, length))
}

/// What is asked.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// Id of the container.
    #[prost(string, tag = "1")]
    pub container: String,
    /// The call.
    #[prost(oneof = "Call", tags = "2, 3, 4")]
    pub call: Option<Call>,
}

/// The calls.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Call {
    /// Run a command to its end.
    #[prost(message, tag = "2")]
    ExecSync(ExecSync),
    /// Go on in a new log file.
    #[prost(message, tag = "3")]
    ReopenLog(Nothing),
    /// A copy of the output from now on: an empty piece says when that is.
    #[prost(message, tag = "4")]
    Attach(Nothing),
}

/// Runs a command as the container's own process would: same user, environment, confinement.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExecSync {
    /// The command.
    #[prost(string, repeated, tag = "1")]
    pub args: Vec<String>,
    /// How long it may take in milliseconds; 0 for ever.
    #[prost(uint64, tag = "2")]
    pub timeout_ms: u64,
}

/// No parameters.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Nothing {}

/// It was done.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Ended {
    /// Exit code of the command; 128 + n when signal n ended it.
    #[prost(uint32, tag = "1")]
    pub exit_code: u32,
}

/// It was not done.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failed {
    /// gRPC code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_told_apart_from_noise() {
        assert_eq!(parse_header(header(Kind::Ended, 7)), Some((Kind::Ended, 7)));
        assert_eq!(parse_header([0, 0, 0, 1, 9]), None, "no such kind");
        assert_eq!(parse_header([0xff, 0, 0, 0, 1]), None, "too long");
    }
}
