//! From what a device is to what it should be, as changes that leave alone what is right.
//!
//! Pure. A peer that stays keeps its session; one that moved keeps the address at which it was heard last, unless what is
//! wanted has changed since: it may be behind a translation of addresses that nobody but the kernel knows.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use super::{Device, IpNet, Key, Peer, Wanted};

/// One change of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Another private key.
    PrivateKey(Key),
    /// Another UDP port.
    Port(u16),
    /// A peer goes, with its session.
    Remove(Key),
    /// A peer comes or changes.
    Peer(Key, PeerChange),
}

/// What changes of a peer; absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerChange {
    /// Where it is.
    pub endpoint: Option<SocketAddr>,
    /// All its addresses. An address that another peer had is taken from that one.
    pub allowed: Option<BTreeSet<IpNet>>,
    /// The second key; [`Key::NONE`] for none.
    pub preshared: Option<Key>,
    /// Seconds between keepalives; 0 for none.
    pub keepalive: Option<u16>,
}

/// The changes, in the order in which they are to be carried out. `last` is what was wanted when this was asked before,
/// where that is known.
pub fn plan(wanted: &Wanted, device: &Device, last: Option<&BTreeMap<Key, Peer>>) -> Vec<Change> {
    let mut changes = Vec::new();
    if device.private_key != Some(wanted.private_key) {
        changes.push(Change::PrivateKey(wanted.private_key));
    }
    if device.port != wanted.port {
        changes.push(Change::Port(wanted.port));
    }
    let gone = device.peers.keys().filter(|key| !wanted.peers.contains_key(*key));
    changes.extend(gone.map(|key| Change::Remove(*key)));
    for (key, peer) in &wanted.peers {
        let before = last.and_then(|last| last.get(key));
        let change = match device.peers.get(key) {
            None => whole(peer),
            Some(found) => difference(peer, found, before),
        };
        if !device.peers.contains_key(key) || change != PeerChange::default() {
            changes.push(Change::Peer(*key, change));
        }
    }
    changes
}

fn whole(peer: &Peer) -> PeerChange {
    PeerChange {
        endpoint: peer.endpoint,
        allowed: Some(peer.allowed.clone()),
        preshared: peer.preshared,
        keepalive: (peer.keepalive != 0).then_some(peer.keepalive),
    }
}

fn difference(peer: &Peer, found: &Peer, before: Option<&Peer>) -> PeerChange {
    let roamed = found.endpoint.is_some() && before.is_some_and(|before| before.endpoint == peer.endpoint);
    let endpoint = peer.endpoint.filter(|endpoint| found.endpoint != Some(*endpoint) && !roamed);
    let differs = peer.preshared.unwrap_or(Key::NONE) != found.preshared.unwrap_or(Key::NONE);
    PeerChange {
        endpoint,
        allowed: (peer.allowed != found.allowed).then(|| peer.allowed.clone()),
        preshared: differs.then(|| peer.preshared.unwrap_or(Key::NONE)),
        keepalive: (peer.keepalive != found.keepalive).then_some(peer.keepalive),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(endpoint: &str, allowed: &[&str]) -> Peer {
        let allowed = allowed.iter().map(|text| text.parse().unwrap()).collect();
        Peer { endpoint: Some(endpoint.parse().unwrap()), allowed, ..Peer::default() }
    }

    fn wanted(peers: &[(u8, Peer)]) -> Wanted {
        let peers = peers.iter().map(|(id, peer)| (Key([*id; 32]), peer.clone())).collect();
        Wanted { private_key: Key([9; 32]), port: 51820, peers }
    }

    fn device(wanted: &Wanted) -> Device {
        Device {
            private_key: Some(wanted.private_key),
            port: wanted.port,
            peers: wanted.peers.clone(),
            ..Device::default()
        }
    }

    #[test]
    fn what_is_right_is_left_alone() {
        let all = wanted(&[(1, peer("192.0.2.1:51820", &["10.1.0.0/24"])), (2, Peer::default())]);
        assert_eq!(plan(&all, &device(&all), None), []);
        assert_eq!(
            plan(&all, &Device::default(), None)[..2],
            [Change::PrivateKey(Key([9; 32])), Change::Port(51820)]
        );
    }

    #[test]
    fn a_peer_that_roamed_is_left_where_it_is_until_it_is_wanted_elsewhere() {
        let all = wanted(&[(1, peer("192.0.2.1:51820", &["10.1.0.0/24"]))]);
        let mut roamed = device(&all);
        let behind = "198.51.100.7:40000".parse().unwrap();
        roamed.peers.get_mut(&Key([1; 32])).unwrap().endpoint = Some(behind);
        assert_eq!(plan(&all, &roamed, Some(&all.peers)), []);
        let moved = wanted(&[(1, peer("192.0.2.9:51820", &["10.1.0.0/24"]))]);
        let to = |endpoint: &str| {
            let endpoint = Some(endpoint.parse().unwrap());
            [Change::Peer(Key([1; 32]), PeerChange { endpoint, ..PeerChange::default() })]
        };
        assert_eq!(plan(&moved, &roamed, Some(&all.peers)), to("192.0.2.9:51820"));
        // After a restart nobody knows what was wanted; a packet of the peer corrects what is wrong now.
        assert_eq!(plan(&all, &roamed, None), to("192.0.2.1:51820"));
    }

    #[test]
    fn peers_go_before_others_get_their_addresses() {
        let old = wanted(&[(3, peer("192.0.2.3:1", &["10.1.0.0/24"]))]);
        let new = wanted(&[(1, peer("192.0.2.1:1", &["10.1.0.0/24"]))]);
        let changes = plan(&new, &device(&old), Some(&old.peers));
        assert_eq!(changes[0], Change::Remove(Key([3; 32])));
        assert!(matches!(&changes[1], Change::Peer(key, _) if *key == Key([1; 32])));
    }

    #[test]
    fn a_second_key_comes_and_goes() {
        let plain = wanted(&[(1, Peer::default())]);
        let secret = Key([5; 32]);
        let both = wanted(&[(1, Peer { preshared: Some(secret), keepalive: 25, ..Peer::default() })]);
        let set = |preshared, keepalive| {
            let change = PeerChange {
                preshared: Some(preshared),
                keepalive: Some(keepalive),
                ..PeerChange::default()
            };
            [Change::Peer(Key([1; 32]), change)]
        };
        assert_eq!(plan(&both, &device(&plain), None), set(secret, 25));
        assert_eq!(plan(&plain, &device(&both), None), set(Key::NONE, 0));
    }
}
