//! Which pods of this node hand their packets straight to each other instead of through their bridge, and which exchange them
//! with the tunnel to other nodes: those of which nothing on the way wants to see the packets. Pure, but for the questions
//! whether frames or packets are filtered.
//!
//! Only pods of one bridge: what is on another one is not to be reached by its link address.

use std::{collections::BTreeMap, fs, net::IpAddr, path::Path};

use cni_plugins_host::nft;
use ebpf_loader::{DataPlane, PodPort, Tunnel};
use netlink_packet_route::link::{InfoKind, LinkLayerType};

use super::{
    devices::{NodeFacts, leads_to_pods},
    network::{LinkFacts, Machine},
};

/// Where `br_netfilter` says whether bridged packets pass netfilter.
const BRIDGE_NETFILTER: &str = "/proc/sys/net/bridge";
const CALLS: [&str; 2] = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"];
/// Names of the tables that `iptables-legacy` has made, of the reader's network namespace.
const LEGACY_TABLES: [&str; 2] =
    ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"];
/// What filters frames in the old way.
const EBTABLES: &str = "/sys/module/ebtables";

/// What is chosen.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Chosen {
    /// The pods' ports of one bridge, by index.
    ports: Vec<PodPort>,
    /// The tunnel to other nodes' pods, with the addresses of those.
    tunnel: Option<Tunnel>,
    /// Why packets take the longer way that they could spare otherwise.
    obstacle: Option<&'static str>,
}

/// What is chosen while nothing sees frames or packets on their way. `routed`: the programs know the node's routes.
pub(super) fn wanted(machine: &Machine, node: &NodeFacts, auto: bool, routed: bool) -> Chosen {
    if !auto {
        return Chosen::default();
    }
    if are_frames_filtered() {
        let obstacle =
            Some("frames between pods are filtered (ebtables, nftables, or iptables with br_netfilter)");
        return Chosen { obstacle, ..Chosen::default() };
    }
    let mut chosen = choose(machine, node);
    if !routed {
        (chosen.tunnel, chosen.obstacle) = (None, None);
    } else if chosen.tunnel.is_some() && are_packets_filtered() {
        chosen.tunnel = None;
        chosen.obstacle =
            Some("other programs' tables of nftables or iptables, or host ports by nftables, see them");
    }
    // Alone on its bridge.
    if chosen.tunnel.is_none() && chosen.ports.len() == 1 {
        chosen.ports.clear();
    }
    chosen
}

/// Has the programs do it, and tells once what is in the way: `told` is what was told last.
pub(super) fn apply(plane: &mut DataPlane, wanted: &Chosen, told: &mut Option<&'static str>) {
    if *told != wanted.obstacle {
        if let Some(obstacle) = wanted.obstacle {
            tracing::info!(obstacle, "packets of pods take the way through the node's stack");
        } else {
            tracing::info!("nothing is in the way of pods' packets any more");
        }
        *told = wanted.obstacle;
    }
    let before = plane.usage();
    let pods = plane.shortcut_pods(&wanted.ports);
    let routed = plane.route_pods(wanted.tunnel.as_ref());
    if (pods, routed) != (before.shortcuts, before.far_pods) {
        tracing::debug!(pods, routed, "pods hand their packets straight to each other, and to the tunnel");
    }
}

/// The first bridge that has pods which are better off.
fn choose(machine: &Machine, node: &NodeFacts) -> Chosen {
    let is_pods = |link: &&LinkFacts| {
        link.kind == Some(InfoKind::Bridge) && link.up && link.plain && leads_to_pods(machine, node, link)
    };
    let bridges: BTreeMap<u32, &LinkFacts> =
        machine.links.iter().filter(is_pods).map(|link| (link.index, link)).collect();
    let all = bridges.into_values().map(|bridge| {
        let ports = ports(machine, bridge.index);
        let tunnel = tunnel(machine, node, bridge, &ports);
        let ruled = tunnel.is_some() && machine.has_rules;
        let obstacle =
            ruled.then_some("rules of routing may choose another way for packets to other nodes' pods");
        Chosen { ports, tunnel: tunnel.filter(|_| !ruled), obstacle }
    });
    let gains =
        |chosen: &Chosen| chosen.ports.len() > 1 || chosen.tunnel.is_some() || chosen.obstacle.is_some();
    all.into_iter().find(gains).unwrap_or_default()
}

