//! ttrpc: ten bytes of header (length, stream, kind, flags; big-endian), then a `ttrpc.Request` or `ttrpc.Response`.
//!
//! Both ends: [`Incoming`] cuts what a peer sends into requests, [`Responder`] answers one of them from any thread,
//! [`call`] is a client for one call. Unary calls only; nothing is kept between two calls.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use prost::Message;

use crate::proto::ttrpc::{Request, Response, Status};

/// Largest message either side accepts, as in ttrpc itself.
const MAX_MESSAGE: usize = 4 << 20;
const HEADER: usize = 10;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// How long a peer may take to read an answer; then its connection is given up.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);

/// gRPC codes that the shim answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Code {
    /// An error that fits nowhere else; containerd shows its words.
    Unknown = 2,
    /// The request cannot be right.
    InvalidArgument = 3,
    /// Not done in time.
    DeadlineExceeded = 4,
    /// No such container, exec process or running process.
    NotFound = 5,
    /// It exists already.
    AlreadyExists = 6,
    /// Too much at once.
    ResourceExhausted = 8,
    /// Not in this state.
    FailedPrecondition = 9,
    /// Nothing that this shim does.
    Unimplemented = 12,
    /// A fault of the shim or the host.
    Internal = 13,
}

/// Why a call failed, as the peer sees it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Its class.
    pub code: Code,
    /// Its words.
    pub message: String,
}

impl Failure {
    /// A failure.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// The server's side of one connection.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    writing: Mutex<()>,
}

impl Connection {
    /// Takes a connection over.
    pub fn new(socket: UnixStream) -> std::io::Result<Self> {
        socket.set_write_timeout(Some(WRITE_PATIENCE))?;
        Ok(Self { socket, writing: Mutex::default() })
    }

