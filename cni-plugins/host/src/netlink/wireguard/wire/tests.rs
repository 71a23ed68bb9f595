//! What is planned and encoded is carried out by a model of the kernel's side, which then has what was wanted.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{
    super::{Wanted, plan},
    *,
};
use crate::netlink::codec::{HEADER, messages, u32_at};

/// Carries out a WG_CMD_SET_DEVICE as drivers/net/wireguard/netlink.c does.
fn carry_out(device: &mut Device, message: &Message) {
    let bytes = message.finish(1, 0);
    assert!(bytes.len() < 1 << 16, "{} bytes", bytes.len());
    let (header, body) = messages(&bytes).next().expect("a whole message");
    assert_eq!((header.kind, &body[..2]), (FAMILY_ID, &[WG_CMD_SET_DEVICE, VERSION][..]));
    assert_eq!(bytes.len() - HEADER, body.len(), "one message");
    let body = &body[GENERIC_HEADER..];
    assert_eq!(find(body, WGDEVICE_A_IFINDEX).and_then(|index| u32_at(index, 0)), Some(INDEX));
    for (kind, payload) in attributes(body) {
        match kind {
            WGDEVICE_A_PRIVATE_KEY => device.private_key = key(payload),
            WGDEVICE_A_LISTEN_PORT => device.port = u16_at(payload, 0).unwrap(),
            WGDEVICE_A_PEERS => attributes(payload).for_each(|(_, peer)| carry_out_peer(device, peer)),
            _ => assert_eq!(kind, WGDEVICE_A_IFINDEX),
        }
    }
}

fn carry_out_peer(device: &mut Device, told: &[u8]) {
    let public_key = key(find(told, WGPEER_A_PUBLIC_KEY).unwrap()).unwrap();
    let flags = find(told, WGPEER_A_FLAGS).and_then(|flags| u32_at(flags, 0)).unwrap();
    if flags & WGPEER_F_REMOVE_ME != 0 {
        device.peers.remove(&public_key);
        return;
    }
    if flags & WGPEER_F_UPDATE_ONLY != 0 && !device.peers.contains_key(&public_key) {
        return;
    }
    // The trie of addresses is the device's: an address has one peer.
    let mut added = Peer::default();
    if let Some(list) = find(told, WGPEER_A_ALLOWEDIPS) {
        read_allowed(&mut added, list);
    }
    for other in device.peers.values_mut() {
        other.allowed.retain(|range| !added.allowed.contains(range));
    }
    let peer = device.peers.entry(public_key).or_default();
    if flags & WGPEER_F_REPLACE_ALLOWEDIPS != 0 {
        peer.allowed.clear();
    }
    peer.allowed.extend(added.allowed);
    if let Some(psk) = find(told, WGPEER_A_PRESHARED_KEY) {
        peer.preshared = key(psk);
    }
    if let Some(to) = find(told, WGPEER_A_ENDPOINT) {
        assert!(matches!(to.len(), 16 | 28), "a sockaddr of {} bytes", to.len());
        peer.endpoint = read_endpoint(to);
    }
    if let Some(seconds) = find(told, WGPEER_A_KEEPALIVE) {
        peer.keepalive = u16_at(seconds, 0).unwrap();
    }
}

/// What the kernel answers, `size` addresses of a peer in one message.
fn answers(device: &Device, size: usize) -> Vec<Vec<u8>> {
    let begin = || {
        generic(FAMILY_ID, WG_CMD_GET_DEVICE)
            .when(device.private_key, |message, key| message.attr(WGDEVICE_A_PRIVATE_KEY, &key.0))
            .u16(WGDEVICE_A_LISTEN_PORT, device.port)
    };
    let mut all = vec![begin()];
    for (public_key, peer) in &device.peers {
        let ranges: Vec<IpNet> = peer.allowed.iter().copied().collect();
        let empty = [Vec::new()];
        let chunks: Vec<Vec<IpNet>> = ranges.chunks(size).map(<[IpNet]>::to_vec).collect();
        let chunks = if chunks.is_empty() { &empty[..] } else { &chunks[..] };
        for (number, chunk) in chunks.iter().enumerate() {
            all.push(begin().nested(WGDEVICE_A_PEERS, |list| {
                list.nested(0, |mut told| {
                    told = told.attr(WGPEER_A_PUBLIC_KEY, &public_key.0);
                    if number == 0 {
                        told = told
                            .attr(WGPEER_A_PRESHARED_KEY, &peer.preshared.unwrap_or(Key::NONE).0)
                            .when(peer.endpoint, |told, to| told.attr(WGPEER_A_ENDPOINT, &endpoint(to)))
                            .u16(WGPEER_A_KEEPALIVE, peer.keepalive);
                    }
                    told.nested(WGPEER_A_ALLOWEDIPS, |list| {
                        chunk
                            .iter()
                            .fold(list, |list, range| list.nested(0, |entry| write_allowed(entry, *range)))
                    })
                })
            }));
        }
    }
    all.iter().map(|message| message.finish(1, 0)[HEADER..].to_vec()).collect()
}

