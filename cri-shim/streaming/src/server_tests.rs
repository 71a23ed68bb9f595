//! The whole server over a real socket, with a fake runtime and hand-written clients.

use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::*;
use crate::runtime::{PortStream, RuntimeError, TerminalSize};
use crate::spdy::frame::{Decoder, Encoder, Event, Frame};

const PATIENCE: Duration = Duration::from_secs(10);

/// `cat` echoes, `exit N` ends with N, `size` prints the terminal's size, anything else fails.
#[derive(Default)]
struct Fake {
    abandoned: CancellationToken,
}

impl Runtime for Fake {
    async fn exec(&self, request: ExecRequest, mut streams: Streams) -> Outcome {
        match request.command.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["cat"] => {
                let (mut stdin, stdout) =
                    (streams.stdin.take().expect("stdin"), streams.stdout.take().expect("stdout"));
                while let Some(bytes) = stdin.recv().await {
                    drop(stdout.send(bytes).await);
                }
                if streams.gone.is_cancelled() {
                    self.abandoned.cancel();
                }
                Ok(0)
            }
            ["exit", code] => Ok(code.parse().expect("a code")),
            ["size"] => {
                streams.resize.wait_for(Option::is_some).await.expect("a size");
                let TerminalSize { width, height } = streams.resize.borrow().expect("a size");
                let stdout = streams.stdout.take().expect("stdout");
                stdout.send(Bytes::from(format!("{width}x{height}"))).await.expect("sent");
                Ok(0)
            }
            _ => Err(RuntimeError::new("no such file")),
        }
    }

    async fn attach(&self, _request: AttachRequest, streams: Streams) -> Result<(), RuntimeError> {
        streams.stdout.expect("stdout").send(Bytes::from_static(b"attached")).await.expect("sent");
        Ok(())
    }

    async fn port_forward(
        &self,
        _sandbox: &str,
        port: u16,
        mut stream: PortStream,
    ) -> Result<(), RuntimeError> {
        if port == 1 {
            return Err(RuntimeError::new("connection refused"));
        }
        while let Some(bytes) = stream.input.recv().await {
            drop(stream.output.send(bytes).await);
        }
        Ok(())
    }
}

async fn start() -> (Handle, Arc<Fake>) {
    let runtime = Arc::new(Fake::default());
    let address = "127.0.0.1:0".parse().expect("an address");
    let (server, handle) = Server::bind(address, Arc::clone(&runtime)).await.expect("bound");
    tokio::spawn(server.serve(CancellationToken::new()));
    (handle, runtime)
}

fn exec(command: &[&str], wanted: Wanted) -> ExecRequest {
    ExecRequest {
        container: "c".to_owned(),
        command: command.iter().map(|part| (*part).to_owned()).collect(),
        wanted,
    }
}

const ALL: Wanted = Wanted { stdin: true, stdout: true, stderr: true, tty: false };
const TTY: Wanted = Wanted { stdin: true, stdout: true, stderr: false, tty: true };

/// Sends the upgrade request and gives the connection with the answer's head.
async fn upgrade(url: &str, headers: &str) -> (TcpStream, String) {
    let rest = url.strip_prefix("http://").expect("http");
    let (host, path) = rest.split_once('/').expect("a path");
    let mut stream = TcpStream::connect(host).await.expect("connected");
    let request = format!("POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n{headers}\r\n");
    let request = if headers.contains("websocket") { request.replacen("POST", "GET", 1) } else { request };
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tokio::time::timeout(PATIENCE, stream.read_u8()).await.expect("in time").expect("read"));
    }
    (stream, String::from_utf8(head).expect("text").to_ascii_lowercase())
}

struct Spdy {
    stream: TcpStream,
    encoder: Encoder,
    decoder: Decoder,
    buffer: BytesMut,
}

impl Spdy {
    async fn connect(url: &str, protocol: &str) -> Self {
        let headers = format!("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n");
        let (stream, head) = upgrade(url, &headers).await;
        assert!(head.starts_with("http/1.1 101"), "{head}");
        assert!(head.contains(&format!("x-stream-protocol-version: {protocol}")), "{head}");
        Self { stream, encoder: Encoder::default(), decoder: Decoder::default(), buffer: BytesMut::new() }
    }

    async fn send(&mut self, frame: Frame) {
        let mut bytes = BytesMut::new();
        self.encoder.encode(&frame, &mut bytes).expect("encoded");
        self.stream.write_all_buf(&mut bytes).await.expect("sent");
    }

    async fn open(&mut self, id: u32, headers: &[(&str, &str)]) {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        self.send(Frame::SynStream { id, headers }).await;
    }

