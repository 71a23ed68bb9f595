//! WebSocket, server side: the handshake, exec and attach over numbered channels, and the tunnel of raw bytes that
//! port-forward uses.
//!
//! Channels: the first byte of a message names it; 0 stdin, 1 stdout, 2 stderr, 3 status, 4 terminal size, and in v5
//! 255 with the number of a channel that the client ends. The base64 forms carry text messages instead.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use http::header::{self, HeaderMap};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes, handshake};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::exec_spdy::OUTPUT_QUEUE;
use crate::runtime::{Streams, TerminalSize, Wanted};
use crate::status::{self, Outcome};

/// Most bytes of one message; clients send 32 KiB.
const MAX_MESSAGE: usize = 1 << 20;

/// Pieces of input that wait for the runtime.
const INPUT_QUEUE: usize = 4;

/// Messages that wait for the connection.
const MESSAGE_QUEUE: usize = 4;

/// How often the client is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// How long the client may take to answer our close.
const CLOSE_LINGER: Duration = Duration::from_secs(5);

/// Bytes of a tunnel on their way, each direction.
const TUNNEL_BUFFER: usize = 64 * 1024;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// A variant of the channel protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Protocol {
    /// Its subprotocol name; empty for clients that ask for none.
    pub(crate) name: &'static str,
    base64: bool,
    json_status: bool,
    half_close: bool,
}

impl Protocol {
    /// Those we speak, best first.
    pub(crate) const ALL: [Self; 6] = [
        Self { name: "v5.channel.k8s.io", base64: false, json_status: true, half_close: true },
        Self { name: "v4.channel.k8s.io", base64: false, json_status: true, half_close: false },
        Self { name: "v4.base64.channel.k8s.io", base64: true, json_status: true, half_close: false },
        Self { name: "channel.k8s.io", base64: false, json_status: false, half_close: false },
        Self { name: "base64.channel.k8s.io", base64: true, json_status: false, half_close: false },
        Self { name: "", base64: false, json_status: false, half_close: false },
    ];

    fn encode(self, channel: u8, bytes: &[u8]) -> Message {
        if self.base64 {
            return Message::text(format!("{channel}{}", STANDARD.encode(bytes)));
        }
        let mut message = BytesMut::with_capacity(1 + bytes.len());
        message.put_u8(channel);
        message.put_slice(bytes);
        Message::binary(message.freeze())
    }

    /// Channel and payload; `None` for what is neither.
    fn decode(self, message: Message) -> Option<(u8, Bytes)> {
        match message {
            Message::Binary(mut bytes) if !self.base64 && !bytes.is_empty() => {
                let channel = bytes.split_to(1)[0];
                Some((channel, bytes))
            }
            Message::Text(text) if self.base64 => {
                let channel = text.as_bytes().first()?.checked_sub(b'0')?;
                let payload = STANDARD.decode(text.as_bytes().get(1..)?).ok()?;
                Some((channel, Bytes::from(payload)))
            }
            _ => None,
        }
    }
}

/// The subprotocols a client offers, in its order.
pub(crate) fn offered(headers: &HeaderMap) -> Vec<&str> {
    let values = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).into_iter();
    let names = values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    names.map(str::trim).filter(|name| !name.is_empty()).collect()
}

/// The `Sec-WebSocket-Accept` value for a valid WebSocket request.
pub(crate) fn accept_key(headers: &HeaderMap) -> Option<String> {
    let version = headers.get(header::SEC_WEBSOCKET_VERSION)?;
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?;
    (version == "13").then(|| handshake::derive_accept_key(key.as_bytes()))
}

