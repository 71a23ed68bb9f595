//! The messages of the kernel's generic netlink family `wireguard` (linux/wireguard.h), as bytes.
//!
//! A device with many peers does not fit one message: [`set`] spreads peers, and a peer's addresses, over several.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::{
    Device, IpNet, Key, Peer,
    plan::{Change, PeerChange},
};
use crate::netlink::codec::{Message, attributes, find, u16_at};

/// `GENL_ID_CTRL` and what is asked of it, linux/genetlink.h.
const CONTROL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// Length of `genlmsghdr`.
const GENERIC_HEADER: usize = 4;

const FAMILY: &str = "wireguard";
const VERSION: u8 = 1;
const WG_CMD_GET_DEVICE: u8 = 0;
const WG_CMD_SET_DEVICE: u8 = 1;
const WGDEVICE_A_IFINDEX: u16 = 1;
const WGDEVICE_A_PRIVATE_KEY: u16 = 3;
const WGDEVICE_A_PUBLIC_KEY: u16 = 4;
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_PEERS: u16 = 8;
const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_PRESHARED_KEY: u16 = 2;
const WGPEER_A_FLAGS: u16 = 3;
const WGPEER_A_ENDPOINT: u16 = 4;
const WGPEER_A_KEEPALIVE: u16 = 5;
const WGPEER_A_ALLOWEDIPS: u16 = 9;
const WGPEER_F_REMOVE_ME: u32 = 1;
const WGPEER_F_REPLACE_ALLOWEDIPS: u32 = 2;
const WGPEER_F_UPDATE_ONLY: u32 = 4;
const WGALLOWEDIP_A_FAMILY: u16 = 1;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Addresses of a peer in one message. The list of peers is one attribute, whose length is 16 bits: at 40 bytes an
/// address and 132 a peer, this and [`PARTS`] stay below.
const ADDRESSES: usize = 128;
/// Parts of peers in one message.
const PARTS: usize = 10;

/// Asks for the number of the family.
pub(super) fn find_family() -> Message {
    generic(CONTROL, CTRL_CMD_GETFAMILY).string(CTRL_ATTR_FAMILY_NAME, FAMILY)
}

/// The number in the answer.
pub(super) fn read_family(body: &[u8]) -> Option<u16> {
    u16_at(find(body.get(GENERIC_HEADER..)?, CTRL_ATTR_FAMILY_ID)?, 0)
}

/// Asks for a device.
pub(super) fn get(family: u16, index: u32) -> Message {
    generic(family, WG_CMD_GET_DEVICE).u32(WGDEVICE_A_IFINDEX, index)
}

/// Adds what one message of the answer tells; a peer with many addresses is told in several.
pub(super) fn read(device: &mut Device, body: &[u8]) {
    for (kind, payload) in attributes(body.get(GENERIC_HEADER..).unwrap_or_default()) {
        match kind {
            WGDEVICE_A_PRIVATE_KEY => device.private_key = key(payload),
            WGDEVICE_A_PUBLIC_KEY => device.public_key = key(payload),
            WGDEVICE_A_LISTEN_PORT => device.port = u16_at(payload, 0).unwrap_or_default(),
            WGDEVICE_A_PEERS => attributes(payload).for_each(|(_, peer)| read_peer(device, peer)),
            _ => {}
        }
    }
}

fn read_peer(device: &mut Device, attributes_of_peer: &[u8]) {
    let Some(public_key) = find(attributes_of_peer, WGPEER_A_PUBLIC_KEY).and_then(key) else { return };
    let peer = device.peers.entry(public_key).or_default();
    for (kind, payload) in attributes(attributes_of_peer) {
        match kind {
            WGPEER_A_PRESHARED_KEY => peer.preshared = key(payload),
            WGPEER_A_ENDPOINT => peer.endpoint = read_endpoint(payload),
            WGPEER_A_KEEPALIVE => peer.keepalive = u16_at(payload, 0).unwrap_or_default(),
            WGPEER_A_ALLOWEDIPS => read_allowed(peer, payload),
            _ => {}
        }
    }
}

fn read_allowed(peer: &mut Peer, list: &[u8]) {
    let one = |entry: &[u8]| {
        let address = match find(entry, WGALLOWEDIP_A_IPADDR)? {
            bytes if bytes.len() == 4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
            bytes => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        };
        IpNet::new(address, *find(entry, WGALLOWEDIP_A_CIDR_MASK)?.first()?)
    };
    peer.allowed.extend(attributes(list).filter_map(|(_, entry)| one(entry)));
}

/// A key that is there: zeros are how the kernel says that there is none.
fn key(payload: &[u8]) -> Option<Key> {
    payload.try_into().ok().map(Key).filter(|key| *key != Key::NONE)
}

