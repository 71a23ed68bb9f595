//! The encrypted tunnel between two nodes, on a kernel that has WireGuard; elsewhere that it is refused with the reason.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod ground;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use cni_plugins_host::{
    netlink::wireguard::{
        Key, Peer, WireGuard, WireGuardError,
        tunnel::{self, Tunnel, TunnelError, Up},
    },
    netns,
};
use ground::{Ground, seen, wait_for};

const DEVICE: &str = "kltestwg0";
const PORT: u16 = 51820;

/// One end: its namespace, its underlay address, its range.
struct Node {
    netns: PathBuf,
    underlay: IpAddr,
    number: u8,
    key_file: PathBuf,
}

impl Node {
    fn tunnel(&self) -> Tunnel {
        Tunnel {
            name: DEVICE.to_owned(),
            port: PORT,
            mtu: 1420,
            addresses: vec![self.inner(false), self.inner(true)],
            key_file: self.key_file.clone(),
        }
    }

    /// Its address in the tunnel.
    fn inner(&self, v6: bool) -> IpAddr {
        let number = self.number;
        let text = if v6 { format!("fd44:{number}::") } else { format!("10.44.{number}.0") };
        text.parse().unwrap()
    }

    fn ensure(&self, tunnel: &Tunnel) -> Result<Up, TunnelError> {
        netns::run_in(&self.netns, || tunnel.ensure()).unwrap()
    }

    fn set_peers(&self, up: Up, peers: &BTreeMap<Key, Peer>) -> usize {
        netns::run_in(&self.netns, || tunnel::set_peers(up.index, peers, None)).unwrap().unwrap()
    }

    /// How the other end knows it.
    fn as_peer(&self, up: Up, port: u16) -> BTreeMap<Key, Peer> {
        let ranges = [format!("10.44.{}.0/24", self.number), format!("fd44:{}::/64", self.number)];
        let peer = Peer {
            endpoint: Some(SocketAddr::new(self.underlay, port)),
            allowed: ranges.iter().map(|text| text.parse().unwrap()).collect(),
            ..Peer::default()
        };
        BTreeMap::from([(up.public_key, peer)])
    }
}

fn reaches(from: &Path, to: SocketAddr) -> bool {
    netns::run_in(from, || TcpStream::connect_timeout(&to, Duration::from_millis(500)).is_ok()).unwrap()
}

