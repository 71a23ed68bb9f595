//! The network between nodes on the real kernel: namespaces as nodes and pods, a pretended API server between their roles.
#![allow(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

mod lab;
mod slow;

use std::net::IpAddr;

use lab::{Lab, Node, eventually, ip, talk};

/// Pods of both families reach each other through the tunnel, and see each other's own addresses.
fn all_reach_all(lab: &Lab, nodes: &[&Node]) {
    for from in nodes {
        for to in nodes.iter().filter(|to| to.number != from.number) {
            for address in &to.pod_addresses {
                let own = from.pod_addresses.iter().find(|own| own.is_ipv4() == address.is_ipv4()).unwrap();
                let what = format!("pod of node {} → {address}", from.number);
                eventually(&what, || {
                    let seen = talk(&from.pod, &to.pod, *address)?;
                    if seen == *own { Ok(()) } else { Err(format!("seen as {seen} instead of {own}")) }
                });
            }
        }
    }
    lab.check_alive();
}

fn entries(node: &Node) -> String {
    let routes = ip(&node.netns, &["route", "show", "proto", "76"]);
    let routes6 = ip(&node.netns, &["-6", "route", "show", "proto", "76"]);
    let neighbours = ip(&node.netns, &["-4", "neigh", "show", "nud", "permanent"]);
    let neighbours6 = ip(&node.netns, &["-6", "neigh", "show", "nud", "permanent"]);
    let forwards = lab::run(&node.netns, "bridge", &["fdb", "show", "dev", "kl-vxlan"]).unwrap_or_default();
    let mut lines: Vec<String> = [routes, routes6, neighbours, neighbours6, forwards]
        .iter()
        .flat_map(|text| text.lines())
        .map(|line| line.trim().replace("  ", " "))
        .collect();
    lines.sort();
    lines.join("\n")
}

#[track_caller]
fn back(node: &Node, before: &str, what: &str) {
    eventually(what, || {
        let now = entries(node);
        if now == before { Ok(()) } else { Err(format!("{now}\ninstead of\n{before}")) }
    });
}

#[test]
fn tunnel_of_three_nodes_heals_and_follows() {
    let lab = Lab::new(3, "mode: vxlan", false);
    let nodes: Vec<&Node> = lab.nodes.iter().collect();
    all_reach_all(&lab, &nodes);
    // The node itself reaches pods of others, too.
    eventually("node → pod", || talk(&nodes[0].netns, &nodes[1].pod, nodes[1].pod_addresses[0]).map(drop));

    // What somebody removes comes back.
    let (node, before) = (nodes[0], entries(nodes[0]));
    assert_eq!(
        before.matches("kl-vxlan").count(),
        8,
        "two ranges of two peers, route and neighbour: {before}"
    );
    ip(&node.netns, &["route", "del", "10.244.2.0/24"]);
    ip(&node.netns, &["-6", "route", "del", "fd00:244:2::/64"]);
    back(node, &before, "routes");
    ip(&node.netns, &["neigh", "del", "10.244.2.0", "dev", "kl-vxlan"]);
    back(node, &before, "a neighbour");
    let mac = before.lines().find_map(|line| line.split_once(" dst 192.0.2.2")).unwrap().0;
    lab::run(&node.netns, "bridge", &["fdb", "del", mac, "dev", "kl-vxlan"]).unwrap();
    back(node, &before, "an FDB entry");
    ip(&node.netns, &["route", "replace", "10.244.2.0/24", "via", "192.0.2.3"]);
    back(node, &before, "a route that was led elsewhere");
    ip(&node.netns, &["link", "set", "kl-vxlan", "down"]);
    back(node, &before, "all, after the device was down");
    ip(&node.netns, &["link", "del", "kl-vxlan"]);
    back(node, &before, "all, after the device was removed");
    all_reach_all(&lab, &nodes[..2]);

    // A peer that gets another address or device is found there.
    // Removed first: the kernel takes a subnet's other addresses away with its first.
    ip(&nodes[1].netns, &["address", "del", "192.0.2.2/24", "dev", "eth0"]);
    ip(&nodes[1].netns, &["address", "add", "192.0.2.77/24", "dev", "eth0"]);
    eventually("the new address", || lab::expect(&entries(node), "dst 192.0.2.77"));
    all_reach_all(&lab, &nodes);

    // A node that leaves for good leaves nothing.
    lab.api.remove_node("node-2");
    eventually("nothing of the node that left", || {
        let now = entries(node);
        if ["10.244.2.0", "fd00:244:2:", "192.0.2.77"].iter().any(|trace| now.contains(trace)) {
            return Err(now);
        }
        Ok(())
    });
    all_reach_all(&lab, &[nodes[0], nodes[2]]);
}

