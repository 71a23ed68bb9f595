//! Pods of one bridge that hand their packets straight to each other: real packets between network namespaces.
//!
//! Whether the bridge carried a packet is seen by the counter of the port that it leaves by.

use std::{fs, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use ebpf_loader::{DataPlane, Device, PodPort, Side};
use ebpf_tests::{
    arena::{Arena, has_tcx, ip},
    bench::namespaces::Namespace,
    servers::{Server, ask_tcp, send_much},
    tables::at,
};

const PODS: [u8; 3] = [1, 2, 3];
/// Connections of one look at the counters.
const ROUNDS: u64 = 20;
/// Frames that the bridge may carry meanwhile: ARP and neighbour discovery.
const FEW: u64 = 12;

/// Three pods on a bridge of the arena's namespace, each with a server on both of its addresses.
struct Ground {
    pods: Vec<Namespace>,
    servers: Vec<Server>,
    plane: DataPlane,
    _arena: Arena,
}

fn v4(pod: u8) -> SocketAddr {
    at(&format!("10.244.0.{}:8080", pod + 1))
}

fn v6(pod: u8) -> SocketAddr {
    at(&format!("[fd00:244::{}]:8080", pod + 1))
}

fn port(pod: u8) -> String {
    format!("port{pod}")
}

impl Ground {
    fn new() -> Result<Self> {
        let arena = Arena::enter(&[])?;
        ip(&["link", "add", "pods", "type", "bridge"])?;
        ip(&["addr", "add", "10.244.0.1/24", "dev", "pods"])?;
        ip(&["addr", "add", "fd00:244::1/64", "dev", "pods", "nodad"])?;
        ip(&["link", "set", "pods", "up"])?;
        let (mut pods, mut servers) = (Vec::new(), Vec::new());
        for pod in PODS {
            let place = Namespace::start(None)?;
            let addresses = [format!("{}/24", v4(pod).ip()), format!("{}/64", v6(pod).ip())];
            let addresses = addresses.each_ref().map(String::as_str);
            place.plug(("pods", &port(pod)), "eth0", &format!("02:00:00:00:00:0{pod}"), &addresses)?;
            for address in [v4(pod), v6(pod)] {
                servers.push(place.run(move || Server::tcp(address))??);
            }
            pods.push(place);
        }
        let mut plane = arena.open()?;
        plane.attach()?;
        Ok(Self { pods, servers, plane, _arena: arena })
    }

    fn ports() -> Result<Vec<PodPort>> {
        let of = |pod: u8| -> Result<PodPort> {
            let index = nix::net::if_::if_nametoindex(port(pod).as_str())?;
            Ok(PodPort { index, address: [2, 0, 0, 0, 0, pod] })
        };
        PODS.into_iter().map(of).collect()
    }

    /// Has one pod ask another one by both families, some times; how many frames its port of the bridge let out.
    fn carried(&self, from: u8, to: u8) -> Result<u64> {
        let before = sent(&port(to))?;
        self.pods[usize::from(from) - 1].run(move || -> Result<()> {
            for address in [v4(to), v6(to)] {
                for _ in 0..ROUNDS / 2 {
                    let (who, _) = ask_tcp(address).with_context(|| format!("ask {address}"))?;
                    ensure!(who == address.to_string(), "{address} answered as {who}");
                }
            }
            Ok(())
        })??;
        Ok(sent(&port(to))? - before)
    }
}

/// Frames that a device of this namespace has sent.
fn sent(device: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    let figure =
        line.and_then(|line| line.split_ascii_whitespace().nth(9)).context("the device's counters")?;
    Ok(figure.parse()?)
}

#[test]
fn pods_of_one_bridge_talk_past_it_and_nobody_else_notices() -> Result<()> {
    let mut ground = Ground::new()?;
    let ports = Ground::ports()?;
    let whole = ground.carried(1, 2)?;
    assert!(whole > ROUNDS * 3, "without anything the bridge carries all: {whole}");
    if !has_tcx()? {
        assert_eq!(ground.plane.shortcut_pods(&ports), 0);
        assert!(ground.carried(1, 2)? > ROUNDS * 3, "the bridge goes on");
        return Ok(());
    }
    assert_eq!(ground.plane.shortcut_pods(&ports), 3);
    let few = ground.carried(1, 2)?;
    assert!(few <= FEW, "{few} frames through the bridge");
    assert!(ground.carried(3, 1)? <= FEW);
    // The node's own connections take the bridge as ever, both ways.
    for pod in PODS {
        assert_eq!(ask_tcp(v4(pod))?.0, v4(pod).to_string());
    }
    let own = Server::tcp(at("10.244.0.1:8080"))?;
    let address = own.address;
    let answer = ground.pods[0].run(move || ask_tcp(address))??;
    assert_eq!(answer.0, address.to_string());
    // Large segments, whose checksums nobody has computed.
    send_much(&ground.pods[1], at("10.244.0.3:9000"), &ground.pods[0])?;
    // Itself, by its own address.
    assert_eq!(ground.pods[0].run(|| ask_tcp(v4(1)))??.0, v4(1).to_string());
    // A pod that nobody hands anything to any more.
    assert_eq!(ground.plane.shortcut_pods(&[ports[0].clone(), ports[2].clone()]), 2);
    let again = ground.carried(1, 2)?;
    assert!(again > ROUNDS * 3, "{again} frames for a pod that is none of them");
    assert!(ground.carried(1, 3)? <= FEW);
    assert_eq!(ground.plane.shortcut_pods(&[]), 0);
    assert!(ground.carried(1, 3)? > ROUNDS * 3);
    ground.servers.clear();
    Ok(())
}

#[test]
fn an_address_that_moves_to_another_pod_takes_its_packets_along() -> Result<()> {
    if !has_tcx()? {
        return Ok(());
    }
    let mut ground = Ground::new()?;
    assert_eq!(ground.plane.shortcut_pods(&Ground::ports()?), 3);
    assert!(ground.carried(1, 2)? <= FEW);
    ground.servers.retain(|server| server.address != v4(2));
    let moved = v4(2).ip().to_string();
    let address = format!("{moved}/24");
    let gone = address.clone();
    ground.pods[1].run(move || ip(&["addr", "del", &gone, "dev", "eth0"]))??;
    let _heir = ground.pods[2].run(move || -> Result<Server> {
        ip(&["addr", "add", &address, "dev", "eth0"])?;
        Ok(Server::tcp(at(&format!("{}:9001", v4(2).ip())))?)
    })??;
    // As whoever takes an address over says to all.
    ip(&["neigh", "flush", "to", &moved])?;
    ground.pods[0].run(move || ip(&["neigh", "flush", "to", &moved]))??;
    let before = (sent(&port(2))?, sent(&port(3))?);
    let target = at(&format!("{}:9001", v4(2).ip()));
    for _ in 0..ROUNDS {
        assert_eq!(ground.pods[0].run(move || ask_tcp(target))??.0, target.to_string());
    }
    let carried = (sent(&port(2))? - before.0, sent(&port(3))? - before.1);
    assert!(carried.0 <= FEW && carried.1 <= FEW, "{carried:?} frames through the bridge");
    Ok(())
}

#[test]
fn what_is_in_doubt_takes_the_bridge() -> Result<()> {
    if !has_tcx()? {
        return Ok(());
    }
    let mut ground = Ground::new()?;
    let ports = Ground::ports()?;
    // Nobody has looked at the pods for long.
    assert_eq!(ground.plane.shortcut_pods_until(&ports, 1), 3);
    assert!(ground.carried(1, 2)? > ROUNDS * 3, "what is written holds true for a while only");
    assert_eq!(ground.plane.shortcut_pods(&ports), 3);
    assert!(ground.carried(1, 2)? <= FEW);
    // Another program wants to see what comes to a pod.
    let device = Device {
        index: ports[1].index,
        name: port(2),
        side: Side::Inner,
        ethernet: true,
        source_v4: None,
        source_v6: None,
        early: false,
    };
    let failed = ground.plane.serve_devices(vec![device]);
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(ground.plane.shortcut_pods(&ports), 2);
    assert!(ground.carried(1, 2)? > ROUNDS * 3);
    assert!(ground.carried(2, 1)? > ROUNDS * 3, "nor does it hand over what it sends");
    // Of two pods with one address nobody knows which is meant.
    let twins = [ports[0].clone(), PodPort { address: ports[0].address, ..ports[2].clone() }];
    assert_eq!(ground.plane.shortcut_pods(&twins), 0);
    assert!(ground.carried(3, 1)? > ROUNDS * 3);
    Ok(())
}
