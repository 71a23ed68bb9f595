//! What the addresses of this node, and of the others, are for. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ebpf_common::{NetAddr, NodeAddressUse};

/// Addresses as the caller told them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Addresses {
    /// This node's.
    pub(crate) own: BTreeSet<IpAddr>,
    /// Those that NodePorts answer on; loopback ones among them.
    pub(crate) node_ports: BTreeSet<IpAddr>,
    /// Those of all nodes, where packets for NodePorts are sent on as they are; `None` until they are told.
    pub(crate) shared: Option<BTreeSet<IpAddr>>,
}

impl Addresses {
    /// What the map shall hold, whatever it holds now.
    pub(crate) fn wanted(&self, present: &BTreeMap<NetAddr, u32>) -> BTreeMap<NetAddr, u32> {
        let mut wanted: BTreeMap<NetAddr, u32> =
            self.own.iter().map(|address| (NetAddr::from(*address), NodeAddressUse::OWN)).collect();
        for address in &self.node_ports {
            *wanted.entry(NetAddr::from(*address)).or_default() |= NodeAddressUse::NODE_PORTS;
        }
        // What a former process knew of other nodes stays until this one knows it.
        let known = present.iter().filter(|(_, uses)| **uses & NodeAddressUse::SHARED != 0);
        let shared: BTreeSet<NetAddr> = match &self.shared {
            Some(shared) => shared.iter().map(|address| NetAddr::from(*address)).collect(),
            None => known.map(|(address, _)| *address).collect(),
        };
        for address in shared {
            let uses = wanted.entry(address).or_default();
            // NodePorts do not answer on an address of this node's that was left out, whoever asks.
            if *uses != NodeAddressUse::OWN {
                *uses |= NodeAddressUse::SHARED;
            }
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(texts: &[&str]) -> BTreeSet<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn other_nodes_addresses_stay_until_they_are_told() {
        let mut addresses = Addresses {
            own: set(&["192.0.2.1", "192.0.2.9"]),
            node_ports: set(&["192.0.2.1", "127.0.0.1"]),
            shared: Some(set(&["192.0.2.1", "192.0.2.2", "192.0.2.9"])),
        };
        let of = |map: &BTreeMap<NetAddr, u32>, text: &str| {
            map.get(&NetAddr::from(text.parse::<IpAddr>().unwrap())).copied().unwrap_or_default()
        };
        let first = addresses.wanted(&BTreeMap::new());
        assert_eq!((of(&first, "192.0.2.1"), of(&first, "192.0.2.2"), of(&first, "127.0.0.1")), (7, 4, 2));
        assert_eq!(of(&first, "192.0.2.9"), 1, "left out of those with NodePorts");
        addresses.shared = None;
        assert_eq!(addresses.wanted(&first), first, "the next process does not know yet");
        addresses.shared = Some(BTreeSet::new());
        let last = addresses.wanted(&first);
        assert_eq!((of(&last, "192.0.2.1"), of(&last, "192.0.2.2")), (3, 0));
    }
}
