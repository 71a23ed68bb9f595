//! Masquerade and host ports by nftables, on a real kernel. What any port map must do is checked by
//! `cargo xtask conformance cni`; here is what only ours has.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod ground;

use std::{collections::BTreeMap, net::IpAddr};

use ground::{Ground, Pod, address, seen};
use serde_json::{Value, json};

fn at(address: &str, port: u16) -> std::net::SocketAddr {
    std::net::SocketAddr::new(address.parse().unwrap(), port)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn masquerade(ground: &Ground, except: &[&str]) -> Vec<Value> {
    let masquerade = ground.plugin("keelson-masquerade", &json!({"ipMasqExcept": except}));
    vec![ground.bridge(), masquerade]
}

fn ports(ground: &Ground, mappings: &Value) -> Vec<Value> {
    let portmap = ground.plugin("keelson-portmap", &json!({"runtimeConfig": {"portMappings": mappings}}));
    vec![ground.bridge(), portmap]
}

#[test]
fn what_leaves_has_the_hosts_address_and_exceptions_see_the_pods() {
    let ground = Ground::new();
    let node = ground.outside();
    // No way back to the pods: an answer comes only to what was masqueraded, or by these routes.
    let pod = ground.pod("c1");
    let chain = masquerade(&ground, &[]);
    ground.add(&chain, &pod);
    assert_eq!(seen(&pod.netns, &node, 7000, at("192.0.2.2", 7000)), ip("192.0.2.1"));
    assert_eq!(seen(&pod.netns, &node, 7000, at("2001:db8::2", 7000)), ip("2001:db8::1"));
    assert_eq!(ground.elements(), BTreeMap::from([("masq4".to_owned(), 1), ("masq6".to_owned(), 1)]));
    ground.del(&chain, &pod);
    assert_eq!(ground.elements(), BTreeMap::new());

    let other = ground.pod("c2");
    let chain = masquerade(&ground, &["192.0.2.0/25", "2001:db8::/32"]);
    let result = ground.add(&chain, &other);
    ground.inside(&node, "ip route add 10.88.0.0/29 via 192.0.2.1");
    ground.inside(&node, "ip route add fd88::/125 via 2001:db8::1");
    assert_eq!(seen(&other.netns, &node, 7000, at("192.0.2.2", 7000)), address(&result, 0));
    assert_eq!(seen(&other.netns, &node, 7000, at("2001:db8::2", 7000)), address(&result, 1));
}

#[test]
fn neighbours_and_the_host_see_the_pods_own_address() {
    let ground = Ground::new();
    let (pod, neighbour) = (ground.pod("c1"), ground.pod("c2"));
    let chain = masquerade(&ground, &[]);
    let result = ground.add(&chain, &pod);
    let second = ground.add(&chain, &neighbour);
    let target = std::net::SocketAddr::new(address(&second, 0), 7000);
    assert_eq!(seen(&pod.netns, &neighbour.netns, 7000, target), address(&result, 0));
    assert_eq!(seen(&pod.netns, &ground.host, 7000, at("10.88.0.1", 7000)), address(&result, 0));
}

#[test]
fn masquerade_is_checked_collected_and_taken_over() {
    let ground = Ground::new();
    let chain = masquerade(&ground, &["10.0.0.0/8"]);
    let (kept, stale) = (ground.pod("kept"), ground.pod("stale"));
    let result = ground.add(&chain, &kept);
    let gone = ground.add(&chain, &stale);
    let check =
        |pod: &Pod, result: &Value| ground.ask(&ground::with_result(&chain[1], result), "CHECK", Some(pod));
    check(&kept, &result).unwrap();
    ground.gc(&chain, &[&kept]);
    check(&kept, &result).unwrap();
    let refused = check(&stale, &gone).unwrap_err();
    assert_eq!(refused["code"], 102, "{refused}");
    assert_eq!(ground.elements(), BTreeMap::from([("masq4".to_owned(), 1), ("masq6".to_owned(), 1)]));

    // An element that an earlier owner of the address left is the new owner's, whose DEL takes it.
    let heir = ground.pod("heir");
    ground.ask(&ground::with_result(&chain[1], &result), "ADD", Some(&heir)).unwrap();
    ground.ask(&chain[1], "DEL", Some(&kept)).unwrap();
    assert_eq!(ground.elements().get("masq4"), Some(&1), "the DEL of the earlier owner took it");
    ground.ask(&chain[1], "DEL", Some(&heir)).unwrap();
    assert_eq!(ground.elements(), BTreeMap::new());
    let refused = check(&kept, &result).unwrap_err();
    assert_eq!(refused["code"], 102, "{refused}");
}

/// Names of the chains that hold exclusions.
fn exclusions(ground: &Ground) -> Vec<String> {
    let text = ground.inside(&ground.host, "nft list chains inet");
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("chain "));
    names
        .filter(|name| name.starts_with("masq"))
        .map(|name| name.split(' ').next().unwrap().to_owned())
        .collect()
}

