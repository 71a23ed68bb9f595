//! Deletes a link without waiting for what the kernel does once the link is gone.
//!
//! The answer to RTM_DELLINK comes only after an RCU barrier: tens of milliseconds in which nothing of the link can be seen
//! any more. A child process makes the request and waits for that answer; here the kernel's notification that the link
//! is gone is waited for, or an answer that says why it cannot be. The child ends by itself a moment later, so this is
//! for programs that end soon too, as plugins do: nobody else reaps it.

#![allow(unsafe_code, reason = "fork has no safe wrapper: the child may only make system calls")]

use std::{
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
    },
    unistd::{ForkResult, fork, pipe2, write},
};

use crate::netlink::NetlinkError;

/// Lengths of a netlink header and of a link message's own header.
const HEADER: usize = 16;
const MESSAGE: usize = 16;
/// Most that the kernel sends at once.
const BUFFER: usize = 32 * 1024;

/// Deletes the link called `name` of this namespace; tells whether there was one. Returns when it is gone.
pub fn delete(name: &str, patience: Duration) -> Result<bool, NetlinkError> {
    match try_delete(name, patience) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(source) => Err(NetlinkError::Request { step: format!("delete link {name}"), source }),
    }
}

fn try_delete(name: &str, patience: Duration) -> io::Result<()> {
    let index = if_nametoindex(name).map_err(|errno| match errno {
        // What a name that nothing has is answered with by the ioctl behind the function.
        Errno::ENXIO | Errno::EINVAL => Errno::ENODEV,
        other => other,
    })?;
    // Before the request, so that nothing is missed.
    let news = route_socket(libc::RTMGRP_LINK.cast_unsigned())?;
    let ours = route_socket(0)?;
    let (answer, answers) = pipe2(OFlag::O_CLOEXEC)?;
    let message = request(index);
    // SAFETY: the child makes only system calls on what was made before, allocates nothing, takes no lock, and ends
    // without running anything of ours.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let errno = ask(&ours, &message);
            let _nobody_may_listen = write(&answers, &errno.to_ne_bytes());
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { .. } => {}
    }
    drop((ours, answers));
    wait(index, &news, answer, Instant::now() + patience)
}

/// In the child: asks the kernel and gives its answer, 0 or an errno.
fn ask(socket: &OwnedFd, message: &[u8]) -> i32 {
    for stream in 0..=2 {
        // Whoever reads the plugin's answer to its end must not wait for us.
        // SAFETY: closes a number; nothing in this process uses the streams any more.
        unsafe { libc::close(stream) };
    }
    let mut answer = [0_u8; 1024];
    let asked = send(socket.as_raw_fd(), message, MsgFlags::empty())
        .and_then(|_| recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()));
    match asked {
        Ok(length) if length >= HEADER + 4 => -number(&answer, HEADER),
        Ok(_) => libc::EPROTO,
        Err(errno) => errno as i32,
    }
}

/// Waits until the link is gone or the child has an answer.
fn wait(index: u32, news: &OwnedFd, answer: OwnedFd, end: Instant) -> io::Result<()> {
    let mut answer = std::fs::File::from(answer);
    let mut buffer = vec![0_u8; BUFFER];
    loop {
        let left = end.checked_duration_since(Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut waiting =
            [PollFd::new(news.as_fd(), PollFlags::POLLIN), PollFd::new(answer.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, left) {
            Err(Errno::EINTR) => continue,
            ready => ready?,
        };
        let [told, answered] = waiting.map(|waiting| waiting.any().unwrap_or_default());
        if told {
            match recv(news.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) if tells_end(&buffer[..length], index) => return Ok(()),
                // Notifications that were lost leave the child's answer.
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if answered {
            let mut errno = [0; 4];
            answer.read_exact(&mut errno)?;
            return match i32::from_ne_bytes(errno) {
                0 => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            };
        }
    }
}

/// Whether one of these notifications says that the link is gone. Those of a bridge that loses a port look alike but for
/// their family, and come earlier.
fn tells_end(mut messages: &[u8], index: u32) -> bool {
    while messages.len() >= HEADER + MESSAGE {
        let length = usize::try_from(number(messages, 0)).unwrap_or_default();
        let kind = u16::from_ne_bytes([messages[4], messages[5]]);
        let family = messages[HEADER];
        let of = number(messages, HEADER + 4).cast_unsigned();
        if kind == libc::RTM_DELLINK && i32::from(family) == libc::AF_UNSPEC && of == index {
            return true;
        }
        if length < HEADER || length.next_multiple_of(4) >= messages.len() {
            return false;
        }
        messages = &messages[length.next_multiple_of(4)..];
    }
    false
}

fn number(bytes: &[u8], at: usize) -> i32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    i32::from_ne_bytes(number)
}

/// RTM_DELLINK of a link by its index, to be acknowledged.
fn request(index: u32) -> [u8; HEADER + MESSAGE] {
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap_or_default();
    let length = u32::try_from(HEADER + MESSAGE).unwrap_or_default();
    let mut message = [0; HEADER + MESSAGE];
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message[4..6].copy_from_slice(&libc::RTM_DELLINK.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    message[HEADER + 4..HEADER + 8].copy_from_slice(&index.to_ne_bytes());
    message
}

fn route_socket(groups: u32) -> io::Result<OwnedFd> {
    let socket =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notification(kind: u16, family: u8, index: u32) -> Vec<u8> {
        let mut message = request(index).to_vec();
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message[HEADER] = family;
        message
    }

    #[test]
    fn only_the_links_own_end_counts() {
        let bridge = u8::try_from(libc::AF_BRIDGE).unwrap();
        let others = [
            notification(libc::RTM_NEWLINK, 0, 7),
            notification(libc::RTM_DELLINK, bridge, 7),
            notification(libc::RTM_DELLINK, 0, 8),
        ]
        .concat();
        assert!(!tells_end(&others, 7));
        assert!(tells_end(&[others.clone(), notification(libc::RTM_DELLINK, 0, 7)].concat(), 7));
        for cut in 0..others.len() {
            assert!(!tells_end(&others[..cut], 7));
        }
    }

    #[test]
    fn a_link_that_is_not_there_is_told() {
        assert!(!delete("no-such-link-0", Duration::from_secs(10)).unwrap());
    }
}
