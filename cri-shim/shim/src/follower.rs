//! Somebody who is attached to a container's output: gets frames as fast as it reads, and misses what is too much.

use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags};
use prost::Message;

use crate::protocol::{Ended, Kind, header};

/// Most bytes that wait for one client; pieces beyond that are dropped for it.
const BACKLOG: usize = 256 << 10;
/// How long a client may take for the last bytes.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// One client.
#[derive(Debug)]
pub struct Follower {
    client: UnixStream,
    backlog: Vec<u8>,
}

impl Follower {
    /// Takes a connection over.
    pub fn new(client: UnixStream) -> Self {
        // One that cannot be set up fails at the first write.
        client.set_nonblocking(true).ok();
        Self { client, backlog: Vec::new() }
    }

    /// Sends a piece; says whether the client is still there.
    pub fn send(&mut self, kind: Kind, piece: &[u8]) -> bool {
        if self.backlog.len() + piece.len() <= BACKLOG {
            self.backlog.extend_from_slice(&header(kind, piece.len()));
            self.backlog.extend_from_slice(piece);
        }
        self.flush()
    }

    /// Sends what waits, as far as the client takes it; says whether it is still there.
    pub fn flush(&mut self) -> bool {
        while !self.backlog.is_empty() {
            match self.client.write(&self.backlog) {
                Ok(count) => drop(self.backlog.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
        self.backlog = Vec::new();
        !self.has_left()
    }

    fn has_left(&self) -> bool {
        let mut fds = [PollFd::new(self.client.as_fd(), PollFlags::empty())];
        nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// What to wait for: room for what waits, or the client's leaving.
    pub fn poll_fd(&self) -> PollFd<'_> {
        let wanted = if self.backlog.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
        PollFd::new(self.client.as_fd(), wanted)
    }

    /// Tells the end.
    pub fn finish(mut self) {
        let ended = Ended::default().encode_to_vec();
        self.backlog.extend_from_slice(&header(Kind::Ended, ended.len()));
        self.backlog.extend_from_slice(&ended);
        if self.client.set_nonblocking(false).is_ok()
            && self.client.set_write_timeout(Some(LAST_WORDS)).is_ok()
        {
            // A client that has left needs no end.
            self.client.write_all(&self.backlog).ok();
        }
    }
}
