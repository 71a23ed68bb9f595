//! The own service of our shim: commands, log rotation and output without a way through containerd.
//!
//! Input: the socket of a pod's shim and a container id. One connection per request (see `keelson_shim::protocol`); dropping
//! the call closes it, and the shim ends what it was doing for us.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use cri_shim_core::log_line::LogStream;
use keelson_shim::protocol::{
    Call, Ended, ExecSync, Failed, HEADER, Kind, MAX_OUTPUT, Nothing, Request, header, parse_header,
};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::Code;

use super::error::ExecError;
use super::sync::ExecOutput;

/// How long the shim may take to answer what needs no work.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long it may take to end a command and everything it started, beyond the command's own limit.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// The shim of one pod.
#[derive(Clone, Debug)]
pub struct OwnShim {
    socket: PathBuf,
}

/// What the shim said.
enum Frame {
    Output(LogStream, Vec<u8>),
    Ended(u32),
}

/// The output of a container from now on.
pub struct Output {
    connection: Connection,
    first: Option<Frame>,
}

impl Output {
    /// The next piece; `None` when there will be none.
    pub async fn next(&mut self) -> Option<(LogStream, Bytes)> {
        let next = match self.first.take() {
            Some(first) => Ok(first),
            None => self.connection.next().await,
        };
        match next {
            Ok(Frame::Output(stream, bytes)) => Some((stream, bytes.into())),
            Ok(Frame::Ended(_)) => None,
            Err(error) => {
                tracing::debug!(error = error.chain(), "a container's output broke off");
                None
            }
        }
    }
}

impl OwnShim {
    /// Where the shim of a sandbox listens. Short, because a socket's path may be: half of the id is unique enough, and a
    /// second sandbox with the same half would find no container of its own there.
    pub fn socket(state_dir: &Path, sandbox: &str) -> PathBuf {
        Self::sockets(state_dir).join(sandbox.get(..16).unwrap_or(sandbox))
    }

    /// The directory of these.
    pub fn sockets(state_dir: &Path) -> PathBuf {
        state_dir.join("shims")
    }

    /// The shim of a sandbox.
    pub fn of(state_dir: &Path, sandbox: &str) -> Self {
        Self { socket: Self::socket(state_dir, sandbox) }
    }

    /// Runs a command to its end, at most for `limit`.
    pub async fn exec_sync(
        &self,
        container: &str,
        command: &[String],
        limit: Option<Duration>,
    ) -> Result<ExecOutput, ExecError> {
        if command.is_empty() {
            return Err(ExecError::NoCommand);
        }
        let timeout_ms = limit.map_or(0, |limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1));
        let call = Call::ExecSync(ExecSync { args: command.to_vec(), timeout_ms });
        let timeout = || ExecError::Timeout { command: command.join(" "), after: limit.unwrap_or_default() };
        let work = async {
            let mut connection = self.ask(container, call).await?;
            let mut output = ExecOutput::default();
            loop {
                match connection.next().await? {
                    Frame::Output(stream, bytes) => {
                        let kept = match stream {
                            LogStream::Stdout => &mut output.stdout,
                            LogStream::Stderr => &mut output.stderr,
                        };
                        let room = MAX_OUTPUT.saturating_sub(kept.len()).min(bytes.len());
                        kept.extend_from_slice(&bytes[..room]);
                    }
                    Frame::Ended(exit_code) => return Ok(ExecOutput { exit_code, ..output }),
                }
            }
        };
        let result = match limit {
            Some(limit) => tokio::time::timeout(limit.saturating_add(END_PATIENCE), work).await,
            None => Ok(work.await),
        };
        match result {
            Ok(Err(ExecError::Shim { code: Code::DeadlineExceeded, .. })) | Err(_) => Err(timeout()),
            Ok(Err(ExecError::Shim { code: Code::Unknown, message, .. })) => {
                Err(ExecError::Refused { exec: command[0].clone(), reason: message })
            }
            Ok(result) => result,
        }
    }

    /// Makes the shim write to a new log file.
    pub async fn reopen_log(&self, container: &str) -> Result<(), ExecError> {
        let work = async { self.ask(container, Call::ReopenLog(Nothing {})).await?.next().await };
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(result) => result.map(drop),
            Err(_elapsed) => Err(self.failed(Code::DeadlineExceeded, "no answer in time")),
        }
    }

    /// A copy of a container's output from now on.
    pub async fn attach(&self, container: &str) -> Result<Output, ExecError> {
        let mut connection = self.ask(container, Call::Attach(Nothing {})).await?;
        // What the container answers to input that it gets from now on is not missed.
        let first = tokio::time::timeout(PATIENCE, connection.next()).await;
        let stuck = |_elapsed| self.failed(Code::Unavailable, "it hands on no output of the container");
        Ok(Output { first: Some(first.map_err(stuck)??), connection })
    }

    fn failed(&self, code: Code, message: impl Into<String>) -> ExecError {
        ExecError::Shim { socket: self.socket.clone(), code, message: message.into() }
    }

    async fn ask(&self, container: &str, call: Call) -> Result<Connection, ExecError> {
        let request = Request { container: container.to_owned(), call: Some(call) }.encode_to_vec();
        let work = async {
            let mut stream = UnixStream::connect(&self.socket).await?;
            let sent = async {
                stream.write_all(&header(Kind::Request, request.len())).await?;
                stream.write_all(&request).await
            };
            match sent.await {
                // One that takes no more requests says so without reading any.
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error),
                _ => Ok(stream),
            }
        };
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(Ok(stream)) => Ok(Connection { shim: self.clone(), stream }),
            Ok(Err(error)) => Err(self.failed(Code::Unavailable, error.to_string())),
            Err(_elapsed) => Err(self.failed(Code::Unavailable, "it takes no request")),
        }
    }
}

