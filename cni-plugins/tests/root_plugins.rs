//! Tuning, bandwidth and loopback, chains with foreign plugins, bad input, the log and removal.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod lab;

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use cni_plugins_host::{
    netlink::{Netlink, Step},
    netns,
};
use cni_plugins_types::{CniResult, NetworkConfigList};
use lab::{
    BRIDGE, Lab, NETWORK, REFERENCE, address, assert_reachable, error_object, links_in, reason, wait_for,
};
use serde_json::{Value, json};

fn one_subnet(lab: &Lab) -> Value {
    lab.bridge(&json!([[{"subnet": "10.99.0.0/24"}]]))
}

fn sysctl(netns: &Path, name: &str) -> String {
    let path = Path::new("/proc/sys").join(name);
    let text = netns::run_in(netns, || fs::read_to_string(&path).unwrap()).unwrap();
    text.trim().to_owned()
}

#[test]
fn tuning_changes_checks_and_puts_back() {
    let lab = Lab::new();
    let tuning = json!({
        "type": "keelson-tuning", "mac": "02:00:00:00:00:77", "mtu": 1350, "promisc": true, "allmulti": true,
        "txQLen": 77,
        "sysctl": {"net.core.somaxconn": "77", "net.ipv4.conf.IFNAME.arp_ignore": "1"},
    });
    let list = lab.list_of(&[one_subnet(&lab), tuning]);
    let pod = lab.pod();
    let somaxconn = sysctl(&pod.netns, "net/core/somaxconn");
    let result = lab.add_to(&list, &pod).unwrap();
    assert_eq!(
        (result.interfaces[2].mac.as_str(), result.interfaces[2].mtu),
        ("02:00:00:00:00:77", Some(1350))
    );
    let eth0 = || links_in(&pod.netns).remove(0);
    let link = eth0();
    assert_eq!((link.mtu, link.promiscuous, link.all_multicast, link.tx_queue), (1350, true, true, 77));
    assert_eq!(sysctl(&pod.netns, "net/core/somaxconn"), "77");
    assert_eq!(sysctl(&pod.netns, "net/ipv4/conf/eth0/arp_ignore"), "1");
    assert_reachable(&lab.host, &pod.netns, address(&result, 0));
    netns::run_in(&pod.netns, || fs::write("/proc/sys/net/core/somaxconn", "9").unwrap()).unwrap();
    let told = lab.check(&list, &pod).unwrap_err();
    assert!(told.contains("sysctl net/core/somaxconn is \"9\", not \"77\""), "{told}");
    // DEL by the plugin alone: the interface is still there.
    lab.del_from(&list, &pod);
    assert_eq!(sysctl(&pod.netns, "net/core/somaxconn"), somaxconn);
    lab.assert_nothing_left();
}

#[test]
fn tuning_refuses_what_the_list_does_not_allow_and_undoes_what_it_did() {
    let lab = Lab::new();
    let allow = lab.path("allow");
    fs::write(&allow, "net.core.*\nnet.ipv4.no_such_parameter\n").unwrap();
    let pod = lab.pod();
    let mut tuning = json!({"type": "keelson-tuning", "mtu": 1300, "sysctlAllowFile": allow});
    let cases = [
        ("net.ipv4.ip_forward", "1", "sysctl: net.ipv4.ip_forward: is not allowed by"),
        ("kernel.hostname", "x", "sysctl: kernel.hostname: is not a parameter of a network namespace"),
        ("net/../kernel/hostname", "x", "is not a parameter of a network namespace"),
        ("net.ipv4.no_such_parameter", "1", "cannot be read in the pod"),
        ("net.core.somaxconn", "many", "sysctl: net/core/somaxconn=many is refused"),
    ];
    for (key, value, expected) in cases {
        tuning["sysctl"] = json!({key: value});
        let list = lab.list_of(&[one_subnet(&lab), tuning.clone()]);
        let told = reason(&lab.add_to(&list, &pod).unwrap_err());
        assert!(told.contains(expected) && told.contains("code 7"), "{key}: {told}");
        lab.assert_nothing_left();
    }
}