#[test]
fn packets_that_are_too_large_are_answered_and_the_mtu_follows_the_underlay() {
    let lab = Lab::new(2, "mode: vxlan", false);
    let nodes: Vec<&Node> = lab.nodes.iter().collect();
    all_reach_all(&lab, &nodes);
    assert_eq!(lab.mtu(1), 1450);
    // The lab's pods were made with the underlay's MTU, as by a plugin that knows nothing of tunnels.
    let to = nodes[1].pod_addresses[0];
    eventually("a pod hears what fits", || match lab::path_mtu(&nodes[0].stray_pod, to, 1500) {
        1450 => Ok(()),
        other => Err(format!("path MTU {other}")),
    });
    let inside = |node: &Node| ip(&node.pod, &["link", "show", "eth0"]);
    eventually("running pods have the tunnel's MTU", || lab::expect(&inside(nodes[0]), "mtu 1450 "));
    for mtu in [1400_u32, 9000, 1500] {
        let text = mtu.to_string();
        for node in &nodes {
            ip(&lab.fabric, &["link", "set", &node.port, "mtu", &text]);
            ip(&node.netns, &["link", "set", "eth0", "mtu", &text]);
        }
        eventually("the MTU follows", || match lab.mtu(1) {
            now if now == mtu - 50 => Ok(()),
            now => Err(now.to_string()),
        });
        let wanted = format!("mtu {} ", mtu - 50);
        eventually("the device's, too", || {
            lab::expect(&ip(&nodes[0].netns, &["link", "show", "kl-vxlan"]), &wanted)
        });
        eventually("the pods', too", || lab::expect(&inside(nodes[0]), &wanted));
        all_reach_all(&lab, &nodes);
    }
    // A path that is narrower than the device.
    ip(&nodes[0].netns, &["route", "add", "192.0.2.2/32", "dev", "eth0", "mtu", "1380"]);
    eventually("the route says what its path carries", || {
        lab::expect(&ip(&nodes[0].netns, &["route", "show", "10.244.2.0/24"]), "mtu lock 1330")
    });
}

#[test]
fn an_agent_that_was_killed_leaves_traffic_flowing_and_its_successor_cleans_up() {
    let mut lab = Lab::new(2, "mode: vxlan", false);
    let nodes: Vec<&Node> = lab.nodes.iter().collect();
    all_reach_all(&lab, &nodes);
    let before = entries(&lab.nodes[0]);
    let index = |node: &Node| ip(&node.netns, &["-o", "link", "show", "kl-vxlan"]);
    let device = index(&lab.nodes[0]);
    lab.stop(1);
    assert_eq!(entries(&lab.nodes[0]), before, "nothing goes with the agent");
    talk(&lab.nodes[0].pod, &lab.nodes[1].pod, lab.nodes[1].pod_addresses[0]).unwrap();
    // What an earlier run left for a node that is no more.
    let netns = lab.nodes[0].netns.clone();
    ip(
        &netns,
        &["route", "add", "10.244.9.0/24", "via", "10.244.9.0", "dev", "kl-vxlan", "onlink", "proto", "76"],
    );
    ip(
        &netns,
        &["neigh", "add", "10.244.9.0", "lladdr", "02:00:00:00:00:09", "dev", "kl-vxlan", "nud", "permanent"],
    );
    lab::run(&netns, "bridge", &["fdb", "add", "02:00:00:00:00:09", "dev", "kl-vxlan", "dst", "192.0.2.9"])
        .unwrap();
    lab.start(1);
    back(&lab.nodes[0], &before, "stale entries are gone");
    assert_eq!(index(&lab.nodes[0]), device, "the device was taken over");
    // A change of mode removes the device.
    lab.stop(1);
    lab.stop(2);
    lab.settings = "mode: host-gw".to_owned();
    lab.start(1);
    lab.start(2);
    let nodes: Vec<&Node> = lab.nodes.iter().collect();
    eventually("no tunnel in host-gw mode", || {
        let links = ip(&nodes[0].netns, &["link"]);
        if links.contains("kl-vxlan") { Err(links) } else { Ok(()) }
    });
    all_reach_all(&lab, &nodes);
}

