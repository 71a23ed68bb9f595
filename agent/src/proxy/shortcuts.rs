//! Which pods of this node hand their packets straight to each other instead of through their bridge: those of which
//! nothing on the way wants to see the packets. Pure, but for the question whether frames are filtered.
//!
//! Only pods of one bridge: what is on another one is not to be reached by its link address.

use std::{collections::BTreeSet, fs, path::Path};

use cni_plugins_host::nft;
use ebpf_loader::PodPort;
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

/// The pods' ports of the first bridge that has any, by index.
pub(super) fn choose(machine: &Machine, node: &NodeFacts) -> Vec<PodPort> {
    let is_pods = |link: &&LinkFacts| {
        link.kind == Some(InfoKind::Bridge) && link.up && link.plain && leads_to_pods(machine, node, link)
    };
    let bridges: BTreeSet<u32> = machine.links.iter().filter(is_pods).map(|link| link.index).collect();
    let all = bridges.iter().map(|bridge| ports(machine, *bridge));
    all.into_iter().find(|ports| ports.len() > 1).unwrap_or_default()
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
pub(super) fn are_frames_filtered() -> bool {
    let calls = |name: &str| {
        fs::read_to_string(Path::new(BRIDGE_NETFILTER).join(name)).is_ok_and(|value| value.trim() != "0")
    };
    let has_tables = |file: &str| fs::read_to_string(file).is_ok_and(|names| !names.trim().is_empty());
    let shown = CALLS.into_iter().any(calls);
    Path::new(EBTABLES).exists()
        || shown && LEGACY_TABLES.into_iter().any(has_tables)
        || nft::filters_frames(shown).unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        choose(machine, &NodeFacts::default()).iter().map(|port| port.index).collect()
    }

    #[test]
    fn pods_of_one_bridge_are_chosen() {
        assert_eq!(chosen(&machine()), [2, 3, 4]);
        assert_eq!(choose(&machine(), &NodeFacts::default())[0].address, [2, 0, 0, 0, 0, 2]);
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
}
