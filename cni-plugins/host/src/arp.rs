//! Gratuitous ARP: tells the neighbours which hardware address an IPv4 address has now.
//!
//! Without it a neighbour that talked to the previous owner of a re-used address keeps sending to the
//! old hardware address until its entry times out.

#![allow(unsafe_code, reason = "packet sockets with a link-layer address, which the standard library lacks")]

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const ETH_P_ARP: u16 = 0x0806;
const BROADCAST: [u8; 6] = [0xff; 6];

/// Broadcasts one gratuitous ARP request for `addr` at `mac` through the interface `ifindex` of the
/// calling thread's namespace.
pub fn announce(ifindex: u32, mac: [u8; 6], addr: Ipv4Addr) -> io::Result<()> {
    let socket: OwnedFd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    let frame = frame(mac, addr);
    let mut hardware = [0_u8; 8];
    hardware[..6].copy_from_slice(&BROADCAST);
    let target = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?,
        sll_protocol: ETH_P_ARP.to_be(),
        sll_ifindex: i32::try_from(ifindex).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: hardware,
    };
    let target_len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).map_err(io::Error::other)?;
    // SAFETY: `frame` and `target` live through the call and the lengths given are theirs; the
    // descriptor is an open packet socket. nix's `LinkAddr` cannot be built from an index.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const target).cast(),
            target_len,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// RFC 5227 announcement: an ARP request whose sender and target protocol address are the same.
fn frame(mac: [u8; 6], addr: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend_from_slice(&BROADCAST);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ETH_P_ARP.to_be_bytes());
    // Ethernet, IPv4, address lengths 6 and 4, operation 1 (request).
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&addr.octets());
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&addr.octets());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sender_and_target_are_the_announced_address() {
        let frame = frame([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 2));
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[28..32], [10, 0, 0, 2]);
        assert_eq!(frame[38..42], [10, 0, 0, 2]);
        assert_eq!(frame[12..14], [8, 6]);
    }
}
