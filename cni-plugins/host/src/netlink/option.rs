//! Socket options that nix does not know.

#![allow(unsafe_code, reason = "setsockopt of the netlink level, which no safe crate here offers")]

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

/// Asks for the kernel's words beside errno, and for errors without a copy of the request.
pub(super) fn extended_ack(socket: &OwnedFd) -> io::Result<()> {
    for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
        let on: libc::c_int = 1;
        let len = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
        // SAFETY: the descriptor is an open netlink socket and `on` lives through the call, which reads
        // `len` bytes of it.
        let done = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_NETLINK, option, (&raw const on).cast(), len)
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
