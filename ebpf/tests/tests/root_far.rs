//! Pods of two nodes whose packets go between pod and tunnel without bridge and stack: real packets between network namespaces.
//!
//! Whether the stack routed a packet is seen by the counters of the bridge that it would have passed.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context, Result, ensure};
use ebpf_loader::{DataPlane, DesiredWay, PodPort, SourcePrefix, Tunnel};
use ebpf_tests::{
    arena::{Arena, has_tcx, ip},
    bench::namespaces::Namespace,
    servers::{Server, ask_tcp, send_much},
    tables::at,
};

const PODS: [u8; 2] = [1, 2];
/// Connections of one look at the counters.
const ROUNDS: u64 = 20;
/// Frames that the bridge may carry meanwhile: ARP and neighbour discovery.
const FEW: u64 = 12;
/// Bytes that a packet may have in the tunnel; the pods take themselves for wider.
const TUNNEL_MTU: u32 = 1450;

/// The arena's namespace is one node, with two pods on a bridge; the other node is its own pod.
struct Ground {
    pods: Vec<Namespace>,
    other: Namespace,
    servers: Vec<Server>,
    plane: DataPlane,
    _arena: Arena,
}

fn near_v4(pod: u8) -> SocketAddr {
    at(&format!("10.244.0.{}:8080", pod + 1))
}

fn near_v6(pod: u8) -> SocketAddr {
    at(&format!("[fd00:244::{}]:8080", pod + 1))
}

fn far() -> [SocketAddr; 2] {
    [at("10.244.1.7:8080"), at("[fd00:244:1::7]:8080")]
}

fn port(pod: u8) -> String {
    format!("port{pod}")
}

