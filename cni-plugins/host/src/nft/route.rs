//! The link by which this host reaches an address.

use std::{io, net::IpAddr};

use nix::{net::if_::if_indextoname, sys::socket::SockProtocol};

use super::{
    NftError,
    attributes::find,
    is_absent,
    wire::{Message, Socket},
};

/// `RTM_GETROUTE` of linux/rtnetlink.h.
const GET_ROUTE: u16 = 26;
/// Bytes of `struct rtmsg`.
const ROUTE_HEADER: usize = 12;

/// Name of the link that packets to `address` leave by; `None` when there is no way.
pub fn link_to(address: IpAddr) -> Result<Option<String>, NftError> {
    let step = || format!("find the link that leads to {address}");
    let (family, octets) = match address {
        IpAddr::V4(v4) => (2, v4.octets().to_vec()),
        IpAddr::V6(v6) => (10, v6.octets().to_vec()),
    };
    let mut header = vec![0; ROUTE_HEADER];
    header[0] = family;
    header[1] = u8::try_from(octets.len() * 8).unwrap_or_default();
    let mut message = Message::raw(GET_ROUTE, 0, header);
    message.body.put(1, &octets);
    let mut socket = Socket::open_to(SockProtocol::NetlinkRoute)?;
    let attributes = match socket.get(&message, ROUTE_HEADER) {
        Ok(attributes) => attributes,
        Err(error) if is_absent(&error) || is_unreachable(&error) => return Ok(None),
        Err(source) => return Err(NftError::new(step(), source)),
    };
    let index = find(&attributes, 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
    let Some(index) = index else { return Ok(None) };
    let name = if_indextoname(index).map_err(|errno| NftError::new(step(), errno))?;
    Ok(Some(name.to_string_lossy().into_owned()))
}

fn is_unreachable(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable)
}
