//! The few translations a datagram socket remembers.

use ebpf_common::{DATAGRAM_PEERS, DatagramPeers, NetAddr, NetPort, Peer};

/// The translation whose frontend is this address: what the socket used last for it.
#[inline(always)]
pub fn find_by_frontend<'p>(peers: &'p DatagramPeers, addr: &NetAddr, port: NetPort) -> Option<&'p Peer> {
    let mut index = 0;
    while index < DATAGRAM_PEERS {
        let peer = &peers.peers[index];
        if peer.backend_port.0 != 0 && peer.frontend_port == port && peer.frontend == *addr {
            return Some(peer);
        }
        index += 1;
    }
    None
}

/// The translation whose backend is this address: where a reply really came from.
#[inline(always)]
pub fn find_by_backend<'p>(peers: &'p DatagramPeers, addr: &NetAddr, port: NetPort) -> Option<&'p Peer> {
    let mut index = 0;
    while index < DATAGRAM_PEERS {
        let peer = &peers.peers[index];
        if peer.backend_port == port && peer.backend_port.0 != 0 && peer.backend == *addr {
            return Some(peer);
        }
        index += 1;
    }
    None
}

/// Notes a translation, in place of the same frontend's or the same backend's last one, else of the oldest.
#[inline(always)]
pub fn remember(peers: &mut DatagramPeers, peer: &Peer) {
    let mut index = 0;
    while index < DATAGRAM_PEERS {
        let known = &mut peers.peers[index];
        let same_frontend = known.frontend_port == peer.frontend_port && known.frontend == peer.frontend;
        let same_backend = known.backend_port == peer.backend_port && known.backend == peer.backend;
        if same_frontend || same_backend {
            *known = *peer;
            return;
        }
        index += 1;
    }
    // The remainder keeps the index in bounds whatever the stored value is.
    peers.peers[peers.next as usize % DATAGRAM_PEERS] = *peer;
    peers.next = peers.next.wrapping_add(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(frontend: u8, backend: u8) -> Peer {
        Peer {
            frontend: NetAddr::from_v4_word(u32::from_ne_bytes([10, 96, 0, frontend])),
            backend: NetAddr::from_v4_word(u32::from_ne_bytes([10, 244, 0, backend])),
            frontend_port: NetPort::from_host(53),
            backend_port: NetPort::from_host(5353),
            backend_id: u32::from(backend),
        }
    }

    #[test]
    fn a_reply_is_traced_to_the_frontend_that_was_dialled() {
        let mut peers = DatagramPeers::default();
        for n in 1..=4 {
            remember(&mut peers, &peer(n, 100 + n));
        }
        for n in 1..=4 {
            let p = peer(n, 100 + n);
            assert_eq!(find_by_backend(&peers, &p.backend, p.backend_port), Some(&p));
            assert_eq!(find_by_frontend(&peers, &p.frontend, p.frontend_port), Some(&p));
        }
    }

    #[test]
    fn a_fifth_frontend_replaces_the_oldest_and_no_other() {
        let mut peers = DatagramPeers::default();
        for n in 1..=5 {
            remember(&mut peers, &peer(n, 100 + n));
        }
        assert_eq!(find_by_frontend(&peers, &peer(1, 101).frontend, NetPort::from_host(53)), None);
        for n in 2..=5 {
            assert!(find_by_frontend(&peers, &peer(n, 0).frontend, NetPort::from_host(53)).is_some());
        }
    }

    #[test]
    fn a_frontend_healed_to_a_new_backend_keeps_one_entry() {
        let mut peers = DatagramPeers::default();
        remember(&mut peers, &peer(1, 101));
        remember(&mut peers, &peer(1, 102));
        assert_eq!(find_by_backend(&peers, &peer(1, 101).backend, NetPort::from_host(5353)), None);
        assert!(find_by_backend(&peers, &peer(1, 102).backend, NetPort::from_host(5353)).is_some());
    }

    #[test]
    fn empty_entries_match_nothing() {
        let peers = DatagramPeers::default();
        assert_eq!(find_by_backend(&peers, &NetAddr::ANY_V6, NetPort(0)), None);
        assert_eq!(find_by_frontend(&peers, &NetAddr::ANY_V6, NetPort(0)), None);
    }
}
