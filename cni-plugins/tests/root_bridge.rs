//! `keelson-bridge` and `keelson-ipam` as executables, against a real kernel.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod lab;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use cni_plugins_host::{
    invoke::RuntimeArgs,
    netlink::{LinkChange, LinkRef, Netlink, Step, VethPair},
    netns,
};
use cni_plugins_types::CniResult;
use lab::{
    BRIDGE, Lab, NETWORK, address, assert_reachable, assert_unreachable, error_object, links_in, reason,
    wait_for,
};
use serde_json::json;
use tokio::task::JoinSet;

#[test]
fn parallel_adds_give_working_distinct_pods_and_del_leaves_nothing() {
    let lab = Lab::new();
    let pods: Vec<RuntimeArgs> = (0..30).map(|_| lab.pod()).collect();
    let list = lab.list();
    let started = Instant::now();
    let results: Vec<CniResult> = lab.on_host(async {
        let mut calls = JoinSet::new();
        for (index, pod) in pods.iter().cloned().enumerate() {
            let (invoker, list) = (lab.invoker.clone(), list.clone());
            calls.spawn(async move { (index, invoker.add(&list, &pod).await.unwrap()) });
        }
        let mut results = calls.join_all().await;
        results.sort_by_key(|(index, _)| *index);
        results.into_iter().map(|(_, result)| result).collect()
    });
    eprintln!("30 parallel ADDs: {:?}", started.elapsed());
    let addresses: BTreeSet<IpAddr> = results.iter().flat_map(CniResult::addresses_in_sandbox).collect();
    assert_eq!(addresses.len(), 60);
    assert_eq!(lab.ports().len(), 30);
    assert!(
        lab.ports().iter().all(|port| port.up && port.mtu == 1400 && port.alias.starts_with("cni:testnet:"))
    );

    let (first, second) = (&pods[0], &pods[1]);
    assert_reachable(&first.netns, &second.netns, address(&results[1], 0));
    assert_reachable(&first.netns, &second.netns, address(&results[1], 1));
    assert_reachable(&first.netns, &first.netns, address(&results[0], 0));
    assert_reachable(&lab.host, &first.netns, address(&results[0], 0));
    assert_reachable(&first.netns, &lab.host, "10.99.0.1".parse().unwrap());
    assert_reachable(&first.netns, &lab.host, "fd99::1".parse().unwrap());

    lab.check(&list, first).unwrap();
    lab.status(&list).unwrap();
    let started = Instant::now();
    for pod in &pods {
        lab.del(pod);
    }
    eprintln!("30 DELs: {:?}", started.elapsed());
    lab.assert_nothing_left();
    lab.del(first);
}

#[test]
fn after_del_the_address_is_free_and_the_pod_unreachable_and_the_interface_goes() {
    let lab = Lab::new();
    let (pod, other) = (lab.pod(), lab.pod());
    let list = lab.list_of(&[lab.bridge(&json!([[{"subnet": "10.99.0.0/29", "rangeEnd": "10.99.0.3"}]]))]);
    let result = lab.add_to(&list, &pod).unwrap();
    lab.add_to(&list, &other).unwrap();
    assert_reachable(&lab.host, &pod.netns, address(&result, 0));
    lab.del_from(&list, &pod);
    assert_unreachable(&lab.host, &pod.netns, address(&result, 0));
    assert_unreachable(&other.netns, &pod.netns, address(&result, 0));
    // The same address, at once, while the old pair may still be there.
    let successor = lab.pod();
    let again = lab.add_to(&list, &successor).unwrap();
    assert_eq!(address(&again, 0), address(&result, 0));
    assert_reachable(&other.netns, &successor.netns, address(&again, 0));
    wait_for("pod without interface", || {
        let links = links_in(&pod.netns);
        if links.is_empty() { Ok(()) } else { Err(format!("{links:?}")) }
    });
    // And the same namespace and interface name, at once.
    lab.del_from(&list, &successor);
    let again = lab.add_to(&list, &successor).unwrap();
    assert_reachable(&other.netns, &successor.netns, address(&again, 0));
    // Also for another container.
    lab.del_from(&list, &successor);
    let heir = RuntimeArgs { container_id: "heir".to_owned(), ..successor.clone() };
    let again = lab.add_to(&list, &heir).unwrap();
    assert_reachable(&other.netns, &heir.netns, address(&again, 0));
    lab.wait_for_ports(2);
    lab.del_from(&list, &heir);
    lab.del_from(&list, &other);
    lab.assert_nothing_left();
}

