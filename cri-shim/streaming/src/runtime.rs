//! What the streaming server needs of a container runtime, and the streams it hands over.
//!
//! Queues are bounded; a side that is done drops its end. Nothing here knows a wire protocol.

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Carries out what clients ask for.
pub trait Runtime: Send + Sync + 'static {
    /// Runs a command in a container until it ends; gives its exit code.
    fn exec(
        &self,
        request: ExecRequest,
        streams: Streams,
    ) -> impl Future<Output = Result<u32, RuntimeError>> + Send;

    /// Connects to a container's own process until it, or the client, ends.
    fn attach(
        &self,
        request: AttachRequest,
        streams: Streams,
    ) -> impl Future<Output = Result<(), RuntimeError>> + Send;

    /// Connects to a port inside a sandbox's network until either side ends.
    fn port_forward(
        &self,
        sandbox: &str,
        port: u16,
        stream: PortStream,
    ) -> impl Future<Output = Result<(), RuntimeError>> + Send;
}

/// What a client is told when the runtime could not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RuntimeError {
    /// The whole chain of causes, for people.
    pub message: String,
    /// What a shell's exit code would be, when the cause is a command that cannot be run: none of that name, or not
    /// allowed. Clients then end as if it had run and failed.
    pub exit_code: Option<u32>,
}

impl RuntimeError {
    /// A failure of the server.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit_code: None }
    }
}

/// Which of a process's streams the client wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "the four flags of the CRI requests, in their words")]
pub struct Wanted {
    /// The client sends input.
    pub stdin: bool,
    /// The client takes output.
    pub stdout: bool,
    /// The client takes errors; never together with a terminal, which has but one output.
    pub stderr: bool,
    /// The process has a terminal, which the client may resize.
    pub tty: bool,
}

/// A command to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRequest {
    /// The container.
    pub container: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Its streams.
    pub wanted: Wanted,
}

/// A container to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachRequest {
    /// The container.
    pub container: String,
    /// Its streams.
    pub wanted: Wanted,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Lines.
    pub height: u16,
}

/// The client's streams. Those not wanted are absent.
pub struct Streams {
    /// What the client types; ends when it has no more or is gone.
    pub stdin: Option<mpsc::Receiver<Bytes>>,
    /// Takes the process's output; closed when the client is gone.
    pub stdout: Option<mpsc::Sender<Bytes>>,
    /// Takes the process's errors.
    pub stderr: Option<mpsc::Sender<Bytes>>,
    /// The terminal's size, the latest only; nothing before the client says one.
    pub resize: watch::Receiver<Option<TerminalSize>>,
    /// Ends when the client is gone, also while the process is silent.
    pub gone: CancellationToken,
}

/// One forwarded connection.
pub struct PortStream {
    /// What the client sends; ends when it has no more or is gone.
    pub input: mpsc::Receiver<Bytes>,
    /// Takes what the client gets; closed when it is gone.
    pub output: mpsc::Sender<Bytes>,
    /// Ends when the client is gone.
    pub gone: CancellationToken,
}