#[test]
fn bandwidth_limits_both_directions() {
    let lab = Lab::new();
    let list = lab.list_of(&[
        one_subnet(&lab),
        json!({"type": "keelson-bandwidth", "capabilities": {"bandwidth": true}}),
    ]);
    let mut pod = lab.pod();
    let rates = json!({"ingressRate": 80_000_000, "ingressBurst": 800_000, "egressRate": 40_000_000, "egressBurst": 800_000});
    pod.capability_args = BTreeMap::from([("bandwidth".to_owned(), rates)]);
    let result = lab.add_to(&list, &pod).unwrap();
    lab.check(&list, &pod).unwrap();
    let pod_addr = SocketAddr::new(address(&result, 0), 0);
    let host_addr = "10.99.0.1:0".parse().unwrap();
    // At 10 and at 5 MB/s, less the burst; nothing is said of how much longer it may take.
    let size = 3_000_000_u32;
    let ingress = transfer(&lab.host, &pod.netns, pod_addr, size);
    assert!(ingress >= Duration::from_millis(250), "3 MB into the pod in {ingress:?}");
    let egress = transfer(&pod.netns, &lab.host, host_addr, size);
    assert!(egress >= Duration::from_millis(500), "3 MB out of the pod in {egress:?}");
    // Somebody in the pod lifts its limit.
    let inside = Netlink::open_in(&pod.netns).unwrap();
    let eth0 = inside.link("eth0").unwrap().unwrap();
    inside.run(vec![Step::delete_root_qdisc(eth0.index)]).unwrap();
    let told = lab.check(&list, &pod).unwrap_err();
    assert!(told.contains("egress: eth0 has") && told.contains("not a limit of 40000000 bits/s"), "{told}");
    lab.del_from(&list, &pod);
    lab.assert_nothing_left();
}