    /// What streams 1, 3, 5 and 7 got until `ends` of them ended.
    async fn collect(&mut self, ends: usize) -> [String; 4] {
        let mut texts = [const { String::new() }; 4];
        let mut left = ends;
        while left > 0 {
            let Some(event) = self.decoder.decode(&mut self.buffer).expect("well formed") else {
                let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.buffer)).await;
                assert!(read.expect("in time").expect("read") > 0, "ended early: {texts:?}");
                continue;
            };
            if let Event::Data { id, bytes, fin } = event {
                texts[id as usize / 2].push_str(std::str::from_utf8(&bytes).expect("text"));
                left -= usize::from(fin);
            }
        }
        texts
    }
}

#[tokio::test]
async fn exec_over_spdy_echoes_and_reports_success() {
    let (handle, _) = start().await;
    let url = handle.exec(exec(&["cat"], ALL)).expect("a URL");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
        client.open(id, &[("streamType", kind)]).await;
    }
    client.send(Frame::Data { id: 3, bytes: Bytes::from_static(b"hello"), fin: true }).await;
    let [status, _, stdout, stderr] = client.collect(3).await;
    assert_eq!((stdout.as_str(), stderr.as_str()), ("hello", ""));
    assert_eq!(status, r#"{"metadata":{},"status":"Success"}"#);
    let (_, head) = upgrade(&url, "Upgrade: SPDY/3.1\r\n").await;
    assert!(head.starts_with("http/1.1 404"), "the token is used: {head}");
}

#[tokio::test]
async fn spdy_clients_get_exit_code_and_terminal_size() {
    let (handle, _) = start().await;
    let wanted = Wanted { stdout: true, ..Wanted::default() };
    let url = handle.exec(exec(&["exit", "3"], wanted)).expect("a URL");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    client.open(1, &[("streamtype", "error")]).await;
    client.open(3, &[("streamtype", "stdout")]).await;
    assert!(client.collect(2).await[0].contains(r#""reason":"NonZeroExitCode""#));

    let url = handle.exec(exec(&["size"], TTY)).expect("a URL");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "resize")] {
        client.open(id, &[("streamtype", kind)]).await;
    }
    let size = Bytes::from_static(b"{\"Width\":80,\"Height\":24}\n");
    client.send(Frame::Data { id: 7, bytes: size, fin: false }).await;
    assert_eq!(client.collect(2).await[2], "80x24");
}

#[tokio::test]
async fn a_vanished_spdy_client_ends_the_input() {
    let (handle, runtime) = start().await;
    let url = handle.exec(exec(&["cat"], TTY)).expect("a URL");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "resize")] {
        client.open(id, &[("streamtype", kind)]).await;
    }
    client.send(Frame::Data { id: 3, bytes: Bytes::from_static(b"x"), fin: false }).await;
    drop(client);
    tokio::time::timeout(PATIENCE, runtime.abandoned.cancelled()).await.expect("noticed");
}

async fn websocket(url: &str, protocol: &str) -> WebSocketStream<TcpStream> {
    let headers = format!(
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {protocol}\r\n"
    );
    let (stream, head) = upgrade(url, &headers).await;
    assert!(head.starts_with("http/1.1 101"), "{head}");
    assert!(head.contains(&format!("sec-websocket-protocol: {}", protocol.to_ascii_lowercase())), "{head}");
    WebSocketStream::from_raw_socket(stream, Role::Client, None).await
}

