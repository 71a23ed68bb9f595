//! Clients outside the node, from API objects to real packets, as the agent finds and serves the node's devices.
//!
//! ```text
//! outside 203.0.113.2 ── uplink │ node 203.0.113.1 │ pods0 ── near pod 10.244.1.2
//!                               │                  │ tun ──── far pod 10.244.2.2
//! ```

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ebpf_tests::{
    arena::{Arena, ip},
    places::{Place, SILENCE, forward},
    tables::at,
};
use keelson_agent::{
    config::{ForwardingMode, ProxySection, ShortcutMode, XdpMode},
    events::EventRecorder,
    host_ports::{HostPort, HostPorts, HostProtocol, Request as HostPortRequest},
    proxy::{
        self,
        show::{self, Output, Question},
    },
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

mod firewalls;
#[path = "../support/lists.rs"]
mod lists;
mod shortcut;

const DEADLINE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(15);
const NODE: [&str; 2] = ["203.0.113.1", "2001:db8::1"];
const CLIENT: [&str; 2] = ["203.0.113.2", "2001:db8::2"];

/// The node's namespace, which is the calling thread's, and what is around it.
struct World {
    arena: Arena,
    outside: Place,
    near: Place,
    _far: Place,
}

impl World {
    fn make() -> Result<Self> {
        let arena = Arena::with_strangers()?;
        forward()?;
        let outside = Place::joined(
            "uplink",
            &["203.0.113.1/24", "2001:db8::1/64"],
            &["203.0.113.2/24", "2001:db8::2/64"],
        )?;
        outside.run(arena.step_out())??;
        ip(&["route", "add", "default", "via", CLIENT[0]])?;
        // A bridge with a pod, as the CNI plugin makes it.
        let near = Place::empty()?;
        ip(&["link", "add", "pods0", "type", "bridge"])?;
        ip(&["addr", "add", "10.244.1.1/24", "dev", "pods0"])?;
        ip(&["addr", "add", "fd00:244:1::1/64", "dev", "pods0", "nodad"])?;
        ip(&["link", "set", "pods0", "up"])?;
        near.join("pod1", "eth0", &[], &["10.244.1.2/24", "fd00:244:1::2/64"])?;
        ip(&["link", "set", "pod1", "master", "pods0"])?;
        near.run(|| {
            ip(&["route", "add", "default", "via", "10.244.1.1"])?;
            ip(&["route", "add", "default", "via", "fd00:244:1::1"])
        })??;
        // A pod of another node: it knows the way to this node's pods alone, as behind a tunnel.
        let far = Place::empty()?;
        far.join(
            "tun",
            "eth0",
            &["10.244.1.0/32", "fd00:244:1::/128"],
            &["10.244.2.2/32", "fd00:244:2::2/128"],
        )?;
        for (own, range) in [("10.244.2.0/24", "10.244.1.0/24"), ("fd00:244:2::/64", "fd00:244:1::/64")] {
            ip(&["route", "add", own, "dev", "tun"])?;
            far.run(move || ip(&["route", "add", range, "dev", "eth0"]))??;
        }
        for (pod, name) in [(&near, "near"), (&far, "far")] {
            pod.serve("0.0.0.0:8080", name)?;
            pod.serve("[::]:8081", name)?;
        }
        // Strict filtering, as some distributions have it.
        for device in ["all", "uplink", "pods0", "tun"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{device}/rp_filter"), "1")?;
        }
        Ok(Self { arena, outside, near, _far: far })
    }

    fn section(&self) -> ProxySection {
        ProxySection {
            enabled: true,
            cgroup_root: self.arena.cgroup.clone(),
            pin_dir: self.arena.pin_dir.clone(),
            service_cidr: "10.96.0.0/12,fd00:96::/108".to_owned(),
            node_port_addresses: Vec::new(),
            serve_outside: true,
            xdp: XdpMode::default(),
            pod_shortcut: ShortcutMode::default(),
            node_port_forwarding: ForwardingMode::default(),
            healthz_bind_address: [127, 0, 0, 1].into(),
            healthz_port: 0,
            metrics_bind_address: [127, 0, 0, 1].into(),
            metrics_port: 0,
        }
    }

    fn ask(&self, address: &str, udp: bool) -> Result<io::Result<String>> {
        let address = at(address);
        if udp { self.outside.ask_udp(address, 3, PATIENCE) } else { self.outside.ask_tcp(address, PATIENCE) }
    }

    fn is_silent(&self, address: &str) -> Result<bool> {
        let asked = self.outside.ask_tcp(at(address), SILENCE)?;
        Ok(asked.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut))
    }
}

