//! What parent and child tell each other over a socket pair: readiness, go, failed steps, a terminal.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::steps::{Failure, Step};

/// One message. Eight bytes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Child: set up, waiting for [`Message::Go`]. The bits are [`crate::steps::Warnings`].
    Ready(u32),
    /// Child: a step failed; it ends now.
    Failed(Failure),
    /// Child: in its user namespace, wants its id maps written.
    MapMe,
    /// Helper: the container's process has this id.
    Made(i32),
    /// Child: the terminal's master side comes with this message.
    Terminal,
    /// Child: all mounts are made, the parent's hooks may run; waiting for [`Message::Go`].
    Hooks,
    /// Parent: go on.
    Go,
}

impl Message {
    fn encode(self) -> [u8; 8] {
        let (kind, step, index, value) = match self {
            Self::Ready(warnings) => (1, 0, 0, warnings.cast_signed()),
            Self::Failed(failure) => (2, failure.step as u8, failure.index, failure.errno.raw_os_error()),
            Self::MapMe => (3, 0, 0, 0),
            Self::Made(pid) => (4, 0, 0, pid),
            Self::Terminal => (5, 0, 0, 0),
            Self::Go => (6, 0, 0, 0),
            Self::Hooks => (7, 0, 0, 0),
        };
        let ([i0, i1], [v0, v1, v2, v3]) = (index.to_le_bytes(), value.to_le_bytes());
        [kind, step, i0, i1, v0, v1, v2, v3]
    }

    fn decode(bytes: [u8; 8]) -> Option<Self> {
        let [kind, step, i0, i1, v0, v1, v2, v3] = bytes;
        let value = i32::from_le_bytes([v0, v1, v2, v3]);
        Some(match kind {
            1 => Self::Ready(value.cast_unsigned()),
            2 => Self::Failed(Failure {
                step: Step::from_number(step)?,
                index: u16::from_le_bytes([i0, i1]),
                errno: Errno::from_raw_os_error(value),
            }),
            3 => Self::MapMe,
            4 => Self::Made(value),
            5 => Self::Terminal,
            6 => Self::Go,
            7 => Self::Hooks,
            _ => return None,
        })
    }
}

/// What came over the socket.
#[derive(Debug)]
pub(crate) enum Received {
    /// A message, and the descriptor with it.
    Message(Message, Option<OwnedFd>),
    /// The other side is closed.
    Closed,
    /// Nothing within the time.
    Late,
}

/// The two sides, both closed at exec.
pub(crate) fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Sends a message. A plain write: it must pass the container's own seccomp profile as any runtime's would.
pub(crate) fn send(socket: BorrowedFd<'_>, message: Message) -> Result<(), Errno> {
    rustix::io::retry_on_intr(|| rustix::io::write(socket, &message.encode())).map(|_| ())
}

/// Sends a descriptor.
pub(crate) fn send_terminal(socket: BorrowedFd<'_>, master: BorrowedFd<'_>) -> Result<(), Errno> {
    let descriptors = [master];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::NOBUFS);
    }
    let bytes = Message::Terminal.encode();
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).map(|_| ())
}

/// Waits in the child for the parent's word; `false` when the parent is gone.
pub(crate) fn wait_for_go(socket: BorrowedFd<'_>) -> bool {
    let mut bytes = [0_u8; 8];
    let read = rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut bytes));
    read == Ok(8) && Message::decode(bytes) == Some(Message::Go)
}

/// Waits in the parent for the child's next message.
pub(crate) fn receive(socket: impl AsFd, limit: Duration) -> Result<Received, Errno> {
    let limit = Timespec { tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
    let mut polled = [PollFd::new(&socket, PollFlags::IN)];
    if rustix::io::retry_on_intr(|| poll(&mut polled, Some(&limit)))? == 0 {
        return Ok(Received::Late);
    }
    let mut bytes = [0_u8; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
    });
    let received = match received {
        // The child ended with our word unread.
        Err(Errno::CONNRESET) => return Ok(Received::Closed),
        other => other?,
    };
    if received.bytes == 0 {
        return Ok(Received::Closed);
    }
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match Message::decode(bytes) {
        Some(message) => Ok(Received::Message(message, descriptor)),
        None => Err(Errno::PROTO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_come_through_and_the_end_is_seen() {
        let (a, b) = pair().unwrap();
        let failure = Failure { step: Step::Mount, index: 259, errno: Errno::NOENT };
        for message in [
            Message::Ready(3),
            Message::Failed(failure),
            Message::MapMe,
            Message::Made(77),
            Message::Hooks,
            Message::Go,
        ] {
            send(a.as_fd(), message).unwrap();
            match receive(&b, Duration::from_secs(5)).unwrap() {
                Received::Message(got, None) => assert_eq!(got, message),
                other => panic!("{other:?}"),
            }
        }
        send_terminal(a.as_fd(), b.as_fd()).unwrap();
        assert!(matches!(
            receive(&b, Duration::from_secs(5)),
            Ok(Received::Message(Message::Terminal, Some(_)))
        ));
        assert!(matches!(receive(&b, Duration::ZERO), Ok(Received::Late)));
        send(b.as_fd(), Message::Go).unwrap();
        assert!(wait_for_go(a.as_fd()));
        drop(b);
        assert!(!wait_for_go(a.as_fd()));
        assert!(matches!(receive(&a, Duration::from_secs(5)), Ok(Received::Closed)));
    }
}
