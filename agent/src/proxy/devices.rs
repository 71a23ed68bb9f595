//! Through which devices clients outside are served, which of them lead to pods, and behind which addresses clients are
//! hidden from endpoints. Pure.
//!
//! A device that another one takes the packets of (a bridge's port, a bond's member) is left to that one. What is no
//! pods' device leads outside: a node may have several interfaces on which its clients are.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ebpf_loader::{DesiredWay, Device, Side, SourcePrefix};
use netlink_packet_route::link::{InfoKind, LinkLayerType};

use super::{
    cidr::Cidr,
    network::{LinkFacts, Machine, is_reachable},
};
use crate::config::XdpMode;

/// How the aliases of links begin that our own CNI plugins make.
const CNI_ALIAS: &str = "cni";

/// What else is known of the node.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeFacts {
    /// Its address in the cluster.
    pub(super) address: Option<IpAddr>,
    /// Its pods' addresses.
    pub(super) pod_ranges: Vec<Cidr>,
    /// Names of devices that lead to pods, here or on other nodes.
    pub(super) pod_devices: BTreeSet<String>,
    /// Where drivers handle packets.
    pub(super) xdp: XdpMode,
}

/// The devices to serve, by index.
pub(super) fn choose(machine: &Machine, node: &NodeFacts) -> Vec<Device> {
    let served = machine.links.iter().filter(|link| is_served(machine, link));
    let mut devices: Vec<Device> = served
        .map(|link| Device {
            index: link.index,
            name: link.name.clone(),
            side: if leads_to_pods(machine, node, link) { Side::Inner } else { Side::Outer },
            ethernet: link.layer == LinkLayerType::Ether,
            source_v4: source_v4(machine, node, Some(link.index)),
            source_v6: source_v6(machine, node, Some(link.index)),
            early: match node.xdp {
                XdpMode::Off => false,
                // Links that the kernel makes up gain nothing from it, and lose what they merge; one by which no endpoint
                // of another node is reached has nothing to send on.
                XdpMode::Auto => link.kind.is_none() && leads_to_nodes(machine, link),
                XdpMode::Always => true,
            },
        })
        .collect();
    devices.sort_by_key(|device| device.index);
    devices
}

/// Whether pods of other nodes are reached by the link without a tunnel.
fn leads_to_nodes(machine: &Machine, link: &LinkFacts) -> bool {
    machine.routes.iter().any(|route| route.of_overlay && route.link == link.index && route.via.is_some())
}

/// Behind which addresses clients are hidden where the way to an endpoint has none of its own: the node's, else those of
/// the default route's device.
pub(super) fn default_sources(machine: &Machine, node: &NodeFacts) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let links: Vec<Option<u32>> = machine.uplinks.iter().map(|index| Some(*index)).chain([None]).collect();
    let (mut v4, mut v6) = match node.address {
        Some(IpAddr::V4(v4)) => (Some(v4), None),
        Some(IpAddr::V6(v6)) => (None, Some(v6)),
        None => (None, None),
    };
    for link in links {
        v4 = v4.or_else(|| source_v4(machine, node, link));
        v6 = v6.or_else(|| source_v6(machine, node, link));
    }
    (v4, v6)
}