/// `sockaddr_in` or `sockaddr_in6`.
fn read_endpoint(payload: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(payload.get(2..4)?.try_into().ok()?);
    let address = match u16_at(payload, 0)? {
        AF_INET => IpAddr::from(<[u8; 4]>::try_from(payload.get(4..8)?).ok()?),
        AF_INET6 => IpAddr::from(<[u8; 16]>::try_from(payload.get(8..24)?).ok()?),
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

fn endpoint(endpoint: SocketAddr) -> Vec<u8> {
    let port = endpoint.port().to_be_bytes();
    match endpoint {
        SocketAddr::V4(v4) => [&AF_INET.to_ne_bytes()[..], &port, &v4.ip().octets(), &[0; 8]].concat(),
        SocketAddr::V6(v6) => {
            let scope = v6.scope_id().to_ne_bytes();
            [&AF_INET6.to_ne_bytes()[..], &port, &[0; 4], &v6.ip().octets(), &scope].concat()
        }
    }
}

/// A part of a peer that goes into one message.
struct Part<'a> {
    key: Key,
    flags: u32,
    /// Only in a peer's first part.
    change: Option<&'a PeerChange>,
    allowed: Vec<IpNet>,
}

/// The messages that carry changes out. Settings of the device go first, into a message of their own.
pub(super) fn set(family: u16, index: u32, changes: &[Change]) -> Vec<Message> {
    let begin = || generic(family, WG_CMD_SET_DEVICE).u32(WGDEVICE_A_IFINDEX, index);
    let mut own: Option<Message> = None;
    let mut parts = Vec::new();
    for change in changes {
        match change {
            Change::PrivateKey(key) => {
                own = Some(own.unwrap_or_else(begin).attr(WGDEVICE_A_PRIVATE_KEY, &key.0));
            }
            Change::Port(port) => own = Some(own.unwrap_or_else(begin).u16(WGDEVICE_A_LISTEN_PORT, *port)),
            Change::Remove(key) => {
                let flags = WGPEER_F_REMOVE_ME | WGPEER_F_UPDATE_ONLY;
                parts.push(Part { key: *key, flags, change: None, allowed: Vec::new() });
            }
            Change::Peer(key, change) => parts.extend(parts_of(*key, change)),
        }
    }
    let with_peers = parts.chunks(PARTS).map(|parts| {
        begin().nested(WGDEVICE_A_PEERS, |list| {
            parts.iter().fold(list, |list, part| list.nested(0, |peer| part.write(peer)))
        })
    });
    own.into_iter().chain(with_peers).collect()
}

fn parts_of(key: Key, change: &PeerChange) -> Vec<Part<'_>> {
    let allowed: Vec<IpNet> = change.allowed.iter().flatten().copied().collect();
    let mut chunks = allowed.chunks(ADDRESSES).map(<[IpNet]>::to_vec);
    let flags = if change.allowed.is_some() { WGPEER_F_REPLACE_ALLOWEDIPS } else { 0 };
    let first = Part { key, flags, change: Some(change), allowed: chunks.next().unwrap_or_default() };
    let others = chunks.map(|allowed| Part { key, flags: WGPEER_F_UPDATE_ONLY, change: None, allowed });
    std::iter::once(first).chain(others).collect()
}

impl Part<'_> {
    fn write(&self, peer: Message) -> Message {
        let mut peer = peer.attr(WGPEER_A_PUBLIC_KEY, &self.key.0).u32(WGPEER_A_FLAGS, self.flags);
        if let Some(change) = self.change {
            peer = peer
                .when(change.preshared, |peer, key| peer.attr(WGPEER_A_PRESHARED_KEY, &key.0))
                .when(change.endpoint, |peer, to| peer.attr(WGPEER_A_ENDPOINT, &endpoint(to)))
                .when(change.keepalive, |peer, seconds| peer.u16(WGPEER_A_KEEPALIVE, seconds));
        }
        if self.allowed.is_empty() {
            return peer;
        }
        peer.nested(WGPEER_A_ALLOWEDIPS, |list| {
            self.allowed.iter().fold(list, |list, range| list.nested(0, |entry| write_allowed(entry, *range)))
        })
    }
}

fn write_allowed(entry: Message, range: IpNet) -> Message {
    let (family, octets) = match range.network() {
        IpAddr::V4(v4) => (AF_INET, v4.octets().to_vec()),
        IpAddr::V6(v6) => (AF_INET6, Ipv6Addr::octets(&v6).to_vec()),
    };
    entry
        .u16(WGALLOWEDIP_A_FAMILY, family)
        .attr(WGALLOWEDIP_A_IPADDR, &octets)
        .u8(WGALLOWEDIP_A_CIDR_MASK, range.prefix_len())
}

/// A message of a generic family.
fn generic(family: u16, command: u8) -> Message {
    let version = if family == CONTROL { 2 } else { VERSION };
    Message::new(family, 0).header(&[command, version, 0, 0])
}

#[cfg(test)]
mod tests;