#[test]
fn exclusions_go_with_the_last_pod_that_has_them() {
    let ground = Ground::new();
    let (first, second, killed) = (ground.pod("c1"), ground.pod("c2"), ground.pod("c3"));
    let chain = masquerade(&ground, &["10.0.0.0/8"]);
    ground.add(&chain, &first);
    ground.add(&chain, &second);
    let both = exclusions(&ground);
    assert_eq!(both.len(), 2, "one of each family: {both:?}");
    ground.del(&chain, &first);
    assert_eq!(exclusions(&ground), both, "the other pod has lost its exclusions");
    // An edited list has other chains, which go by themselves.
    let edited = masquerade(&ground, &["10.0.0.0/8", "172.16.0.0/12"]);
    ground.add(&edited, &killed);
    assert_eq!(exclusions(&ground).len(), 3, "IPv6 has the same exclusions in both");
    ground.gc(&edited, &[&second]);
    assert_eq!(exclusions(&ground), both);
    ground.del(&chain, &second);
    assert_eq!(exclusions(&ground), Vec::<String>::new());
    // What an earlier version left.
    ground.inside(&ground.host, "nft add chain inet keelson_cni masq4_0123456789abcdef");
    ground.gc(&chain, &[]);
    assert_eq!(exclusions(&ground), Vec::<String>::new());
    assert_eq!(ground.records(), Vec::<String>::new());
}

#[test]
fn masquerade_flushed_by_others_comes_back_with_gc() {
    let ground = Ground::new();
    let node = ground.outside();
    let (pod, stale) = (ground.pod("c1"), ground.pod("c2"));
    for chain in [masquerade(&ground, &[]), {
        let mut bridge = ground.bridge();
        bridge["ipMasq"] = json!(true);
        vec![bridge]
    }] {
        let result = ground.add(&chain, &pod);
        ground.add(&chain, &stale);
        ground.inside(&ground.host, "nft flush ruleset");
        ground.gc(&chain, &[&pod]);
        assert_eq!(seen(&pod.netns, &node, 7000, at("192.0.2.2", 7000)), ip("192.0.2.1"));
        assert_eq!(seen(&pod.netns, &node, 7000, at("2001:db8::2", 7000)), ip("2001:db8::1"));
        let last = chain.last().unwrap();
        ground.ask(&ground::with_result(last, &result), "CHECK", Some(&pod)).unwrap();
        let held = BTreeMap::from([("masq4".to_owned(), 1), ("masq6".to_owned(), 1)]);
        assert_eq!(ground.elements(), held, "the stale pod's are not brought back");
        assert_eq!(ground.records().len(), 1, "nor is its record kept: {:?}", ground.records());
        ground.del(&chain, &pod);
        ground.del(&chain, &stale);
        assert_eq!(ground.records(), Vec::<String>::new());
    }
}

#[test]
fn keys_in_any_case_map_ports() {
    let ground = Ground::new();
    let node = ground.outside();
    let pod = ground.pod("c1");
    // As containerd writes them.
    let chain =
        ports(&ground, &json!([{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}]));
    ground.add(&chain, &pod);
    assert_eq!(seen(&node, &pod.netns, 80, at("192.0.2.1", 8080)), ip("192.0.2.2"));
}