/// What each channel got until the server closed.
async fn collect(socket: &mut WebSocketStream<TcpStream>) -> [String; 4] {
    let mut texts = [const { String::new() }; 4];
    loop {
        match tokio::time::timeout(PATIENCE, socket.next()).await.expect("in time") {
            Some(Ok(Message::Binary(mut bytes))) => {
                let channel = usize::from(bytes.get_u8());
                texts[channel].push_str(std::str::from_utf8(&bytes).expect("text"));
            }
            Some(Ok(Message::Close(Some(frame)))) => {
                assert_eq!(frame.code, CloseCode::Normal, "kubectl takes any other for a failure");
                return texts;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[tokio::test]
async fn exec_over_websocket_echoes_half_closes_and_reports() {
    let (handle, _) = start().await;
    let url = handle.exec(exec(&["cat"], ALL)).expect("a URL");
    let mut socket = websocket(&url, "v5.channel.k8s.io").await;
    socket.send(Message::binary(&b"\0hello"[..])).await.expect("sent");
    socket.send(Message::binary(&b"\xff\0"[..])).await.expect("sent");
    let texts = collect(&mut socket).await;
    assert_eq!(texts[1], "hello");
    assert_eq!(texts[3], r#"{"metadata":{},"status":"Success"}"#);

    let url = handle.exec(exec(&["size"], TTY)).expect("a URL");
    let mut socket = websocket(&url, "v4.channel.k8s.io").await;
    socket.send(Message::binary(&b"\x04{\"Width\":80,\"Height\":24}"[..])).await.expect("sent");
    assert_eq!(collect(&mut socket).await[1], "80x24");

    let url = handle.exec(exec(&["nope"], TTY)).expect("a URL");
    let mut socket = websocket(&url, "v5.channel.k8s.io").await;
    assert!(collect(&mut socket).await[3].contains("error executing command in container: no such file"));

    let wanted = Wanted { stdout: true, ..Wanted::default() };
    let url = handle.attach(AttachRequest { container: "c".to_owned(), wanted }).expect("a URL");
    let mut socket = websocket(&url, "v5.channel.k8s.io").await;
    assert_eq!(collect(&mut socket).await[1], "attached");
}

#[tokio::test]
async fn a_vanished_websocket_client_ends_the_input() {
    let (handle, runtime) = start().await;
    let url = handle.exec(exec(&["cat"], ALL)).expect("a URL");
    let mut socket = websocket(&url, "v5.channel.k8s.io").await;
    socket.send(Message::binary(&b"\0hello"[..])).await.expect("sent");
    drop(socket);
    tokio::time::timeout(PATIENCE, runtime.abandoned.cancelled()).await.expect("noticed");
}

async fn open_pair(client: &mut Spdy, first: u32, port: &str) {
    client.open(first, &[("streamtype", "error"), ("port", port), ("requestid", port)]).await;
    client.send(Frame::Data { id: first, bytes: Bytes::new(), fin: true }).await;
    client.open(first + 2, &[("streamtype", "data"), ("port", port), ("requestid", port)]).await;
}

#[tokio::test]
async fn ports_are_forwarded_and_failures_stay_with_their_pair() {
    let (handle, _) = start().await;
    let mut client = Spdy::connect(&handle.port_forward("p").expect("a URL"), "portforward.k8s.io").await;
    open_pair(&mut client, 1, "1").await;
    let [error, ..] = client.collect(2).await;
    assert!(error.contains("connection refused"), "{error}");
    open_pair(&mut client, 5, "80").await;
    client.send(Frame::Data { id: 7, bytes: Bytes::from_static(b"ping"), fin: true }).await;
    let [_, _, error, data] = client.collect(2).await;
    assert_eq!((error.as_str(), data.as_str()), ("", "ping"));
}

#[tokio::test]
async fn ports_are_forwarded_through_the_websocket_tunnel() {
    let (handle, _) = start().await;
    let mut socket =
        websocket(&handle.port_forward("p").expect("a URL"), "SPDY/3.1+portforward.k8s.io").await;
    let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
    for (id, kind) in [(1, "error"), (3, "data")] {
        let headers = [("streamtype", kind), ("port", "80"), ("requestid", "0")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        encoder.encode(&Frame::SynStream { id, headers }, &mut bytes).expect("encoded");
    }
    encoder
        .encode(&Frame::Data { id: 3, bytes: Bytes::from_static(b"ping"), fin: true }, &mut bytes)
        .expect("encoded");
    for piece in bytes.chunks(7) {
        socket.send(Message::binary(piece.to_vec())).await.expect("sent");
    }
    let (mut decoder, mut buffer, mut got) = (Decoder::default(), BytesMut::new(), Vec::new());
    while got != b"ping" {
        let message = tokio::time::timeout(PATIENCE, socket.next()).await.expect("in time").expect("open");
        buffer.extend_from_slice(&message.expect("a message").into_data());
        while let Some(event) = decoder.decode(&mut buffer).expect("well formed") {
            if let Event::Data { id: 3, bytes, .. } = event {
                got.extend_from_slice(&bytes);
            }
        }
    }
}

#[tokio::test]
async fn bad_requests_are_refused_with_a_reason() {
    let (handle, _) = start().await;
    assert!(matches!(handle.exec(exec(&["x"], Wanted { stderr: true, ..TTY })), Err(UrlError::TtyAndStderr)));
    assert!(matches!(handle.exec(exec(&["x"], Wanted::default())), Err(UrlError::NoStream)));
    let url = handle.exec(exec(&["cat"], ALL)).expect("a URL");
    let (_, head) =
        upgrade(&url, "Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v9.channel.k8s.io\r\n").await;
    assert!(head.starts_with("http/1.1 403"), "{head}");
    assert!(head.contains("x-accepted-stream-protocol-versions: v4.channel.k8s.io"), "{head}");
    let (_, head) = upgrade(&url, "Upgrade: h2c\r\n").await;
    assert!(head.starts_with("http/1.1 400"), "{head}");
    let (_, head) = upgrade(&url.replace("/exec/", "/else/"), "Upgrade: SPDY/3.1\r\n").await;
    assert!(head.starts_with("http/1.1 404"), "{head}");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    client.open(1, &[("streamtype", "error")]).await;
}
