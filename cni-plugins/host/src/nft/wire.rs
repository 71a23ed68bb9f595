//! nfnetlink messages and the socket they go through.
//!
//! The kernel handles what is sent before the call returns, so that all answers of a transaction wait in the socket then;
//! a receive deadline is set all the same.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket,
            sockopt::{ReceiveTimeout, SndBufForce},
        },
        time::TimeVal,
    },
};

use super::{
    NftError, TABLE,
    attributes::{Attributes, find},
    comment,
};

/// `NFPROTO_INET` of linux/netfilter.h.
pub(super) const INET: u8 = 1;
/// `NFNL_SUBSYS_NFTABLES` of linux/netfilter/nfnetlink.h.
const SUBSYSTEM: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

/// Types of messages, `enum nf_tables_msg_types`.
pub(super) mod kind {
    pub(in super::super) const NEW_TABLE: u16 = 0;
    pub(in super::super) const GET_TABLE: u16 = 1;
    pub(in super::super) const DEL_TABLE: u16 = 2;
    pub(in super::super) const NEW_CHAIN: u16 = 3;
    pub(in super::super) const GET_CHAIN: u16 = 4;
    pub(in super::super) const DEL_CHAIN: u16 = 5;
    pub(in super::super) const NEW_RULE: u16 = 6;
    pub(in super::super) const GET_RULE: u16 = 7;
    pub(in super::super) const DEL_RULE: u16 = 8;
    pub(in super::super) const NEW_SET: u16 = 9;
    pub(in super::super) const NEW_ELEMENTS: u16 = 12;
    pub(in super::super) const GET_ELEMENTS: u16 = 13;
    pub(in super::super) const DEL_ELEMENTS: u16 = 14;
}

/// Flags of messages, linux/netlink.h.
pub(super) mod flag {
    const REQUEST: u16 = 1;
    pub(in super::super) const ACK: u16 = 4;
    pub(in super::super) const DUMP: u16 = 0x300;
    pub(in super::super) const REPLACE: u16 = 0x100;
    pub(in super::super) const EXCL: u16 = 0x200;
    pub(in super::super) const CREATE: u16 = 0x400;
    pub(in super::super) const APPEND: u16 = 0x800;
    pub(in super::super) const BASE: u16 = REQUEST;
}

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The list changed while it was told.
const DUMP_INTERRUPTED: u16 = 0x10;
/// How often a list that changes under the reading is asked for again.
const DUMP_TRIES: usize = 20;
/// Bytes of one read: the kernel tells lists in pieces of at most 32 KiB.
pub(super) const BUFFER: usize = 64 << 10;
/// Room for one transaction, that of a pod with ten thousand ports.
const SEND_BUFFER: usize = 16 << 20;
/// Longest wait for an answer.
const DEADLINE: TimeVal = TimeVal::new(10, 0);

/// A message without its sequence number.
#[derive(Debug, Clone)]
pub(super) struct Message {
    kind: u16,
    flags: u16,
    header: Vec<u8>,
    /// Its attributes.
    pub(super) body: Attributes,
}

impl Message {
    /// A message about the table's objects.
    pub(super) fn nft(kind: u16, flags: u16) -> Self {
        Self::of(SUBSYSTEM << 8 | kind, flags, INET)
    }

    /// A message about the objects of a table of another family.
    pub(super) fn nft_of(family: u8, kind: u16, flags: u16) -> Self {
        Self::of(SUBSYSTEM << 8 | kind, flags, family)
    }

    /// A message of any nfnetlink subsystem.
    pub(super) fn of(kind: u16, flags: u16, family: u8) -> Self {
        Self { kind, flags: flags | flag::BASE, header: vec![family, 0, 0, 0], body: Attributes::default() }
    }

    /// A message with another header than nfnetlink's.
    pub(super) fn raw(kind: u16, flags: u16, header: Vec<u8>) -> Self {
        Self { kind, flags: flags | flag::BASE, header, body: Attributes::default() }
    }