/// Sends `size` bytes from one namespace to another; how long until the last arrived.
fn transfer(from: &Path, to: &Path, at: SocketAddr, size: u32) -> Duration {
    let listener = netns::run_in(to, || TcpListener::bind(at).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    let receiver = thread::spawn(move || {
        let mut received = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
        received.len()
    });
    let started = Instant::now();
    netns::run_in(from, || {
        let mut stream = TcpStream::connect(target).unwrap();
        stream.write_all(&vec![0; usize::try_from(size).unwrap()]).unwrap();
    })
    .unwrap();
    assert_eq!(receiver.join().unwrap(), usize::try_from(size).unwrap());
    started.elapsed()
}

#[test]
fn bandwidth_and_tuning_collect_what_has_no_attachment() {
    let lab = Lab::new();
    let list = lab.list_of(&[
        one_subnet(&lab),
        json!({"type": "keelson-bandwidth", "ingressRate": 8_000_000, "ingressBurst": 1_000_000}),
        json!({"type": "keelson-tuning", "mtu": 1300}),
    ]);
    let (kept, lost) = (lab.pod(), lab.pod());
    lab.add_to(&list, &kept).unwrap();
    lab.add_to(&list, &lost).unwrap();
    netns::remove(&lost.netns).unwrap();
    fs::remove_dir_all(&lab.invoker.cache_dir).unwrap();
    lab.gc(&list, &[&kept]);
    lab.wait_for_ports(1);
    assert_eq!(lab.held_addresses().len(), 1);
    lab.gc(&list, &[]);
    lab.assert_nothing_left();
}

#[test]
fn loopback_is_up_and_hands_a_result_on() {
    let lab = Lab::new();
    let list = lab.list_of(&[json!({"type": "keelson-loopback"})]);
    let mut pod = lab.pod();
    pod.ifname = "lo".to_owned();
    let result = lab.add_to(&list, &pod).unwrap();
    let addresses: Vec<String> = result.ips.iter().map(|ip| ip.address.to_string()).collect();
    assert_eq!(addresses, ["127.0.0.1/8", "::1/128"]);
    lab.check(&list, &pod).unwrap();
    lab.del_from(&list, &pod);
    let chain = lab.list_of(&[one_subnet(&lab), json!({"type": "keelson-loopback"})]);
    let pod = lab.pod();
    let result = lab.add_to(&chain, &pod).unwrap();
    assert_eq!(result.ips[0].address.to_string(), "10.99.0.2/24");
    lab.del_from(&chain, &pod);
    lab.assert_nothing_left();
}

#[test]
fn foreign_plugins_work_before_behind_and_below_ours() {
    if !Path::new(REFERENCE).join("bridge").exists() {
        eprintln!("skipped: {REFERENCE} is missing (apt-get install containernetworking-plugins)");
        return;
    }
    let lab = Lab::new();
    let data = lab.path("ipam");
    let ours = one_subnet(&lab);
    let foreign_bridge = |ipam: Value| json!({"type": "bridge", "bridge": BRIDGE, "isGateway": true, "isDefaultGateway": true, "ipam": ipam});
    let subnet = json!({"type": "keelson-ipam", "dataDir": data, "subnet": "10.99.0.0/24"});
    let host_local = json!({"type": "host-local", "dataDir": data.clone() + "/hl", "ranges": [[{"subnet": "10.99.0.0/24"}]]});
    let fixed = json!({"type": "static", "addresses": [{"address": "10.99.0.9/24", "gateway": "10.99.0.1"}]});
    let mut over_host_local = ours.clone();
    over_host_local["ipam"] = host_local;
    let mut over_static = ours.clone();
    over_static["ipam"] = fixed;
    let chains = [
        vec![over_host_local.clone()],
        vec![over_static],
        vec![foreign_bridge(subnet.clone())],
        vec![
            foreign_bridge(subnet),
            json!({"type": "keelson-tuning", "mtu": 1300}),
            json!({"type": "keelson-bandwidth", "ingressRate": 80_000_000, "ingressBurst": 8_000_000, "egressRate": 80_000_000, "egressBurst": 8_000_000}),
        ],
        vec![
            ours,
            json!({"type": "tuning", "mtu": 1300}),
            json!({"type": "bandwidth", "ingressRate": 80_000_000, "ingressBurst": 8_000_000}),
        ],
        vec![over_host_local, json!({"type": "keelson-tuning", "sysctl": {"net.core.somaxconn": "99"}})],
    ];
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        for (index, chain) in chains.iter().enumerate() {
            let list: NetworkConfigList = lab.list_of_version(version, chain);
            let (one, two) = (lab.pod(), lab.pod());
            let attach = |pod| {
                let added = lab.add_to(&list, pod);
                added.unwrap_or_else(|error| panic!("chain {index} in {version}: {}", reason(&error)))
            };
            let result: CniResult = attach(&one);
            assert_reachable(&lab.host, &one.netns, address(&result, 0));
            lab.check(&list, &one).unwrap_or_else(|told| panic!("chain {index} in {version}: {told}"));
            if index != 1 {
                let other = attach(&two);
                assert_reachable(&one.netns, &two.netns, address(&other, 0));
                lab.del_from(&list, &two);
            }
            lab.del_from(&list, &one);
            lab.assert_nothing_left();
        }
    }
}