#[test]
fn two_nodes_reach_each_other_through_an_encrypted_tunnel() {
    let ground = Ground::new();
    let other = ground.outside();
    let node = |netns: &Path, underlay: &str, number: u8| Node {
        netns: netns.to_owned(),
        underlay: underlay.parse().unwrap(),
        number,
        key_file: ground.dir().join(format!("wireguard-{number}.key")),
    };
    let (one, two) = (node(&ground.host, "192.0.2.1", 1), node(&other, "2001:db8::2", 2));
    let first = match one.ensure(&one.tunnel()) {
        Err(TunnelError::Device(WireGuardError::Unsupported)) => {
            let told = TunnelError::Device(WireGuardError::Unsupported).to_string();
            assert!(told.contains("this kernel has no WireGuard"), "{told}");
            assert!(one.key_file.exists(), "the key is there before the device");
            assert_eq!(ground.inside(&ground.host, "ip -o link show type wireguard"), "");
            eprintln!("skipped: {told}; run by `cargo xtask test vm-light`");
            return;
        }
        first => first.unwrap(),
    };
    let second = two.ensure(&two.tunnel()).unwrap();
    assert_ne!(first.public_key, second.public_key);
    assert_eq!(one.ensure(&one.tunnel()).unwrap(), first, "made again: nothing changes");
    // One end is reached over IPv6, the other over IPv4: the tunnel does not care.
    let two_v4 = Node {
        underlay: "192.0.2.2".parse().unwrap(),
        netns: two.netns.clone(),
        key_file: two.key_file.clone(),
        ..two
    };
    let (to_two, to_one) = (two_v4.as_peer(second, PORT), one.as_peer(first, PORT));
    assert_eq!(one.set_peers(first, &to_two), 1);
    assert_eq!(one.set_peers(first, &to_two), 0);
    assert_eq!(two_v4.set_peers(second, &to_one), 1);
    ground.inside(&one.netns, &format!("ip route add 10.44.2.0/24 dev {DEVICE}"));
    ground.inside(&one.netns, &format!("ip route add fd44:2::/64 dev {DEVICE}"));
    ground.inside(&two_v4.netns, &format!("ip route add 10.44.1.0/24 dev {DEVICE}"));
    ground.inside(&two_v4.netns, &format!("ip route add fd44:1::/64 dev {DEVICE}"));
    for v6 in [false, true] {
        let target = SocketAddr::new(two_v4.inner(v6), 7000);
        assert_eq!(seen(&one.netns, &two_v4.netns, 7000, target), one.inner(v6));
    }

    // A peer removed by hand is found missing, and comes back.
    netns::run_in(&one.netns, || {
        let mut wireguard = WireGuard::open().unwrap();
        assert_eq!(wireguard.device(first.index).unwrap().unwrap().peers.len(), 1);
        assert_eq!(tunnel::set_peers(first.index, &BTreeMap::new(), None).unwrap(), 1);
        assert!(wireguard.device(first.index).unwrap().unwrap().peers.is_empty());
    })
    .unwrap();
    assert!(!reaches(&one.netns, SocketAddr::new(two_v4.inner(false), 7000)));
    assert_eq!(one.set_peers(first, &to_two), 1);
    assert_eq!(
        seen(&one.netns, &two_v4.netns, 7000, SocketAddr::new(two_v4.inner(false), 7000)),
        one.inner(false)
    );

    // The other node is made anew: another key, which the peers learn.
    netns::run_in(&two_v4.netns, || assert!(tunnel::remove(DEVICE).unwrap())).unwrap();
    tunnel::forget_key(&two_v4.key_file).unwrap();
    let again = two_v4.ensure(&Tunnel { port: PORT + 1, mtu: 1380, ..two_v4.tunnel() }).unwrap();
    assert_ne!(again.public_key, second.public_key);
    two_v4.set_peers(again, &to_one);
    ground.inside(&two_v4.netns, &format!("ip route add 10.44.1.0/24 dev {DEVICE}"));
    assert_eq!(
        one.set_peers(first, &two_v4.as_peer(again, PORT + 1)),
        2,
        "the old key goes, the new one comes"
    );
    assert_eq!(
        seen(&one.netns, &two_v4.netns, 7000, SocketAddr::new(two_v4.inner(false), 7000)),
        one.inner(false)
    );
    let shown = ground.inside(&two_v4.netns, &format!("ip -o link show {DEVICE}"));
    assert!(shown.contains("mtu 1380"), "{shown}");
}

#[test]
fn what_is_in_the_way_is_named() {
    let ground = Ground::new();
    let node = Node {
        netns: ground.host.clone(),
        underlay: "192.0.2.1".parse().unwrap(),
        number: 1,
        key_file: ground.dir().join("wireguard.key"),
    };
    ground.inside(&ground.host, &format!("ip link add {DEVICE} type bridge"));
    let told = node.ensure(&node.tunnel()).unwrap_err();
    assert!(matches!(told, TunnelError::NotOurs(_)), "{told:?}");
    netns::run_in(&ground.host, || assert!(!tunnel::remove(DEVICE).unwrap(), "a link of others")).unwrap();
    ground.inside(&ground.host, &format!("ip link del {DEVICE}"));
    std::fs::write(&node.key_file, "nonsense").unwrap();
    let told = node.ensure(&node.tunnel()).unwrap_err();
    assert!(matches!(told, TunnelError::Key(_)), "{told:?}");
    tunnel::forget_key(&node.key_file).unwrap();
    let _taken =
        netns::run_in(&ground.host, || std::net::UdpSocket::bind(("0.0.0.0", PORT)).unwrap()).unwrap();
    match node.ensure(&node.tunnel()).unwrap_err() {
        TunnelError::Port(port) => assert_eq!(port, PORT),
        TunnelError::Device(WireGuardError::Unsupported) => {
            eprintln!("skipped: this kernel has no WireGuard");
        }
        other => panic!("{other:?}"),
    }
    netns::run_in(&ground.host, || tunnel::remove(DEVICE).unwrap()).unwrap();
    wait_for("no link", || !ground.inside(&ground.host, "ip -o link").contains(DEVICE));
}
