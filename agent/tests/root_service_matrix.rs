//! Every kind of Service from API objects to real packets: type × policy × client place × family × protocol, as a table
//! that is printed. Each row is one Service, each column one kind of client; a cell says who answers.

use std::{
    collections::BTreeSet,
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ebpf_tests::{
    arena::{Arena, ip},
    places::{self, Place, SILENCE, forward},
    servers::{Server, ask_tcp},
    tables::at,
};
use keelson_agent::{
    config::{ForwardingMode, ProxySection, ShortcutMode, XdpMode},
    events::EventRecorder,
    proxy,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

#[path = "support/lists.rs"]
mod lists;

const DEADLINE: Duration = Duration::from_secs(90);
/// Endpoints: one on this node, one elsewhere. Both are addresses of the test's namespace.
const LOCAL: [&str; 2] = ["10.244.0.1", "fd00:244::1"];
const FAR: [&str; 2] = ["10.244.1.1", "fd00:244:1::1"];
const NODE: [&str; 2] = ["192.0.2.10", "2001:db8::10"];
/// How often each cell is asked: enough to meet both endpoints.
const ASKED: u32 = 24;

/// Who may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Both,
    Local,
    Far,
    Refused,
    /// Silence: a load balancer tries another node, and strangers learn nothing.
    Dropped,
    /// Not a service for this client; nothing listens there, or nothing is there.
    Untouched,
}

/// Which endpoints a Service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Endpoints {
    Both,
    FarOnly,
    None,
    /// The local one drains.
    LocalDraining,
    /// Both drain.
    AllDraining,
    /// Hints for this node name the local one.
    HintedLocal,
    /// Hints for this node's zone name the far one.
    HintedZone,
}

/// One row.
struct Row {
    what: &'static str,
    endpoints: Endpoints,
    spec: Value,
    /// What is dialled, by family; `None` stands for the clusterIP.
    dial: Dial,
    host: Expected,
    pod: Expected,
    /// A client on another machine.
    outside: Expected,
}

