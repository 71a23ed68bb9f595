//! Tells when somebody else takes the table away, as `nft flush ruleset` does.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, NetlinkAddr, SockProtocol, bind, recv};

use super::wire::{BUFFER, Socket, deleted_tables};
use super::{NftError, TABLE};

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h.
const GROUP: u32 = 7;

/// Changes of nftables in the network namespace that it was made in.
#[derive(Debug)]
pub struct Watch {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Watch {
    /// From now on.
    pub fn open() -> Result<Self, NftError> {
        let socket = Socket::open_to(SockProtocol::NetlinkNetFilter)?;
        bind(socket.as_fd().as_raw_fd(), &NetlinkAddr::new(0, 1 << (GROUP - 1)))
            .map_err(|errno| NftError::new("watch nftables", errno))?;
        Ok(Self { socket, buffer: vec![0; BUFFER] })
    }

    /// Whether the table was taken away since the last call; also when more happened than was kept, and nobody knows. Does not
    /// block: wait until the descriptor can be read.
    pub fn lost(&mut self) -> io::Result<bool> {
        let mut lost = false;
        loop {
            match recv(self.socket.as_fd().as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => lost |= deleted_tables(&self.buffer[..length]).any(|name| name == TABLE),
                Err(Errno::EAGAIN) => return Ok(lost),
                Err(Errno::ENOBUFS) => lost = true,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
