//! Exec and attach over SPDY: collects the streams a client opens, joins them to the runtime, ends with the status.
//!
//! Input: an upgraded connection, its negotiated version and the work to do with the streams. It decides nothing about
//! what runs. Protocol: `{v4.,v3.,v2.,}channel.k8s.io`, streams named by their `streamtype` header.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::runtime::{Streams, TerminalSize, Wanted};
use crate::spdy::headers::header;
use crate::spdy::{Connection, Output, Stream};
use crate::status::{self, Outcome};

/// How long a client may take to open its streams.
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// Streams of one exec: error, stdin, stdout, stderr, resize.
const MAX_STREAMS: usize = 5;

/// Pieces of output between the runtime and the connection.
pub(crate) const OUTPUT_QUEUE: usize = 4;

/// Most bytes of one resize message.
const MAX_RESIZE: usize = 256;

/// The versions of the protocol, newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    /// No resizing, plain text status.
    V1,
    /// As V1, with a half-closable stdin.
    V2,
    /// With resizing.
    V3,
    /// With a JSON status.
    V4,
}

impl Version {
    /// The names by which clients ask, newest first.
    pub(crate) const NAMES: [(&'static str, Self); 4] = [
        ("v4.channel.k8s.io", Self::V4),
        ("v3.channel.k8s.io", Self::V3),
        ("v2.channel.k8s.io", Self::V2),
        ("channel.k8s.io", Self::V1),
    ];
}

/// Serves one exec or attach; `run` gets the streams, `doing` begins the message of a failure.
pub(crate) async fn serve<T, R>(
    io: T,
    version: Version,
    wanted: Wanted,
    doing: &str,
    run: impl FnOnce(Streams) -> R,
) where
    T: AsyncRead + AsyncWrite + Send + 'static,
    R: Future<Output = Outcome>,
{
    let (connection, mut incoming) = Connection::serve(io, MAX_STREAMS);
    let collected = tokio::time::timeout(OPEN_DEADLINE, collect(&mut incoming, version, wanted)).await;
    let Ok(Some(channels)) = collected else {
        tracing::debug!("a client did not open the streams it asked for");
        return connection.close().await;
    };
    let mut pumps = JoinSet::new();
    let (resize, sizes) = watch::channel(None);
    if let Some(stream) = channels.resize {
        pumps.spawn(take_sizes(stream.input, resize));
    }
    let mut output = |stream: Option<Stream>| {
        let output = stream?.output;
        let (sender, receiver) = mpsc::channel(OUTPUT_QUEUE);
        pumps.spawn(pump(receiver, output));
        Some(sender)
    };
    let streams = Streams {
        stdout: output(channels.stdout),
        stderr: output(channels.stderr),
        stdin: channels.stdin.map(|stream| stream.input),
        resize: sizes,
        gone: connection.gone().clone(),
    };
    let outcome = run(streams).await;
    // The runtime has dropped its ends, so the output pumps run dry; the resize pump ends with the watch.
    while pumps.join_next().await.is_some() {}
    let text =
        if version >= Version::V4 { status::json(&outcome, doing) } else { status::text(&outcome, doing) };
    let sent = channels.error.output.send(Bytes::from(text)).await;
    if sent.is_ok() {
        channels.error.output.finish().await;
    }
    connection.close().await;
}

struct Channels {
    error: Stream,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

/// Waits for every wanted stream, in whatever order they come; `None` when the client leaves before.
async fn collect(
    incoming: &mut mpsc::Receiver<Stream>,
    version: Version,
    wanted: Wanted,
) -> Option<Channels> {
    let may_resize = wanted.tty && version >= Version::V3;
    let (mut error, mut stdin, mut stdout, mut stderr, mut resize) = (None, None, None, None, None);
    loop {
        let complete = stdin.is_some() >= wanted.stdin
            && stdout.is_some() >= wanted.stdout
            && stderr.is_some() >= wanted.stderr
            && resize.is_some() >= may_resize;
        if complete && error.is_some() {
            return Some(Channels { error: error?, stdin, stdout, stderr, resize });
        }
        let stream = incoming.recv().await?;
        match header(&stream.headers, "streamtype") {
            Some("error") => error = Some(stream),
            Some("stdin") if wanted.stdin => stdin = Some(stream),
            Some("stdout") if wanted.stdout => stdout = Some(stream),
            Some("stderr") if wanted.stderr => stderr = Some(stream),
            Some("resize") if may_resize => resize = Some(stream),
            other => tracing::debug!(stream = ?other, "a client opened a stream that nobody asked for"),
        }
    }
}

/// Passes output on until the runtime has no more or the client takes none.
async fn pump(mut receiver: mpsc::Receiver<Bytes>, output: Output) {
    loop {
        // Cancel-safe: receiving loses nothing, and a cut stream needs nothing.
        let bytes = tokio::select! {
            bytes = receiver.recv() => bytes,
            () = output.cut() => return,
        };
        let Some(bytes) = bytes else { return output.finish().await };
        if output.send(bytes).await.is_err() {
            return;
        }
    }
}

/// Reads the terminal sizes, JSON objects one after the other, until the client or the runtime is done.
async fn take_sizes(mut input: mpsc::Receiver<Bytes>, sizes: watch::Sender<Option<TerminalSize>>) {
    let mut pending = Vec::new();
    loop {
        // Cancel-safe: receiving loses nothing.
        let bytes = tokio::select! {
            bytes = input.recv() => bytes,
            () = sizes.closed() => return,
        };
        let Some(bytes) = bytes else { return };
        pending.extend_from_slice(&bytes);
        while let Some(end) = pending.iter().position(|byte| *byte == b'}') {
            let object: Vec<u8> = pending.drain(..=end).collect();
            match serde_json::from_slice(&object) {
                Ok(size) => drop(sizes.send_replace(Some(size))),
                Err(error) => tracing::debug!(%error, "a client sent no terminal size"),
            }
        }
        if pending.len() > MAX_RESIZE {
            return tracing::debug!("a client sent no terminal size");
        }
    }
}