#[derive(Clone, Copy)]
enum Dial {
    ClusterIp,
    Addresses([&'static str; 2]),
    NodePort([&'static str; 2]),
}

#[allow(clippy::too_many_lines, reason = "a table")]
fn rows() -> Vec<Row> {
    use Endpoints as E;
    use Expected::{Both, Dropped, Far, Local, Refused, Untouched};
    let row = |what, endpoints, spec, dial, [host, pod, outside]: [Expected; 3]| Row {
        what,
        endpoints,
        spec,
        dial,
        host,
        pod,
        outside,
    };
    let cluster = |what, endpoints, spec, expected| {
        row(what, endpoints, spec, Dial::ClusterIp, [expected, expected, expected])
    };
    let internal_local = json!({"internalTrafficPolicy": "Local"});
    let external_local = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"});
    let loopback = Dial::NodePort(["127.0.0.1", "::1"]);
    let node = Dial::NodePort(NODE);
    vec![
        cluster("ClusterIP", E::Both, json!({}), Both),
        cluster("ClusterIP, no endpoints", E::None, json!({}), Refused),
        cluster("ClusterIP, internal Local", E::Both, internal_local.clone(), Local),
        row(
            "ClusterIP, internal Local, none here",
            E::FarOnly,
            internal_local.clone(),
            Dial::ClusterIp,
            [Refused, Refused, Dropped],
        ),
        cluster("ClusterIP, internal Local, draining", E::LocalDraining, internal_local, Local),
        cluster("ClusterIP, local draining", E::LocalDraining, json!({}), Far),
        cluster("ClusterIP, all draining", E::AllDraining, json!({}), Both),
        cluster("ClusterIP, hints for the node", E::HintedLocal, json!({}), Local),
        cluster("ClusterIP, hints for the zone", E::HintedZone, json!({}), Far),
        row("NodePort on the node's address", E::Both, json!({"type": "NodePort"}), node, [Both, Both, Both]),
        row(
            "NodePort on loopback",
            E::Both,
            json!({"type": "NodePort"}),
            loopback,
            [Both, Untouched, Untouched],
        ),
        row(
            "NodePort, no endpoints",
            E::None,
            json!({"type": "NodePort"}),
            node,
            [Refused, Refused, Refused],
        ),
        // Inside the cluster, externalTrafficPolicy does not count.
        row(
            "NodePort, external Local",
            E::FarOnly,
            json!({"type": "NodePort", "externalTrafficPolicy": "Local"}),
            node,
            [Far, Far, Dropped],
        ),
        row(
            "LoadBalancer",
            E::Both,
            json!({"type": "LoadBalancer"}),
            Dial::Addresses(["198.51.100.1", "2001:db8:1::1"]),
            [Both, Both, Both],
        ),
        row(
            "LoadBalancer, external Local",
            E::Both,
            external_local,
            Dial::Addresses(["198.51.100.2", "2001:db8:1::2"]),
            [Both, Both, Local],
        ),
        row(
            "LoadBalancer, ipMode Proxy",
            E::Both,
            json!({"type": "LoadBalancer", "ipMode": "Proxy"}),
            Dial::Addresses(["198.51.100.3", "2001:db8:1::3"]),
            [Untouched, Untouched, Untouched],
        ),
        row(
            "LoadBalancer, source ranges",
            E::Both,
            json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ["203.0.113.0/24", "2001:db8:ff::/48"]}),
            Dial::Addresses(["198.51.100.4", "2001:db8:1::4"]),
            [Both, Both, Both],
        ),
        row(
            "LoadBalancer, other source ranges",
            E::Both,
            json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8:fe::/48"]}),
            Dial::Addresses(["198.51.100.5", "2001:db8:1::5"]),
            [Both, Both, Dropped],
        ),
        row(
            "external IP of this node",
            E::Both,
            json!({"externalIPs": NODE}),
            Dial::Addresses(NODE),
            [Both, Both, Both],
        ),
        row(
            "external IP of somebody else",
            E::Both,
            json!({"externalIPs": ["203.0.114.9", "2001:db8:2::9"]}),
            Dial::Addresses(["203.0.114.9", "2001:db8:2::9"]),
            [Untouched, Untouched, Both],
        ),
        cluster("headless label", E::Both, json!({"label": "service.kubernetes.io/headless"}), Untouched),
        cluster(
            "another proxy's",
            E::Both,
            json!({"label": "service.kubernetes.io/service-proxy-name"}),
            Untouched,
        ),
        cluster(
            "ClusterIP, one client one endpoint",
            E::FarOnly,
            json!({"sessionAffinity": "ClientIP"}),
            Far,
        ),
    ]
}

fn cluster_ips(index: usize) -> [String; 2] {
    [format!("10.96.1.{index}"), format!("fd00:96::{index:x}")]
}

/// The port of a row: all its own, so that rows on the same address do not meet.
fn port(index: usize) -> usize {
    100 + index
}

fn service(index: usize, row: &Row) -> Value {
    let mut spec = row.spec.clone();
    let ips = cluster_ips(index);
    let label = spec.as_object_mut().and_then(|spec| spec.remove("label"));
    let mode = spec.as_object_mut().and_then(|spec| spec.remove("ipMode"));
    spec["clusterIP"] = ips[0].clone().into();
    spec["clusterIPs"] = json!(ips);
    let node_port = matches!(row.dial, Dial::NodePort(_)).then(|| 30000 + index);
    spec["ports"] = ["TCP", "UDP"]
        .map(|protocol| {
            json!({"name": protocol.to_lowercase(), "port": port(index), "protocol": protocol, "nodePort": node_port})
        })
        .to_vec()
        .into();
    let mut service = json!({
        "metadata": {"name": format!("s{index}"), "namespace": "default", "uid": format!("u{index}"), "labels": {}},
        "spec": spec,
    });
    if let Some(label) = label.as_ref().and_then(Value::as_str) {
        service["metadata"]["labels"][label] = "x".into();
    }
    if let (true, Dial::Addresses(addresses)) = (row.spec["type"] == "LoadBalancer", row.dial) {
        let ingress =
            addresses.map(|address| json!({"ip": address, "ipMode": mode.clone().unwrap_or("VIP".into())}));
        service["status"] = json!({"loadBalancer": {"ingress": ingress}});
    }
    service
}

fn slice(index: usize, row: &Row, family: usize) -> Value {
    let ready = json!({"ready": true});
    let draining = json!({"ready": false, "serving": true, "terminating": true});
    let endpoint = |address: &str, conditions: &Value, hints: Value| {
        let node = if LOCAL.contains(&address) { "node-1" } else { "node-2" };
        json!({"addresses": [address], "nodeName": node, "conditions": conditions, "hints": hints})
    };
    let (local, far, none) = (LOCAL[family], FAR[family], Value::Null);
    let node_hint = |name: &str| json!({"forNodes": [{"name": name}]});
    let zone_hint = |name: &str| json!({"forZones": [{"name": name}]});
    let endpoints = match row.endpoints {
        Endpoints::Both => vec![endpoint(local, &ready, none.clone()), endpoint(far, &ready, none)],
        Endpoints::FarOnly => vec![endpoint(far, &ready, none)],
        Endpoints::None => vec![],
        Endpoints::LocalDraining => {
            vec![endpoint(local, &draining, none.clone()), endpoint(far, &ready, none)]
        }
        Endpoints::AllDraining => {
            vec![endpoint(local, &draining, none.clone()), endpoint(far, &draining, none)]
        }
        Endpoints::HintedLocal => {
            vec![endpoint(local, &ready, node_hint("node-1")), endpoint(far, &ready, node_hint("node-2"))]
        }
        Endpoints::HintedZone => {
            vec![endpoint(local, &ready, zone_hint("z2")), endpoint(far, &ready, zone_hint("z1"))]
        }
    };
    json!({
        "metadata": {
            "name": format!("s{index}-{family}"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("s{index}")},
        },
        "addressType": (["IPv4", "IPv6"][family]),
        "endpoints": endpoints,
        "ports": [{"name": "tcp", "port": 8080, "protocol": "TCP"}, {"name": "udp", "port": 8080, "protocol": "UDP"}],
    })
}

fn ask(address: SocketAddr, udp: bool) -> io::Result<(String, SocketAddr)> {
    if !udp {
        return ask_tcp(address);
    }
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.send_to(b"who", address)?;
    let mut buffer = [0; 200];
    let (len, from) = socket.recv_from(&mut buffer)?;
    Ok((String::from_utf8_lossy(&buffer[..len]).into_owned(), from))
}

/// Who answers a client on another machine.
fn observe_outside(
    outside: &Place,
    address: SocketAddr,
    udp: bool,
    expected: Expected,
) -> std::result::Result<Expected, String> {
    let silent = matches!(expected, Expected::Dropped | Expected::Untouched);
    let patience = if silent { SILENCE } else { DEADLINE };
    let mut met = BTreeSet::new();
    for _ in 0..ASKED {
        let asked =
            if udp { outside.ask_udp(address, 3, patience) } else { outside.ask_tcp(address, patience) };
        match asked.map_err(|error| error.to_string())? {
            Ok(who) => drop(met.insert(who)),
            Err(_) if expected == Expected::Untouched => return Ok(expected),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(Expected::Refused),
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                return Ok(Expected::Dropped);
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    who_answered(&met)
}

/// Who answers a client here, and whether it sees the address that it dialled.
fn observe(address: SocketAddr, udp: bool, expected: Expected) -> std::result::Result<Expected, String> {
    if expected == Expected::Untouched && udp {
        // A datagram into the void says nothing; whether the address is a service is asked with TCP.
        return Ok(Expected::Untouched);
    }
    let mut met = BTreeSet::new();
    for _ in 0..ASKED {
        match ask(address, udp) {
            Ok((who, seen)) if seen == address => drop(met.insert(who)),
            Ok((_, seen)) => return Err(format!("dialled {address}, sees {seen}")),
            Err(error) if expected == Expected::Untouched => {
                return if error.kind() == io::ErrorKind::TimedOut {
                    Err(error.to_string())
                } else {
                    Ok(expected)
                };
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(Expected::Refused),
            Err(error) => return Err(error.to_string()),
        }
    }
    who_answered(&met)
}

fn who_answered(met: &BTreeSet<String>) -> std::result::Result<Expected, String> {
    let is = |ips: [&str; 2]| {
        met.iter().any(|who| ips.iter().any(|ip| who.trim_start_matches('[').starts_with(ip)))
    };
    match (is(LOCAL), is(FAR)) {
        (true, true) => Ok(Expected::Both),
        (true, false) => Ok(Expected::Local),
        (false, true) => Ok(Expected::Far),
        (false, false) => Err(format!("answered by {met:?}")),
    }
}

fn dialled(index: usize, row: &Row, family: usize) -> SocketAddr {
    let ips = cluster_ips(index);
    let (address, port) = match row.dial {
        Dial::ClusterIp => (ips[family].as_str(), port(index)),
        Dial::Addresses(addresses) => (addresses[family], port(index)),
        Dial::NodePort(addresses) => (addresses[family], 30000 + index),
    };
    SocketAddr::new(
        address.parse().expect("addresses are written as they should be"),
        u16::try_from(port).expect("ports are small"),
    )
}

/// All columns of one row, from the calling thread's namespace.
fn cells(
    index: usize,
    row: &Row,
    place: &str,
    expected: Expected,
    failures: &mut Vec<String>,
    observe: impl Fn(SocketAddr, bool, Expected) -> std::result::Result<Expected, String>,
) -> Vec<String> {
    let mut cells = Vec::new();
    for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
        for udp in [false, true] {
            let address = dialled(index, row, family);
            let seen = observe(address, udp, expected);
            if seen != Ok(expected) {
                let protocol = if udp { "UDP" } else { "TCP" };
                failures.push(format!(
                    "{} from {place}, {name} {protocol}: {seen:?}, not {expected:?}",
                    row.what
                ));
            }
            cells.push(seen.map_or_else(|why| why, |seen| format!("{seen:?}")));
        }
    }
    cells
}

/// A pod: a namespace of its own, joined to the node.
fn enter_pod(node_thread: i32) -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
    ip(&["link", "set", "lo", "up"])?;
    let node = node_thread.to_string();
    ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "pod", "netns", &node])?;
    ip(&["addr", "add", "10.244.9.2/24", "dev", "eth0"])?;
    ip(&["addr", "add", "fd00:244:9::2/64", "dev", "eth0", "nodad"])?;
    ip(&["link", "set", "eth0", "up"])
}

/// The node's end of it, and the routes.
fn join_pod() -> Result<()> {
    ip(&["addr", "add", "10.244.9.1/24", "dev", "pod"])?;
    ip(&["addr", "add", "fd00:244:9::1/64", "dev", "pod", "nodad"])?;
    ip(&["link", "set", "pod", "up"])
}

#[test]
#[allow(clippy::too_many_lines, reason = "one world, one walk through it")]
fn every_cell_of_the_semantics_matrix() -> Result<()> {
    let arena = Arena::with_strangers()?;
    forward()?;
    for address in ["2001:db8::10", "192.0.2.10"].into_iter().chain(LOCAL).chain(FAR) {
        places::add("lo", address)?;
    }
    let outside = Place::joined(
        "uplink",
        &["203.0.113.1/24", "2001:db8:ff::1/64"],
        &["203.0.113.2/24", "2001:db8:ff::2/64"],
    )?;
    outside.run(arena.step_out())??;
    let on = |family: usize, ip: &str| {
        at(&if family == 0 { format!("{ip}:8080") } else { format!("[{ip}]:8080") })
    };
    let mut servers = Vec::new();
    for family in [0, 1] {
        for address in [on(family, LOCAL[family]), on(family, FAR[family])] {
            servers.push(Server::tcp(address)?);
            servers.push(Server::udp(address)?);
        }
    }
    let rows = rows();
    let services = rows.iter().enumerate().map(|(index, row)| service(index, row)).collect();
    let slices =
        rows.iter().enumerate().flat_map(|(index, row)| [slice(index, row, 0), slice(index, row, 1)]);
    let slices: Vec<Value> = slices.collect();
    // One thread, so that everything stays in the arena's network namespace.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let section = ProxySection {
        enabled: true,
        cgroup_root: arena.cgroup.clone(),
        pin_dir: arena.pin_dir.clone(),
        service_cidr: "10.96.0.0/12,fd00:96::/108".to_owned(),
        node_port_addresses: Vec::new(),
        serve_outside: true,
        xdp: XdpMode::default(),
        pod_shortcut: ShortcutMode::default(),
        node_port_forwarding: ForwardingMode::default(),
        healthz_bind_address: [127, 0, 0, 1].into(),
        healthz_port: 10256,
        metrics_bind_address: [127, 0, 0, 1].into(),
        metrics_port: 10249,
    };
    let node = json!({
        "metadata": {"name": "node-1", "labels": {"topology.kubernetes.io/zone": "z1"}}, "spec": {},
    });
    let node = tokio::sync::watch::channel(Some(Arc::new(serde_json::from_value(node)?))).1;
    let config = proxy::ProxyConfig::new(&section, "node-1", [192, 0, 2, 10].into())?;
    let (events, _facts) = EventRecorder::new();
    let cancel = CancellationToken::new();
    runtime.block_on(async {
        let client = lists::client([("services", services), ("endpointslices", slices)]);
        let (_, host_ports) = tokio::sync::mpsc::channel(1);
        let task = tokio::spawn(proxy::run(client, config, node, events, host_ports, cancel.clone()));
        let until = Instant::now() + DEADLINE;
        // The data plane stays when its agent goes; once everything is programmed it is not needed any more.
        loop {
            let health = tokio::task::spawn_blocking(|| http_get("127.0.0.1:10256", "/healthz")).await?;
            if health.as_ref().is_ok_and(|text| text.starts_with("HTTP/1.1 200")) {
                break;
            }
            ensure!(Instant::now() < until, "the proxy is not healthy: {health:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let metrics = tokio::task::spawn_blocking(|| http_get("127.0.0.1:10249", "/metrics")).await??;
        for part in
            ["keelson_service_map_capacity", "keelson_service_connections_total{namespace=\"default\""]
        {
            ensure!(metrics.contains(part), "{part} is not in the metrics");
        }
        cancel.cancel();
        task.await?
    })?;
    let mut failures = Vec::new();
    let host: Vec<Vec<String>> = rows
        .iter()
        .enumerate()
        .map(|(i, row)| cells(i, row, "the host", row.host, &mut failures, observe))
        .collect();
    let strangers: Vec<Vec<String>> = rows
        .iter()
        .enumerate()
        .map(|(i, row)| {
            cells(i, row, "outside", row.outside, &mut failures, |address, udp, expected| {
                observe_outside(&outside, address, udp, expected)
            })
        })
        .collect();
    let here = nix::unistd::gettid().as_raw();
    let (ready, made) = std::sync::mpsc::channel();
    let (go, gone_ahead) = std::sync::mpsc::channel::<()>();
    let all = &rows;
    let pod = std::thread::scope(|scope| -> Result<Vec<Vec<String>>> {
        let pod = scope.spawn(move || -> Result<(Vec<Vec<String>>, Vec<String>)> {
            ready.send(enter_pod(here))?;
            gone_ahead.recv_timeout(DEADLINE)?;
            ip(&["route", "add", "default", "via", "10.244.9.1"])?;
            ip(&["-6", "route", "add", "default", "via", "fd00:244:9::1"])?;
            let mut failures = Vec::new();
            let rows = all.iter().enumerate();
            let cells =
                rows.map(|(i, row)| cells(i, row, "a pod", row.pod, &mut failures, observe)).collect();
            Ok((cells, failures))
        });
        made.recv_timeout(DEADLINE).context("the pod was not made")??;
        join_pod()?;
        go.send(())?;
        let (cells, of_pod) = pod.join().unwrap()?;
        failures.extend(of_pod);
        Ok(cells)
    })?;
    println!("{:38} {:40} {:40} outside", "service", "host: v4 TCP, v4 UDP, v6 TCP, v6 UDP", "pod");
    for (((row, host), pod), stranger) in rows.iter().zip(&host).zip(&pod).zip(&strangers) {
        println!("{:38} {:40} {:40} {}", row.what, host.join(", "), pod.join(", "), stranger.join(", "));
    }
    ensure!(failures.is_empty(), "{} cells are wrong:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

fn http_get(address: &str, path: &str) -> io::Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