    fn batch(kind: u16) -> Self {
        let resource = SUBSYSTEM.to_be_bytes();
        Self {
            kind,
            flags: flag::BASE,
            header: vec![0, 0, resource[0], resource[1]],
            body: Attributes::default(),
        }
    }

    fn write(&self, sequence: u32, more_flags: u16, out: &mut Vec<u8>) {
        let length = u32::try_from(16 + self.header.len() + self.body.0.len()).unwrap_or(u32::MAX);
        out.extend(length.to_ne_bytes());
        out.extend(self.kind.to_ne_bytes());
        out.extend((self.flags | more_flags).to_ne_bytes());
        out.extend(sequence.to_ne_bytes());
        out.extend(0_u32.to_ne_bytes());
        out.extend(&self.header);
        out.extend(&self.body.0);
    }
}

/// A netlink socket.
#[derive(Debug)]
pub(super) struct Socket {
    descriptor: OwnedFd,
    sequence: u32,
}

/// One message of an answer.
struct Reply<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Socket {
    /// A socket to netfilter, in the calling thread's network namespace.
    pub(super) fn open() -> Result<Self, NftError> {
        Self::open_to(SockProtocol::NetlinkNetFilter)
    }

    /// A socket to a part of the kernel, in the calling thread's network namespace.
    pub(super) fn open_to(protocol: SockProtocol) -> Result<Self, NftError> {
        let open = || -> nix::Result<OwnedFd> {
            let descriptor = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
            setsockopt(&descriptor, ReceiveTimeout, &DEADLINE)?;
            Ok(descriptor)
        };
        let descriptor = open().map_err(|errno| NftError::new("open a netlink socket", errno))?;
        Ok(Self { descriptor, sequence: 1 })
    }

    /// Carries out all messages or none.
    pub(super) fn commit(&mut self, messages: &[Message]) -> io::Result<()> {
        let mut bytes =
            Vec::with_capacity(64 + messages.iter().map(|one| 32 + one.body.0.len()).sum::<usize>());
        let first = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        Message::batch(BATCH_BEGIN).write(first, 0, &mut bytes);
        let mut last = first;
        for (index, message) in messages.iter().enumerate() {
            last = self.sequence;
            self.sequence = self.sequence.wrapping_add(1);
            // One answer is enough: that of the last. Those that fail answer unasked.
            let acknowledge = if index + 1 == messages.len() { flag::ACK } else { 0 };
            message.write(last, acknowledge, &mut bytes);
        }
        Message::batch(BATCH_END).write(last.wrapping_add(1), 0, &mut bytes);
        self.sequence = last.wrapping_add(2);
        self.send(&bytes)?;
        self.outcome(first, last)
    }

    /// A request with one answer: done, or an errno.
    pub(super) fn request(&mut self, message: &Message) -> io::Result<()> {
        let sequence = self.next();
        let mut bytes = Vec::new();
        message.write(sequence, flag::ACK, &mut bytes);
        self.send(&bytes)?;
        self.outcome(sequence, sequence)
    }