#[test]
fn a_delegate_that_fails_half_way_is_undone() {
    let lab = Lab::new();
    let script = |name: &str, text: &str| {
        let path = lab.invoker.bin_dirs[0].join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        assert!(Command::new("chmod").arg("+x").arg(&path).status().unwrap().success());
    };
    let log = lab.path("delegate.log");
    let said = format!("echo $CNI_COMMAND >> {log}; cat > /dev/null; ");
    script(
        "failing-ipam",
        &format!("{said}[ $CNI_COMMAND = DEL ] && exit 0; echo '{{\"code\":11,\"msg\":\"busy\"}}'; exit 1"),
    );
    script("silent-ipam", &format!("{said}exit 0"));
    script(
        "wrong-ipam",
        &format!(
            "{said}[ $CNI_COMMAND = DEL ] || echo '{{\"cniVersion\":\"1.1.0\",\"ips\":[{{\"address\":\"10.0.0.300/24\"}}]}}'"
        ),
    );
    let cases = [
        ("failing-ipam", "busy (CNI error code 11)"),
        ("silent-ipam", "ipam: silent-ipam gave no usable result: nothing (CNI error code 6)"),
        ("wrong-ipam", "invalid CIDR address \"10.0.0.300/24\""),
    ];
    for (kind, expected) in cases {
        fs::write(&log, "").unwrap();
        let mut bridge = one_subnet(&lab);
        bridge["ipam"] = json!({"type": kind});
        let list = lab.list_of(&[bridge]);
        let pod = lab.pod();
        let told = reason(&lab.add_to(&list, &pod).unwrap_err());
        assert!(told.contains(expected), "{kind}: {told}");
        // Our own DEL, then the runtime's.
        assert_eq!(
            fs::read_to_string(&log).unwrap().lines().collect::<Vec<_>>(),
            ["ADD", "DEL", "DEL"],
            "{kind}"
        );
        lab.assert_nothing_left();
    }
}