struct Connection {
    shim: OwnShim,
    stream: UnixStream,
}

impl Connection {
    async fn next(&mut self) -> Result<Frame, ExecError> {
        let broken = |error: std::io::Error| self.shim.failed(Code::Unavailable, error.to_string());
        let mut head = [0; HEADER];
        self.stream.read_exact(&mut head).await.map_err(broken)?;
        let nonsense = || self.shim.failed(Code::Internal, "it said something that cannot be understood");
        let (kind, length) = parse_header(head).ok_or_else(nonsense)?;
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).await.map_err(broken)?;
        match kind {
            Kind::Stdout => Ok(Frame::Output(LogStream::Stdout, payload)),
            Kind::Stderr => Ok(Frame::Output(LogStream::Stderr, payload)),
            Kind::Ended => {
                let ended = Ended::decode(payload.as_slice()).map_err(|_garbled| nonsense())?;
                Ok(Frame::Ended(ended.exit_code))
            }
            Kind::Failed => {
                let failed = Failed::decode(payload.as_slice()).map_err(|_garbled| nonsense())?;
                Err(self.shim.failed(Code::from_i32(failed.code), failed.message))
            }
            Kind::Request => Err(nonsense()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    /// Answers one request with `frames`.
    fn answer(dir: &Path, frames: Vec<(Kind, Vec<u8>)>) -> (OwnShim, tokio::task::JoinHandle<Request>) {
        let shim = OwnShim::of(dir, "pod");
        std::fs::create_dir_all(dir.join("shims")).unwrap();
        let listener = UnixListener::bind(OwnShim::socket(dir, "pod")).unwrap();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; HEADER];
            stream.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; parse_header(head).unwrap().1];
            stream.read_exact(&mut payload).await.unwrap();
            for (kind, bytes) in frames {
                stream.write_all(&header(kind, bytes.len())).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
            }
            Request::decode(payload.as_slice()).unwrap()
        });
        (shim, served)
    }

    #[tokio::test]
    async fn a_command_gives_its_output_and_code() {
        let dir = tempfile::tempdir().unwrap();
        let (shim, served) = answer(
            dir.path(),
            vec![
                (Kind::Stdout, b"out".to_vec()),
                (Kind::Stderr, b"err".to_vec()),
                (Kind::Ended, Ended { exit_code: 3 }.encode_to_vec()),
            ],
        );
        let command = ["true".to_owned()];
        let output = shim.exec_sync("c", &command, Some(Duration::from_secs(2))).await.unwrap();
        assert_eq!(output, ExecOutput { stdout: b"out".into(), stderr: b"err".into(), exit_code: 3 });
        let request = served.await.unwrap();
        let call = Call::ExecSync(ExecSync { args: command.to_vec(), timeout_ms: 2000 });
        assert_eq!(request, Request { container: "c".to_owned(), call: Some(call) });
    }

    #[tokio::test]
    async fn a_shim_that_takes_no_more_requests_says_why() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("shims")).unwrap();
        let listener = UnixListener::bind(OwnShim::socket(dir.path(), "pod")).unwrap();
        let words = "the pod runs 512 commands already";
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let failed = Failed { code: Code::ResourceExhausted as i32, message: words.to_owned() };
            let failed = failed.encode_to_vec();
            stream.write_all(&header(Kind::Failed, failed.len())).await.unwrap();
            stream.write_all(&failed).await.unwrap();
        });
        let shim = OwnShim::of(dir.path(), "pod");
        // Longer than a socket's buffer: whatever the timing, it cannot all be sent.
        let command = ["x".repeat(900_000)];
        let error = shim.exec_sync("c", &command, None).await.unwrap_err();
        served.await.unwrap();
        let status = tonic::Status::from(&error);
        assert!(status.code() == Code::ResourceExhausted && status.message().contains(words), "{status}");
    }

    #[tokio::test]
    async fn failures_keep_their_kind() {
        let cases = [(Code::DeadlineExceeded, Code::DeadlineExceeded), (Code::NotFound, Code::NotFound)];
        for (told, seen) in cases {
            let dir = tempfile::tempdir().unwrap();
            let failed = Failed { code: told as i32, message: "words".to_owned() };
            let (shim, _served) = answer(dir.path(), vec![(Kind::Failed, failed.encode_to_vec())]);
            let error = shim.exec_sync("c", &["true".to_owned()], None).await.unwrap_err();
            assert_eq!(tonic::Status::from(&error).code(), seen, "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let error = OwnShim::of(dir.path(), "pod").reopen_log("c").await.unwrap_err();
        assert_eq!(tonic::Status::from(&error).code(), Code::Unavailable, "{error}");
    }
}