/// The node's routes, with what drivers need to know of the next neighbour.
pub(super) fn ways(machine: &Machine) -> Vec<DesiredWay> {
    let ways = machine.routes.iter().filter_map(|route| {
        let link = machine.links.iter().find(|link| link.index == route.link && link.up)?;
        let to = SourcePrefix { address: route.to.network, bits: route.to.prefix };
        // The neighbour of a route without one is the destination: known where that is a single address.
        let single = route.to.prefix == if route.to.network.is_ipv4() { 32 } else { 128 };
        let neighbour = route.via.or(single.then_some(route.to.network));
        let mac = neighbour.and_then(|ip| machine.neighbours.get(&(link.index, ip)));
        let link_addresses = mac.map(|mac| (*mac, link.mac));
        let mtu = route.mtu.map_or(link.mtu, |mtu| mtu.min(link.mtu));
        Some(DesiredWay { to, device: link.index, via: route.via, link: link_addresses, mtu })
    });
    let mut ways: Vec<DesiredWay> = ways.collect();
    // A neighbour on a link is a way of its own.
    let devices: BTreeMap<u32, &LinkFacts> = machine.links.iter().map(|link| (link.index, link)).collect();
    let routed: BTreeSet<SourcePrefix> = ways.iter().map(|way| way.to).collect();
    ways.extend(machine.neighbours.iter().filter_map(|((index, ip), mac)| {
        let link = devices.get(index).filter(|link| link.up && link.layer == LinkLayerType::Ether)?;
        let to = SourcePrefix { address: *ip, bits: if ip.is_ipv4() { 32 } else { 128 } };
        let usable = is_reachable(*ip) && !ip.is_multicast() && *mac != [0; 6] && !routed.contains(&to);
        usable.then_some(DesiredWay {
            to,
            device: *index,
            via: None,
            link: Some((*mac, link.mac)),
            mtu: link.mtu,
        })
    }));
    ways
}

fn is_served(machine: &Machine, link: &LinkFacts) -> bool {
    // Packets of a VRF's members stay their own.
    let enslaved = link.master.is_some_and(|master| {
        let master = machine.links.iter().find(|other| other.index == master);
        master.is_none_or(|master| master.kind != Some(InfoKind::Vrf))
    });
    let layer = matches!(
        link.layer,
        LinkLayerType::Ether
            | LinkLayerType::None
            | LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit
            | LinkLayerType::Rawip
    );
    // Nothing arrives at a dummy, and a VRF's packets are those of its members.
    let idle = matches!(link.kind, Some(InfoKind::Dummy | InfoKind::Vrf | InfoKind::Ifb | InfoKind::Nlmon));
    link.up && layer && !enslaved && !idle
}

pub(super) fn leads_to_pods(machine: &Machine, node: &NodeFacts, link: &LinkFacts) -> bool {
    let mut own = machine.addresses.iter().filter(|(index, _)| *index == link.index).map(|(_, ip)| *ip);
    if node.pod_devices.contains(&link.name) || link.alias.starts_with(CNI_ALIAS) {
        return true;
    }
    if machine.uplinks.contains(&link.index) || own.clone().any(|ip| Some(ip) == node.address) {
        return false;
    }
    if own.clone().any(|ip| node.pod_ranges.iter().any(|range| range.contains(ip))) {
        return true;
    }
    // A pod's own veth, of plugins that route instead of bridging, has no address of its own or an arbitrary one.
    let is_real = |ip: IpAddr| is_reachable(ip) && !matches!(ip, IpAddr::V4(v4) if v4.is_link_local());
    matches!(link.kind, Some(InfoKind::Veth | InfoKind::Netkit)) && !own.any(is_real)
}

/// An address of a device (or of any): the node's own first.
fn sources<'m>(
    machine: &'m Machine,
    node: &'m NodeFacts,
    link: Option<u32>,
) -> impl Iterator<Item = IpAddr> + 'm {
    let own = machine
        .addresses
        .iter()
        .filter(move |(index, ip)| link.is_none_or(|link| link == *index) && is_reachable(*ip))
        .map(|(_, ip)| *ip);
    let first = own.clone().filter(|ip| Some(*ip) == node.address);
    first.chain(own)
}

fn source_v4(machine: &Machine, node: &NodeFacts, link: Option<u32>) -> Option<Ipv4Addr> {
    sources(machine, node, link).find_map(|ip| if let IpAddr::V4(v4) = ip { Some(v4) } else { None })
}

