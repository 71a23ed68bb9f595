//! The runtime behind the streaming server: exec, attach and port-forward on real containers.
//!
//! Input: requests with ids that were checked when their URL was given. Output: bytes to and from the client. A client
//! that vanishes closes the process's input (and hangs up its terminal); output that nobody takes is drained until the
//! process ends, so that it neither blocks nor leaks.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cri_shim_streaming::runtime::{
    AttachRequest, ExecRequest, PortStream, Runtime, RuntimeError, Streams, TerminalSize,
};
use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::error::ExecError;
use super::fifo::Ends;
use super::process::{ExecProcess, Moved, read_piece};
use super::sync::{forget, settle};
use super::{Executor, port};

/// How long the last output of an ended container may take to reach its client.
const LAST_WORDS: Duration = Duration::from_secs(60);

/// A running container's own streams, as they flow from now on.
pub struct ContainerIo {
    /// Its output (all of it, with a terminal).
    pub stdout: mpsc::Receiver<Bytes>,
    /// Its errors.
    pub stderr: mpsc::Receiver<Bytes>,
    /// Takes its input, where it was made with one.
    pub stdin: Option<mpsc::Sender<Bytes>>,
    /// Ends when the container does.
    pub ended: CancellationToken,
}

/// What the rest of the CRI server knows of containers and sandboxes.
pub trait Containers: Send + Sync + 'static {
    /// Joins the streams of a running container.
    fn attach(&self, container: &str) -> impl Future<Output = Result<ContainerIo, RuntimeError>> + Send;

    /// Sets the size of a running container's terminal.
    fn resize(
        &self,
        container: &str,
        size: TerminalSize,
    ) -> impl Future<Output = Result<(), RuntimeError>> + Send;

    /// The network namespace of a ready sandbox; `None` for the host's.
    fn netns(&self, sandbox: &str) -> impl Future<Output = Result<Option<PathBuf>, RuntimeError>> + Send;
}

/// Serves the streaming server.
pub struct Streamer<C> {
    executor: Executor,
    containers: Arc<C>,
}

impl<C> Streamer<C> {
    /// Runs commands with `executor` and finds everything else in `containers`.
    pub fn new(executor: Executor, containers: Arc<C>) -> Self {
        Self { executor, containers }
    }
}

impl<C: Containers> Runtime for Streamer<C> {
    async fn exec(&self, request: ExecRequest, mut streams: Streams) -> Result<u32, RuntimeError> {
        let wanted = request.wanted;
        let (container, command) = (&request.container, &request.command);
        let started = ExecProcess::start(&self.executor, container, command, wanted.stdin, wanted.tty).await;
        let (process, ends) = match started {
            Ok(started) => started,
            Err(error) => return Err(refuse(&error, &mut streams, wanted.tty).await),
        };
        let gone = streams.gone.clone();
        let mut session = tokio::spawn(Session { process, terminal: wanted.tty }.run(ends, streams));
        // Cancel-safe: the session goes on by itself; a client that is gone does not wait for it.
        tokio::select! {
            result = &mut session => match result {
                Ok(result) => result.map_err(|error| told(&error)),
                Err(lost) => Err(told(&lost.into())),
            },
            () = gone.cancelled() => Ok(0),
        }
    }

    async fn attach(&self, request: AttachRequest, streams: Streams) -> Result<(), RuntimeError> {
        let ContainerIo { stdout, stderr, stdin, ended } = self.containers.attach(&request.container).await?;
        let Streams { stdin: input, stdout: to_stdout, stderr: to_stderr, mut resize, gone } = streams;
        let output = async {
            tokio::join!(pass(stdout, to_stdout), pass(stderr, to_stderr));
        };
        let input = async {
            if let (Some(input), Some(stdin)) = (input, stdin) {
                pass(input, Some(stdin)).await;
            }
            std::future::pending::<()>().await;
        };
        let resize = async {
            loop {
                let size = next_size(&mut resize).await;
                if let Err(error) = self.containers.resize(&request.container, size).await {
                    tracing::debug!(%error, "cannot resize a terminal");
                }
            }
        };
        tokio::pin!(output);
        // Cancel-safe: attaching owns nothing; what is not passed on is for nobody.
        tokio::select! {
            () = &mut output => {}
            () = input => {}
            never = resize => never,
            () = gone.cancelled() => {}
            () = ended.cancelled() => drop(tokio::time::timeout(LAST_WORDS, output).await),
        }
        // Also tells the other side that nobody is attached any more.
        ended.cancel();
        Ok(())
    }

