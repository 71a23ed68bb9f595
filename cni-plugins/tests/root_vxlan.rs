//! `keelson-vxlan` as a runtime calls it, with the overlay's state as an agent would leave it.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod ground;

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path};

use cni_plugins_host::overlay::{self, State};
use ground::{Ground, Pod, address, seen, wait_for, with_result};
use serde_json::{Value, json};

/// The device that stands for the tunnel; what kind it is, no plugin asks.
const DEVICE: &str = "kltun0";
const REFERENCE: &str = "/usr/lib/cni";

fn state() -> State {
    State {
        node: "n1".to_owned(),
        mode: "vxlan".to_owned(),
        ready: true,
        device: Some(DEVICE.to_owned()),
        mtu: 1380,
        pod_cidrs: vec!["10.88.0.0/29".parse().unwrap(), "fd88::/125".parse().unwrap()],
        cluster_cidrs: vec!["10.88.0.0/16".parse().unwrap(), "192.0.2.0/25".parse().unwrap()],
        ..State::default()
    }
}

/// A host with a tunnel.
fn ready() -> Ground {
    let ground = Ground::new();
    ground.inside(&ground.host, &format!("ip link add {DEVICE} type bridge"));
    ground.inside(&ground.host, &format!("ip link set {DEVICE} up"));
    leave(&ground, &state());
    ground
}

fn leave(ground: &Ground, state: &State) {
    overlay::write(&file(ground), state).unwrap();
}

/// Where it is unless the configuration says otherwise.
fn file(ground: &Ground) -> std::path::PathBuf {
    ground.dir().join("run/overlay.json")
}

fn vxlan(ground: &Ground, more: &Value) -> Value {
    let mut config = ground.plugin("keelson-vxlan", more);
    config["ipam"]["dataDir"] = json!(ground.dir().join("ipam"));
    config
}

#[track_caller]
fn refused(ground: &Ground, config: &Value, verb: &str, pod: Option<&Pod>, code: u32, words: &str) {
    let told = ground.ask(config, verb, pod).unwrap_err();
    assert_eq!(told["code"], code, "{verb}: {told}");
    assert!(told["msg"].as_str().unwrap().contains(words), "{verb}: {words:?}: {told}");
}