const FAMILY_ID: u16 = 33;
const INDEX: u32 = 7;

/// Peers whose addresses do not overlap, as they are of one cluster: peer number → how it is.
fn peers() -> impl Strategy<Value = BTreeMap<Key, Peer>> {
    let peer = (any::<bool>(), 0_u8..3, 0_usize..5, 0_u8..3, 0_u16..3);
    proptest::collection::btree_map(1_u8..60, peer, 0..40).prop_map(|all| {
        all.into_iter()
            .map(|(number, (v6, port, size, psk, keepalive))| {
                let host = if v6 { format!("[2001:db8::{number}]") } else { format!("192.0.2.{number}") };
                let endpoint = (port > 0).then(|| format!("{host}:{port}").parse().unwrap());
                let size = [0, 1, 2, 127, 300][size];
                let v4 = (0..size).map(|low| format!("10.{number}.{}.{}/32", low / 256, low % 256));
                let more = (0..size / 100).map(|low| format!("fd00:{number}:{low}::/64"));
                let allowed = v4.chain(more).map(|text| text.parse().unwrap()).collect();
                let preshared = (psk > 0).then_some(Key([psk; 32]));
                (Key([number; 32]), Peer { endpoint, allowed, preshared, keepalive })
            })
            .collect()
    })
}

fn wanted() -> impl Strategy<Value = Wanted> {
    (1_u8..4, 1_u16..4, peers()).prop_map(|(key, port, peers)| Wanted {
        private_key: Key([key; 32]),
        port,
        peers,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_device_becomes_what_is_wanted(before in wanted(), after in wanted()) {
        let mut device = Device { index: INDEX, ..Device::default() };
        for step in [&before, &after] {
            for message in set(FAMILY_ID, INDEX, &plan(step, &device, None)) {
                carry_out(&mut device, &message);
            }
            let mut expected = step.peers.clone();
            for (key, peer) in &mut expected {
                // Without an address of its own a peer is where it was heard last.
                peer.endpoint = peer.endpoint.or_else(|| device.peers.get(key)?.endpoint);
            }
            prop_assert_eq!(&device.peers, &expected);
            prop_assert_eq!((device.private_key, device.port), (Some(step.private_key), step.port));
            prop_assert_eq!(plan(step, &device, None), vec![]);
        }
    }

    #[test]
    fn what_the_kernel_tells_in_pieces_is_put_together(all in wanted(), size in 1_usize..300) {
        let told = Device { private_key: Some(all.private_key), port: all.port, peers: all.peers, ..Device::default() };
        let mut device = Device::default();
        for body in answers(&told, size) {
            read(&mut device, &body);
        }
        prop_assert_eq!(device, told);
    }

    #[test]
    fn bytes_of_any_kind_are_read_without_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        read(&mut Device::default(), &body);
        let _ = read_family(&body);
    }
}

#[test]
fn an_address_moves_from_one_peer_to_another() {
    let range: IpNet = "10.1.0.0/24".parse().unwrap();
    let with = |number: u8| {
        let peer = |allowed: bool| Peer {
            allowed: allowed.then_some(range).into_iter().collect(),
            ..Peer::default()
        };
        let peers = (1..3).map(|other| (Key([other; 32]), peer(other == number))).collect();
        Wanted { private_key: Key([9; 32]), port: 1, peers }
    };
    let mut device = Device { index: INDEX, ..Device::default() };
    for number in [1, 2, 1] {
        for message in set(FAMILY_ID, INDEX, &plan(&with(number), &device, None)) {
            carry_out(&mut device, &message);
        }
        assert_eq!(device.peers, with(number).peers);
    }
}