#[test]
fn del_works_without_namespace_and_check_sees_the_damage() {
    let lab = Lab::new();
    let pod = lab.pod();
    lab.add(&pod).unwrap();
    let inside = Netlink::open_in(&pod.netns).unwrap();
    let eth0 = inside.link("eth0").unwrap().unwrap();
    let mtu = |mtu| LinkChange { mtu: Some(mtu), ..LinkChange::default() };
    inside.run(vec![Step::set_link(LinkRef::Index(eth0.index), &mtu(1300))]).unwrap();
    let told = lab.check(&lab.list(), &pod).unwrap_err();
    assert!(told.contains("eth0 has the MTU 1300, not 1400 (CNI error code 102)"), "{told}");
    inside.run(vec![Step::set_link(LinkRef::Index(eth0.index), &mtu(1400))]).unwrap();
    inside.run(vec![Step::delete_address(eth0.index, "10.99.0.2/24".parse().unwrap())]).unwrap();
    let told = lab.check(&lab.list(), &pod).unwrap_err();
    assert!(told.contains("eth0 does not have the address 10.99.0.2/24"), "{told}");
    let port = lab.ports().remove(0).name;
    Netlink::open_in(&lab.host).unwrap().delete_link(&port).unwrap();
    let told = lab.check(&lab.list(), &pod).unwrap_err();
    assert!(told.contains("is missing, down or not a port of"), "{told}");
    netns::remove(&pod.netns).unwrap();
    lab.del(&pod);
    lab.del(&pod);
    lab.assert_nothing_left();
}

#[test]
fn a_second_add_fails_and_leaves_the_first_intact() {
    let lab = Lab::new();
    let pod = lab.pod();
    let result = lab.add(&pod).unwrap();
    let told = error_object(lab.call_for("ADD", &pod));
    assert_eq!(told["code"], 100);
    assert!(told["msg"].as_str().unwrap().contains("eth0 exists already"), "{told}");
    let other = lab.pod();
    lab.add(&other).unwrap();
    assert_reachable(&other.netns, &pod.netns, address(&result, 0));
    assert_eq!(lab.held_addresses().len(), 4);
}

#[test]
fn exhaustion_is_told_by_add_and_status_and_rolled_back() {
    let lab = Lab::new();
    let list = lab.list_of(&[lab.bridge(&json!([[{"subnet": "10.99.0.0/30"}]]))]);
    let (pod, other) = (lab.pod(), lab.pod());
    lab.status(&list).unwrap();
    lab.add_to(&list, &pod).unwrap();
    let told = reason(&lab.add_to(&list, &other).unwrap_err());
    assert!(
        told.contains(
            "\"testnet\": no IP addresses available in range 10.99.0.1-10.99.0.2 (CNI error code 101)"
        ),
        "{told}"
    );
    let told = lab.status(&list).unwrap_err();
    assert!(told.contains("(CNI error code 50)"), "{told}");
    assert_eq!(lab.ports().len(), 1);
    // A pod whose namespace went without DEL: nobody needs to call GC for its address.
    netns::remove(&pod.netns).unwrap();
    lab.status(&list).unwrap();
    lab.add_to(&list, &other).unwrap();
    lab.del_from(&list, &pod);
    lab.del_from(&list, &other);
    lab.assert_nothing_left();
}

