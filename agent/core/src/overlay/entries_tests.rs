//! Tables of nodes and the entries that lead to them.

use super::*;

fn desired<'p>(place: &Place, peers: impl IntoIterator<Item = &'p Peer>) -> (Entries, Vec<Problem>) {
    super::desired(place, &Host::default(), peers)
}

fn range(text: &str) -> Range {
    text.parse().unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn place(mode: Mode) -> Place {
    Place {
        node: "a".to_owned(),
        ranges: vec![range("10.244.0.0/24")],
        mode,
        direct_routing: false,
        underlay: 2,
        address: address("192.0.2.1"),
        subnets: vec![range("192.0.2.0/24"), range("2001:db8::/64")],
        tunnel: (mode != Mode::HostGw).then_some(Tunnel { index: 9, mtu: 1450 }),
        public_key: (mode == Mode::Wireguard).then(|| key('a')),
    }
}

/// A public key, told apart by its letter.
fn key(letter: char) -> String {
    format!("{}=", letter.to_string().repeat(43))
}

fn peer(number: u8, ranges: &[&str], addresses: &[&str]) -> Peer {
    Peer {
        name: format!("n{number}"),
        since: Some(i64::from(number)),
        unreadable: Vec::new(),
        ranges: ranges.iter().map(|text| range(text)).collect(),
        addresses: addresses.iter().map(|text| address(text)).collect(),
        mode: None,
        mac: Some(Mac([2, 0, 0, 0, 0, number])),
        public_key: None,
    }
}

#[test]
fn behind_the_tunnel_a_peer_has_one_route_and_neighbour_per_range_and_one_fdb_entry() {
    let peers = [
        peer(1, &["10.244.1.0/24", "fd00:1::/64"], &["192.0.2.2"]),
        peer(2, &["10.244.2.0/24"], &["198.51.100.7"]),
        Peer { name: "a".to_owned(), ..peer(3, &["10.244.0.0/24"], &["192.0.2.1"]) },
    ];
    let (entries, problems) = desired(&place(Mode::Vxlan), &peers);
    assert_eq!(problems, []);
    assert_eq!(entries.routes.len(), 3);
    assert_eq!(
        entries.routes[&range("fd00:1::/64")],
        Hop { via: address("fd00:1::"), device: 9, onlink: true, mtu: 1450 }
    );
    let mac = |number| Mac([2, 0, 0, 0, 0, number]);
    assert_eq!(
        entries.neighbours,
        BTreeMap::from([
            (address("10.244.1.0"), mac(1)),
            (address("fd00:1::"), mac(1)),
            (address("10.244.2.0"), mac(2))
        ])
    );
    let forwards = BTreeMap::from([(mac(1), address("192.0.2.2")), (mac(2), address("198.51.100.7"))]);
    assert_eq!(entries.forwards, forwards);
}

#[test]
fn direct_routing_leaves_the_tunnel_to_far_peers() {
    let peers = [peer(1, &["10.244.1.0/24"], &["192.0.2.2"]), peer(2, &["10.244.2.0/24"], &["198.51.100.7"])];
    let (entries, problems) = desired(&Place { direct_routing: true, ..place(Mode::Vxlan) }, &peers);
    assert_eq!(problems, []);
    let near = Hop { via: address("192.0.2.2"), device: 2, onlink: false, mtu: 0 };
    assert_eq!(entries.routes[&range("10.244.1.0/24")], near);
    assert_eq!(entries.routes[&range("10.244.2.0/24")].device, 9);
    assert_eq!((entries.neighbours.len(), entries.forwards.len()), (1, 1));
}

#[test]
fn without_a_tunnel_each_family_goes_through_the_peers_address_of_that_family() {
    let both = peer(1, &["10.244.1.0/24", "fd00:1::/64"], &["192.0.2.2", "2001:db8::2"]);
    let (entries, problems) = desired(&place(Mode::HostGw), [&both]);
    assert_eq!(problems, []);
    assert_eq!(entries.routes[&range("fd00:1::/64")].via, address("2001:db8::2"));
    assert!(entries.neighbours.is_empty() && entries.forwards.is_empty());
    let half = peer(1, &["10.244.1.0/24", "fd00:1::/64"], &["192.0.2.2"]);
    let (entries, problems) = desired(&place(Mode::HostGw), [&half]);
    assert_eq!(entries.routes.len(), 1);
    assert_eq!(problems, [Problem::Family { node: "n1".to_owned(), family: "IPv6" }]);
}

#[test]
fn what_cannot_be_reached_is_told() {
    let told = |mode, peer: Peer| {
        let (entries, problems) = desired(&place(mode), [&peer]);
        assert_eq!(entries, Entries::default());
        problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    let good = || peer(1, &["10.244.1.0/24"], &["192.0.2.2"]);
    assert!(told(Mode::Vxlan, Peer { mac: None, ..good() }).contains("keelson.io/vtep-mac"));
    let other = Peer { mode: Some("host-gw".to_owned()), ..good() };
    assert!(told(Mode::Vxlan, other).contains("mode host-gw, this one vxlan"));
    assert!(told(Mode::Vxlan, peer(1, &["10.244.1.0/24"], &["2001:db8::2"])).contains("no IPv4 address"));
    assert!(told(Mode::HostGw, peer(1, &["10.244.1.0/24"], &["198.51.100.7"])).contains("198.51.100.7"));
    let own = told(Mode::Vxlan, peer(1, &["10.244.0.0/16"], &["192.0.2.2"]));
    assert!(own.contains("10.244.0.0/24 of node a"), "{own}");
    assert_eq!(told(Mode::Vxlan, peer(1, &[], &["192.0.2.2"])), "", "no range yet");
}

#[test]
fn of_two_that_claim_the_same_the_older_one_keeps_it() {
    let one = peer(1, &["10.244.1.0/24"], &["192.0.2.2"]);
    let since = Some(2);
    let two = Peer { name: "n0".to_owned(), since, addresses: vec![address("192.0.2.3")], ..one.clone() };
    let (entries, problems) = desired(&place(Mode::Vxlan), [&two, &one]);
    assert_eq!(entries.forwards[&Mac([2, 0, 0, 0, 0, 1])], address("192.0.2.2"));
    assert!(matches!(&problems[..], [Problem::SameMac { node, .. }] if node == "n0"), "{problems:?}");
    let (_, problems) = desired(&place(Mode::HostGw), [&two, &one]);
    assert!(matches!(&problems[..], [Problem::Overlap { node, .. }] if node == "n0"), "{problems:?}");
}

#[test]
fn addresses_that_no_other_machine_has_are_told_and_not_used() {
    let told = |peers: &[Peer]| {
        let (entries, problems) = desired(&place(Mode::Vxlan), peers);
        (entries, problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    };
    for (wrong, word) in [
        ("0.0.0.0", "of one machine"),
        ("127.0.0.1", "of one machine"),
        ("224.0.0.1", "of one machine"),
        ("255.255.255.255", "of one machine"),
        ("240.0.0.1", "of one machine"),
        ("169.254.1.1", "on one link only"),
        ("fe80::7", "on one link only"),
        ("192.0.2.0", "the whole of 192.0.2.0/24"),
        ("192.0.2.255", "the whole of 192.0.2.0/24"),
        ("192.0.2.1", "this node's own"),
        ("10.244.0.7", "the pod range 10.244.0.0/24 of node a"),
    ] {
        let (entries, words) = told(&[peer(1, &["10.244.1.0/24"], &[wrong])]);
        assert_eq!(entries, Entries::default(), "{wrong}");
        assert!(words.contains(word), "{words}");
    }
    // The remnant of a node that has another name now must not cut it off.
    let both = [peer(1, &["10.244.1.0/24"], &["192.0.2.2"]), peer(2, &["10.244.2.0/24"], &["192.0.2.2"])];
    let (entries, words) = told(&both);
    assert_eq!(entries.routes.len(), 2);
    assert!(words.contains("as node n1 has"), "{words}");
    let unreadable = vec![(ADDRESSES, "all".to_owned()), (VTEP_MAC, "zz".to_owned())];
    let (entries, words) =
        told(&[Peer { mac: None, unreadable, ..peer(1, &["10.244.1.0/24"], &["192.0.2.2"]) }]);
    assert_eq!(entries, Entries::default());
    assert!(words.contains("\"all\"") && words.contains("\"zz\""), "{words}");
}

#[test]
fn a_range_takes_no_route_of_the_host_and_no_node_away() {
    let host = Host {
        routes: BTreeMap::from([(range("172.30.0.0/24"), "proto static".to_owned())]),
        gateways: BTreeSet::from([address("192.0.2.254")]),
    };
    let told = |peers: &[Peer]| {
        let (entries, problems) = super::desired(&place(Mode::Vxlan), &host, peers);
        let words: Vec<String> = problems.iter().map(ToString::to_string).collect();
        (entries.routes.into_keys().collect::<Vec<_>>(), words.join("; "))
    };
    for (wrong, word) in [
        ("172.30.0.0/24", "proto static"),
        ("192.0.2.0/24", "192.0.2.1, the address of node a"),
        ("192.0.2.2/31", "192.0.2.2, the address of node n1"),
        ("192.0.2.252/30", "the gateway 192.0.2.254"),
        ("2001:db8::/32", "2001:db8::/64, the subnet of the underlay"),
    ] {
        let (routes, words) = told(&[peer(1, &[wrong, "10.244.1.0/24"], &["192.0.2.2"])]);
        assert_eq!(routes, [range("10.244.1.0/24")], "{wrong}");
        assert!(words.contains(word), "{wrong}: {words}");
    }
    // A part of the subnet that no node uses is taken, but told.
    let (routes, words) = told(&[peer(1, &["192.0.2.128/26"], &["192.0.2.2"])]);
    assert_eq!(routes, [range("192.0.2.128/26")]);
    assert!(words.contains("lies in 192.0.2.0/24, the subnet of the underlay"), "{words}");
    // An older node keeps its address, a younger one is refused the range, and the other way around.
    let (routes, words) =
        told(&[peer(1, &["10.244.1.0/24"], &["10.9.0.7"]), peer(2, &["10.9.0.0/24"], &["192.0.2.3"])]);
    assert_eq!(
        (routes, words.contains("address of node n1")),
        (vec![range("10.244.1.0/24")], true),
        "{words}"
    );
    let (routes, words) =
        told(&[peer(2, &["10.244.1.0/24"], &["10.9.0.7"]), peer(1, &["10.9.0.0/24"], &["192.0.2.3"])]);
    assert_eq!(
        (routes, words.contains("pod range 10.9.0.0/24")),
        (vec![range("10.9.0.0/24")], true),
        "{words}"
    );
}

#[test]
fn behind_the_encrypted_tunnel_a_peer_has_a_key_and_a_route_per_range() {
    let with = |number: u8, letter: char, ranges: &[&str], addresses: &[&str]| Peer {
        public_key: Some(key(letter)),
        ..peer(number, ranges, addresses)
    };
    let peers = [
        with(1, 'b', &["10.244.1.0/24", "fd00:1::/64"], &["192.0.2.2"]),
        with(2, 'b', &["10.244.2.0/24"], &["192.0.2.3"]),
        with(3, 'a', &["10.244.3.0/24"], &["192.0.2.4"]),
        with(4, 'c', &["10.244.1.128/25"], &["192.0.2.5"]),
        peer(5, &["10.244.5.0/24"], &["192.0.2.6"]),
        Peer { public_key: Some("junk".to_owned()), ..peer(6, &["10.244.6.0/24"], &["192.0.2.7"]) },
        with(7, 'd', &["10.244.7.0/24"], &["2001:db8::7"]),
    ];
    // Not even with direct routing: the way around the tunnel would be in the clear.
    let here = Place { direct_routing: true, ..place(Mode::Wireguard) };
    let (entries, problems) = desired(&here, &peers);
    let v4 = Hop { via: address("0.0.0.0"), device: 9, onlink: false, mtu: 1450 };
    assert_eq!(
        entries.routes,
        BTreeMap::from([
            (range("10.244.1.0/24"), v4),
            (range("fd00:1::/64"), Hop { via: address("::"), ..v4 }),
        ])
    );
    let holder = KeyHolder {
        address: address("192.0.2.2"),
        ranges: vec![range("10.244.1.0/24"), range("fd00:1::/64")],
    };
    assert_eq!(entries.keys, BTreeMap::from([(key('b'), holder)]));
    assert!(entries.neighbours.is_empty() && entries.forwards.is_empty());
    let told: Vec<String> = problems.iter().map(ToString::to_string).collect();
    let words = ["key of node n1", "key of node a", "overlaps 10.244.1.0/24", PUBLIC_KEY, PUBLIC_KEY, "IPv4"];
    assert_eq!(told.len(), words.len(), "{told:?}");
    for word in words {
        assert!(told.iter().any(|text| text.contains(word)), "{word}: {told:?}");
    }
}