fn service(name: &str, port: u16, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec["clusterIP"] = format!("10.96.1.{}", port % 100).into();
    spec["clusterIPs"] = json!([spec["clusterIP"], format!("fd00:96::{:x}", port % 100)]);
    spec["ports"] = json!([
        {"name": "tcp", "port": 80, "protocol": "TCP", "nodePort": port},
        {"name": "udp", "port": 80, "protocol": "UDP", "nodePort": port},
    ]);
    let ingress = json!([{"ip": format!("198.51.100.{}", port % 100)}]);
    let mut service = json!({"metadata": {"name": name, "namespace": "default", "uid": name}, "spec": spec});
    if service["spec"]["type"] == "LoadBalancer" {
        service["status"] = json!({"loadBalancer": {"ingress": ingress}});
    }
    service
}

fn slices(name: &str, near: bool, far: bool) -> Vec<Value> {
    let endpoint = |address: &str, node: &str| json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}});
    let slice = |family: usize| {
        let mut endpoints = Vec::new();
        if near {
            endpoints.push(endpoint(["10.244.1.2", "fd00:244:1::2"][family], "node-1"));
        }
        if far {
            endpoints.push(endpoint(["10.244.2.2", "fd00:244:2::2"][family], "node-2"));
        }
        let port = [8080, 8081][family];
        json!({
            "metadata": {
                "name": format!("{name}-{family}"), "namespace": "default",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": (["IPv4", "IPv6"][family]),
            "endpoints": endpoints,
            "ports": [
                {"name": "tcp", "port": port, "protocol": "TCP"}, {"name": "udp", "port": port, "protocol": "UDP"},
            ],
        })
    };
    vec![slice(0), slice(1)]
}

/// An agent's proxy role in the calling thread's namespace, on a runtime of one thread.
struct Agent {
    runtime: tokio::runtime::Runtime,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<Result<()>>,
    host_ports: mpsc::Sender<HostPortRequest>,
}

impl Agent {
    fn start(world: &World, services: Vec<Value>, slices: Vec<Value>) -> Result<Self> {
        Self::with(&world.section(), services, slices, Vec::new())
    }

    fn with(
        section: &ProxySection,
        services: Vec<Value>,
        slices: Vec<Value>,
        nodes: Vec<Value>,
    ) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let node = json!({
            "metadata": {"name": "node-1"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:244:1::/64"]},
        });
        let node = tokio::sync::watch::channel(Some(Arc::new(serde_json::from_value(node)?))).1;
        let config = proxy::ProxyConfig::new(section, "node-1", NODE[0].parse()?)?
            .with_pod_devices(["tun".to_owned()]);
        let (events, _facts) = EventRecorder::new();
        let cancel = CancellationToken::new();
        let (host_ports, requests) = mpsc::channel(4);
        let task = {
            let _context = runtime.enter();
            let client =
                lists::client([("services", services), ("endpointslices", slices), ("nodes", nodes)]);
            let run = proxy::run(client, config, node, events, requests, cancel.clone());
            runtime.spawn(run)
        };
        let agent = Self { runtime, cancel, task, host_ports };
        // The first answer comes after the first fill.
        agent.host_ports(HostPorts::new())?;
        Ok(agent)
    }

    /// Asks for exactly these host ports; the owners that are served.
    fn host_ports(&self, wanted: HostPorts) -> Result<BTreeSet<String>> {
        let (done, answer) = oneshot::channel();
        self.runtime.block_on(async {
            self.host_ports.send(HostPortRequest { wanted, done }).await?;
            Ok(tokio::time::timeout(DEADLINE, answer).await??)
        })
    }

