//! The SPDY client: streams that we open, over a TCP connection or inside a WebSocket.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use cri_shim_streaming::spdy::frame::{Decoder, Encoder, Event, Frame, MAX_DATA};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::websocket::Socket;
use super::{Piece, Wants, http};

/// What carries the frames.
pub(crate) enum Carrier {
    /// A TCP connection after the upgrade.
    Tcp(TcpStream),
    /// Binary messages.
    Tunnel(Socket),
}

/// One SPDY connection.
pub(crate) struct SpdyStreams {
    carrier: Carrier,
    buffer: BytesMut,
    encoder: Encoder,
    decoder: Decoder,
    next: u32,
}

impl SpdyStreams {
    /// Upgrades at `url`.
    pub(crate) async fn connect(url: &str, protocols: &[&str]) -> Result<Self> {
        let mut headers = vec![("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];
        headers.extend(protocols.iter().map(|name| ("X-Stream-Protocol-Version", *name)));
        let answer = http::request("POST", url, "", &headers).await?;
        if answer.status == 101 {
            let chosen =
                format!("x-stream-protocol-version: {}", protocols.first().copied().unwrap_or_default());
            anyhow::ensure!(answer.head.contains(&chosen), "not {chosen:?}: {:?}", answer.head);
        }
        let (stream, buffer) = answer.upgraded()?;
        Ok(Self::over(Carrier::Tcp(stream), buffer))
    }

    /// Inside a tunnel.
    pub(crate) fn over(carrier: Carrier, buffer: BytesMut) -> Self {
        Self { carrier, buffer, encoder: Encoder::default(), decoder: Decoder::default(), next: 1 }
    }

    /// Opens a stream and gives its id.
    pub(crate) async fn open(&mut self, headers: &[(&str, &str)]) -> Result<u32> {
        let id = self.next;
        self.next += 2;
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        self.write(&Frame::SynStream { id, headers }).await?;
        Ok(id)
    }

    /// Sends data.
    pub(crate) async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) -> Result<()> {
        if bytes.is_empty() {
            return self.write(&Frame::Data { id, bytes: Bytes::new(), fin }).await;
        }
        let mut pieces = bytes.chunks(MAX_DATA).peekable();
        while let Some(piece) = pieces.next() {
            let last = pieces.peek().is_none();
            let bytes = Bytes::copy_from_slice(piece);
            self.write(&Frame::Data { id, bytes, fin: fin && last }).await?;
        }
        Ok(())
    }

    async fn write(&mut self, frame: &Frame) -> Result<()> {
        let mut wire = BytesMut::new();
        self.encoder.encode(frame, &mut wire)?;
        match &mut self.carrier {
            Carrier::Tcp(stream) => stream.write_all(&wire).await.context("writing to the server"),
            Carrier::Tunnel(socket) => socket.send(&wire).await,
        }
    }

    /// The next data, or the end of a stream; `None` when the connection ended.
    pub(crate) async fn next(&mut self) -> Result<Option<(u32, Bytes, bool)>> {
        loop {
            while let Some(event) = self.decoder.decode(&mut self.buffer)? {
                match event {
                    Event::Data { id, bytes, fin } => return Ok(Some((id, bytes, fin))),
                    Event::Reset { id } => return Ok(Some((id, Bytes::new(), true))),
                    // Servers ask with even ids.
                    Event::Ping(id) if id.is_multiple_of(2) => self.write(&Frame::Ping(id)).await?,
                    _ => {}
                }
            }
            let more = match &mut self.carrier {
                // A server may cut the connection once it has said everything.
                Carrier::Tcp(stream) => stream.read_buf(&mut self.buffer).await.unwrap_or(0) > 0,
                Carrier::Tunnel(socket) => match socket.next().await? {
                    Some(bytes) => {
                        self.buffer.extend_from_slice(&bytes);
                        true
                    }
                    None => false,
                },
            };
            if !more {
                return Ok(None);
            }
        }
    }
}

/// exec or attach.
pub(crate) struct ExecSession {
    streams: SpdyStreams,
    kinds: BTreeMap<u32, &'static str>,
    open: usize,
}

impl ExecSession {
    pub(super) async fn open(url: &str, wants: Wants, protocols: &[&str]) -> Result<Self> {
        let mut streams = SpdyStreams::connect(url, protocols).await?;
        let mut kinds = BTreeMap::new();
        for (wanted, kind) in [
            (true, "error"),
            (wants.stdin, "stdin"),
            (wants.stdout, "stdout"),
            (wants.stderr, "stderr"),
            (wants.tty, "resize"),
        ] {
            if wanted {
                kinds.insert(streams.open(&[("streamtype", kind)]).await?, kind);
            }
        }
        let open = kinds.values().filter(|kind| matches!(**kind, "error" | "stdout" | "stderr")).count();
        Ok(Self { streams, kinds, open })
    }

    fn id(&self, wanted: &str) -> Result<u32> {
        let found = self.kinds.iter().find(|(_, kind)| **kind == wanted);
        found.map(|(id, _)| *id).with_context(|| format!("the session has no {wanted}"))
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let id = self.id("stdin")?;
        self.streams.data(id, bytes, false).await
    }

    pub(super) async fn close_stdin(&mut self) -> Result<()> {
        let id = self.id("stdin")?;
        self.streams.data(id, &[], true).await
    }

    pub(super) async fn resize(&mut self, size: &[u8]) -> Result<()> {
        let id = self.id("resize")?;
        self.streams.data(id, size, false).await
    }

    pub(super) async fn next(&mut self) -> Result<Option<Piece>> {
        while self.open > 0 {
            let Some((id, bytes, fin)) = self.streams.next().await? else { return Ok(None) };
            let kind = self.kinds.get(&id).copied().unwrap_or_default();
            if fin && matches!(kind, "error" | "stdout" | "stderr") {
                self.open -= 1;
            }
            if bytes.is_empty() {
                continue;
            }
            return match kind {
                "stdout" => Ok(Some(Piece::Stdout(bytes))),
                "stderr" => Ok(Some(Piece::Stderr(bytes))),
                "error" => Ok(Some(Piece::Status(bytes))),
                other => bail!("{} bytes came on the stream {id} ({other:?})", bytes.len()),
            };
        }
        Ok(None)
    }
}