#[test]
fn a_bad_exception_is_named() {
    let ground = Ground::new();
    let config = ground.plugin("keelson-masquerade", &json!({"ipMasqExcept": ["10.0.0.0"]}));
    let refused = ground.ask(&config, "STATUS", None).unwrap_err();
    assert_eq!(refused["code"], 7, "{refused}");
    assert!(refused["msg"].as_str().unwrap().contains("10.0.0.0"), "{refused}");
}

#[test]
fn a_range_of_ports_is_mapped_one_to_one_and_goes_whole() {
    let ground = Ground::new();
    let node = ground.outside();
    let pod = ground.pod("c1");
    let chain = ports(&ground, &json!([{"hostPort": 20000, "containerPort": 30000, "range": 2000}]));
    ground.add(&chain, &pod);
    for offset in [0, 1, 999, 1999] {
        assert_eq!(seen(&node, &pod.netns, 30000 + offset, at("192.0.2.1", 20000 + offset)), ip("192.0.2.2"));
    }
    let elements = ground.elements();
    assert_eq!((elements["map4"], elements["map6"], elements["ports"]), (2000, 2000, 2000));
    // A single port in the middle is taken.
    let other = ground.pod("c2");
    let result = ground.add(&chain[..1], &other);
    let mut single = chain[1].clone();
    single["runtimeConfig"]["portMappings"] = json!([{"hostPort": 20999, "containerPort": 80}]);
    let refused = ground.ask(&ground::with_result(&single, &result), "ADD", Some(&other)).unwrap_err();
    let told = refused["msg"].as_str().unwrap();
    assert!(told.contains("20999/tcp") && told.contains("container c1"), "{told}");
    ground.del(&chain, &pod);
    assert_eq!(ground.elements(), BTreeMap::new());
    assert_eq!(ground.records(), Vec::<String>::new());
}

#[test]
fn the_node_has_the_address_behind_ipv6_loopback_ports_only_while_a_pod_has_one() {
    let ground = Ground::new();
    let has_it =
        || ground.inside(&ground.host, "ip -6 route show table local").contains("fd6b:656c:736f:6e00::1");
    let (first, second) = (ground.pod("c1"), ground.pod("c2"));
    let chain = |port: u16, host: &str| {
        ports(&ground, &json!([{"hostPort": port, "containerPort": 80, "hostIP": host}]))
    };
    let (everywhere, elsewhere) = (chain(8080, ""), chain(8081, "192.0.2.1"));
    ground.add(&everywhere, &first);
    ground.add(&elsewhere, &second);
    assert!(has_it());
    ground.del(&everywhere, &first);
    assert!(!has_it(), "the last port that serves ::1 has gone");
    ground.add(&everywhere, &first);
    assert!(has_it());
    ground.gc(&everywhere, &[&second]);
    assert!(!has_it(), "also by GC");
    ground.del(&elsewhere, &second);
}

#[test]
fn opening_127_0_0_1_for_host_ports_opens_nothing_else_to_the_pods() {
    let ground = Ground::new();
    let pod = ground.pod("c1");
    let chain = ports(&ground, &json!([{"hostPort": 8080, "containerPort": 80}]));
    ground.add(&chain, &pod);
    assert_eq!(seen(&ground.host, &pod.netns, 80, at("127.0.0.1", 8080)), ip("10.88.0.1"));
    // A service that the host has on 127.0.0.1 only, and a pod that routes that address to the host.
    ground.inside(&pod.netns, "sysctl -qw net.ipv4.conf.all.route_localnet=1");
    ground.inside(&pod.netns, "ip addr del 127.0.0.1/8 dev lo");
    ground.inside(&pod.netns, "ip route flush table local 127.0.0.0/8");
    ground.inside(&pod.netns, "ip route add 127.0.0.1/32 via 10.88.0.1");
    let listener = cni_plugins_host::netns::run_in(&ground.host, || {
        std::net::TcpListener::bind("127.0.0.1:7000").unwrap()
    })
    .unwrap();
    let reached = cni_plugins_host::netns::run_in(&pod.netns, || {
        std::net::TcpStream::connect_timeout(&at("127.0.0.1", 7000), std::time::Duration::from_secs(1))
            .is_ok()
    })
    .unwrap();
    drop(listener);
    assert!(!reached, "a pod reaches what the host serves on 127.0.0.1");
}