/// The tunnel by which these pods reach those of other nodes, if nothing else chooses or sees its packets.
fn tunnel(machine: &Machine, node: &NodeFacts, bridge: &LinkFacts, ports: &[PodPort]) -> Option<Tunnel> {
    let is_tunnel = |link: &&LinkFacts| {
        link.kind == Some(InfoKind::Vxlan)
            && link.up
            && link.plain
            && link.layer == LinkLayerType::Ether
            && node.pod_devices.contains(&link.name)
            && machine.routes.iter().any(|route| route.of_overlay && route.link == link.index)
    };
    let link = machine.links.iter().find(is_tunnel)?;
    let of_bridge = |index: &u32| ports.iter().any(|port| port.index == *index);
    let mut pods: BTreeMap<IpAddr, Option<u32>> = BTreeMap::new();
    for (ip, index) in machine.pods.iter().filter(|(_, index)| of_bridge(index)) {
        // Of two with one address nobody knows which is meant.
        pods.entry(*ip).and_modify(|taken| *taken = None).or_insert(Some(*index));
    }
    let pods: BTreeMap<IpAddr, u32> = pods.into_iter().filter_map(|(ip, index)| Some((ip, index?))).collect();
    (!pods.is_empty()).then_some(Tunnel { index: link.index, bridge: bridge.mac, mtu: bridge.mtu, pods })
}

fn ports(machine: &Machine, bridge: u32) -> Vec<PodPort> {
    let ports = machine.links.iter().filter(|link| {
        link.master == Some(bridge)
            && link.kind == Some(InfoKind::Veth)
            && link.layer == LinkLayerType::Ether
            && link.up
            && link.plain
    });
    let mut ports: Vec<PodPort> = ports
        .filter_map(|link| Some(PodPort { index: link.index, address: *machine.peers.get(&link.index)? }))
        .collect();
    ports.sort();
    ports
}

/// Whether something on this machine sees frames between ports of a bridge; true where that cannot be found out.
fn are_frames_filtered() -> bool {
    let calls = |name: &str| {
        fs::read_to_string(Path::new(BRIDGE_NETFILTER).join(name)).is_ok_and(|value| value.trim() != "0")
    };
    let shown = CALLS.into_iter().any(calls);
    Path::new(EBTABLES).exists() || shown && has_legacy_tables() || nft::filters_frames(shown).unwrap_or(true)
}

fn has_legacy_tables() -> bool {
    let has_tables = |file: &str| fs::read_to_string(file).is_ok_and(|names| !names.trim().is_empty());
    LEGACY_TABLES.into_iter().any(has_tables)
}

