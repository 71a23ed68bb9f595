//! Clients of gRPC's C core (Python, C++, Ruby, PHP) send the path of a Unix socket as the authority of their requests, with
//! its slashes as `%2F`. RFC 3986 allows that; the library that reads HTTP/2 here refuses it and resets the stream. Nobody
//! looks at the authority of a request on a Unix socket, so the percent signs are replaced while the bytes come in.
//!
//! Input: a connection. Output: the same connection, in which header blocks have no percent sign in an authority that is
//! spelled out. Other frames and compressed authorities are passed on untouched; no length ever changes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::{Connected, UdsConnectInfo};

/// What a client sends first (RFC 9113, section 3.4).
const PREFACE: usize = 24;
/// Bytes before a frame's payload: length, kind, flags, stream.
const HEAD: usize = 9;
/// Kinds of frames that carry header blocks: HEADERS and CONTINUATION.
const HEADER_BLOCKS: [u8; 2] = [1, 9];
/// The name as a literal, with its length before it (RFC 7541, section 6.2).
const NAME: &[u8] = b"\x0a:authority";

/// A connection whose authorities can be read.
#[derive(Debug)]
pub struct Tolerant {
    stream: UnixStream,
    filter: Filter,
}

impl Tolerant {
    /// Takes a connection over.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, filter: Filter::default() }
    }
}

impl Connected for Tolerant {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> UdsConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Tolerant {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.filter.pass(&mut buffer.filled_mut()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tolerant {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Where in the stream of bytes it is.
#[derive(Debug)]
struct Filter {
    place: Place,
    head: [u8; HEAD],
    literal: Literal,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// Before the first frame, so many bytes.
    Preface(usize),
    /// In a frame's head, so many bytes of it are there.
    Head(usize),
    /// In a payload, so many bytes are left.
    Payload(usize),
}

/// How much of a literal authority has been seen in a header block.
#[derive(Clone, Copy, Debug)]
enum Literal {
    /// So many bytes of [`NAME`].
    Name(usize),
    /// The name; next comes the value's length.
    Length,
    /// A long value's length so far, and the weight of the next seven bits.
    MoreLength(usize, u32),
    /// The length; so many bytes of the value are left.
    Value(usize),
}

impl Default for Filter {
    fn default() -> Self {
        Self { place: Place::Preface(PREFACE), head: [0; HEAD], literal: Literal::Name(0) }
    }
}

impl Filter {
    /// Lets bytes pass.
    fn pass(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let here = match self.place {
                Place::Preface(left) | Place::Payload(left) => left,
                Place::Head(there) => HEAD - there,
            };
            let (these, rest) = bytes.split_at_mut(here.min(bytes.len()));
            self.step(these);
            bytes = rest;
        }
    }

    /// Bytes of one place, at most what is left of it.
    fn step(&mut self, bytes: &mut [u8]) {
        match &mut self.place {
            Place::Preface(left) => {
                *left -= bytes.len();
                if *left == 0 {
                    self.place = Place::Head(0);
                }
            }
            Place::Head(there) => {
                self.head[*there..*there + bytes.len()].copy_from_slice(bytes);
                *there += bytes.len();
                if *there == HEAD {
                    let [a, b, c, ..] = self.head;
                    let length = u32::from_be_bytes([0, a, b, c]) as usize;
                    self.literal = Literal::Name(0);
                    self.place = if length == 0 { Place::Head(0) } else { Place::Payload(length) };
                }
            }
            Place::Payload(left) => {
                *left -= bytes.len();
                if *left == 0 {
                    self.place = Place::Head(0);
                }
                if HEADER_BLOCKS.contains(&self.head[3]) {
                    for byte in bytes {
                        self.literal = self.literal.next(byte);
                    }
                }
            }
        }
    }
}

impl Literal {
    fn next(self, byte: &mut u8) -> Self {
        match self {
            Self::Name(seen) if *byte == NAME[seen] => {
                if seen + 1 == NAME.len() {
                    Self::Length
                } else {
                    Self::Name(seen + 1)
                }
            }
            Self::Name(_) => Self::Name(usize::from(*byte == NAME[0])),
            // The highest bit tells that the value is compressed.
            Self::Length => match *byte {
                0 | 0x80.. => Self::Name(0),
                0x7f => Self::MoreLength(0x7f, 0),
                length => Self::Value(length.into()),
            },
            Self::MoreLength(length, weight) => {
                let length = length + (usize::from(*byte & 0x7f) << weight);
                match *byte {
                    0x80.. if weight < 14 => Self::MoreLength(length, weight + 7),
                    0x80.. => Self::Name(0),
                    _ => Self::Value(length),
                }
            }
            Self::Value(left) => {
                if *byte == b'%' {
                    *byte = b'-';
                }
                if left == 1 { Self::Name(0) } else { Self::Value(left - 1) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, 4, 0, 0, 0, 1], payload].concat()
    }

    fn block(authority: &str) -> Vec<u8> {
        let length = match authority.len() {
            short @ 0..127 => vec![u8::try_from(short).unwrap()],
            long => vec![
                0x7f,
                0x80 | u8::try_from((long - 127) % 128).unwrap(),
                u8::try_from((long - 127) / 128).unwrap(),
            ],
        };
        let path = &b"\x40\x05:path\x22/runtime.v1.RuntimeService/Version"[..];
        [path, &b"\x40\x0a:authority"[..], &length, authority.as_bytes(), b"\x40\x02te\x08trailers"].concat()
    }

    /// What comes out when the bytes come in pieces of `size`.
    fn passed(bytes: &[u8], size: usize) -> Vec<u8> {
        let (mut filter, mut out) = (Filter::default(), bytes.to_vec());
        out.chunks_mut(size).for_each(|piece| filter.pass(piece));
        out
    }

    #[test]
    fn an_authority_that_is_spelled_out_loses_its_percent_signs_however_it_comes() {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let long = format!("{}%2Fend", "run%2Flong".repeat(30));
        for authority in ["tmp%2Fcri.sock", long.as_str(), "localhost", ""] {
            // Data that looks the same is data.
            let data = [b"\x0a:authority\x05".as_slice(), b"a%2Fb"].concat();
            let all = |authority: &str| {
                let frames = [
                    frame(4, &[]),
                    frame(1, &block(authority)),
                    frame(0, &data),
                    frame(9, &block(authority)),
                ];
                [preface.as_slice(), &frames.concat()].concat()
            };
            for size in [1, 2, 3, 7, 50, 100_000] {
                assert_eq!(passed(&all(authority), size), all(&authority.replace('%', "-")), "{size}");
            }
        }
    }

    #[test]
    fn compressed_values_and_other_headers_stay_as_they_are() {
        let compressed = frame(1, b"\x40\x0a:authority\x85a%2Fb\x40\x01x\x05a%2Fb");
        let all = [[0; PREFACE].as_slice(), &compressed].concat();
        assert_eq!(passed(&all, 4), all);
    }
}