    /// Lets the agent run until something holds.
    fn until(&self, what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
        let until = Instant::now() + DEADLINE;
        while !holds()? {
            ensure!(Instant::now() < until, "{what} did not happen");
            self.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(10)).await });
        }
        Ok(())
    }

    fn stop(self) -> Result<()> {
        self.cancel.cancel();
        self.runtime
            .block_on(async { Ok::<_, anyhow::Error>(tokio::time::timeout(DEADLINE, self.task).await??) })?
    }
}

fn ask_maps(world: &World, question: &Question) -> Result<String> {
    let mut text = String::new();
    show::answer(&world.arena.pin_dir, question, Output::Table, |part| {
        text.push_str(part);
        Ok(())
    })?;
    Ok(text)
}

fn rp_filter(device: &str) -> Result<String> {
    let dir = format!("/proc/sys/net/ipv4/conf/{device}");
    let read = |name: &str| std::fs::read_to_string(format!("{dir}/{name}"));
    Ok(format!("{}{}", read("rp_filter")?.trim(), read("accept_local")?.trim()))
}

#[test]
#[allow(clippy::too_many_lines, reason = "one scene, told in its order")]
fn clients_outside_reach_pods_here_and_elsewhere() -> Result<()> {
    let world = World::make()?;
    let cluster = json!({"type": "LoadBalancer"});
    let local = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"});
    let ranged = |range: &str| json!({"type": "LoadBalancer", "loadBalancerSourceRanges": [range]});
    let services = vec![
        service("near", 30001, &cluster),
        service("far", 30002, &cluster),
        service("local", 30003, &local),
        service("nobody-here", 30004, &local),
        service("nobody", 30005, &cluster),
        service("let-in", 30006, &ranged("203.0.113.0/24")),
        service("kept-out", 30007, &ranged("192.0.2.0/24")),
        service("external", 30008, &json!({"type": "NodePort", "externalIPs": ["198.51.100.99"]})),
    ];
    let all = [
        slices("near", true, false),
        slices("far", false, true),
        slices("local", true, true),
        slices("nobody-here", false, true),
        slices("nobody", false, false),
        slices("let-in", true, false),
        slices("kept-out", true, false),
        slices("external", true, false),
    ];
    let agent = Agent::start(&world, services, all.concat())?;
    // Whom the pod sees: the address of the device that leads to it, or the client itself.
    for (node_port, pod, seen) in [
        (30001, "near", ["10.244.1.1", "fd00:244:1::1"]),
        (30002, "far", ["10.244.1.0", "fd00:244:1::"]),
        (30003, "near", CLIENT),
    ] {
        for udp in [false, true] {
            for (family, node) in NODE.iter().enumerate() {
                let dialled = SocketAddr::new(node.parse()?, node_port).to_string();
                let answer =
                    world.ask(&dialled, udp)?.with_context(|| format!("dial {dialled}, UDP {udp}"))?;
                let from = SocketAddr::new(seen[family].parse()?, 0).to_string();
                let start = format!("{pod} {}", from.trim_end_matches('0'));
                ensure!(answer.starts_with(&start), "{dialled}, UDP {udp}: {answer}, not {start}");
            }
            let balancer = format!("198.51.100.{}:80", node_port % 100);
            let answer = world.ask(&balancer, udp)?.with_context(|| format!("dial {balancer}"))?;
            ensure!(answer.starts_with(&format!("{pod} {}:", seen[0])), "{balancer}: {answer}");
        }
    }
    world.ask("198.51.100.6:80", false)?.context("in the source ranges")?;
    world.ask("198.51.100.99:80", false)?.context("an external IP")?;
    ensure!(world.is_silent("198.51.100.7:80")?, "in no source range");
    ensure!(
        world.is_silent("203.0.113.1:30004")?,
        "policy Local, nobody here: the balancer tries another node"
    );
    for refusing in ["203.0.113.1:30005", "198.51.100.5:80"] {
        for udp in [false, true] {
            let error = world.ask(refusing, udp)?.err().context("nobody is there")?;
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{refusing}, UDP {udp}");
        }
    }
    let trace = |destination: &str| {
        let (source, destination) = (CLIENT[0].to_owned(), destination.to_owned());
        ask_maps(&world, &Question::Trace { source, destination, protocol: "TCP".to_owned() })
    };
    for (destination, part) in [
        ("203.0.113.1:30001", "a client outside is connected to one of\n  10.244.1.2:8080"),
        ("203.0.113.1:30003", "with its own address, to one of\n  10.244.1.2:8080"),
        ("203.0.113.1:30004", "dropped: policy Local finds no endpoint"),
        ("203.0.113.1:30005", "refused at once"),
        ("198.51.100.7:80", "dropped: the client is in no source range"),
        ("203.0.113.1:22", "no service"),
    ] {
        let text = trace(destination)?;
        ensure!(text.contains(part), "{destination}: {text}");
    }
    let devices = ask_maps(&world, &Question::Devices)?;
    for part in ["uplink", "outside", "pods0", "10.244.1.1,fd00:244:1::1", "tun", "10.244.1.0"] {
        ensure!(devices.contains(part), "{part} is not in:\n{devices}");
    }
    ensure!(!devices.contains("pod1"), "a bridge's port is the bridge's:\n{devices}");
    let flows = ask_maps(&world, &Question::Flows { limit: 1000 })?;
    ensure!(flows.contains("203.0.113.1:30002") && flows.contains("10.244.2.2:8080"), "{flows}");
    agent.stop()?;
    world.ask("203.0.113.1:30001", false)?.context("the data plane needs no agent")?;
    Ok(())
}