    fn send(&self, frame: &[u8]) {
        let _whole_frames = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if (&self.socket).write_all(frame).is_err() {
            // Half a frame may be out: nothing can follow it. The reader sees the end and cleans up.
            self.socket.shutdown(std::net::Shutdown::Both).ok();
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What a peer has sent and is not a whole frame yet.
#[derive(Debug, Default)]
pub struct Incoming {
    buffer: Vec<u8>,
}

impl Incoming {
    /// Reads what is there into `requests`; an error or `Ok(false)` ends the connection.
    pub fn read(
        &mut self,
        connection: &Arc<Connection>,
        requests: &mut Vec<(Request, Responder)>,
    ) -> std::io::Result<bool> {
        let mut open = true;
        loop {
            let mut piece = [0_u8; 8192];
            match recv(connection.socket.as_raw_fd(), &mut piece, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => {
                    open = false;
                    break;
                }
                Ok(count) => self.buffer.extend_from_slice(&piece[..count]),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
            // Whole frames are taken out between two reads, so that the buffer stays within one frame and one piece.
            while let Some((stream, request)) = self.take()? {
                requests.push((request, Responder { connection: Arc::clone(connection), stream }));
            }
        }
        if self.buffer.is_empty() {
            self.buffer = Vec::new();
        }
        Ok(open)
    }

    fn take(&mut self) -> std::io::Result<Option<(u32, Request)>> {
        let Some((length, stream, kind)) = header(&self.buffer)? else { return Ok(None) };
        let Some(body) = self.buffer.get(HEADER..HEADER + length) else { return Ok(None) };
        if kind != REQUEST {
            return Err(std::io::Error::other("a client sent something that is no request"));
        }
        let request = Request::decode(body).map_err(std::io::Error::other)?;
        self.buffer.drain(..HEADER + length);
        Ok(Some((stream, request)))
    }
}

/// Length, stream and kind of the frame that `bytes` begin with, once all of its header is there.
fn header(bytes: &[u8]) -> std::io::Result<Option<(usize, u32, u8)>> {
    let Some(head) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _flags] = *head;
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if length > MAX_MESSAGE {
        return Err(std::io::Error::other("a frame is too large"));
    }
    Ok(Some((length, u32::from_be_bytes([s0, s1, s2, s3]), kind)))
}

fn frame(stream: u32, kind: u8, message: &impl Message) -> Vec<u8> {
    let length = message.encoded_len();
    let mut bytes = Vec::with_capacity(HEADER + length);
    bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(&[kind, 0]);
    bytes.extend_from_slice(&message.encode_to_vec());
    bytes
}

/// Answers one request.
#[derive(Debug)]
pub struct Responder {
    connection: Arc<Connection>,
    stream: u32,
}

impl Responder {
    /// Sends the answer.
    pub fn answer(self, result: Result<Vec<u8>, Failure>) {
        let response = match result {
            Ok(payload) => Response { status: None, payload },
            Err(failure) => Response {
                status: Some(Status { code: failure.code as i32, message: failure.message }),
                payload: Vec::new(),
            },
        };
        self.connection.send(&frame(self.stream, RESPONSE, &response));
    }
}

/// Makes the `number`-th call on a connection (from 0) and waits for its answer; deadlines are the socket's own.
pub fn call(
    mut socket: &UnixStream,
    number: u32,
    (service, method): (&str, &str),
    payload: &impl Message,
) -> std::io::Result<Vec<u8>> {
    let request = Request {
        service: service.to_owned(),
        method: method.to_owned(),
        payload: payload.encode_to_vec(),
        ..Request::default()
    };
    let stream = number.wrapping_mul(2) | 1;
    socket.write_all(&frame(stream, REQUEST, &request))?;
    loop {
        let mut head = [0_u8; HEADER];
        socket.read_exact(&mut head)?;
        let Some((length, of, kind)) = header(&head)? else { continue };
        let mut body = vec![0; length];
        socket.read_exact(&mut body)?;
        if kind != RESPONSE || of != stream {
            continue;
        }
        let response = Response::decode(body.as_slice()).map_err(std::io::Error::other)?;
        return match response.status.filter(|status| status.code != 0) {
            Some(status) => Err(std::io::Error::other(status.message)),
            None => Ok(response.payload),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::task::{ConnectRequest, ConnectResponse};

    #[test]
    fn a_call_is_cut_out_of_the_stream_and_answered() {
        let (client, server) = UnixStream::pair().unwrap();
        let connection = Arc::new(Connection::new(server).unwrap());
        let asked = std::thread::spawn(move || {
            let request = ConnectRequest { id: "c".to_owned() };
            let answer = call(&client, 3, ("a.Service", "Connect"), &request).unwrap();
            assert_eq!(ConnectResponse::decode(answer.as_slice()).unwrap().task_pid, 7);
            call(&client, 4, ("a.Service", "Other"), &request).unwrap_err().to_string()
        });
        let (mut incoming, mut requests) = (Incoming::default(), Vec::new());
        for round in 0..2 {
            while requests.is_empty() {
                assert!(incoming.read(&connection, &mut requests).unwrap());
            }
            let (request, responder) = requests.remove(0);
            assert_eq!(request.service, "a.Service");
            responder.answer(match round {
                0 => Ok(ConnectResponse { task_pid: 7, ..ConnectResponse::default() }.encode_to_vec()),
                _ => Err(Failure::new(Code::Unimplemented, "not here")),
            });
        }
        assert_eq!(asked.join().unwrap(), "not here");
    }

    #[test]
    fn broken_frames_end_the_connection() {
        let cases: [&[u8]; 2] = [&[0xff; 10], &[0, 0, 0, 0, 0, 0, 0, 1, RESPONSE, 0]];
        for bytes in cases {
            let (mut client, server) = UnixStream::pair().unwrap();
            let connection = Arc::new(Connection::new(server).unwrap());
            client.write_all(bytes).unwrap();
            assert!(Incoming::default().read(&connection, &mut Vec::new()).is_err());
        }
    }
}