#[track_caller]
fn refused(told: &Value, code: u32, expected: &str) {
    assert_eq!(told["code"], code, "{told}");
    assert!(told["msg"].as_str().unwrap().contains(expected), "{expected:?}: {told}");
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn bad_input_gets_the_right_code_and_names_the_field() {
    let lab = Lab::new();
    let pod = lab.pod();
    let netns = pod.netns.display().to_string();
    let ipam = json!({"type": "keelson-ipam", "dataDir": lab.path("ipam"), "subnet": "10.99.0.0/24"});
    let good = json!({
        "cniVersion": "1.1.0", "name": NETWORK, "type": "keelson-bridge", "bridge": BRIDGE, "ipam": ipam,
        "logFile": lab.path("cni.log"), "stateDir": lab.path("state"),
    });
    let with = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        config.to_string()
    };
    let ipam_with = |key: &str, value: Value| {
        let mut changed = ipam.clone();
        changed[key] = value;
        with("ipam", changed)
    };
    let deep = "[".repeat(100_000);
    let huge = format!("{{\"name\":\"{}\"}}", "x".repeat(17 << 20));
    let configs = [
        ("not json", 6, "cannot decode the configuration"),
        (&deep, 6, "recursion limit"),
        (&huge, 6, "larger than 16 MiB"),
        ("[]", 6, "not a JSON object"),
        (&with("cniVersion", "9.0.0".into()), 1, "9.0.0"),
        (&with("name", "../x".into()), 7, "name"),
        (&with("mtu", "big".into()), 7, "mtu: "),
        (&with("bridge", "a/b".into()), 7, "bridge"),
        (&with("ipam", json!({"type": "no-such-plugin"})), 7, "ipam.type"),
        (&with("ipam", json!({"subnet": "10.99.0.0/24"})), 7, "ipam.type"),
        (&ipam_with("subnet", "10.99.0.0/33".into()), 7, "ipam.subnet: "),
        (&ipam_with("subnet", "10.99.0.0/31".into()), 7, "ipam.subnet: 10.99.0.0/31 is too small"),
        (&ipam_with("gateway", "10.98.0.1".into()), 7, "ipam.gateway: 10.98.0.1"),
        (&ipam_with("subnet", "::ffff:10.99.0.0/120".into()), 7, "ipam.subnet: ::ffff:10.99.0.0/120"),
        (&ipam_with("type", "/bin/true".into()), 7, "ipam.type: \"/bin/true\""),
        (&ipam_with("type", "../bin/keelson-ipam".into()), 7, "ipam.type: \"../bin/keelson-ipam\""),
        (&ipam_with("dataDir", "relative".into()), 7, "ipam.dataDir: \"relative\""),
        (&with("stateDir", "run".into()), 7, "stateDir: \"run\""),
        (&with("bridge", "o4b%d".into()), 7, "bridge: \"o4b%d\""),
        (&with("ipMasqBackend", "iptables".into()), 2, "ipMasqBackend: iptables"),
        (&with("runtimeConfig", json!([])), 7, "runtimeConfig: "),
        (
            &with("runtimeConfig", json!({"ips": ["1.1.1.1"]})),
            7,
            "runtimeConfig.ips: requested IP address 1.1.1.1",
        ),
        (&ipam_with("ranges", json!([[{"subnet": "10.99.0.0/16"}]])), 7, "overlap"),
        (&ipam_with("resolvConf", "/nonexistent".into()), 7, "ipam.resolvConf"),
        (&ipam_with("routes", json!([{"dst": "0.0.0.0/0", "gw": "nowhere"}])), 7, "ipam.routes[0].gw: "),
        (&with("runtimeConfig", json!({"mac": "01:00:00:00:00:01"})), 7, "runtimeConfig.mac"),
        (&with("runtimeConfig", json!({"ips": ["10.99.0"]})), 7, "runtimeConfig.ips"),
        (&with("prevResult", json!({"cniVersion": "8.0.0"})), 1, "prevResult"),
        (&with("prevResult", json!({"ips": 7})), 6, "prevResult.ips: "),
        (&with("prevResult", json!({"ips": [{"address": "x"}]})), 6, "prevResult.ips[0].address: "),
    ];
    let environment = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", pod.container_id.as_str()),
        ("CNI_NETNS", netns.as_str()),
        ("CNI_IFNAME", "eth0"),
    ];
    for (config, code, expected) in configs {
        refused(&error_object(lab.call("keelson-bridge", &environment, config.as_bytes())), code, expected);
    }
    let variables = [
        ("CNI_COMMAND", "", 4, "CNI_COMMAND"),
        ("CNI_COMMAND", "MOVE", 4, "CNI_COMMAND"),
        ("CNI_CONTAINERID", "", 4, "CNI_CONTAINERID"),
        ("CNI_CONTAINERID", "../x", 4, "CNI_CONTAINERID"),
        ("CNI_IFNAME", "", 4, "CNI_IFNAME"),
        ("CNI_IFNAME", "sixteen-letters!", 4, "CNI_IFNAME"),
        ("CNI_IFNAME", "eth%d", 4, "CNI_IFNAME"),
        ("CNI_IFNAME", "all", 4, "CNI_IFNAME"),
        ("CNI_NETNS", "", 4, "CNI_NETNS"),
        ("CNI_NETNS", "/nonexistent", 3, "/nonexistent"),
        ("CNI_NETNS", "/proc/self/ns/uts", 3, "is not a network namespace"),
        ("CNI_NETNS", "/proc/self/ns/net", 4, "the host's own network namespace"),
        ("CNI_ARGS", "IP", 4, "CNI_ARGS"),
        ("CNI_ARGS", "IP=10.99.0", 7, "CNI_ARGS IP"),
    ];
    for (name, value, code, expected) in variables {
        let mut environment: Vec<(&str, &str)> = environment.to_vec();
        environment.retain(|(key, _)| *key != name);
        environment.push((name, value));
        let child = lab.call("keelson-bridge", &environment, good.to_string().as_bytes());
        refused(&error_object(child), code, expected);
    }
    // Names that were taken once must not keep a pod from going; a path would lead out of the records.
    for (name, is_taken) in [("eth%d", true), ("all", true), ("..", false), ("a/b", false), ("", false)] {
        let environment = [
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", pod.container_id.as_str()),
            ("CNI_NETNS", netns.as_str()),
            ("CNI_IFNAME", name),
        ];
        let child = lab.call("keelson-bridge", &environment, good.to_string().as_bytes());
        assert_eq!(child.wait_with_output().unwrap().status.success(), is_taken, "{name:?}");
    }
    for chained in ["keelson-tuning", "keelson-bandwidth"] {
        let child = lab.call(chained, &environment, with("type", chained.into()).as_bytes());
        refused(&error_object(child), 7, "prevResult is missing");
    }
    lab.assert_nothing_left();
    // The bridge may be there; nothing of the pod's.
    assert!(links_in(&pod.netns).is_empty());
    let log = fs::read_to_string(lab.path("cni.log")).unwrap();
    assert!(log.contains("keelson-bridge ADD network=testnet container=container0 interface=eth0"), "{log}");
    assert!(log.contains("failed: ipam.subnet: 10.99.0.0/31 is too small"), "{log}");
}