fn source_v6(machine: &Machine, node: &NodeFacts, link: Option<u32>) -> Option<Ipv6Addr> {
    sources(machine, node, link).find_map(|ip| if let IpAddr::V6(v6) = ip { Some(v6) } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: Option<InfoKind>, master: Option<u32>) -> LinkFacts {
        let layer = if name == "lo" {
            LinkLayerType::Loopback
        } else if name.starts_with("wg") {
            LinkLayerType::None
        } else {
            LinkLayerType::Ether
        };
        LinkFacts {
            index,
            name: name.to_owned(),
            alias: String::new(),
            up: true,
            layer,
            mac: [2; 6],
            mtu: 1500,
            kind,
            master,
            peer: None,
            plain: true,
        }
    }

    fn machine() -> Machine {
        Machine {
            links: vec![
                link(1, "lo", None, None),
                link(2, "eth0", None, None),
                link(3, "eth1", None, None),
                link(4, "kl-pods0", Some(InfoKind::Bridge), None),
                link(5, "veth1", Some(InfoKind::Veth), Some(4)),
                link(6, "kl-vxlan", Some(InfoKind::Vxlan), None),
                link(7, "cali1", Some(InfoKind::Veth), None),
                link(8, "docker0", Some(InfoKind::Bridge), None),
                link(9, "dummy0", Some(InfoKind::Dummy), None),
                link(10, "wg0", Some(InfoKind::Wireguard), None),
            ],
            addresses: [
                (1, "127.0.0.1"),
                (2, "192.0.2.7"),
                (2, "192.0.2.9"),
                (2, "2001:db8::9"),
                (3, "198.51.100.1"),
                (4, "10.244.1.1"),
                (6, "10.244.1.0"),
                (7, "169.254.1.1"),
                (8, "172.17.0.1"),
            ]
            .map(|(index, ip)| (index, ip.parse().unwrap()))
            .to_vec(),
            uplinks: [2].into(),
            routes: Vec::new(),
            neighbours: BTreeMap::new(),
            peers: BTreeMap::new(),
            pods: Vec::new(),
            has_rules: false,
        }
    }

    fn node() -> NodeFacts {
        NodeFacts {
            address: Some([192, 0, 2, 9].into()),
            pod_ranges: vec!["10.244.1.0/24".parse().unwrap()],
            pod_devices: ["kl-vxlan".to_owned()].into(),
            xdp: XdpMode::Auto,
        }
    }

    #[test]
    fn each_device_leads_where_it_does() {
        let devices = choose(&machine(), &node());
        let seen: Vec<(&str, Side, bool)> =
            devices.iter().map(|device| (device.name.as_str(), device.side, device.ethernet)).collect();
        let expected = [
            ("eth0", Side::Outer, true),
            ("eth1", Side::Outer, true),
            ("kl-pods0", Side::Inner, true),
            ("kl-vxlan", Side::Inner, true),
            ("cali1", Side::Inner, true),
            ("docker0", Side::Outer, true),
            ("wg0", Side::Outer, false),
        ];
        assert_eq!(seen, expected, "no loopback, no bridge port, no dummy");
        assert!(devices.iter().all(|device| !device.early), "nothing to send on from wire to wire");
        let mut machine = machine();
        machine.addresses.push((7, [192, 0, 2, 77].into()));
        let devices = choose(&machine, &node());
        assert_eq!(devices[4].side, Side::Outer, "a veth with a real address is no pod's");
    }

    #[test]
    fn clients_are_hidden_behind_the_address_on_the_way() {
        let devices = choose(&machine(), &node());
        let of = |name: &str| devices.iter().find(|device| device.name == name).unwrap();
        assert_eq!(of("kl-pods0").source_v4, Some([10, 244, 1, 1].into()));
        assert_eq!(of("kl-vxlan").source_v4, Some([10, 244, 1, 0].into()));
        assert_eq!(of("eth0").source_v4, Some([192, 0, 2, 9].into()), "the node's own before its neighbour");
        assert_eq!(of("docker0").source_v6, None);
        let (v4, v6) = default_sources(&machine(), &node());
        assert_eq!((v4, v6), (Some([192, 0, 2, 9].into()), Some("2001:db8::9".parse().unwrap())));
    }

    #[test]
    fn an_uplink_is_outside_whatever_its_kind() {
        let mut machine = machine();
        machine.links.push(link(11, "node", Some(InfoKind::Veth), None));
        machine.uplinks = [11].into();
        let devices = choose(&machine, &node());
        assert_eq!(devices.last().map(|device| device.side), Some(Side::Outer));
    }
}
