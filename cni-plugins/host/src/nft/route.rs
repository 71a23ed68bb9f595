//! The link by which this host reaches an address; and an address that this host has without any link.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
};

use nix::{
    errno::Errno,
    net::if_::{if_indextoname, if_nametoindex},
    sys::socket::SockProtocol,
};

use super::{
    NftError,
    attributes::find,
    is_absent,
    wire::{Message, Socket, flag},
};

/// `RTM_NEWROUTE`, `RTM_DELROUTE` and `RTM_GETROUTE` of linux/rtnetlink.h.
const NEW_ROUTE: u16 = 24;
const DEL_ROUTE: u16 = 25;
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

/// Makes an address one of this host's, by a route in the table `local`. May be repeated.
pub(super) fn hold(address: Ipv6Addr) -> Result<(), NftError> {
    let failed = |source| NftError::new(format!("make {address} an address of this host"), source);
    let message = local_route(NEW_ROUTE, flag::CREATE | flag::REPLACE, address).map_err(failed)?;
    Socket::open_to(SockProtocol::NetlinkRoute)?.request(&message).map_err(failed)
}

/// Takes it back; absence is success.
pub(super) fn release(address: Ipv6Addr) -> Result<(), NftError> {
    let failed = |source| NftError::new(format!("take the address {address} from this host"), source);
    let message = local_route(DEL_ROUTE, 0, address).map_err(failed)?;
    match Socket::open_to(SockProtocol::NetlinkRoute)?.request(&message) {
        Err(error) if is_no_route(&error) => Ok(()),
        done => done.map_err(failed),
    }
}

fn local_route(kind: u16, flags: u16, address: Ipv6Addr) -> io::Result<Message> {
    // Family, bits, table `local`, protocol `boot`, scope `host`, type `local`.
    let mut message = Message::raw(kind, flags, vec![10, 128, 0, 0, 255, 3, 254, 2, 0, 0, 0, 0]);
    message.body.put(1, &address.octets()).put(4, &if_nametoindex("lo")?.to_ne_bytes());
    Ok(message)
}

/// The route is not there, or this kernel runs without IPv6.
fn is_no_route(error: &io::Error) -> bool {
    let absent = [Errno::ESRCH, Errno::EOPNOTSUPP, Errno::EAFNOSUPPORT];
    absent.iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

fn is_unreachable(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable)
}