/// Serves one exec or attach; `run` gets the streams, `doing` begins the message of a failure.
pub(crate) async fn serve<T, R>(
    io: T,
    protocol: Protocol,
    wanted: Wanted,
    doing: &str,
    run: impl FnOnce(Streams) -> R,
) where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    R: Future<Output = Outcome>,
{
    let (sink, source) = open(io).await.split();
    let gone = CancellationToken::new();
    let (messages, queue) = mpsc::channel(MESSAGE_QUEUE);
    let writer = AbortOnDropHandle::new(tokio::spawn(write_messages(sink, queue, gone.clone())));
    let (stdin, stdin_receiver) = mpsc::channel(INPUT_QUEUE);
    let (resize, sizes) = watch::channel(None);
    let input = Input { protocol, stdin: wanted.stdin.then_some(stdin), resize };
    let reader = AbortOnDropHandle::new(tokio::spawn(input.read(source, gone.clone())));
    // An empty message on the first channel tells the client that the connection stands.
    let first = if wanted.stdout { STDOUT } else { ERROR };
    let mut alive = messages.send(protocol.encode(first, &[])).await.is_ok();
    let mut pumps = JoinSet::new();
    let mut output = |wanted: bool, channel: u8| {
        let (sender, receiver) = mpsc::channel(OUTPUT_QUEUE);
        if wanted {
            pumps.spawn(pump(receiver, messages.clone(), protocol, channel));
        }
        wanted.then_some(sender)
    };
    let streams = Streams {
        stdin: wanted.stdin.then_some(stdin_receiver),
        stdout: output(wanted.stdout, STDOUT),
        stderr: output(wanted.stderr, STDERR),
        resize: sizes,
        gone: gone.clone(),
    };
    let outcome = run(streams).await;
    while pumps.join_next().await.is_some() {}
    let text =
        if protocol.json_status { status::json(&outcome, doing) } else { status::text(&outcome, doing) };
    if !text.is_empty() {
        alive &= messages.send(protocol.encode(ERROR, &text)).await.is_ok();
    }
    if alive && messages.send(normal_close()).await.is_ok() {
        // The client reads what is left and answers the close; then nothing can be lost.
        let ended = async { drop((writer.await, reader.await)) };
        drop(tokio::time::timeout(CLOSE_LINGER, ended).await);
    }
}

/// Turns the connection's binary messages into a plain byte stream. The tunnel ends with the stream's other end.
pub(crate) async fn tunnel<T>(io: T) -> DuplexStream
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sink, mut source) = open(io).await.split();
    let (near, far) = tokio::io::duplex(TUNNEL_BUFFER);
    let (mut from_near, mut to_near) = tokio::io::split(far);
    let gone = CancellationToken::new();
    let (messages, queue) = mpsc::channel(MESSAGE_QUEUE);
    tokio::spawn(write_messages(sink, queue, gone.clone()));
    tokio::spawn(async move {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(16 * 1024);
            let ended = !matches!(from_near.read_buf(&mut buffer).await, Ok(1..));
            let message = if ended { normal_close() } else { Message::binary(buffer.split().freeze()) };
            if messages.send(message).await.is_err() || ended {
                return;
            }
        }
    });
    tokio::spawn(async move {
        loop {
            // Cancel-safe: a lost connection needs no message any more.
            let message = tokio::select! {
                message = source.next() => message,
                () = gone.cancelled() => None,
            };
            let written = match message {
                Some(Ok(Message::Binary(bytes))) => to_near.write_all(&bytes).await,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(()),
                _ => break,
            };
            if written.is_err() {
                break;
            }
        }
        // Ends the inner protocol's reading; an error means that it has ended already.
        drop(to_near.shutdown().await);
        gone.cancel();
    });
    near
}

async fn open<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> WebSocketStream<T> {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .read_buffer_size(32 * 1024)
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MAX_MESSAGE);
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}

async fn pump(
    mut receiver: mpsc::Receiver<Bytes>,
    messages: mpsc::Sender<Message>,
    protocol: Protocol,
    channel: u8,
) {
    loop {
        // Cancel-safe: receiving loses nothing, and a lost connection needs nothing.
        let bytes = tokio::select! {
            bytes = receiver.recv() => bytes,
            () = messages.closed() => return,
        };
        let Some(bytes) = bytes else { return };
        if messages.send(protocol.encode(channel, &bytes)).await.is_err() {
            return;
        }
    }
}

