//! The WebSocket client: RFC 6455 as far as channels of bytes need it.

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Piece, http};

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// What a connection is made of: plain or encrypted.
pub(crate) trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Wire for S {}

/// One connection.
pub(crate) struct Socket {
    stream: Box<dyn Wire>,
    buffer: BytesMut,
}

impl Socket {
    /// Upgrades at `url`; the server must choose `protocol`.
    pub(crate) async fn connect(url: &str, query: &str, protocol: &str) -> Result<Self> {
        let headers = [
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"),
            // Only a proxy would care for its randomness.
            ("Sec-WebSocket-Key", "a2VlbHNvbi1jb25mb3JtYQ=="),
            ("Sec-WebSocket-Protocol", protocol),
            ("Origin", "http://localhost"),
        ];
        let answer = http::request("GET", url, query, &headers).await?;
        if answer.status == 101 {
            let chosen = format!("sec-websocket-protocol: {}", protocol.to_lowercase());
            anyhow::ensure!(answer.head.contains(&chosen), "not {chosen:?}: {:?}", answer.head);
        }
        let (stream, buffer) = answer.upgraded()?;
        Ok(Self { stream: Box::new(stream), buffer })
    }

    /// A connection that somebody else has upgraded.
    pub(crate) fn over(stream: Box<dyn Wire>) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    /// Sends one binary message.
    pub(crate) async fn send(&mut self, payload: &[u8]) -> Result<()> {
        self.frame(BINARY, payload).await
    }

    async fn frame(&mut self, opcode: u8, payload: &[u8]) -> Result<()> {
        let mut wire = vec![0x80 | opcode];
        match payload.len() {
            short @ 0..126 => wire.push(0x80 | u8::try_from(short)?),
            middle @ 126..=0xffff => {
                wire.push(0xfe);
                wire.extend_from_slice(&u16::try_from(middle)?.to_be_bytes());
            }
            long => {
                wire.push(0xff);
                wire.extend_from_slice(&u64::try_from(long)?.to_be_bytes());
            }
        }
        // A mask of zeros is a mask.
        wire.extend_from_slice(&[0; 4]);
        wire.extend_from_slice(payload);
        self.stream.write_all(&wire).await.context("writing to the server")
    }

    /// The next message; `None` when the server closed.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        let mut message = BytesMut::new();
        loop {
            let Some((last, opcode, payload)) = self.read_frame().await? else { return Ok(None) };
            match opcode {
                CLOSE => return Ok(None),
                PING => self.frame(PONG, &payload).await?,
                PONG => {}
                _ => {
                    message.extend_from_slice(&payload);
                    if last {
                        return Ok(Some(message.freeze()));
                    }
                }
            }
        }
    }

    async fn read_frame(&mut self) -> Result<Option<(bool, u8, Bytes)>> {
        loop {
            if let Some(frame) = parse(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            if self.stream.read_buf(&mut self.buffer).await.unwrap_or(0) == 0 {
                return Ok(None);
            }
        }
    }
}

fn parse(buffer: &mut BytesMut) -> Result<Option<(bool, u8, Bytes)>> {
    let Some([first, second]) = buffer.get(..2).and_then(|head| <[u8; 2]>::try_from(head).ok()) else {
        return Ok(None);
    };
    if second & 0x80 != 0 {
        bail!("the server masks its frames");
    }
    let extra = match second & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let Some(length) = buffer.get(2..2 + extra) else { return Ok(None) };
    let length = match extra {
        0 => usize::from(second & 0x7f),
        _ => length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)),
    };
    if buffer.len() < 2 + extra + length {
        return Ok(None);
    }
    buffer.advance(2 + extra);
    Ok(Some((first & 0x80 != 0, first & 0x0f, buffer.split_to(length).freeze())))
}

/// exec or attach: the first byte of a message is its channel.
pub(crate) struct ExecSession {
    socket: Socket,
    /// Messages are text: the channel as a digit, the rest in base64.
    text: bool,
}

impl ExecSession {
    pub(super) async fn open(url: &str, protocol: &str) -> Result<Self> {
        let text = protocol.contains("base64");
        Ok(Self { socket: Socket::connect(url, "", protocol).await?, text })
    }

    /// On a connection that has chosen a protocol of binary messages.
    pub(crate) fn over(socket: Socket) -> Self {
        Self { socket, text: false }
    }

    async fn channel(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        if self.text {
            let message = format!("{channel}{}", BASE64.encode(bytes));
            return self.socket.frame(TEXT, message.as_bytes()).await;
        }
        self.socket.send(&[&[channel], bytes].concat()).await
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.channel(0, bytes).await
    }

    /// Only version 5 can say it.
    pub(super) async fn close_stdin(&mut self) -> Result<()> {
        self.channel(255, &[0]).await
    }

    pub(super) async fn resize(&mut self, size: &[u8]) -> Result<()> {
        self.channel(4, size).await
    }

    pub(super) async fn next(&mut self) -> Result<Option<Piece>> {
        loop {
            let Some(mut message) = self.socket.next().await? else { return Ok(None) };
            if message.len() < 2 {
                // Each channel begins with an empty message in some servers.
                continue;
            }
            if self.text {
                let bytes = BASE64.decode(&message[1..]).context("a message that is not base64")?;
                message = [&[message[0] - b'0'], &bytes[..]].concat().into();
            }
            let piece = match message.get_u8() {
                1 => Piece::Stdout(message),
                2 => Piece::Stderr(message),
                3 => Piece::Status(message),
                other => bail!("{} bytes came on channel {other}", message.len()),
            };
            return Ok(Some(piece));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_whole_or_not_at_all() {
        let long = [&[0x82, 126, 1, 0][..], &[7; 256]].concat();
        let mut buffer = BytesMut::new();
        for byte in &long {
            assert!(parse(&mut buffer).unwrap().is_none());
            buffer.extend_from_slice(&[*byte]);
        }
        let (last, opcode, payload) = parse(&mut buffer).unwrap().unwrap();
        assert_eq!((last, opcode, payload.len()), (true, BINARY, 256));
        assert!(buffer.is_empty());
    }
}