#[test]
fn loopback_is_installed_where_there_is_none_and_taken_away_where_it_is_ours() {
    let dir = tempfile::tempdir().unwrap();
    let keelson = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_keelson-cni")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    let path = |name: &str| dir.path().join(name).display().to_string();
    let netns = netns::create_named(&dir.path().join("netns"), "empty").unwrap();
    let uninstall = |bin: &str| {
        let own = [path("none"), path("data"), path("state"), path("log")];
        netns::run_in(&netns, || {
            keelson(&[
                "uninstall",
                "--bin-dir",
                bin,
                "--conf-dir",
                &own[0],
                "--data-dir",
                &own[1],
                "--state-dir",
                &own[2],
                "--log-file",
                &own[3],
            ]);
        })
        .unwrap();
    };
    let empty = path("empty-bin");
    keelson(&["install", &empty]);
    keelson(&["install", &empty]);
    let loopback = Path::new(&empty).join("loopback");
    assert_eq!(fs::read_link(&loopback).unwrap(), Path::new(env!("CARGO_BIN_EXE_keelson-cni")));
    uninstall(&empty);
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
    let used = path("used-bin");
    fs::create_dir(&used).unwrap();
    fs::write(Path::new(&used).join("loopback"), "another's").unwrap();
    // A link that leads nowhere is no plugin.
    let dangling = path("dangling-bin");
    fs::create_dir(&dangling).unwrap();
    std::os::unix::fs::symlink("/nowhere", Path::new(&dangling).join("loopback")).unwrap();
    keelson(&["install", &dangling]);
    uninstall(&dangling);
    assert_eq!(fs::read_dir(&dangling).unwrap().count(), 0);
    keelson(&["install", &used]);
    uninstall(&used);
    assert_eq!(fs::read_to_string(Path::new(&used).join("loopback")).unwrap(), "another's");
    assert_eq!(fs::read_dir(&used).unwrap().count(), 1);
    netns::remove(&netns).unwrap();
}