/// Whether something on this machine sees or changes packets that it routes between pods; true where that cannot be found
/// out.
fn are_packets_filtered() -> bool {
    has_legacy_tables() || nft::filters_frames(true).unwrap_or(true) || nft::ports::any().unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::proxy::network::RouteFacts;

    fn link(index: u32, kind: InfoKind, master: Option<u32>) -> LinkFacts {
        LinkFacts {
            index,
            name: format!("link{index}"),
            alias: if kind == InfoKind::Bridge { "cni:net".to_owned() } else { String::new() },
            up: true,
            layer: LinkLayerType::Ether,
            mac: [2; 6],
            mtu: 1500,
            kind: Some(kind),
            master,
            peer: None,
            plain: true,
        }
    }

    /// Two bridges, of three pods and of two.
    fn machine() -> Machine {
        let veth = |index, bridge| link(index, InfoKind::Veth, Some(bridge));
        Machine {
            links: vec![
                link(1, InfoKind::Bridge, None),
                veth(2, 1),
                veth(3, 1),
                veth(4, 1),
                link(5, InfoKind::Bridge, None),
                veth(6, 5),
                veth(7, 5),
            ],
            peers: (2..8).map(|index| (index, [2, 0, 0, 0, 0, u8::try_from(index).unwrap()])).collect(),
            ..Machine::default()
        }
    }

    fn chosen(machine: &Machine) -> Vec<u32> {
        choose(machine, &NodeFacts::default()).ports.iter().map(|port| port.index).collect()
    }

    #[test]
    fn pods_of_one_bridge_are_chosen() {
        assert_eq!(chosen(&machine()), [2, 3, 4]);
        assert_eq!(choose(&machine(), &NodeFacts::default()).ports[0].address, [2, 0, 0, 0, 0, 2]);
    }

    #[test]
    fn pods_whose_packets_somebody_wants_to_see_are_left_out() {
        type Change = fn(&mut Machine);
        let changes: [(Change, &[u32], &str); 7] = [
            (|machine| machine.links[2].plain = false, &[2, 4], "a queue, or a port that is closed to some"),
            (|machine| machine.links[2].up = false, &[2, 4], "down"),
            (|machine| machine.links[2].kind = Some(InfoKind::Vxlan), &[2, 4], "no pod's"),
            (|machine| machine.peers.retain(|index, _| *index != 3), &[2, 4], "its other end is not known"),
            (|machine| machine.links[0].plain = false, &[6, 7], "a bridge with VLANs"),
            (|machine| machine.links[0].alias = String::new(), &[6, 7], "not known to lead to pods"),
            (|machine| machine.links.truncate(2), &[], "a pod alone"),
        ];
        for (change, left, what) in changes {
            let mut machine = machine();
            change(&mut machine);
            assert_eq!(chosen(&machine), left, "{what}");
        }
    }

    /// The same with a tunnel, and a node that knows of it.
    fn node() -> (Machine, NodeFacts) {
        let mut machine = machine();
        machine.links.push(LinkFacts { name: "kl-vxlan".to_owned(), ..link(8, InfoKind::Vxlan, None) });
        machine.routes.push(RouteFacts {
            to: "10.244.1.0/24".parse().unwrap(),
            link: 8,
            via: Some([10, 244, 1, 0].into()),
            of_overlay: true,
            mtu: None,
            metric: 0,
        });
        let pod = |last| IpAddr::from([10, 244, 0, last]);
        machine.pods = vec![(pod(2), 2), (pod(3), 3), (pod(6), 6)];
        let pod_devices = BTreeSet::from(["kl-vxlan".to_owned()]);
        (machine, NodeFacts { pod_devices, ..NodeFacts::default() })
    }

    #[test]
    fn the_tunnel_serves_the_bridges_pods() {
        let (mut machine, node) = node();
        let tunnel = choose(&machine, &node).tunnel.expect("a tunnel");
        assert_eq!((tunnel.index, tunnel.bridge, tunnel.mtu), (8, [2; 6], 1500));
        assert_eq!(tunnel.pods.values().copied().collect::<Vec<_>>(), [2, 3]);
        // One pod gains by it, too.
        machine.links.retain(|link| !matches!(link.index, 3 | 4));
        assert_eq!(choose(&machine, &node).tunnel.expect("a tunnel").pods.len(), 1);
    }

    #[test]
    fn what_else_chooses_or_sees_packets_keeps_them_off_the_tunnel() {
        type Change = fn(&mut Machine, &mut NodeFacts);
        let changes: [(Change, &str); 7] = [
            (|machine, _| machine.has_rules = true, "rules of routing"),
            (|machine, _| machine.links[7].plain = false, "a queue before the tunnel"),
            (|machine, _| machine.links[7].up = false, "a tunnel that is down"),
            (|machine, _| machine.links[7].kind = None, "no tunnel"),
            (|_, node| node.pod_devices.clear(), "somebody else's tunnel"),
            (|machine, _| machine.routes.clear(), "no other node"),
            (|machine, _| machine.pods.clear(), "no address is known"),
        ];
        for (change, what) in changes {
            let (mut machine, mut node) = node();
            change(&mut machine, &mut node);
            let chosen = choose(&machine, &node);
            assert_eq!(chosen.tunnel, None, "{what}");
            assert_eq!(chosen.ports.len(), 3, "{what}: pods of the node are not concerned");
        }
        let (mut machine, node) = node();
        machine.pods.push((machine.pods[0].0, 4));
        let tunnel = choose(&machine, &node).tunnel.expect("a tunnel");
        assert_eq!(tunnel.pods.values().copied().collect::<Vec<_>>(), [3], "of two with one address neither");
    }
}
