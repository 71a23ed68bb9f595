//! One blocking netlink socket: many requests in one system call, every answer with a deadline.
//!
//! A batch is carried out by the kernel while it is being sent, in order and past failures, so that a
//! killed process leaves either none or all of it begun.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
            sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};

use super::codec::{HEADER, Message, messages, text, u32_at};
use crate::netns::{self, NetnsError};

/// Seconds until an answer counts as missing.
const DEADLINE_SECONDS: i64 = 10;
/// Most that one `recv` can give: the kernel's bound for a dump's part.
const BUFFER: usize = 32 << 10;
/// Largest answer that is collected: a node has thousands of links, not millions.
const MAX_ANSWER: usize = 64 << 20;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// `NLM_F_ROOT | NLM_F_MATCH`.
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
/// The kernel's own words about a failure.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// A netlink socket of one network namespace.
#[derive(Debug)]
pub struct Socket {
    descriptor: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// The answer to one message of a batch.
#[derive(Debug, Default)]
pub struct Answer {
    /// Bodies of the messages that came back (without `nlmsghdr`), for a GET.
    pub bodies: Vec<Vec<u8>>,
    /// What the kernel refused it with, and its words if it had some.
    pub error: Option<(Errno, String)>,
}

impl Answer {
    /// The answer as a result.
    pub fn result(self) -> io::Result<Vec<Vec<u8>>> {
        match self.error {
            None => Ok(self.bodies),
            Some((errno, words)) if words.is_empty() => Err(errno.into()),
            Some((errno, words)) => Err(io::Error::new(
                io::Error::from(errno).kind(),
                Refused { errno, words: words.trim_end_matches('.').to_owned() },
            )),
        }
    }

    /// The errno of a refusal.
    pub fn errno(&self) -> Option<Errno> {
        self.error.as_ref().map(|(errno, _)| *errno)
    }
}

/// An errno together with the kernel's explanation.
#[derive(Debug, thiserror::Error)]
#[error("{} ({words})", errno.desc())]
pub struct Refused {
    /// The number.
    pub errno: Errno,
    /// The kernel's words.
    pub words: String,
}

/// The errno in an error of this module.
pub fn errno_of(error: &io::Error) -> Option<Errno> {
    let refused = error.get_ref().and_then(|inner| inner.downcast_ref::<Refused>()).map(|r| r.errno);
    refused.or_else(|| error.raw_os_error().map(Errno::from_raw))
}

impl Socket {
    /// A socket in the calling thread's namespace.
    pub fn open(protocol: SockProtocol) -> io::Result<Self> {
        let descriptor = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        setsockopt(&descriptor, ReceiveTimeout, &TimeVal::new(DEADLINE_SECONDS, 0))?;
        super::option::extended_ack(&descriptor)?;
        Ok(Self { descriptor, sequence: 0, buffer: Vec::new() })
    }

    /// A socket in the namespace at `path`, usable from here.
    pub fn open_in(path: &Path, protocol: SockProtocol) -> Result<io::Result<Self>, NetnsError> {
        netns::visit(path, || Self::open(protocol))
    }

    /// Sends all messages at once and collects each one's answer. An error here means that the socket
    /// failed; what the kernel refused is in the answers.
    pub fn exchange(&mut self, requests: &[Message]) -> io::Result<Vec<Answer>> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            bytes.extend(request.finish(self.sequence, NLM_F_REQUEST | NLM_F_ACK));
        }
        self.send_raw(&bytes)?;
        let mut answers: Vec<Answer> = requests.iter().map(|_| Answer::default()).collect();
        let mut missing = requests.len();
        while missing > 0 {
            let received = self.recv_raw()?;
            for (header, body) in messages(&received) {
                let index = usize::try_from(header.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                let Some(answer) = answers.get_mut(index) else { continue };
                if header.kind == NLMSG_ERROR {
                    answer.error = refusal(header.flags, body);
                    missing -= 1;
                } else {
                    answer.bodies.push(body.to_vec());
                }
            }
        }
        Ok(answers)
    }

    /// Sends one message and returns its answer's bodies.
    pub fn request(&mut self, request: &Message) -> io::Result<Vec<Vec<u8>>> {
        let mut answers = self.exchange(std::slice::from_ref(request))?;
        answers.pop().unwrap_or_default().result()
    }

    /// Lists: sends one message as a dump and hands each body to `each`.
    pub fn dump(&mut self, request: &Message, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        self.send_raw(&request.finish(self.sequence, NLM_F_REQUEST | NLM_F_DUMP))?;
        let mut total = 0;
        loop {
            let received = self.recv_raw()?;
            total += received.len();
            if total > MAX_ANSWER {
                return Err(io::Error::other("the kernel's list is larger than 64 MiB"));
            }
            for (header, body) in messages(&received) {
                if header.sequence != self.sequence {
                    continue;
                }
                match header.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let error = refusal(header.flags, body);
                        return Answer { bodies: Vec::new(), error }.result().map(|_| ());
                    }
                    _ => each(body),
                }
            }
        }
    }

    /// Sends finished bytes.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sent = retried(|| send(self.descriptor.as_raw_fd(), bytes, MsgFlags::empty()))?;
        if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("a netlink request was cut")) }
    }

    /// Receives once; fails when nothing comes within the deadline.
    pub fn recv_raw(&mut self) -> io::Result<Vec<u8>> {
        self.buffer.resize(BUFFER, 0);
        let descriptor = self.descriptor.as_raw_fd();
        let received = retried(|| recv(descriptor, &mut self.buffer, MsgFlags::empty()));
        match received {
            Ok(len) => Ok(self.buffer[..len].to_vec()),
            Err(Errno::EAGAIN) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer from the kernel within {DEADLINE_SECONDS} s"),
            )),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next sequence number, for messages that are finished by the caller.
    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }
}

/// What an NLMSG_ERROR says; `None` for an acknowledgement.
pub fn refusal(flags: u16, body: &[u8]) -> Option<(Errno, String)> {
    let code = u32_at(body, 0).map_or(0, u32::cast_signed);
    if code == 0 {
        return None;
    }
    let mut words = String::new();
    if flags & NLM_F_ACK_TLVS != 0 {
        // After the code comes the request: its header only when capped, else all of it.
        let request = u32_at(body, 4).and_then(|len| usize::try_from(len).ok()).unwrap_or(HEADER);
        let skip = 4 + if flags & NLM_F_CAPPED != 0 { HEADER } else { request.next_multiple_of(4) };
        let attributes = body.get(skip..).unwrap_or_default();
        words = super::codec::find(attributes, NLMSGERR_ATTR_MSG).map(text).unwrap_or_default();
    }
    Some((Errno::from_raw(code.saturating_neg()), words))
}

fn retried(mut call: impl FnMut() -> nix::Result<usize>) -> nix::Result<usize> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_the_kernels_words() {
        let words = Message::new(0, 0).string(NLMSGERR_ATTR_MSG, "Too bad.").finish(0, 0);
        let mut body = (-17_i32).to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; HEADER]);
        body.extend_from_slice(&words[HEADER..]);
        let refused = refusal(NLM_F_CAPPED | NLM_F_ACK_TLVS, &body).unwrap();
        assert_eq!(refused, (Errno::EEXIST, "Too bad.".to_owned()));
        let error = Answer { bodies: Vec::new(), error: Some(refused) }.result().unwrap_err();
        assert_eq!(error.to_string(), "File exists (Too bad)");
        assert_eq!(errno_of(&error), Some(Errno::EEXIST));
        assert_eq!(refusal(0, &[0; 4]), None);
    }
}