#[test]
fn one_command_removes_everything() {
    let lab = Lab::new();
    let list = lab.list_of(&[
        one_subnet(&lab),
        json!({"type": "keelson-tuning", "mtu": 1300}),
        json!({"type": "keelson-bandwidth", "ingressRate": 8_000_000, "ingressBurst": 1_000_000}),
    ]);
    let conf_dir = lab.path("net.d");
    fs::create_dir(&conf_dir).unwrap();
    fs::write(Path::new(&conf_dir).join("10-keelson.conflist"), &list.source).unwrap();
    let other = r#"{"cniVersion":"1.0.0","name":"other","type":"macvlan"}"#;
    fs::write(Path::new(&conf_dir).join("20-other.conf"), other).unwrap();
    for _ in 0..3 {
        lab.add_to(&list, &lab.pod()).unwrap();
    }
    // As a call leaves it that was refused before anything was given.
    fs::create_dir(lab.path("ipam/untouched")).unwrap();
    fs::write(lab.path("ipam/untouched/lock"), "").unwrap();
    let bin = lab.invoker.bin_dirs[0].clone();
    let keelson = env!("CARGO_BIN_EXE_keelson-cni");
    let output = netns::run_in(&lab.host, || {
        Command::new(keelson)
            .args(["uninstall", "--conf-dir", &conf_dir, "--data-dir", &lab.path("ipam")])
            .args(["--state-dir", &lab.path("state"), "--log-file", &lab.path("cni.log"), "--bin-dir"])
            .arg(&bin)
            .output()
            .unwrap()
    })
    .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(lab.links(), Vec::new());
    wait_for("pods without interfaces", || {
        let left = fs::read_dir(lab.dir.path().join("netns")).unwrap().flatten();
        let left: Vec<_> = left.flat_map(|entry| links_in(&entry.path())).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
    assert_eq!(fs::read_dir(&bin).unwrap().count(), 0);
    let left: Vec<_> = fs::read_dir(&conf_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["20-other.conf"]);
    for gone in ["ipam/testnet", "ipam/untouched", "state", "cni.log"] {
        assert!(!Path::new(&lab.path(gone)).exists(), "{gone}");
    }
}

/// `keelson-cni` in the host's namespace; no longer than a moment, whatever is in the way.
fn keelson(lab: &Lab, arguments: &[&str]) -> std::process::Output {
    netns::run_in(&lab.host, || {
        let limited = ["10", env!("CARGO_BIN_EXE_keelson-cni")];
        Command::new("timeout").args(limited).args(arguments).output().unwrap()
    })
    .unwrap()
}

#[test]
fn addresses_of_a_foreign_main_plugin_are_listed_and_removed_and_its_list_stays() {
    let lab = Lab::new();
    let conf_dir = lab.path("net.d");
    fs::create_dir(&conf_dir).unwrap();
    // A pipe must not hold anybody up.
    assert!(Command::new("mkfifo").arg(format!("{conf_dir}/05-pipe.conf")).status().unwrap().success());
    let shared = lab.path("shared");
    let ipam = json!({"type": "keelson-ipam", "DataDir": shared, "subnet": "10.99.0.0/24"});
    let list = lab.list_of(&[json!({"type": "flannel", "delegate": {"type": "bridge", "ipam": ipam}})]);
    fs::write(format!("{conf_dir}/10-foreign.conflist"), &list.source).unwrap();
    let pod = lab.pod();
    let netns = pod.netns.display().to_string();
    let environment = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", pod.container_id.as_str()),
        ("CNI_NETNS", netns.as_str()),
        ("CNI_IFNAME", "eth0"),
    ];
    let input = json!({"cniVersion": "1.1.0", "name": NETWORK, "type": "bridge", "ipam": ipam,
        "logFile": lab.path("cni.log")});
    let added = lab.call("keelson-ipam", &environment, input.to_string().as_bytes());
    assert!(added.wait_with_output().unwrap().status.success());
    // What is another's there is left alone.
    for (name, file) in [("etcd", "leases"), ("etcd2", "lock")] {
        fs::create_dir(format!("{shared}/{name}")).unwrap();
        fs::write(format!("{shared}/{name}/{file}"), "another's").unwrap();
    }
    let own = ["data", "state", "log", "bin"].map(|name| lab.path(name));
    let data_dir = format!("--data-dir={}", own[0]);
    let places = ["--conf-dir", &conf_dir, &data_dir, "--state-dir", &own[1], "--log-file", &own[2]];
    let run = |command: &str, more: &[&str]| {
        let output = keelson(&lab, &[&[command], &places[..], more].concat());
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        assert!(output.status.success(), "{output:?}");
        (text(output.stdout), text(output.stderr))
    };
    let (listed, told) = run("leases", &[]);
    assert!(listed.contains("10.99.0.2") && listed.lines().count() == 1, "{listed}");
    assert!(told.contains("05-pipe.conf is left out: it is not a regular file"), "{told}");
    // Help is help, and nothing else.
    let (help, _) = run("cleanup", &["--help"]);
    assert!(help.starts_with("usage:"), "{help}");
    assert!(run("leases", &[]).0.contains("10.99.0.2"));
    let (_, told) = run("uninstall", &["--bin-dir", &own[3]]);
    assert!(told.contains("10-foreign.conflist stays and names plugins"), "{told}");
    let mut left: Vec<_> = fs::read_dir(&shared).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["etcd", "etcd2"]);
}