#[test]
fn node_ports_are_answered_directly_where_node_and_service_want_that() -> Result<()> {
    let world = World::make()?;
    let objects = || -> (Vec<Value>, Vec<Value>) {
        let mut services =
            vec![service("far", 30002, &json!({"type": "NodePort"})), service("plain", 30003, &json!({}))];
        services[0]["metadata"]["annotations"] = json!({"service.keelson.io/forwarding": "dsr"});
        (services, [slices("far", false, true), slices("plain", false, true)].concat())
    };
    let node = |name: &str, addresses: [&str; 2]| {
        let addresses = addresses.map(|address| json!({"type": "InternalIP", "address": address}));
        json!({"metadata": {"name": name}, "status": {"addresses": addresses}})
    };
    let nodes = vec![node("node-1", NODE), node("node-2", ["203.0.113.9", "2001:db8::9"])];
    let trace = |destination: &str| {
        let (source, destination) = (CLIENT[0].to_owned(), destination.to_owned());
        ask_maps(&world, &Question::Trace { source, destination, protocol: "TCP".to_owned() })
    };
    let shown = "with its own address, to one of\n  10.244.2.2:8080";
    let hidden = "a client outside is connected to one of\n  10.244.2.2:8080";
    let direct = ProxySection { node_port_forwarding: ForwardingMode::Dsr, ..world.section() };
    let (services, slices) = objects();
    let agent = Agent::with(&direct, services, slices, nodes)?;
    agent.until("all nodes' addresses are known", || Ok(trace("203.0.113.1:30002")?.contains(shown)))?;
    for (destination, part) in
        [("203.0.113.9:30002", shown), ("203.0.113.1:30003", hidden), ("203.0.113.9:30003", "no service")]
    {
        let text = trace(destination)?;
        ensure!(text.contains(part), "{destination}: {text}");
    }
    agent.stop()?;
    // Switched off again, the node serves its own addresses as before, and others' not at all.
    let (services, slices) = objects();
    let agent = Agent::start(&world, services, slices)?;
    agent.until("other nodes' addresses are forgotten", || {
        Ok(trace("203.0.113.9:30002")?.contains("no service"))
    })?;
    let text = trace("203.0.113.1:30002")?;
    ensure!(text.contains(hidden), "{text}");
    agent.stop()
}