#[test]
fn a_call_killed_anywhere_leaves_nothing_after_del_or_gc() {
    let lab = Lab::new();
    let survivor = lab.pod();
    let result = lab.add(&survivor).unwrap();
    for round in 0..40_u32 {
        let pod = lab.pod();
        let killed = if round % 4 < 2 { "ADD" } else { "DEL" };
        if killed == "DEL" {
            lab.add(&pod).unwrap();
        }
        let mut child = lab.call_for(killed, &pod);
        let kill_at = Instant::now() + Duration::from_micros(120) * round;
        while Instant::now() < kill_at {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if round % 2 == 0 {
            lab.del(&pod);
        } else {
            lab.gc(&lab.list(), &[&survivor]);
        }
        lab.wait_for_ports(1);
        assert_eq!(lab.held_addresses().len(), 2, "round {round}");
        // The same container can be attached afterwards.
        if round % 8 == 0 {
            lab.add(&pod).unwrap();
            lab.del(&pod);
        }
    }
    assert_reachable(&lab.host, &survivor.netns, address(&result, 0));
}

#[test]
fn requested_addresses_and_hardware_address_are_given() {
    let lab = Lab::new();
    let list = lab.list_of(&[json!({
        "type": "keelson-bridge", "bridge": BRIDGE, "isGateway": true,
        "capabilities": {"ips": true, "mac": true, "ipRanges": true},
        "ipam": {"type": "keelson-ipam", "dataDir": lab.path("ipam"), "subnet": "10.99.0.0/24"},
    })]);
    let mut pod = lab.pod();
    pod.capability_args = BTreeMap::from([
        ("ips".to_owned(), json!(["10.99.0.77/24", "fd99::77"])),
        ("mac".to_owned(), json!("02:11:22:33:44:55")),
        ("ipRanges".to_owned(), json!([[{"subnet": "fd99::/64"}]])),
    ]);
    let result = lab.add_to(&list, &pod).unwrap();
    assert_eq!(result.ips[0].address.to_string(), "10.99.0.77/24");
    assert_eq!(result.ips[1].address.to_string(), "fd99::77/64");
    assert_eq!(result.interfaces[2].mac, "02:11:22:33:44:55");
    assert_eq!(links_in(&pod.netns)[0].mac, [2, 0x11, 0x22, 0x33, 0x44, 0x55]);
    assert_reachable(&lab.host, &pod.netns, address(&result, 1));
    let mut taken = lab.pod();
    taken.args =
        vec![("IgnoreUnknown".to_owned(), "1".to_owned()), ("IP".to_owned(), "10.99.0.77".to_owned())];
    let told = reason(&lab.add_to(&list, &taken).unwrap_err());
    assert!(told.contains("requested IP address 10.99.0.77 is not available (CNI error code 103)"), "{told}");
    lab.check(&list, &pod).unwrap();
    lab.del_from(&list, &pod);
    lab.assert_nothing_left();
}

#[test]
fn a_pod_cannot_send_with_another_hardware_address() {
    let lab = Lab::new();
    let mut bridge = lab.bridge(&json!([[{"subnet": "10.99.0.0/24"}]]));
    bridge["macspoofchk"] = true.into();
    let list = lab.list_of(&[bridge]);
    let pod = lab.pod();
    let result = lab.add_to(&list, &pod).unwrap();
    assert_reachable(&pod.netns, &lab.host, "10.99.0.1".parse().unwrap());
    lab.check(&list, &pod).unwrap();
    let inside = Netlink::open_in(&pod.netns).unwrap();
    let set = |mac| {
        let change = LinkChange { mac: Some(mac), ..LinkChange::default() };
        inside.run(vec![Step::set_link(LinkRef::Name("eth0"), &change)]).unwrap();
    };
    let own: [u8; 6] = links_in(&pod.netns)[0].mac.clone().try_into().unwrap();
    set([2, 0, 0, 0, 0, 9]);
    assert_unreachable(&pod.netns, &lab.host, "10.99.0.1".parse().unwrap());
    set(own);
    assert_reachable(&lab.host, &pod.netns, address(&result, 0));
    lab.del_from(&list, &pod);
    lab.assert_nothing_left();
}

#[test]
fn isolated_pods_reach_the_host_only() {
    let lab = Lab::new();
    let mut bridge = lab.bridge(&json!([[{"subnet": "10.99.0.0/24"}]]));
    bridge["portIsolation"] = true.into();
    let list = lab.list_of(&[bridge]);
    let (one, two) = (lab.pod(), lab.pod());
    lab.add_to(&list, &one).unwrap();
    let result = lab.add_to(&list, &two).unwrap();
    assert_reachable(&one.netns, &lab.host, "10.99.0.1".parse().unwrap());
    assert_unreachable(&one.netns, &two.netns, address(&result, 0));
    lab.check(&list, &one).unwrap();
    lab.del_from(&list, &one);
    lab.del_from(&list, &two);
    lab.assert_nothing_left();
}

#[test]
fn routed_pods_reach_each_other_and_the_host_without_a_bridge() {
    let lab = Lab::new();
    let list = lab.list_of(&[json!({
        "type": "keelson-bridge", "mode": "routed", "isDefaultGateway": true,
        "ipam": lab.ipam(&json!([[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]])),
    })]);
    let (one, two) = (lab.pod(), lab.pod());
    let first = lab.add_to(&list, &one).unwrap();
    let second = lab.add_to(&list, &two).unwrap();
    assert_eq!(first.ips[0].address.to_string(), "10.99.0.2/32");
    assert_eq!(first.interfaces.len(), 2);
    for family in 0..2 {
        assert_reachable(&one.netns, &two.netns, address(&second, family));
        assert_reachable(&lab.host, &one.netns, address(&first, family));
    }
    assert_reachable(&one.netns, &lab.host, "10.99.0.1".parse().unwrap());
    assert!(lab.links().iter().all(|link| link.kind.as_deref() == Some("veth")));
    lab.check(&list, &one).unwrap();
    lab.del_from(&list, &one);
    assert_unreachable(&two.netns, &one.netns, address(&first, 0));
    lab.del_from(&list, &two);
    wait_for("host without links", || {
        let links = lab.links();
        if links.is_empty() { Ok(()) } else { Err(format!("{links:?}")) }
    });
    lab.assert_nothing_left();
}

#[test]
fn vlans_are_set_or_refused_with_the_reason() {
    let lab = Lab::new();
    let mut bridge = lab.bridge(&json!([[{"subnet": "10.99.0.0/24"}]]));
    bridge["vlan"] = 7.into();
    bridge["preserveDefaultVlan"] = false.into();
    let list = lab.list_of(&[bridge]);
    let (one, two) = (lab.pod(), lab.pod());
    match lab.add_to(&list, &one) {
        Ok(_) => {
            let second = lab.add_to(&list, &two).unwrap();
            assert_reachable(&one.netns, &two.netns, address(&second, 0));
            assert_reachable(&one.netns, &lab.host, "10.99.0.1".parse().unwrap());
            lab.check(&list, &one).unwrap();
            lab.del_from(&list, &one);
            lab.del_from(&list, &two);
            // The gateway's own port stays, as the bridge does.
            lab.wait_for_ports(1);
        }
        Err(error) => {
            let told = reason(&error);
            assert!(
                std::env::var_os("KEELSON_VM").is_none(),
                "the guest's kernel has VLAN filtering: {told}"
            );
            assert!(
                told.contains("vlan: 7 is not supported") && told.contains("(CNI error code 2)"),
                "{told}"
            );
            lab.assert_nothing_left();
            eprintln!("this kernel has no VLAN filtering: only the refusal was tested");
        }
    }
}

#[test]
fn another_address_on_the_bridge_is_kept_unless_forced() {
    let lab = Lab::new();
    let subnet = |net: &str| json!([[{"subnet": net}]]);
    let first = lab.list_of(&[lab.bridge(&subnet("10.99.0.0/24"))]);
    let mut wider = lab.bridge(&json!([[{"subnet": "10.99.0.0/16", "gateway": "10.99.9.1"}]]));
    let (one, two) = (lab.pod(), lab.pod());
    lab.add_to(&first, &one).unwrap();
    let told = reason(&lab.add_to(&lab.list_of(&[wider.clone()]), &two).unwrap_err());
    assert!(told.contains("bridge: kltest0 has the address 10.99.0.1/24, which overlaps"), "{told}");
    wider["forceAddress"] = true.into();
    lab.add_to(&lab.list_of(&[wider]), &two).unwrap();
    let host = Netlink::open_in(&lab.host).unwrap();
    let bridge = host.link(BRIDGE).unwrap().unwrap();
    let addresses = host.addresses(bridge.index).unwrap();
    assert!(addresses.contains(&"10.99.9.1/16".parse().unwrap()), "{addresses:?}");
    assert!(!addresses.contains(&"10.99.0.1/24".parse().unwrap()), "{addresses:?}");
}

#[test]
fn a_forced_address_of_the_same_subnet_stays() {
    let lab = Lab::new();
    let ranges = |gateway: &str| json!([[{"subnet": "10.99.0.0/24", "gateway": gateway}]]);
    let first = lab.list_of(&[lab.bridge(&ranges("10.99.0.1"))]);
    let mut forced = lab.bridge(&ranges("10.99.0.254"));
    forced["forceAddress"] = true.into();
    let forced = lab.list_of(&[forced]);
    let (one, two) = (lab.pod(), lab.pod());
    lab.add_to(&first, &one).unwrap();
    let result = lab.add_to(&forced, &two).unwrap();
    lab.check(&forced, &two).unwrap();
    assert_reachable(&two.netns, &lab.host, "10.99.0.254".parse().unwrap());
    assert_reachable(&lab.host, &two.netns, address(&result, 0));
}

#[test]
fn a_bridge_without_gateway_has_a_hardware_address_of_its_own() {
    let macs = [(), ()].map(|()| {
        let lab = Lab::new();
        let mut plugin = lab.bridge(&json!([[{"subnet": "10.99.0.0/24"}]]));
        plugin["isGateway"] = false.into();
        plugin["isDefaultGateway"] = false.into();
        lab.add_to(&lab.list_of(&[plugin]), &lab.pod()).unwrap();
        let links = lab.links();
        links.into_iter().find(|link| link.name == BRIDGE).unwrap().mac
    });
    assert_ne!(macs[0], macs[1]);
}

#[test]
fn the_mtu_is_that_of_the_default_route_whatever_else_is_routed() {
    let lab = Lab::new();
    let ip = |line: &str| {
        let run = || std::process::Command::new("ip").args(line.split(' ')).status().unwrap().success();
        assert!(netns::run_in(&lab.host, run).unwrap(), "{line}");
    };
    let mut plugin = lab.bridge(&json!([[{"subnet": "10.99.0.0/24"}]]));
    plugin["mtu"] = 0.into();
    let list = lab.list_of(&[plugin]);
    let mtu = || {
        let pod = lab.pod();
        let result = lab.add_to(&list, &pod).unwrap();
        result.interfaces[2].mtu
    };
    // Documentation addresses are this host's own, and blocked.
    ip("link set lo up");
    ip("addr add 192.0.2.1/32 dev lo");
    assert_eq!(mtu(), Some(1500), "without a default route");
    ip("link add up0 mtu 1380 type veth peer name up1");
    ip("link set up0 up");
    ip("addr add 198.51.100.2/24 dev up0");
    ip("route add default via 198.51.100.1 metric 10");
    assert_eq!(mtu(), Some(1380));
    ip("addr del 192.0.2.1/32 dev lo");
    assert_eq!(mtu(), Some(1380));
    for kind in ["blackhole", "prohibit", "unreachable"] {
        ip(&format!("route add {kind} 192.0.2.0/24"));
        assert_eq!(mtu(), Some(1380), "{kind}");
        ip(&format!("route del {kind} 192.0.2.0/24"));
    }
    ip("route add blackhole default metric 5");
    assert_eq!(mtu(), Some(1380), "behind a blackhole");
}

#[test]
fn addresses_are_usable_at_once_without_duplicate_detection() {
    let lab = Lab::new();
    for detect in [false, true] {
        let mut bridge = lab.bridge(&json!([[{"subnet": "fd99::/64"}]]));
        bridge["enabledad"] = detect.into();
        let list = lab.list_of(&[bridge]);
        let pod = lab.pod();
        let result = lab.add_to(&list, &pod).unwrap();
        if !detect {
            let read =
                |path: &str| netns::run_in(&pod.netns, || std::fs::read_to_string(path)).unwrap().unwrap();
            let tentative = |line: &&str| {
                let flags = line.split_whitespace().nth(4).unwrap();
                u8::from_str_radix(flags, 16).unwrap() & 0x40 != 0
            };
            let table = "/proc/thread-self/net/if_inet6";
            let waiting: Vec<String> = read(table).lines().filter(tentative).map(str::to_owned).collect();
            // The kernel adds the link-local one itself, in a worker of its own, which detects nothing.
            assert!(waiting.iter().all(|line| line.starts_with("fe80")), "{waiting:?}");
            assert_eq!(read("/proc/sys/net/ipv6/conf/eth0/accept_dad").trim(), "0");
            wait_for("link-local address", || {
                let left: Vec<String> = read(table).lines().filter(tentative).map(str::to_owned).collect();
                if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
            });
        }
        if detect {
            // At once where the kernel has optimistic addresses, else when detection is over.
            let socket = SocketAddr::new(address(&result, 0), 0);
            wait_for("usable address", || {
                let bound = netns::run_in(&pod.netns, || std::net::TcpListener::bind(socket)).unwrap();
                bound.map_err(|error| error.to_string())
            });
        }
        assert_reachable(&lab.host, &pod.netns, address(&result, 0));
        lab.del_from(&list, &pod);
    }
    lab.assert_nothing_left();
}

#[test]
fn a_pod_gets_its_address_back_where_addresses_are_sticky() {
    let lab = Lab::new();
    let mut bridge = lab.bridge(&json!([[{"subnet": "10.99.0.0/24"}]]));
    bridge["ipam"]["sticky"] = true.into();
    let list = lab.list_of(&[bridge]);
    let pod = |name: &str| {
        let mut pod = lab.pod();
        let arg = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        pod.args = vec![arg("K8S_POD_NAMESPACE", "shop"), arg("K8S_POD_NAME", name)];
        pod
    };
    let (one, two) = (pod("db-0"), pod("db-1"));
    let first = lab.add_to(&list, &one).unwrap();
    lab.add_to(&list, &two).unwrap();
    lab.del_from(&list, &one);
    let other = pod("db-2");
    let third = lab.add_to(&list, &other).unwrap();
    assert_ne!(address(&third, 0), address(&first, 0));
    let again = pod("db-0");
    let result = lab.add_to(&list, &again).unwrap();
    assert_eq!(address(&result, 0), address(&first, 0));
    assert_reachable(&lab.host, &again.netns, address(&result, 0));
    for pod in [&two, &other, &again] {
        lab.del_from(&list, pod);
    }
    lab.assert_nothing_left();
}

#[test]
fn several_networks_on_several_bridges_do_not_meet() {
    let lab = Lab::new();
    let list = |name: &str, bridge: &str, subnet: &str| {
        let mut plugin = lab.bridge(&json!([[{"subnet": subnet}]]));
        plugin["bridge"] = bridge.into();
        plugin["isDefaultGateway"] = false.into();
        plugin["ipam"]["routes"] = json!([]);
        lab.list_named(name, "1.1.0", &[plugin])
    };
    let red = list("red", "klred0", "10.97.0.0/24");
    let blue = list("blue", "klblue0", "10.98.0.0/24");
    let mut pod = lab.pod();
    lab.add_to(&red, &pod).unwrap();
    // A second interface of the same pod.
    pod.ifname = "net1".to_owned();
    let result = lab.add_to(&blue, &pod).unwrap();
    assert_reachable(&lab.host, &pod.netns, address(&result, 0));
    let names: BTreeSet<String> = links_in(&pod.netns).into_iter().map(|link| link.name).collect();
    assert_eq!(names, BTreeSet::from(["eth0".to_owned(), "net1".to_owned()]));
    lab.del_from(&blue, &pod);
    // GC of one network leaves the other's alone.
    lab.gc(&blue, &[]);
    let left = wait_for("pod with one interface", || {
        let links = links_in(&pod.netns);
        if links.len() == 1 { Ok(links) } else { Err(format!("{links:?}")) }
    });
    assert_eq!(left[0].name, "eth0");
    pod.ifname = "eth0".to_owned();
    lab.del_from(&red, &pod);
}

#[test]
fn what_a_pod_sends_to_the_outside_has_the_hosts_address() {
    let lab = Lab::new();
    // The outside: a namespace behind a veth of the host, which knows no way back to pods.
    let outside = netns::create_named(&lab.dir.path().join("netns"), "outside").unwrap();
    let file = std::fs::File::open(&outside).unwrap();
    let host = Netlink::open_in(&lab.host).unwrap();
    let pair = VethPair {
        host_name: "uplink0",
        bridge_index: None,
        host_mac: None,
        peer_name: "uplink1",
        peer_mac: None,
        peer_netns: Some(std::os::fd::AsRawFd::as_raw_fd(&file)),
        mtu: 1500,
    };
    host.run(vec![Step::create_veth(&pair)]).unwrap();
    let beyond = Netlink::open_in(&outside).unwrap();
    for (netlink, name, address) in [(&host, "uplink0", "192.0.2.1/24"), (&beyond, "uplink1", "192.0.2.2/24")]
    {
        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        let index = netlink.link(name).unwrap().unwrap().index;
        let steps = [
            Step::set_link(LinkRef::Index(index), &up),
            Step::add_address(index, address.parse().unwrap(), false),
        ];
        netlink.run(steps.into()).unwrap();
    }
    for (mode, masquerades) in [("bridge", true), ("routed", true), ("bridge", false)] {
        let mut plugin = lab.bridge(&json!([[{"subnet": "10.99.0.0/24"}]]));
        plugin["mode"] = mode.into();
        plugin["hairpinMode"] = false.into();
        plugin["ipMasq"] = masquerades.into();
        let list = lab.list_of(&[plugin]);
        let (one, two) = (lab.pod(), lab.pod());
        lab.add_to(&list, &one).unwrap();
        let other = lab.add_to(&list, &two).unwrap();
        lab.check(&list, &one).unwrap();
        lab.status(&list).unwrap();
        let there = "192.0.2.2".parse().unwrap();
        if masquerades {
            assert_reachable(&one.netns, &outside, there);
        } else {
            assert_unreachable(&one.netns, &outside, there);
        }
        assert_reachable(&one.netns, &two.netns, address(&other, 0));
        if masquerades {
            let flush = || std::process::Command::new("nft").args(["flush", "ruleset"]).status().unwrap();
            assert!(netns::run_in(&lab.host, flush).unwrap().success());
            let told = lab.check(&list, &one).unwrap_err();
            assert!(told.contains("are missing in the nftables table"), "{mode}: {told}");
        }
        lab.del_from(&list, &one);
        lab.del_from(&list, &two);
        lab.assert_nothing_left();
    }
}

#[test]
fn a_pod_goes_also_when_its_list_was_edited_into_one_that_is_refused() {
    let lab = Lab::new();
    let pod = lab.pod();
    let netns = pod.netns.display().to_string();
    let good = json!({
        "cniVersion": "1.1.0", "name": NETWORK, "type": "keelson-bridge", "bridge": BRIDGE,
        "hairpinMode": true, "ipMasq": true, "logFile": lab.path("cni.log"), "stateDir": lab.path("state"),
        "ipam": {"type": "keelson-ipam", "dataDir": lab.path("ipam"), "subnet": "10.99.0.0/24"},
    });
    let call = |command: &str, config: &serde_json::Value| {
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", pod.container_id.as_str()),
            ("CNI_NETNS", netns.as_str()),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", if command == "DEL" { "nonsense" } else { "" }),
        ];
        let output = lab.call("keelson-bridge", &environment, config.to_string().as_bytes());
        let output = output.wait_with_output().unwrap();
        assert!(output.status.success(), "{command} {config}: {}", String::from_utf8_lossy(&output.stdout));
    };
    let masqueraded = || {
        let list = || std::process::Command::new("nft").args(["list", "ruleset"]).output().unwrap();
        String::from_utf8(netns::run_in(&lab.host, list).unwrap().stdout).unwrap().contains("10.99.0.")
    };
    for (key, value) in [
        ("promiscMode", json!(true)),
        ("mtu", json!(67)),
        ("mtu", json!("big")),
        ("ipMasqBackend", json!("iptables")),
        ("ipMasqExcept", json!(["1.2.3.4"])),
        ("ipMasq", json!(false)),
        ("runtimeConfig", json!([])),
        ("mode", json!("none")),
        ("vlanTrunk", json!(7)),
        ("dns", json!("x")),
        ("logFile", json!(7)),
        ("prevResult", json!("x")),
    ] {
        call("ADD", &good);
        assert!(masqueraded());
        let mut edited = good.clone();
        edited[key] = value;
        if key == "mtu" {
            edited["cni.dev/valid-attachments"] = json!([]);
            call("GC", &edited);
        } else {
            call("DEL", &edited);
        }
        assert!(!masqueraded(), "{key}");
        lab.assert_nothing_left();
    }
}

#[test]
fn the_result_tells_the_mtu_that_the_bridge_has_with_the_port() {
    let lab = Lab::new();
    let result = lab.add(&lab.pod()).unwrap();
    let bridge = lab.links().into_iter().find(|link| link.name == BRIDGE).unwrap();
    assert_eq!((result.interfaces[0].mtu, bridge.mtu), (Some(1400), 1400));
}