    async fn port_forward(&self, sandbox: &str, port: u16, stream: PortStream) -> Result<(), RuntimeError> {
        let failed = |error: port::PortError| RuntimeError::new(crate::images::registry::chain(&error));
        let netns = self.containers.netns(sandbox).await?;
        let connection = port::connect(netns.as_deref(), port).await.map_err(failed)?;
        port::copy(connection, stream).await.map_err(failed)
    }
}

/// A command that could not be run is told as a shell tells it, and in the status; anything else is the server's failure.
async fn refuse(error: &ExecError, streams: &mut Streams, terminal: bool) -> RuntimeError {
    let Some((code, reason)) = error.shell_code() else { return told(error) };
    let text = if terminal { format!("{reason}\r\n") } else { format!("{reason}\n") };
    if let Some(output) = streams.stderr.take().or_else(|| streams.stdout.take())
        && output.send(Bytes::from(text)).await.is_err()
    {
        tracing::debug!(reason, "a client left before it could be told");
    }
    RuntimeError { message: reason.to_owned(), exit_code: Some(code) }
}

fn told(error: &ExecError) -> RuntimeError {
    RuntimeError::new(error.chain())
}

/// One interactive command.
struct Session {
    process: ExecProcess,
    terminal: bool,
}

impl Session {
    async fn run(self, ends: Ends, streams: Streams) -> Result<u32, ExecError> {
        let Streams { stdin, stdout, stderr, resize, gone } = streams;
        let moved = Moved::default();
        let stdout = drain(ends.stdout, stdout, moved.clone());
        let stderr = ends.stderr.map(|pipe| drain(pipe, stderr, moved.clone()));
        let input = self.feed(stdin, ends.stdin);
        let resize = self.follow_size(resize);
        let hang_up = async {
            gone.cancelled().await;
            if self.terminal
                && let Err(error) = self.process.signal(Signal::SIGHUP).await
            {
                tracing::debug!(error = error.chain(), "cannot hang up a terminal");
            }
            std::future::pending::<()>().await;
        };
        // Cancel-safe: the helpers end with the process; waiting again finds its exit.
        let exit = tokio::select! {
            exit = self.process.wait() => exit,
            () = async { tokio::join!(input, resize, hang_up); } => self.process.wait().await,
        };
        let done = || stdout.is_finished() && stderr.as_ref().is_none_or(AbortOnDropHandle::is_finished);
        settle(&moved, done).await;
        forget(&self.process).await;
        // The shim has closed its ends; what is in the FIFOs still has to reach the client.
        settle(&moved, done).await;
        exit.map(|exit| exit.status)
    }

    /// Applies each size the client tells; never ends by itself.
    async fn follow_size(&self, mut sizes: watch::Receiver<Option<TerminalSize>>) {
        loop {
            let TerminalSize { width, height } = next_size(&mut sizes).await;
            if let Err(error) = self.process.resize(width, height).await {
                tracing::debug!(error = error.chain(), "cannot resize a terminal");
            }
        }
    }

    /// Passes the client's input on, then lets the process see its end.
    async fn feed(&self, input: Option<mpsc::Receiver<Bytes>>, fifo: Option<pipe::Sender>) {
        let (Some(mut input), Some(mut fifo)) = (input, fifo) else { return };
        while let Some(bytes) = input.recv().await {
            if let Err(error) = fifo.write_all(&bytes).await {
                tracing::debug!(%error, "a process takes no input");
                break;
            }
        }
        if let Err(error) = self.process.close_stdin(fifo).await {
            tracing::debug!(error = error.chain(), "cannot close a process's input");
        }
    }
}

/// Reads a FIFO to its end, passing it on as long as somebody takes it.
fn drain(
    mut pipe: pipe::Receiver,
    mut client: Option<mpsc::Sender<Bytes>>,
    moved: Moved,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(piece) = read_piece(&mut pipe, &moved).await {
            let Some(taker) = &client else { continue };
            if moved.while_waiting(taker.send(piece)).await.is_err() {
                client = None;
            }
        }
    }))
}

async fn pass(mut from: mpsc::Receiver<Bytes>, mut to: Option<mpsc::Sender<Bytes>>) {
    while let Some(bytes) = from.recv().await {
        let Some(taker) = &to else { continue };
        if taker.send(bytes).await.is_err() {
            to = None;
        }
    }
}

/// The client's next terminal size; pending when there will be none.
async fn next_size(sizes: &mut watch::Receiver<Option<TerminalSize>>) -> TerminalSize {
    loop {
        if sizes.changed().await.is_err() {
            return std::future::pending().await;
        }
        let size = *sizes.borrow_and_update();
        if let Some(size) = size {
            return size;
        }
    }
}