#[test]
fn devices_are_followed_and_left_as_they_were() -> Result<()> {
    let world = World::make()?;
    let services = vec![service("near", 30001, &json!({"type": "NodePort"}))];
    let agent = Agent::start(&world, services, slices("near", true, false))?;
    world.ask("203.0.113.1:30001", false)?.context("served from the start")?;
    assert_eq!(rp_filter("uplink")?, "21", "loose, and from this node");
    // A second interface with clients of its own.
    let second = Place::joined("second", &["192.0.2.1/24"], &["192.0.2.2/24"])?;
    second.run(world.arena.step_out())??;
    agent.until("the new interface is served", || {
        Ok(second.ask_tcp(at("192.0.2.1:30001"), SILENCE)?.is_ok())
    })?;
    ip(&["link", "del", "second"])?;
    agent.until("the interface is forgotten", || {
        Ok(!ask_maps(&world, &Question::Devices)?.contains("second"))
    })?;
    agent.stop()?;
    // The next agent finds everything, and a client notices nothing.
    let services = vec![service("near", 30001, &json!({"type": "NodePort"}))];
    let agent = Agent::start(&world, services, slices("near", true, false))?;
    world.ask("203.0.113.1:30001", false)?.context("served by the next agent")?;
    agent.stop()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(proxy::cleanup(&world.arena.pin_dir, "10.96.0.0/12,fd00:96::/108"))?;
    for device in ["uplink", "pods0", "tun"] {
        assert_eq!(rp_filter(device)?, "10", "{device} is as it was");
    }
    ensure!(world.ask("203.0.113.1:30001", false)?.is_err(), "nothing is served any more");
    Ok(())
}

#[test]
fn host_ports_are_served_inside_and_outside() -> Result<()> {
    let world = World::make()?;
    let services = vec![service("near", 30001, &json!({"type": "NodePort"}))];
    let agent = Agent::start(&world, services, slices("near", true, false))?;
    let port = |protocol, host_ip: Option<&str>, port| -> Result<HostPort> {
        let host_ip = host_ip.map(str::parse).transpose()?;
        Ok(HostPort { protocol, host_ip, port, target: at("10.244.1.2:8080") })
    };
    let wanted = HostPorts::from([
        ("a".to_owned(), [port(HostProtocol::Tcp, None, 80)?, port(HostProtocol::Udp, None, 53)?].into()),
        ("b".to_owned(), [port(HostProtocol::Tcp, Some("127.0.0.1"), 81)?].into()),
        ("taken".to_owned(), [port(HostProtocol::Tcp, None, 30001)?].into()),
    ]);
    let served = agent.host_ports(wanted.clone())?;
    assert_eq!(served, ["a".to_owned(), "b".to_owned()].into(), "a NodePort keeps its port");
    for (address, udp) in [("203.0.113.1:80", false), ("203.0.113.1:53", true)] {
        let answer = world.ask(address, udp)?.with_context(|| format!("dial {address}"))?;
        ensure!(answer.starts_with("near 203.0.113.2:"), "the pod sees its client: {answer}");
    }
    ensure!(world.ask("203.0.113.1:81", false)?.is_err(), "that one is loopback's");
    for address in ["203.0.113.1:80", "127.0.0.1:80", "127.0.0.1:81"] {
        ebpf_tests::servers::ask_tcp(at(address))
            .with_context(|| format!("the node itself dials {address}"))?;
    }
    let pod = world.near.run(|| ebpf_tests::servers::ask_tcp(at("127.0.0.1:81")))?;
    ensure!(pod.is_err(), "a pod's loopback is its own");
    world.near.run(|| ebpf_tests::servers::ask_tcp(at("203.0.113.1:80")))?.context("a pod dials the node")?;
    // The next agent keeps them until it is told otherwise.
    agent.stop()?;
    world.ask("203.0.113.1:80", false)?.context("without an agent")?;
    let services = vec![service("near", 30001, &json!({"type": "NodePort"}))];
    let agent = Agent::start(&world, services, slices("near", true, false))?;
    agent.until("nobody asks for it any more", || {
        Ok(world.outside.ask_tcp(at("203.0.113.1:80"), SILENCE)?.is_err())
    })?;
    agent.host_ports(wanted)?;
    world.ask("203.0.113.1:80", false)?.context("asked for again")?;
    agent.stop()
}