#[track_caller]
fn nothing_left(ground: &Ground) {
    wait_for("the host without pairs", || ground.pairs().is_empty());
    assert_eq!(ground.leases(), Vec::<String>::new());
    let left: Vec<String> =
        ground.records().into_iter().filter(|path| !path.ends_with("overlay.json")).collect();
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn a_pod_gets_what_the_overlay_says() {
    let ground = ready();
    let config = vxlan(&ground, &json!({"delegate": {"bridge": "kgr0"}}));
    ground.ask(&config, "STATUS", None).unwrap();
    let (one, two) = (ground.pod("c1"), ground.pod("c2"));
    let first = ground.add(std::slice::from_ref(&config), &one);
    let second = ground.add(std::slice::from_ref(&config), &two);
    let addresses: Vec<&str> =
        first["ips"].as_array().unwrap().iter().map(|ip| ip["address"].as_str().unwrap()).collect();
    assert_eq!(addresses, ["10.88.0.2/29", "fd88::2/125"]);
    assert_eq!(first["interfaces"][0]["name"], "kgr0");
    let shown = ground.inside(&one.netns, "ip -o link show eth0");
    assert!(shown.contains("mtu 1380"), "{shown}");
    for index in 0..2 {
        let target = SocketAddr::new(address(&second, index), 7000);
        assert_eq!(seen(&one.netns, &two.netns, 7000, target), address(&first, index));
    }
    let default = ground.inside(&one.netns, "ip route show default");
    assert!(default.contains("via 10.88.0.1"), "{default}");
    let checked = with_result(&config, &first);
    ground.ask(&checked, "CHECK", Some(&one)).unwrap();
    // What a later state says is no difference of an attachment that is there.
    leave(&ground, &State { mtu: 1300, pod_cidrs: vec!["10.89.0.0/24".parse().unwrap()], ..state() });
    ground.ask(&checked, "CHECK", Some(&one)).unwrap();
    ground.inside(&ground.host, &format!("ip link set {DEVICE} down"));
    refused(&ground, &config, "STATUS", None, 51, "the tunnel device kltun0 is down");
    ground.inside(&ground.host, &format!("ip link del {DEVICE}"));
    refused(&ground, &config, "STATUS", None, 51, "the tunnel device kltun0 is missing");
    refused(&ground, &checked, "CHECK", Some(&one), 102, "the tunnel device kltun0 is missing");
    ground.del(std::slice::from_ref(&config), &one);
    ground.del(std::slice::from_ref(&config), &one);
    ground.gc(std::slice::from_ref(&config), &[]);
    nothing_left(&ground);
}

#[test]
fn without_the_overlay_pods_wait_and_what_is_there_goes_all_the_same() {
    let ground = ready();
    let config = vxlan(&ground, &json!({}));
    let (one, two, three) = (ground.pod("c1"), ground.pod("c2"), ground.pod("c3"));
    ground.add(std::slice::from_ref(&config), &one);
    ground.add(std::slice::from_ref(&config), &two);

    let wrong = |ground: &Ground, code: u32, words: &str| {
        refused(ground, &config, "ADD", Some(&three), code, words);
        refused(ground, &config, "STATUS", None, 50, words);
    };
    leave(&ground, &State { ready: false, reason: "no underlay".to_owned(), ..state() });
    wrong(&ground, 11, "the overlay is not ready: no underlay");
    leave(&ground, &State { mtu: 1000, ..state() });
    wrong(&ground, 7, "overlay.json: mtu: 1000 is not between 1280 and 65535");
    leave(&ground, &State { pod_cidrs: Vec::new(), ..state() });
    wrong(&ground, 7, "podCIDRs: is empty");
    fs::write(file(&ground), "{\"version\":1,").unwrap();
    wrong(&ground, 6, "cannot decode it");
    fs::write(file(&ground), "{\"version\":1,\"bootID\":\"another\",\"ready\":true}").unwrap();
    wrong(&ground, 11, "earlier boot");
    overlay::remove(&file(&ground)).unwrap();
    wrong(&ground, 11, "does not exist");

    ground.del(std::slice::from_ref(&config), &one);
    assert_eq!(ground.leases().len(), 1);
    ground.gc(std::slice::from_ref(&config), &[]);
    nothing_left(&ground);
}

#[test]
fn only_what_leaves_the_cluster_is_masqueraded() {
    let ground = ready();
    let node = ground.outside();
    ground.inside(&ground.host, "ip addr add 198.51.100.1/24 dev up0");
    ground.inside(&node, "ip addr add 198.51.100.2/24 dev eth0");
    ground.inside(&node, "ip route add 10.88.0.0/29 via 192.0.2.1");
    let config = vxlan(&ground, &json!({"ipMasq": true}));
    let pod = ground.pod("c1");
    let result = ground.add(std::slice::from_ref(&config), &pod);
    // 192.0.2.0/25 counts as another node's pods here.
    let at = |text: &str| -> SocketAddr { text.parse().unwrap() };
    assert_eq!(seen(&pod.netns, &node, 7000, at("192.0.2.2:7000")), address(&result, 0));
    let outside = seen(&pod.netns, &node, 7000, at("198.51.100.2:7000"));
    assert_eq!(outside.to_string(), "198.51.100.1");
    ground.ask(&with_result(&config, &result), "CHECK", Some(&pod)).unwrap();
    ground.del(std::slice::from_ref(&config), &pod);
    assert_eq!(ground.elements().len(), 0);
    nothing_left(&ground);
}

#[test]
fn routed_pods_and_pods_without_default_route() {
    let ground = ready();
    let routed = vxlan(&ground, &json!({"delegate": {"mode": "routed"}}));
    let (one, two) = (ground.pod("c1"), ground.pod("c2"));
    let first = ground.add(std::slice::from_ref(&routed), &one);
    assert_eq!(first["ips"][0]["address"], "10.88.0.2/32");
    ground.ask(&with_result(&routed, &first), "CHECK", Some(&one)).unwrap();
    let plain = vxlan(&ground, &json!({"delegate": {"isGateway": true, "isDefaultGateway": false}}));
    ground.add(std::slice::from_ref(&plain), &two);
    let routes = ground.inside(&two.netns, "ip route");
    assert!(routes.contains("10.88.0.0/16 via 10.88.0.1") && !routes.contains("default"), "{routes}");
    ground.del(std::slice::from_ref(&routed), &one);
    ground.del(std::slice::from_ref(&plain), &two);
    nothing_left(&ground);
}

#[test]
fn a_configuration_that_cannot_work_is_refused_by_name() {
    let ground = ready();
    let pod = ground.pod("c1");
    let cases = [
        (json!({"overlayFile": "overlay.json"}), 7, "overlayFile"),
        (json!({"delegate": 7}), 7, "delegate"),
        (json!({"delegate": {"ipam": {}}}), 7, "delegate.ipam"),
        (json!({"delegate": {"name": "x"}}), 7, "delegate.name"),
        (json!({"delegate": {"type": "keelson-vxlan"}}), 7, "delegate.type"),
        (json!({"delegate": {"type": "../sh"}}), 7, "delegate.type"),
        (json!({"delegate": {"type": "no-such-plugin"}}), 7, "delegate.type: no plugin \"no-such-plugin\""),
        (json!({"delegate": {"mtu": 1500}}), 7, "delegate.mtu: 1500 is not a number up to 1380"),
        (json!({"delegate": {"vlan": 5000}}), 7, "vlan: 5000"),
        (json!({"delegate": {"type": "bridge"}, "ipMasq": true}), 2, "ipMasq"),
        (json!({"ipMasq": true, "ipMasqExcept": ["10.0.0.0"]}), 7, "ipMasqExcept[0]"),
        (json!({"ipam": {"ranges": []}}), 7, "ipam.ranges: follows from podCIDRs"),
        (json!({"ipam": {"exclude": ["x"]}}), 7, "ipam.exclude"),
    ];
    for (more, code, words) in cases {
        let mut config = ground.plugin("keelson-vxlan", &more);
        if config["ipam"].is_null() {
            config["ipam"] = json!({"dataDir": ground.dir().join("ipam")});
        }
        refused(&ground, &config, "ADD", Some(&pod), code, words);
    }
    let elsewhere = vxlan(&ground, &json!({"overlayFile": ground.dir().join("elsewhere.json")}));
    refused(&ground, &elsewhere, "ADD", Some(&pod), 11, "elsewhere.json does not exist");
    nothing_left(&ground);
}

/// An executable in the plugins' directory that notes its calls and does as it is told.
fn script(ground: &Ground, name: &str, text: &str) -> std::path::PathBuf {
    let log = ground.dir().join("calls");
    let path = ground.dir().join("bin").join(name);
    let noted = format!(
        "#!/bin/sh\necho $CNI_COMMAND $CNI_CONTAINERID >> {}; cat > /dev/null\n{text}\n",
        log.display()
    );
    fs::write(&path, noted).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(&log, "").unwrap();
    log
}

#[test]
fn a_foreign_delegate_that_fails_is_taken_back_and_a_second_add_costs_the_first_nothing() {
    let ground = ready();
    let config = vxlan(&ground, &json!({"delegate": {"type": "failing"}}));
    let pod = ground.pod("c1");
    let log = script(
        &ground,
        "failing",
        "[ $CNI_COMMAND = ADD ] || exit 0; echo '{\"code\":123,\"msg\":\"half-way\"}'; exit 1",
    );
    refused(&ground, &config, "ADD", Some(&pod), 123, "half-way");
    assert_eq!(fs::read_to_string(&log).unwrap(), "ADD c1\nDEL c1\n");
    nothing_left(&ground);

    // Neither the addition nor its undoing works: the record tells DEL what to repeat.
    script(&ground, "failing", "echo '{\"code\":123,\"msg\":\"broken\"}'; exit 1");
    let told = ground.ask(&config, "ADD", Some(&pod)).unwrap_err();
    assert!(told["details"].as_str().unwrap().contains("not undone: detach by failing"), "{told}");
    assert_eq!(ground.records().len(), 2, "the state and the record");
    let log = script(&ground, "failing", "exit 0");
    // By now the configuration names another delegate.
    ground.del(&[vxlan(&ground, &json!({}))], &pod);
    assert_eq!(fs::read_to_string(&log).unwrap(), "DEL c1\n");
    nothing_left(&ground);

    let own = vxlan(&ground, &json!({}));
    let result = ground.add(std::slice::from_ref(&own), &pod);
    refused(&ground, &own, "ADD", Some(&pod), 100, "eth0 exists already");
    ground.ask(&with_result(&own, &result), "CHECK", Some(&pod)).unwrap();
    ground.del(std::slice::from_ref(&own), &pod);
    nothing_left(&ground);
}

#[test]
fn gc_detaches_what_a_foreign_delegate_left() {
    let ground = ready();
    let answer = json!({"cniVersion": "1.1.0", "ips": [{"address": "10.88.0.2/29"}]});
    let log = script(&ground, "other", &format!("[ $CNI_COMMAND = ADD ] && echo '{answer}'; exit 0"));
    let config = vxlan(&ground, &json!({"delegate": {"type": "other"}}));
    let (kept, stale) = (ground.pod("kept"), ground.pod("stale"));
    ground.add(std::slice::from_ref(&config), &kept);
    ground.add(std::slice::from_ref(&config), &stale);
    fs::write(&log, "").unwrap();
    ground.gc(std::slice::from_ref(&config), &[&kept]);
    assert_eq!(fs::read_to_string(&log).unwrap(), "DEL stale\nGC\n");
    ground.del(std::slice::from_ref(&config), &kept);
    nothing_left(&ground);
}

#[test]
fn the_reference_bridge_and_its_ipam_work_below_it() {
    if !Path::new(REFERENCE).join("bridge").exists() {
        eprintln!("skipped: {REFERENCE} is missing (apt-get install containernetworking-plugins)");
        return;
    }
    let ground = ready();
    for name in ["bridge", "host-local"] {
        std::os::unix::fs::symlink(Path::new(REFERENCE).join(name), ground.dir().join("bin").join(name))
            .unwrap();
    }
    let mut config = vxlan(&ground, &json!({"delegate": {"type": "bridge", "bridge": "kgr0"}}));
    config["cniVersion"] = json!("1.0.0");
    config["ipam"] = json!({"type": "host-local", "dataDir": ground.dir().join("hl")});
    let (one, two) = (ground.pod("c1"), ground.pod("c2"));
    let first = ground.add(std::slice::from_ref(&config), &one);
    let second = ground.add(std::slice::from_ref(&config), &two);
    let target = SocketAddr::new(address(&second, 0), 7000);
    assert_eq!(seen(&one.netns, &two.netns, 7000, target), address(&first, 0));
    let shown = ground.inside(&one.netns, "ip -o link show eth0");
    assert!(shown.contains("mtu 1380"), "{shown}");
    // host-local wants its ranges for DEL as well; they are in the record.
    overlay::remove(&file(&ground)).unwrap();
    ground.del(std::slice::from_ref(&config), &one);
    ground.del(std::slice::from_ref(&config), &two);
    nothing_left(&ground);
    let held = fs::read_dir(ground.dir().join("hl/net")).unwrap().flatten();
    let held: Vec<_> = held
        .map(|entry| entry.file_name())
        .filter(|name| name.to_string_lossy().starts_with("10."))
        .collect();
    assert!(held.is_empty(), "{held:?}");
}

#[test]
fn uninstall_takes_the_network_between_nodes_and_leaves_others() {
    let ground = Ground::new();
    let on_host = |command: &str| ground.inside(&ground.host, command);
    on_host("ip link set lo up");
    on_host("ip link add eth9 type veth peer name eth9p");
    on_host("ip link set eth9 up");
    on_host("ip addr add 192.0.2.1/24 dev eth9");
    on_host("ip -6 addr add 2001:db8::1/64 dev eth9 nodad");
    on_host(&format!("ip link add {DEVICE} type vxlan id 1 local 192.0.2.1 dstport 8472 dev eth9"));
    on_host(&format!("ip link set {DEVICE} up"));
    // As the agent makes them: through the tunnel, and, without one, through the peer.
    on_host(&format!("ip route add 10.88.1.0/24 via 10.88.1.0 dev {DEVICE} onlink proto 76"));
    on_host("ip route add 10.88.2.0/24 via 192.0.2.2 proto 76");
    on_host("ip -6 route add fd88:2::/64 via 2001:db8::2 proto 76");
    on_host("ip route add 10.99.0.0/24 via 192.0.2.2");
    leave(&ground, &state());
    // No tunnel: somebody else's link that the state of another network names.
    let other = ground.dir().join("other");
    on_host("ip link add kept0 type bridge");
    overlay::write(&other.join("overlay.json"), &State { device: Some("kept0".to_owned()), ..state() })
        .unwrap();
    let run = ground.dir().join("run");
    let told = on_host(&format!(
        "{} uninstall --conf-dir {dir}/none --bin-dir {dir}/bin --data-dir {dir}/ipam --log-file {dir}/none.log \
         --state-dir {} --state-dir {}",
        env!("CARGO_BIN_EXE_keelson-cni"),
        run.display(),
        other.display(),
        dir = ground.dir().display(),
    ));
    for gone in ["interface kltun0", "route to 10.88.2.0/24", "route to fd88:2::/64", "overlay.json"] {
        assert!(told.contains(gone), "{gone}: {told}");
    }
    let links = on_host("ip -o link");
    assert!(!links.contains(DEVICE) && links.contains("kept0") && links.contains("eth9"), "{links}");
    let routes = on_host("ip route") + &on_host("ip -6 route");
    assert!(!routes.contains("proto 76") && !routes.contains("10.88."), "{routes}");
    assert!(routes.contains("10.99.0.0/24 via 192.0.2.2"), "{routes}");
    assert!(!file(&ground).exists());
}