#[test]
fn without_a_tunnel_and_with_one_only_where_it_is_needed() {
    for settings in ["mode: host-gw", "mode: vxlan\n    directRouting: true"] {
        let lab = Lab::new(2, settings, false);
        let nodes: Vec<&Node> = lab.nodes.iter().collect();
        all_reach_all(&lab, &nodes);
        let routes = ip(&nodes[0].netns, &["route", "show", "10.244.2.0/24"]);
        assert!(routes.contains("via 192.0.2.2 dev eth0"), "{routes}");
        let routes = ip(&nodes[0].netns, &["-6", "route", "show", "fd00:244:2::/64"]);
        assert!(routes.contains("via 2001:db8::2 dev eth0"), "{routes}");
        let before = entries(nodes[0]);
        ip(&nodes[0].netns, &["route", "del", "10.244.2.0/24"]);
        back(nodes[0], &before, "a plain route");
    }
}

#[test]
fn over_ipv6_and_through_an_interface_chosen_by_name_or_route() {
    for underlay in ["interface: eth0, ipv6: true", "route: 2001:db8::99, ipv6: true"] {
        let lab = Lab::new(2, &format!("mode: vxlan\n    underlay: {{{underlay}}}"), false);
        let nodes: Vec<&Node> = lab.nodes.iter().collect();
        all_reach_all(&lab, &nodes);
        assert_eq!(lab.mtu(1), 1430);
        eventually("FDB over IPv6", || lab::expect(&entries(nodes[0]), "dst 2001:db8::2"));
    }
}

#[test]
fn what_cannot_work_is_told_as_an_event() {
    let lab = Lab::new(1, "mode: vxlan\n    underlay: {interface: nothere}", true);
    eventually("the missing interface", || lab::expect(&lab.events(1), "nothere"));
    ip(&lab.nodes[0].netns, &["link", "add", "kl-vxlan", "type", "veth", "peer", "name", "other"]);
    let mut lab = lab;
    lab.stop(1);
    lab.settings = "mode: vxlan".to_owned();
    lab.start(1);
    eventually("a foreign device of that name", || lab::expect(&lab.events(1), "is no VXLAN device"));
    ip(&lab.nodes[0].netns, &["link", "del", "kl-vxlan"]);
    eventually("it works once that is gone", || match lab.mtu(1) {
        1450 => Ok(()),
        other => Err(other.to_string()),
    });
    let address: IpAddr = [192, 0, 2, 50].into();
    lab.api.add_silent_node("stranger", "10.244.50.0/24", address);
    eventually("a peer without a device", || lab::expect(&lab.events(1), "keelson.io/vtep-mac"));
}

#[test]
fn another_address_or_device_of_a_peer_replaces_the_one_before() {
    let lab = Lab::new(1, "mode: vxlan", true);
    let node = &lab.nodes[0];
    let (first, second) = (IpAddr::from([192, 0, 2, 50]), IpAddr::from([192, 0, 2, 51]));
    let (mac, other) = ("02:00:00:00:50:01", "02:00:00:00:50:02");
    lab.api.add_silent_node("stranger", "10.244.50.0/24", first);
    let is = |mac: &str, address: IpAddr| {
        let now = entries(node);
        lab::expect(&now, &format!("10.244.50.0 dev kl-vxlan lladdr {mac} PERMANENT"))?;
        lab::expect(&now, &format!("{mac} dst {address} self permanent"))?;
        match now.lines().filter(|line| line.contains("02:00:00:00:50:")).count() {
            2 => Ok(()),
            _ => Err(format!("something of before is left: {now}")),
        }
    };
    for (mac, address) in [(mac, first), (other, first), (other, second), (mac, first)] {
        lab.api.publish_tunnel("stranger", address, mac);
        eventually(&format!("{mac} at {address}"), || is(mac, address));
    }
    // This node's own device gets its hardware address back: peers send there.
    let own = || ip(&node.netns, &["-o", "link", "show", "kl-vxlan"]);
    let before = own();
    ip(&node.netns, &["link", "set", "kl-vxlan", "address", "02:00:00:00:99:99"]);
    eventually("the device's own address", || if own() == before { Ok(()) } else { Err(own()) });
    eventually("with its entries", || is(mac, first));
}

