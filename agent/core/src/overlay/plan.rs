//! From the entries that the kernel has to those that it should have.
//!
//! Order: no route leads into a tunnel whose end is not known yet, and an end is forgotten only after the last route
//! to it. What is already right is left alone, so that traffic goes on while an agent starts anew.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::entries::{Entries, Hop};
use super::range::{Mac, Range};

/// One change of the kernel's tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Remove a route of ours.
    RemoveRoute(Range, Hop),
    /// Add or replace the peer's address behind its device.
    SetForward(Mac, IpAddr),
    /// Add or replace the device behind a gateway.
    SetNeighbour(IpAddr, Mac),
    /// Add or replace a route.
    SetRoute(Range, Hop),
    /// Remove a neighbour on the tunnel.
    RemoveNeighbour(IpAddr),
    /// Remove an FDB entry of the tunnel.
    RemoveForward(Mac, IpAddr),
}

/// The changes, in the order in which they are safe.
pub fn plan(desired: &Entries, observed: &Entries) -> Vec<Action> {
    let gone = missing(&observed.routes, &desired.routes).map(|(range, hop)| Action::RemoveRoute(range, hop));
    let forwards =
        differing(&desired.forwards, &observed.forwards).map(|(mac, to)| Action::SetForward(mac, to));
    let neighbours =
        differing(&desired.neighbours, &observed.neighbours).map(|(via, mac)| Action::SetNeighbour(via, mac));
    let routes =
        differing(&desired.routes, &observed.routes).map(|(range, hop)| Action::SetRoute(range, hop));
    let old_neighbours =
        missing(&observed.neighbours, &desired.neighbours).map(|(via, _)| Action::RemoveNeighbour(via));
    let old_forwards =
        missing(&observed.forwards, &desired.forwards).map(|(mac, to)| Action::RemoveForward(mac, to));
    gone.chain(forwards).chain(neighbours).chain(routes).chain(old_neighbours).chain(old_forwards).collect()
}

/// Entries of `one` whose key `other` lacks.
fn missing<'m, K: Ord + Copy, V: Copy>(
    one: &'m BTreeMap<K, V>,
    other: &'m BTreeMap<K, V>,
) -> impl Iterator<Item = (K, V)> + 'm {
    one.iter().filter(|(key, _)| !other.contains_key(key)).map(|(key, value)| (*key, *value))
}

/// Entries of `one` that `other` lacks or has otherwise.
fn differing<'m, K: Ord + Copy, V: Copy + PartialEq>(
    one: &'m BTreeMap<K, V>,
    other: &'m BTreeMap<K, V>,
) -> impl Iterator<Item = (K, V)> + 'm {
    one.iter().filter(|(key, value)| other.get(key) != Some(value)).map(|(key, value)| (*key, *value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn apply(entries: &mut Entries, action: &Action) {
        match action {
            Action::RemoveRoute(range, _) => drop(entries.routes.remove(range)),
            Action::SetForward(mac, to) => drop(entries.forwards.insert(*mac, *to)),
            Action::SetNeighbour(via, mac) => drop(entries.neighbours.insert(*via, *mac)),
            Action::SetRoute(range, hop) => drop(entries.routes.insert(*range, *hop)),
            Action::RemoveNeighbour(via) => drop(entries.neighbours.remove(via)),
            Action::RemoveForward(mac, _) => drop(entries.forwards.remove(mac)),
        }
    }

    /// A tunnel's entries: peer number → version of its address and of its device.
    fn entries(peers: &BTreeMap<u8, (u8, u8)>) -> Entries {
        let mut entries = Entries::default();
        for (peer, (host, device)) in peers {
            let via = IpAddr::from([10, 244, *peer, 0]);
            let mac = Mac([2, 0, 0, 0, *device, *peer]);
            entries.routes.insert(Range::of(via, 24), Hop { via, device: 9, onlink: true, mtu: 1450 });
            entries.neighbours.insert(via, mac);
            entries.forwards.insert(mac, [192, 0, *host, *peer].into());
        }
        entries
    }

    fn tunnel_ends_are_known(entries: &Entries) -> bool {
        entries
            .routes
            .values()
            .all(|hop| entries.neighbours.get(&hop.via).is_some_and(|mac| entries.forwards.contains_key(mac)))
    }

    fn peers() -> impl Strategy<Value = BTreeMap<u8, (u8, u8)>> {
        proptest::collection::btree_map(0_u8..6, (0_u8..3, 0_u8..3), 0..6)
    }

    proptest! {
        #[test]
        fn it_converges_and_no_route_ever_leads_to_an_unknown_end(before in peers(), after in peers()) {
            let (mut now, wanted) = (entries(&before), entries(&after));
            for action in plan(&wanted, &now) {
                apply(&mut now, &action);
                prop_assert!(tunnel_ends_are_known(&now), "after {action:?}: {now:?}");
            }
            prop_assert_eq!(&now, &wanted);
            prop_assert_eq!(plan(&wanted, &now), vec![]);
        }
    }

    #[test]
    fn what_stays_is_not_touched() {
        let before = entries(&BTreeMap::from([(1, (1, 1)), (2, (1, 1))]));
        let after = entries(&BTreeMap::from([(1, (1, 1)), (2, (2, 1))]));
        let mac = Mac([2, 0, 0, 0, 1, 2]);
        assert_eq!(plan(&after, &before), [Action::SetForward(mac, [192, 0, 2, 2].into())]);
    }
}