/// The tunnel's device of a node, and its way to the other one's pods.
fn dig(own: u8, other: u8) -> Result<()> {
    let mac = |node: u8| format!("02:00:00:00:01:{node:02x}");
    let (local, remote) = (format!("192.0.2.{own}"), format!("192.0.2.{other}"));
    ip(&["link", "add", "tunnel", "address", &mac(own), "mtu", &TUNNEL_MTU.to_string(), "type", "vxlan"]
        .into_iter()
        .chain(["id", "75", "local", &local, "remote", &remote, "dstport", "4789", "nolearning"])
        .collect::<Vec<_>>())?;
    ip(&["addr", "add", &format!("10.244.{own}.0/32"), "dev", "tunnel"])?;
    ip(&["link", "set", "tunnel", "up"])?;
    let range = |node: u8| if node == 0 { "fd00:244::".to_owned() } else { format!("fd00:244:{node}::") };
    for (via, bits) in [(format!("10.244.{other}.0"), 24), (range(other), 64)] {
        ip(&["neigh", "add", &via, "lladdr", &mac(other), "dev", "tunnel", "nud", "permanent"])?;
        ip(&["route", "add", &format!("{via}/{bits}"), "via", &via, "dev", "tunnel", "onlink"])?;
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    Ok(fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?)
}

impl Ground {
    fn new() -> Result<Self> {
        let arena = Arena::enter(&[])?;
        for (bridge, address) in [("pods", "10.244.0.1/24"), ("fabric", "192.0.2.0/31")] {
            ip(&["link", "add", bridge, "type", "bridge"])?;
            ip(&["addr", "add", address, "dev", bridge])?;
            ip(&["link", "set", bridge, "up"])?;
        }
        ip(&["addr", "add", "fd00:244::1/64", "dev", "pods", "nodad"])?;
        let other = Namespace::start(None)?;
        other.plug(("fabric", "wire"), "eth0", "02:00:00:00:02:01", &["192.0.2.1/31"])?;
        dig(0, 1)?;
        other.run(|| -> Result<()> {
            dig(1, 0)?;
            for address in far() {
                ip(&["addr", "add", &address.ip().to_string(), "dev", "lo"])?;
            }
            Ok(())
        })??;
        let (mut pods, mut servers) = (Vec::new(), Vec::new());
        for pod in PODS {
            let place = Namespace::start(None)?;
            let addresses = [format!("{}/24", near_v4(pod).ip()), format!("{}/64", near_v6(pod).ip())];
            let addresses = addresses.each_ref().map(String::as_str);
            place.plug(("pods", &port(pod)), "eth0", &format!("02:00:00:00:00:0{pod}"), &addresses)?;
            place.run(|| -> Result<()> {
                ip(&["route", "add", "default", "via", "10.244.0.1"])?;
                ip(&["-6", "route", "add", "default", "via", "fd00:244::1"])
            })??;
            for address in [near_v4(pod), near_v6(pod)] {
                servers.push(place.run(move || Server::tcp(address))??);
            }
            pods.push(place);
        }
        for address in far() {
            servers.push(other.run(move || Server::tcp(address))??);
        }
        let mut plane = arena.open()?;
        plane.attach()?;
        let ways = far().map(|address| DesiredWay {
            to: SourcePrefix { address: address.ip(), bits: if address.is_ipv4() { 24 } else { 64 } },
            device: index("tunnel").expect("a tunnel"),
            via: Some(if address.is_ipv4() { IpAddr::from([10, 244, 1, 0]) } else { network(address.ip()) }),
            link: None,
            mtu: TUNNEL_MTU,
        });
        plane.set_ways(&ways)?;
        Ok(Self { pods, other, servers, plane, _arena: arena })
    }

    fn ports() -> Result<Vec<PodPort>> {
        let of = |pod: u8| -> Result<PodPort> {
            Ok(PodPort { index: index(&port(pod))?, address: [2, 0, 0, 0, 0, pod] })
        };
        PODS.into_iter().map(of).collect()
    }

    fn tunnel() -> Result<Tunnel> {
        let mac = link_address("pods")?;
        let bytes: Vec<u8> =
            mac.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
        let mut pods = BTreeMap::new();
        for pod in PODS {
            let link = index(&port(pod))?;
            pods.extend([near_v4(pod), near_v6(pod)].map(|address| (address.ip(), link)));
        }
        let bridge = bytes.as_slice().try_into()?;
        Ok(Tunnel { index: index("tunnel")?, bridge, mtu: 1500, pods })
    }

    /// Has the other node's pod be asked by one of ours, and ask it, some times; how many frames the bridge took and gave.
    fn carried(&self, pod: u8) -> Result<u64> {
        let before = frames("pods")?;
        let asked = far();
        self.pods[usize::from(pod) - 1].run(move || ask(&asked))??;
        let asked = [near_v4(pod), near_v6(pod)];
        self.other.run(move || ask(&asked))??;
        Ok(frames("pods")? - before)
    }
}

fn ask(addresses: &[SocketAddr]) -> Result<()> {
    for address in addresses {
        for _ in 0..ROUNDS / 2 {
            let (who, _) = ask_tcp(*address).with_context(|| format!("ask {address}"))?;
            ensure!(who == address.to_string(), "{address} answered as {who}");
        }
    }
    Ok(())
}

fn network(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
        v4 @ IpAddr::V4(_) => v4,
    }
}

fn index(device: &str) -> Result<u32> {
    Ok(nix::net::if_::if_nametoindex(device)?)
}

/// What `ip` shows, since the file system of devices may be another namespace's.
fn link_address(device: &str) -> Result<String> {
    let shown = std::process::Command::new("ip").args(["-o", "link", "show", "dev", device]).output()?;
    let text = String::from_utf8(shown.stdout)?;
    let address = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    Ok(address.context("a link address")?.to_owned())
}

/// Frames that a device of this namespace has received and sent.
fn frames(device: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    let figures: Vec<u64> =
        line.context("the device's counters")?.split_ascii_whitespace().flat_map(str::parse).collect();
    Ok(figures[1] + figures[9])
}