#[test]
fn routes_of_others_stay_and_a_range_waits_for_its_place() {
    let lab = Lab::new(1, "mode: vxlan", false);
    let node = &lab.nodes[0];
    ip(&node.netns, &["route", "add", "172.30.0.0/24", "via", "192.0.2.254", "proto", "static"]);
    let routes = || {
        let all = ip(&node.netns, &["route", "show"]);
        all.lines().filter(|line| !line.contains("proto 76")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = routes();
    let peers = [("held", "172.30.0.0/24"), ("taker", "192.0.2.0/24"), ("good", "10.244.50.0/24")];
    for (number, (name, range)) in (50..).zip(peers) {
        let address = IpAddr::from([192, 0, 2, number]);
        lab.api.add_silent_node(name, range, address);
        lab.api.publish_tunnel(name, address, &format!("02:00:00:00:50:{number:02}"));
    }
    eventually("the peer that takes nothing", || lab::expect(&entries(node), "10.244.50.0/24 via"));
    assert_eq!(routes(), before);
    let now = entries(node);
    assert!(!now.contains("172.30.0.0") && !now.contains("192.0.2.0/24"), "{now}");
    ip(&node.netns, &["route", "del", "172.30.0.0/24"]);
    eventually("the peer whose range is free now", || lab::expect(&entries(node), "172.30.0.0/24 via"));
    // Once it is the overlay's, it is defended.
    ip(&node.netns, &["route", "replace", "172.30.0.0/24", "via", "192.0.2.254", "proto", "static"]);
    eventually("the overlay's route again", || lab::expect(&entries(node), "172.30.0.0/24 via"));
    lab.api.remove_node("held");
    eventually("nothing of a node that left", || {
        let now = entries(node);
        if now.contains("172.30.0.0") { Err(now) } else { Ok(()) }
    });
}

/// Moves node 2 behind a router, which is the fabric, whose link to it carries less than its interface says.
fn put_behind_a_router(lab: &Lab, mtu: &str) {
    let (fabric, near, far) = (&lab.fabric, &lab.nodes[0], &lab.nodes[1]);
    for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
        lab::run(fabric, "sysctl", &["-qw", setting]).unwrap();
    }
    ip(fabric, &["address", "add", "192.0.2.254/24", "dev", "br0"]);
    ip(fabric, &["address", "add", "2001:db8::254/64", "dev", "br0", "nodad"]);
    ip(fabric, &["link", "set", &far.port, "nomaster"]);
    ip(fabric, &["address", "add", "198.51.100.254/24", "dev", &far.port]);
    ip(fabric, &["address", "add", "2001:db8:1::254/64", "dev", &far.port, "nodad"]);
    ip(fabric, &["route", "replace", "198.51.100.2/32", "dev", &far.port, "mtu", "lock", mtu]);
    ip(fabric, &["-6", "route", "replace", "2001:db8:1::2/128", "dev", &far.port, "mtu", "lock", mtu]);
    ip(&far.netns, &["address", "flush", "dev", "eth0", "scope", "global"]);
    ip(&far.netns, &["address", "add", "198.51.100.2/24", "dev", "eth0"]);
    ip(&far.netns, &["address", "add", "2001:db8:1::2/64", "dev", "eth0", "nodad"]);
    for (netns, v4, v6) in
        [(&far.netns, "198.51.100.254", "2001:db8:1::254"), (&near.netns, "192.0.2.254", "2001:db8::254")]
    {
        ip(netns, &["route", "add", "default", "via", v4]);
        ip(netns, &["-6", "route", "add", "default", "via", v6]);
    }
}

#[test]
fn a_narrow_link_on_the_way_is_found_and_told_to_pods() {
    // What the router says of its link comes into the routes to the peer's pods, and pods hear it from those. Over IPv4 the
    // tunnel's packets would be split, over IPv6 they would be lost.
    for (underlay, peer, learned) in
        [("vni: 1", "dst 198.51.100.2 ", 1350), ("underlay: {ipv6: true}", "dst 2001:db8:1::2 ", 1330)]
    {
        let lab = Lab::new(2, &format!("mode: vxlan\n    {underlay}"), false);
        let nodes: Vec<&Node> = lab.nodes.iter().collect();
        all_reach_all(&lab, &nodes);
        put_behind_a_router(&lab, "1400");
        eventually("the peer's address behind the router", || lab::expect(&entries(nodes[0]), peer));
        let told = format!("mtu lock {learned}");
        for (family, range) in [("-4", "10.244.2.0/24"), ("-6", "fd00:244:2::/64")] {
            eventually("the route says what the way carries", || {
                lab::expect(&ip(&nodes[0].netns, &[family, "route", "show", range]), &told)
            });
        }
        all_reach_all(&lab, &nodes);
        for address in &nodes[1].pod_addresses {
            eventually("the pod hears what the way carries", || {
                match lab::path_mtu(&nodes[0].pod, *address, 1428) {
                    mtu if mtu == learned => Ok(()),
                    other => Err(format!("path MTU {other} to {address}")),
                }
            });
        }
    }
}

#[test]
fn encrypted_where_the_kernel_can_and_told_where_it_cannot() {
    let lab = Lab::new(3, "mode: wireguard", false);
    let nodes: Vec<&Node> = lab.nodes.iter().collect();
    if lab::run(&lab.fabric, "ip", &["link", "add", "probe0", "type", "wireguard"]).is_err() {
        eventually("the reason as an Event", || lab::expect(&lab.events(1), "this kernel has no WireGuard"));
        eventually("the reason for keelson-vxlan", || {
            let left = lab.left(1);
            if left["ready"] == false {
                lab::expect(&left["reason"].to_string(), "no WireGuard")
            } else {
                Err(left.to_string())
            }
        });
        lab.check_alive();
        eprintln!("skipped: this kernel has no WireGuard; run by `cargo xtask test vm-light`");
        return;
    }
    all_reach_all(&lab, &nodes);
    assert_eq!(lab.mtu(1), 1440);
    let left = lab.left(1);
    assert_eq!(
        (&left["ready"], &left["device"], &left["mtu"]),
        (&true.into(), &"kl-wg".into(), &1440.into())
    );
    let (node, before) = (nodes[0], entries(nodes[0]));
    assert_eq!(before.lines().filter(|line| line.contains("dev kl-wg")).count(), 4, "{before}");
    ip(&node.netns, &["route", "del", "10.244.2.0/24"]);
    back(node, &before, "a route into the tunnel");
    // Of this no message of the kernel tells.
    let tunnel = || lab.wireguard(1);
    let peers = tunnel().peers;
    assert_eq!(peers.len(), 2);
    lab.forget_wireguard_peers(1);
    eventually("the tunnel's peers", || {
        let now: Vec<_> = tunnel().peers.into_keys().collect();
        if now.iter().eq(peers.keys()) { Ok(()) } else { Err(format!("{} peers", now.len())) }
    });
    all_reach_all(&lab, &nodes);
    // With the device its key and peers go; the key is on the disk, so that the peers need to learn nothing.
    ip(&node.netns, &["link", "del", "kl-wg"]);
    back(node, &before, "the routes of a new tunnel");
    all_reach_all(&lab, &nodes);
    lab.api.remove_node("node-3");
    eventually("the routes of a node that left", || {
        let now = entries(node);
        if now.contains("10.244.3.0/24") { Err(now) } else { Ok(()) }
    });
    all_reach_all(&lab, &nodes[..2]);
}

#[test]
fn a_second_key_is_needed_on_both_sides() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\n").unwrap();
    let settings = format!("mode: wireguard\n    presharedKeyFile: {}", file.path().display());
    let lab = Lab::new(2, &settings, false);
    let nodes: Vec<&Node> = lab.nodes.iter().collect();
    if lab::run(&lab.fabric, "ip", &["link", "add", "probe0", "type", "wireguard"]).is_err() {
        eprintln!("skipped: this kernel has no WireGuard; run by `cargo xtask test vm-light`");
        return;
    }
    all_reach_all(&lab, &nodes);
    let key = lab.wireguard(1).peers.into_values().find_map(|peer| peer.preshared);
    assert_eq!(key.unwrap().to_string(), "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=");
}