#[test]
fn a_log_that_is_a_pipe_holds_no_pod_up() {
    let lab = Lab::new();
    assert!(Command::new("mkfifo").arg(lab.path("pipe")).status().unwrap().success());
    let pod = lab.pod();
    let netns = pod.netns.display().to_string();
    let mut config = one_subnet(&lab);
    for (key, value) in [
        ("name", NETWORK.to_owned()),
        ("cniVersion", "1.1.0".to_owned()),
        ("logFile", lab.path("pipe")),
        ("stateDir", lab.path("state")),
    ] {
        config[key] = value.into();
    }
    for command in ["ADD", "DEL"] {
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", pod.container_id.as_str()),
            ("CNI_NETNS", netns.as_str()),
            ("CNI_IFNAME", "eth0"),
        ];
        let mut child = lab.call("keelson-bridge", &environment, config.to_string().as_bytes());
        let status = wait_for("end of the call", || {
            child.try_wait().unwrap().ok_or_else(|| format!("{command} waits"))
        });
        assert!(status.success(), "{command}");
    }
    lab.assert_nothing_left();
}

#[test]
fn an_address_for_the_pod_that_is_the_gateways_is_refused() {
    let lab = Lab::new();
    let foreign = lab.dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    let plugin = foreign.join("first-address");
    let answer = r#"{"cniVersion":"1.1.0","ips":[{"address":"10.99.0.1/24"}]}"#;
    fs::write(&plugin, format!("#!/bin/sh\ncat >/dev/null\ntest $CNI_COMMAND != ADD || echo '{answer}'\n"))
        .unwrap();
    fs::set_permissions(&plugin, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let pod = lab.pod();
    let netns = pod.netns.display().to_string();
    let path = foreign.display().to_string();
    let environment = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", pod.container_id.as_str()),
        ("CNI_NETNS", netns.as_str()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", path.as_str()),
        ("PATH", "/usr/bin:/bin"),
    ];
    let config = json!({
        "cniVersion": "1.1.0", "name": NETWORK, "type": "keelson-bridge", "bridge": BRIDGE, "isGateway": true,
        "ipam": {"type": "first-address"}, "logFile": "", "stateDir": lab.path("state"),
    });
    let told = error_object(lab.call("keelson-bridge", &environment, config.to_string().as_bytes()));
    refused(&told, 7, "ipam: gives the pod 10.99.0.1, which the host is to have as the gateway");
    assert!(lab.links().is_empty() && links_in(&pod.netns).is_empty());
}

#[test]
fn a_relative_directory_is_refused_before_anything_is_written_there() {
    let lab = Lab::new();
    let pod = lab.pod();
    let cwd = lab.dir.path().join("cwd");
    fs::create_dir(&cwd).unwrap();
    let mut config = one_subnet(&lab);
    config["name"] = NETWORK.into();
    config["cniVersion"] = "1.1.0".into();
    let call = |command: &str, config: &Value| {
        let mut child = netns::run_in(&lab.host, || {
            Command::new(lab.invoker.bin_dirs[0].join("keelson-bridge"))
                .current_dir(&cwd)
                .env_clear()
                .env("CNI_COMMAND", command)
                .env("CNI_CONTAINERID", &pod.container_id)
                .env("CNI_NETNS", &pod.netns)
                .env("CNI_IFNAME", "eth0")
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        child
    };
    let mut good = config.clone();
    good["stateDir"] = lab.path("state").into();
    good["logFile"] = "".into();
    assert!(call("ADD", &good).wait_with_output().unwrap().status.success());
    for key in ["stateDir", "logFile"] {
        let mut wrong = good.clone();
        wrong[key] = "rel".into();
        refused(&error_object(call("ADD", &wrong)), 7, &format!("{key}: \"rel\" is not an absolute path"));
        assert!(call("DEL", &wrong).wait_with_output().unwrap().status.success());
    }
    assert_eq!(fs::read_dir(&cwd).unwrap().count(), 0);
    lab.assert_nothing_left();
}