#[test]
fn pods_of_two_nodes_talk_past_bridge_and_stack() -> Result<()> {
    let mut ground = Ground::new()?;
    let whole = ground.carried(1)?;
    assert!(whole > ROUNDS * 12, "without anything the stack routes all: {whole}");
    if !has_tcx()? {
        assert_eq!(ground.plane.shortcut_pods(&Ground::ports()?), 0);
        assert_eq!(ground.plane.route_pods(Some(&Ground::tunnel()?)), 0);
        assert!(ground.carried(1)? > ROUNDS * 12, "the stack goes on");
        return Ok(());
    }
    assert_eq!(ground.plane.shortcut_pods(&Ground::ports()?), 2);
    let tunnel = Ground::tunnel()?;
    assert_eq!(ground.plane.route_pods(Some(&tunnel)), 4);
    for pod in PODS {
        let few = ground.carried(pod)?;
        assert!(few <= FEW, "{few} frames through the bridge");
    }
    // Pods of one node, and the node itself, are reached as ever.
    assert_eq!(ground.pods[0].run(|| ask_tcp(near_v4(2)))??.0, near_v4(2).to_string());
    assert_eq!(ask_tcp(near_v4(1))?.0, near_v4(1).to_string());
    assert_eq!(ask_tcp(far()[0])?.0, far()[0].to_string());
    // Large segments both ways; the pod learns that the tunnel is narrower than it thinks.
    send_much(&ground.other, SocketAddr::new(far()[0].ip(), 9000), &ground.pods[0])?;
    send_much(&ground.pods[0], SocketAddr::new(near_v4(1).ip(), 9000), &ground.other)?;
    // Only as long as it is wanted.
    assert_eq!(ground.plane.route_pods(None), 0);
    let again = ground.carried(1)?;
    assert!(again > ROUNDS * 12, "{again}");
    assert_eq!(ground.plane.route_pods(Some(&tunnel)), 4);
    assert!(ground.carried(1)? <= FEW);
    // Nobody has looked at the pods for long.
    assert_eq!(ground.plane.shortcut_pods_until(&Ground::ports()?, 1), 2);
    assert!(ground.carried(1)? > ROUNDS * 12);
    ground.servers.clear();
    Ok(())
}

#[test]
fn an_address_that_moves_is_believed_of_its_new_pod() -> Result<()> {
    if !has_tcx()? {
        return Ok(());
    }
    let mut ground = Ground::new()?;
    assert_eq!(ground.plane.shortcut_pods(&Ground::ports()?), 2);
    let tunnel = Ground::tunnel()?;
    assert_eq!(ground.plane.route_pods(Some(&tunnel)), 4);
    assert!(ground.carried(1)? <= FEW);
    ground.servers.retain(|server| server.address != near_v4(1));
    let moved = near_v4(1).ip();
    ground.pods[0].run(move || ip(&["addr", "del", &format!("{moved}/24"), "dev", "eth0"]))??;
    let target = SocketAddr::new(moved, 9001);
    let _heir = ground.pods[1].run(move || -> Result<Server> {
        ip(&["addr", "add", &format!("{moved}/24"), "dev", "eth0"])?;
        Ok(Server::tcp(target)?)
    })??;
    // As whoever takes an address over says to all.
    ip(&["neigh", "flush", "to", &moved.to_string()])?;
    assert_eq!(ask_tcp(target)?.0, target.to_string(), "the node has asked who has it");
    assert_eq!(ground.other.run(move || ask_tcp(target))??.0, target.to_string());
    // Who told the old place does not win against what the pod says, until it has looked again.
    assert_eq!(ground.plane.route_pods(Some(&tunnel)), 3);
    assert_eq!(ground.other.run(move || ask_tcp(target))??.0, target.to_string());
    let mut fresh = tunnel.clone();
    fresh.pods.insert(moved, index(&port(2))?);
    ground.plane.believe_pods();
    assert_eq!(ground.plane.route_pods(Some(&fresh)), 4);
    let before = frames("pods")?;
    for _ in 0..ROUNDS {
        assert_eq!(ground.other.run(move || ask_tcp(target))??.0, target.to_string());
    }
    assert!(frames("pods")? - before <= FEW, "the new place is served");
    Ok(())
}

#[test]
fn a_pod_whose_packets_take_the_bridge_is_not_routed_either() -> Result<()> {
    if !has_tcx()? {
        return Ok(());
    }
    let mut ground = Ground::new()?;
    assert_eq!(ground.plane.shortcut_pods(&Ground::ports()?), 2);
    let tunnel = Ground::tunnel()?;
    assert_eq!(ground.plane.route_pods(Some(&tunnel)), 4);
    let ports = Ground::ports()?;
    assert_eq!(ground.plane.shortcut_pods(&ports[..1]), 1);
    assert_eq!(ground.plane.route_pods(Some(&tunnel)), 2);
    assert!(ground.carried(1)? <= FEW);
    assert!(ground.carried(2)? > ROUNDS * 12);
    Ok(())
}