#[test]
fn rules_deleted_by_hand_come_back_with_gc_and_with_the_next_add() {
    let ground = Ground::new();
    let node = ground.outside();
    let (first, second) = (ground.pod("c1"), ground.pod("c2"));
    let chain = ports(&ground, &json!([{"hostPort": 8080, "containerPort": 80}]));
    ground.add(&chain, &first);
    ground.inside(&ground.host, "nft flush ruleset");
    ground.gc(&chain, &[&first]);
    assert_eq!(seen(&node, &first.netns, 80, at("192.0.2.1", 8080)), ip("192.0.2.2"));
    ground.inside(&ground.host, "nft flush ruleset");
    let other = ports(&ground, &json!([{"hostPort": 8081, "containerPort": 80}]));
    ground.add(&other, &second);
    assert_eq!(seen(&node, &second.netns, 80, at("192.0.2.1", 8081)), ip("192.0.2.2"));
    ground.del(&chain, &first);
    assert_eq!(seen(&node, &second.netns, 80, at("192.0.2.1", 8081)), ip("192.0.2.2"));
}

#[test]
fn networks_of_two_state_directories_leave_each_others_ports_alone() {
    let ground = Ground::new();
    let node = ground.outside();
    let (first, second) = (ground.pod("c1"), ground.pod("c2"));
    let one = ports(&ground, &json!([{"hostPort": 8080, "containerPort": 80, "hostIP": "192.0.2.1"}]));
    let elsewhere = |mappings: &Value| {
        let mut chain = ports(&ground, mappings);
        for plugin in &mut chain {
            plugin["name"] = json!("other");
        }
        chain[0]["bridge"] = json!("kgr1");
        chain[0]["ipam"]["ranges"] = json!([[{"subnet": "10.89.0.0/29"}]]);
        chain[1]["stateDir"] = json!(ground.dir().join("run/other"));
        chain
    };
    let two = elsewhere(&json!([
        {"hostPort": 8081, "containerPort": 81}, {"hostPort": 8080, "containerPort": 81, "hostIP": "192.0.2.9"}]));
    ground.add(&one, &first);
    let result = ground.add(&two[..1], &second);
    // What one has, the other does not get, and does not take away by trying.
    let mut taken =
        elsewhere(&json!([{"hostPort": 8080, "containerPort": 81, "hostIP": "192.0.2.1"}])).remove(1);
    taken = ground::with_result(&taken, &result);
    let refused = ground.ask(&taken, "ADD", Some(&second)).unwrap_err();
    assert_eq!(refused["code"], 104, "{refused}");
    assert_eq!(seen(&node, &first.netns, 80, at("192.0.2.1", 8080)), ip("192.0.2.2"));
    ground.ask(&ground::with_result(&two[1], &result), "ADD", Some(&second)).unwrap();
    ground.gc(&one, &[&first]);
    ground.gc(&two, &[&second]);
    assert_eq!(seen(&node, &first.netns, 80, at("192.0.2.1", 8080)), ip("192.0.2.2"));
    assert_eq!(seen(&node, &second.netns, 81, at("192.0.2.1", 8081)), ip("192.0.2.2"));
    // The port number that both have on different addresses stays while one of them needs it.
    ground.gc(&two, &[]);
    assert_eq!(seen(&node, &first.netns, 80, at("192.0.2.1", 8080)), ip("192.0.2.2"));
    ground.del(&one, &first);
    assert_eq!(ground.elements(), BTreeMap::new());
}