    /// A question with one object as answer; its payload behind the header of `header` bytes.
    pub(super) fn get(&mut self, message: &Message, header: usize) -> io::Result<Vec<u8>> {
        let sequence = self.next();
        let mut bytes = Vec::new();
        message.write(sequence, 0, &mut bytes);
        self.send(&bytes)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = self.receive(&mut buffer)?;
            if let Some(reply) = replies(&buffer[..length]).find(|reply| reply.sequence == sequence) {
                if reply.kind == NLMSG_ERROR {
                    return Err(error_of(reply.payload).unwrap_or_else(|| io::Error::other("no object")));
                }
                return Ok(reply.payload.get(header..).unwrap_or_default().to_vec());
            }
        }
    }

    /// A list; the attributes of each object.
    pub(super) fn dump(&mut self, message: &Message) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..DUMP_TRIES {
            if let Some(found) = self.dump_once(message)? {
                return Ok(found);
            }
        }
        Err(Errno::EINTR.into())
    }

    /// `None` when the list changed while it was told.
    fn dump_once(&mut self, message: &Message) -> io::Result<Option<Vec<Vec<u8>>>> {
        let sequence = self.next();
        let mut bytes = Vec::new();
        message.write(sequence, flag::DUMP, &mut bytes);
        self.send(&bytes)?;
        let mut buffer = vec![0; BUFFER];
        let (mut found, mut whole) = (Vec::new(), true);
        loop {
            let length = self.receive(&mut buffer)?;
            for reply in replies(&buffer[..length]).filter(|reply| reply.sequence == sequence) {
                whole &= reply.flags & DUMP_INTERRUPTED == 0;
                match reply.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match error_of(reply.payload) {
                            Some(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => Ok(None),
                            Some(error) => Err(error),
                            None => Ok(whole.then_some(found)),
                        };
                    }
                    // Behind the four bytes of nfgenmsg.
                    _ => found.push(reply.payload.get(4..).unwrap_or_default().to_vec()),
                }
            }
        }
    }

    /// Whether the table is there.
    pub(super) fn table_exists(&mut self) -> io::Result<bool> {
        let mut message = Message::nft(kind::GET_TABLE, 0);
        message.body.text(1, TABLE);
        match self.get(&message, 4) {
            Ok(_) => Ok(true),
            Err(error) if super::is_absent(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn next(&mut self) -> u32 {
        let sequence = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        sequence
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > 64 << 10 {
            // Without the right to do so the kernel's own limit decides, and sending says so.
            setsockopt(&self.descriptor, SndBufForce, &SEND_BUFFER).ok();
        }
        let sent = nix::unistd::write(&self.descriptor, bytes)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(self.descriptor.as_raw_fd(), buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                other => return Ok(other?),
            }
        }
    }

    /// Reads answers to the messages `first..=last` until that of the last one, or an error.
    fn outcome(&self, first: u32, last: u32) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        let mut overflow = false;
        loop {
            let length = match self.receive(&mut buffer) {
                // A large transaction that fails is told by as many answers, each with its message in it; the first of
                // them wait behind this one.
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) && !overflow => {
                    overflow = true;
                    continue;
                }
                other => other?,
            };
            let (mut done, mut failed) = (false, None);
            for reply in replies(&buffer[..length]) {
                let ours = reply.sequence.wrapping_sub(first) <= last.wrapping_sub(first);
                if ours && reply.kind == NLMSG_ERROR {
                    failed = failed.or_else(|| error_of(reply.payload));
                    done |= reply.sequence == last;
                }
            }
            if let Some(error) = failed {
                self.drain(&mut buffer);
                return Err(error);
            }
            if done {
                return Ok(());
            }
        }
    }

    /// Takes away the answers that a failed transaction has left.
    fn drain(&self, buffer: &mut [u8]) {
        while recv(self.descriptor.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT).is_ok_and(|length| length > 0)
        {
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The names of tables that a datagram of the group of changes tells to be gone.
pub(super) fn deleted_tables(bytes: &[u8]) -> impl Iterator<Item = String> {
    replies(bytes)
        .filter(|reply| reply.kind == SUBSYSTEM << 8 | kind::DEL_TABLE)
        .filter_map(|reply| find(reply.payload.get(4..)?, 1).map(comment::text))
}

/// The messages of a datagram; ends at the first that does not fit.
fn replies(mut bytes: &[u8]) -> impl Iterator<Item = Reply<'_>> {
    std::iter::from_fn(move || {
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let half = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let length = usize::try_from(word(0)?).ok()?;
        let reply =
            Reply { kind: half(4)?, flags: half(6)?, sequence: word(8)?, payload: bytes.get(16..length)? };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(reply)
    })
}

/// The errno of an error message or of the end of a list; `None` for zero.
fn error_of(payload: &[u8]) -> Option<io::Error> {
    let code = i32::from_ne_bytes(payload.get(..4)?.try_into().ok()?);
    (code != 0).then(|| io::Error::from_raw_os_error(-code))
}
