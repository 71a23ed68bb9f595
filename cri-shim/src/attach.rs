//! What exec, attach and port-forward need of containers and sandboxes.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use cri_shim_core::log_line::LogStream;
use cri_shim_core::record::ContainerPhase;
use cri_shim_streaming::runtime::{RuntimeError as Told, TerminalSize};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use crate::container::start::pipes;
use crate::error::{RuntimeError, chain};
use crate::exec::direct::Output;
use crate::exec::{ContainerIo, Containers};
use crate::host::{blocking, fifo, keeper};
use crate::runtime::Runtime;
use crate::state::Container;

/// Pieces of input or output between a client and a container.
const PIECES: usize = 32;

/// The runtime as the streaming server sees it. Cloning is cheap.
#[derive(Clone)]
pub struct Attached(pub Arc<Runtime>);

fn told(error: &RuntimeError) -> Told {
    Told::new(chain(error))
}

impl Containers for Attached {
    async fn attach(&self, id: &str) -> Result<ContainerIo, Told> {
        let container = self.0.running_container(id).map_err(|error| told(&error))?;
        let ((to_stdout, stdout), (to_stderr, stderr)) = (mpsc::channel(PIECES), mpsc::channel(PIECES));
        match (self.0.own_shim(&container), container.pump()) {
            (Some(shim), _) => {
                let output = shim.attach(id).await.map_err(|error| Told::new(error.chain()))?;
                tokio::spawn(pass_shim_output(output, to_stdout, to_stderr));
            }
            (None, Some(pump)) => drop(tokio::spawn(pass_output(pump.attach(), to_stdout, to_stderr))),
            (None, None) => {
                return Err(Told::new(format!("the output of container {id} is not being read")));
            }
        }
        let stdin = self.stdin(&container).map_err(|error| told(&error))?;
        let ended = CancellationToken::new();
        let over = ended.clone();
        tokio::spawn(async move {
            // Cancel-safe: waiting owns nothing.
            tokio::select! {
                () = container.record.wait_for(|record| record.phase() >= ContainerPhase::Exited) => over.cancel(),
                () = over.cancelled() => {}
            }
        });
        Ok(ContainerIo { stdout, stderr, stdin, ended })
    }

    async fn resize(&self, id: &str, size: TerminalSize) -> Result<(), Told> {
        let resized = self.0.client.resize_terminal(id, "", size.width.into(), size.height.into()).await;
        resized.map_err(|error| Told::new(error.to_string()))
    }

    async fn netns(&self, id: &str) -> Result<Option<PathBuf>, Told> {
        let sandbox = self.0.ready_sandbox(id).map_err(|error| told(&error))?;
        Ok(sandbox.record.with(|record| (!record.host_network()).then(|| PathBuf::from(&record.netns))))
    }
}

impl Attached {
    /// A way into the container's standard input, where it was made with one.
    fn stdin(&self, container: &Arc<Container>) -> Result<Option<mpsc::Sender<Bytes>>, RuntimeError> {
        let record = container.record.get();
        if !record.config.stdin {
            return Ok(None);
        }
        let stdio = fifo::paths(&container.state_dir(&self.0.paths.state_dir), &record.id, pipes(&record));
        let path = PathBuf::from(stdio.stdin);
        let mut pipe =
            pipe::OpenOptions::new().open_sender(&path).map_err(RuntimeError::host("open pipe", &path))?;
        let (sender, mut input) = mpsc::channel::<Bytes>(PIECES);
        let (runtime, container) = (Arc::clone(&self.0), Arc::clone(container));
        tokio::spawn(async move {
            while let Some(piece) = input.recv().await {
                if pipe.write_all(&piece).await.is_err() {
                    // The container reads no more.
                    return;
                }
            }
            if record.config.stdin_once {
                container.set_stdin(None);
                let program = runtime.paths.keeper.clone();
                let released =
                    blocking(move || keeper::release_stdin(&program, &path.to_string_lossy())).await;
                if let Err(error) = released {
                    tracing::warn!(container = record.id, error = chain(&error), "standard input stays open");
                }
                drop(pipe);
                if let Err(error) = runtime.client.close_stdin(&record.id, "").await {
                    tracing::debug!(container = record.id, %error, "standard input was closed already");
                }
            }
        });
        Ok(Some(sender))
    }
}

/// Copies a container's output until it ends or the client has gone; a client that is too slow misses some.
async fn pass_output(
    mut output: broadcast::Receiver<(LogStream, Bytes)>,
    stdout: mpsc::Sender<Bytes>,
    stderr: mpsc::Sender<Bytes>,
) {
    loop {
        let (stream, piece) = match output.recv().await {
            Ok(piece) => piece,
            Err(RecvError::Lagged(pieces)) => {
                tracing::debug!(pieces, "an attached client is too slow; it misses output");
                continue;
            }
            Err(RecvError::Closed) => return,
        };
        if !pass_piece(stream, piece, &stdout, &stderr).await {
            return;
        }
    }
}

/// The same for a container whose output our shim reads; that drops what a slow client does not take.
async fn pass_shim_output(mut output: Output, stdout: mpsc::Sender<Bytes>, stderr: mpsc::Sender<Bytes>) {
    loop {
        // Cancel-safe: when the client has gone, a piece read in part is for nobody.
        let next = tokio::select! {
            next = output.next() => next,
            () = async { tokio::join!(stdout.closed(), stderr.closed()); } => None,
        };
        let Some((stream, piece)) = next else { return };
        if !pass_piece(stream, piece, &stdout, &stderr).await {
            return;
        }
    }
}

/// Hands a piece on; says whether anybody is there.
async fn pass_piece(
    stream: LogStream,
    piece: Bytes,
    stdout: &mpsc::Sender<Bytes>,
    stderr: &mpsc::Sender<Bytes>,
) -> bool {
    let receiver = match stream {
        LogStream::Stdout => stdout,
        LogStream::Stderr => stderr,
    };
    receiver.send(piece).await.is_ok() || !stdout.is_closed() || !stderr.is_closed()
}