/// A close that says that all went well; clients take one without a status for an error (RFC 6455, section 7.4).
fn normal_close() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() }))
}

/// Writes until a close was written, every sender is gone or the connection breaks.
async fn write_messages<T>(
    mut sink: SplitSink<WebSocketStream<T>, Message>,
    mut queue: mpsc::Receiver<Message>,
    gone: CancellationToken,
) where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut ping = tokio::time::interval(PING_INTERVAL);
    ping.reset();
    loop {
        // Cancel-safe: each arm only receives.
        let message = tokio::select! {
            message = queue.recv() => message,
            _ = ping.tick() => Some(Message::Ping(Bytes::new())),
            () = gone.cancelled() => return,
        };
        let Some(message) = message else { return };
        let last = matches!(message, Message::Close(_));
        // Cancel-safe: a lost connection needs no message any more.
        let sent = tokio::select! {
            sent = sink.send(message) => sent,
            () = gone.cancelled() => return,
        };
        if sent.is_err() {
            return gone.cancel();
        }
        if last {
            return;
        }
    }
}

/// The client's messages and where they go.
struct Input {
    protocol: Protocol,
    stdin: Option<mpsc::Sender<Bytes>>,
    resize: watch::Sender<Option<TerminalSize>>,
}

impl Input {
    async fn read<T>(mut self, mut source: SplitStream<WebSocketStream<T>>, gone: CancellationToken)
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        loop {
            // Cancel-safe: a lost connection needs no message any more.
            let message = tokio::select! {
                message = source.next() => message,
                () = gone.cancelled() => return,
            };
            match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return gone.cancel(),
                Some(Ok(message)) => {
                    if let Some((channel, payload)) = self.protocol.decode(message) {
                        self.take(channel, payload, &gone).await;
                    }
                }
            }
        }
    }

    async fn take(&mut self, channel: u8, payload: Bytes, gone: &CancellationToken) {
        match (channel, &self.stdin) {
            (STDIN, Some(stdin)) if !payload.is_empty() => {
                // Cancel-safe: input for a process whose client is gone may be lost.
                let taken = tokio::select! {
                    taken = stdin.send(payload) => taken.is_ok(),
                    () = gone.cancelled() => false,
                };
                if !taken {
                    self.stdin = None;
                }
            }
            (CLOSE, _) if self.protocol.half_close && payload.first() == Some(&STDIN) => self.stdin = None,
            (RESIZE, _) => match serde_json::from_slice(&payload) {
                Ok(size) => drop(self.resize.send_replace(Some(size))),
                Err(error) => tracing::debug!(%error, "a client sent no terminal size"),
            },
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_survive_both_encodings() {
        for protocol in Protocol::ALL {
            let message = protocol.encode(STDOUT, b"\x00hi\xff");
            assert_eq!(
                protocol.decode(message),
                Some((STDOUT, Bytes::from_static(b"\x00hi\xff"))),
                "{protocol:?}"
            );
        }
    }

    #[test]
    fn what_is_no_channel_message_is_dropped() {
        let [v5, _, base64, ..] = Protocol::ALL;
        assert_eq!(v5.decode(Message::binary(Bytes::new())), None);
        assert_eq!(v5.decode(Message::text("0aGk=")), None);
        assert_eq!(base64.decode(Message::text("")), None);
        assert_eq!(base64.decode(Message::text("0***")), None);
        assert_eq!(base64.decode(Message::text("é")), None);
    }

    #[test]
    fn the_handshake_needs_version_13_and_a_key() {
        let mut headers = HeaderMap::new();
        assert_eq!(accept_key(&headers), None);
        headers.insert(header::SEC_WEBSOCKET_VERSION, header::HeaderValue::from_static("13"));
        headers
            .insert(header::SEC_WEBSOCKET_KEY, header::HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ=="));
        // The example of RFC 6455, section 1.3.
        assert_eq!(accept_key(&headers).as_deref(), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    }
}
