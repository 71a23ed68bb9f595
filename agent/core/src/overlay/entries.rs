//! The kernel entries that lead to every peer: one route per pod range, one neighbour per range and one FDB entry per
//! node behind a tunnel, a plain route where no tunnel is needed; a key with its ranges behind an encrypted tunnel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::node::{ADDRESSES, Mode, PUBLIC_KEY, Peer, VTEP_MAC};
use super::range::{Mac, Range};

/// What this node is and has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its name, to leave itself out.
    pub node: String,
    /// Its own pod ranges.
    pub ranges: Vec<Range>,
    /// How it sends.
    pub mode: Mode,
    /// Whether peers in a subnet of the underlay are reached without the tunnel.
    pub direct_routing: bool,
    /// Index of the underlay's interface.
    pub underlay: u32,
    /// Its address there.
    pub address: IpAddr,
    /// Subnets that the interface is in.
    pub subnets: Vec<Range>,
    /// The tunnel, in modes that have one.
    pub tunnel: Option<Tunnel>,
    /// Its own public key, in mode `wireguard`.
    pub public_key: Option<String>,
}

/// What this machine has that is not the overlay's, and that no entry of the overlay may take away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// Routes of others, and what they are in words.
    pub routes: BTreeMap<Range, String>,
    /// Gateways of others' routes on the underlay.
    pub gateways: BTreeSet<IpAddr>,
}

/// The tunnel device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tunnel {
    /// Interface index.
    pub index: u32,
    /// Largest packet that goes through.
    pub mtu: u32,
}

/// Where packets of a route go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hop {
    /// Gateway; unspecified (`0.0.0.0`, `::`) where the interface leads there itself.
    pub via: IpAddr,
    /// Interface.
    pub device: u32,
    /// The gateway counts as a neighbour although no subnet of the interface holds it.
    pub onlink: bool,
    /// Largest packet; 0 leaves it to the interface.
    pub mtu: u32,
}

/// All entries of the overlay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    /// Routes by destination.
    pub routes: BTreeMap<Range, Hop>,
    /// Neighbours on the tunnel: gateway → the peer's device.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// FDB of the tunnel: the peer's device → the peer's address.
    pub forwards: BTreeMap<Mac, IpAddr>,
    /// Peers of the encrypted tunnel by public key. Not part of [`super::plan`]: the tunnel's device keeps them.
    pub keys: BTreeMap<String, KeyHolder>,
}

/// A node behind the encrypted tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyHolder {
    /// Where it takes packets.
    pub address: IpAddr,
    /// What it may send from, and what is sent to it.
    pub ranges: Vec<Range>,
}

/// A peer that cannot be reached, or not wholly, and why.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Problem {
    /// Its agent has not published its device yet, or runs another mode.
    #[error("node {node} publishes no {what}: its agent does not run the overlay (yet), or in another mode")]
    Unpublished {
        /// Peer.
        node: String,
        /// Annotation that is missing.
        what: &'static str,
    },
    /// It sends in another mode.
    #[error("node {node} runs overlay mode {theirs}, this one {ours}: both must be the same")]
    OtherMode {
        /// Peer.
        node: String,
        /// Its mode.
        theirs: String,
        /// This node's.
        ours: Mode,
    },
    /// It has no address of the family that is needed.
    #[error("node {node} has no {family} address, without which its pods are not reached from here")]
    Family {
        /// Peer.
        node: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// Without a tunnel it must share a subnet.
    #[error(
        "node {node} ({address}) is in no subnet of the underlay interface: mode host-gw cannot reach it, vxlan can"
    )]
    NotNextDoor {
        /// Peer.
        node: String,
        /// Its address.
        address: IpAddr,
    },
    /// It publishes something that cannot be used.
    #[error("node {node} publishes {what} {text:?}, which cannot be used: {expected} is expected")]
    Unreadable {
        /// Peer.
        node: String,
        /// Annotation.
        what: &'static str,
        /// Its value, or the part of it.
        text: String,
        /// What it should be.
        expected: &'static str,
    },
    /// An address at which no other node can take packets.
    #[error("node {node} has the address {address}, which {why}: nothing is sent there")]
    Address {
        /// Peer.
        node: String,
        /// The address.
        address: IpAddr,
        /// What is wrong with it.
        why: String,
    },
    /// Two nodes have one address. Packets for both go there: the object of one may be a remnant.
    #[error("node {node} has the address {address}, as node {holder} has: one of them does not answer there")]
    SameAddress {
        /// The younger peer.
        node: String,
        /// The address.
        address: IpAddr,
        /// The older one.
        holder: String,
    },
    /// This machine has a route of its own to the same range.
    #[error(
        "node {node} has the pod range {range}, to which this node has a route already ({route}): that route stays, and the range is left out"
    )]
    OtherRoute {
        /// Peer.
        node: String,
        /// Its range.
        range: Range,
        /// The route in words.
        route: String,
    },
    /// What leads to the nodes themselves would be led into the overlay.
    #[error(
        "node {node} has the pod range {range}, which holds {what}: it is left out, as the nodes would lose each other"
    )]
    Holds {
        /// Peer.
        node: String,
        /// Its range.
        range: Range,
        /// What the range holds.
        what: String,
    },
    /// The range is a part of the network that this node is in. It is used all the same: such subnets may be wide, and the
    /// range free.
    #[error(
        "node {node} has the pod range {range}, which lies in {subnet}, the subnet of the underlay interface: other machines there with an address of that range are not reached from here"
    )]
    Inside {
        /// Peer.
        node: String,
        /// Its range.
        range: Range,
        /// The subnet.
        subnet: Range,
    },
    /// Two nodes claim the same addresses; the older one keeps them.
    #[error("node {node} has the pod range {range}, which overlaps {other} of node {holder}: it is left out")]
    Overlap {
        /// Peer that is left out.
        node: String,
        /// Its range.
        range: Range,
        /// The other range.
        other: Range,
        /// Who has it.
        holder: String,
    },
    /// Two nodes publish the same device; the older one keeps it.
    #[error(
        "node {node} publishes the hardware address {mac}, which is that of node {holder}: it is left out"
    )]
    SameMac {
        /// Peer that is left out.
        node: String,
        /// The address.
        mac: Mac,
        /// Who has it.
        holder: String,
    },
    /// Two nodes publish the same key; the older one keeps it.
    #[error("node {node} publishes the WireGuard key of node {holder}: it is left out")]
    SameKey {
        /// Peer that is left out.
        node: String,
        /// Who has it.
        holder: String,
    },
}

/// The entries for all peers, and what is wrong with those that have none. Nothing of the host's is taken away. Of two that
/// claim the same the older one keeps it, so that no newcomer takes what pods use.
pub fn desired<'p>(
    place: &Place,
    host: &Host,
    peers: impl IntoIterator<Item = &'p Peer>,
) -> (Entries, Vec<Problem>) {
    let mut peers: Vec<&Peer> = peers.into_iter().filter(|peer| peer.name != place.node).collect();
    peers.sort_by(|a, b| (a.since, &a.name).cmp(&(b.since, &b.name)));
    let mut draft = Draft::new(place, host);
    for peer in peers {
        if let Err(problem) = draft.add(peer) {
            draft.problems.push(problem);
        }
    }
    (draft.entries, draft.problems)
}

struct Draft<'p> {
    place: &'p Place,
    host: &'p Host,
    /// Where nodes take packets.
    nodes: BTreeMap<IpAddr, String>,
    entries: Entries,
    problems: Vec<Problem>,
    holders: BTreeMap<Range, String>,
    macs: BTreeMap<Mac, String>,
    keys: BTreeMap<String, String>,
}

impl<'p> Draft<'p> {
    fn new(place: &'p Place, host: &'p Host) -> Self {
        let holders = place.ranges.iter().map(|range| (*range, place.node.clone())).collect();
        let keys = place.public_key.iter().map(|key| (key.clone(), place.node.clone())).collect();
        Self {
            place,
            host,
            nodes: BTreeMap::from([(place.address, place.node.clone())]),
            entries: Entries::default(),
            problems: Vec::new(),
            holders,
            macs: BTreeMap::new(),
            keys,
        }
    }

    /// A peer without pod ranges or address has nothing to reach yet; that is no problem.
    fn add(&mut self, peer: &Peer) -> Result<(), Problem> {
        let place = self.place;
        let addresses = self.usable_addresses(peer);
        if peer.ranges.is_empty() || addresses.is_empty() {
            return Ok(());
        }
        let peer = &Peer { addresses, ..peer.clone() };
        if let Some(theirs) = peer.mode.as_ref().filter(|theirs| **theirs != place.mode.to_string()) {
            return Err(Problem::OtherMode {
                node: peer.name.clone(),
                theirs: theirs.clone(),
                ours: place.mode,
            });
        }
        let Some(tunnel) = place.tunnel else { return self.direct(peer) };
        if place.mode == Mode::Wireguard {
            // Never around the tunnel: what it carries is to be secret.
            let address = peer.address_like(place.address).ok_or_else(|| no_address(peer, place.address))?;
            return self.encrypted(peer, address, tunnel);
        }
        if place.direct_routing && peer.ranges.iter().all(|range| self.gateway(peer, range).is_ok()) {
            return self.direct(peer);
        }
        let address = peer.address_like(place.address).ok_or_else(|| no_address(peer, place.address))?;
        self.through(peer, address, tunnel)
    }

    /// The peer's addresses at which it can be; the others become problems.
    fn usable_addresses(&mut self, peer: &Peer) -> Vec<IpAddr> {
        let node = || peer.name.clone();
        for (what, text) in peer.unreadable.iter().filter(|(what, _)| *what == ADDRESSES) {
            let (text, expected) = (text.clone(), "an IP address");
            self.problems.push(Problem::Unreadable { node: node(), what, text, expected });
        }
        let mut usable = Vec::new();
        for address in &peer.addresses {
            if let Some(why) = self.unusable(*address) {
                self.problems.push(Problem::Address { node: node(), address: *address, why });
                continue;
            }
            usable.push(*address);
            match self.nodes.get(address) {
                Some(holder) => {
                    let (address, holder) = (*address, holder.clone());
                    self.problems.push(Problem::SameAddress { node: node(), address, holder });
                }
                None => drop(self.nodes.insert(*address, node())),
            }
        }
        usable
    }

    fn unusable(&self, address: IpAddr) -> Option<String> {
        let broadcast = address == IpAddr::from([255; 4]);
        let reserved = matches!(address, IpAddr::V4(v4) if v4.octets()[0] >= 240);
        if address.is_unspecified()
            || address.is_loopback()
            || address.is_multicast()
            || broadcast
            || reserved
        {
            return Some("is no address of one machine".to_owned());
        }
        if is_link_local(address) && !is_link_local(self.place.address) {
            return Some("counts on one link only".to_owned());
        }
        if let Some(subnet) = self.place.subnets.iter().find(|subnet| subnet.is_end(address)) {
            return Some(format!("stands for the whole of {subnet}, the subnet of the underlay interface"));
        }
        if address == self.place.address {
            return Some("is this node's own".to_owned());
        }
        let (range, holder) = self.holders.iter().find(|(range, _)| range.contains(address))?;
        Some(format!("lies in the pod range {range} of node {holder}"))
    }

    /// What the nodes need to reach each other, and the range would take away.
    fn held(&self, range: &Range) -> Option<String> {
        let node = self.nodes.iter().find(|(address, _)| range.contains(**address));
        let node = node.map(|(address, name)| format!("{address}, the address of node {name}"));
        let gateway = || self.host.gateways.iter().find(|gateway| range.contains(**gateway));
        let covers = |subnet: &&Range| range.contains(subnet.network()) && range.prefix() <= subnet.prefix();
        node.or_else(|| gateway().map(|gateway| format!("the gateway {gateway}"))).or_else(|| {
            let subnet = self.place.subnets.iter().find(covers)?;
            Some(format!("{subnet}, the subnet of the underlay interface"))
        })
    }

    /// The subnet of the underlay that the range is a part of.
    fn subnet_around(&self, range: &Range) -> Option<Range> {
        let subnets = self.place.subnets.iter();
        subnets.copied().find(|subnet| subnet.contains(range.network()) && subnet.prefix() < range.prefix())
    }

    /// The peer's own address in a subnet of the underlay, of the range's family.
    fn gateway(&self, peer: &Peer, range: &Range) -> Result<IpAddr, Problem> {
        let address = peer.address_like(range.network()).ok_or_else(|| no_address(peer, range.network()))?;
        if self.place.subnets.iter().any(|subnet| subnet.contains(address)) {
            return Ok(address);
        }
        Err(Problem::NotNextDoor { node: peer.name.clone(), address })
    }

    fn direct(&mut self, peer: &Peer) -> Result<(), Problem> {
        let mut outcome = Ok(());
        for range in self.free(peer) {
            match self.gateway(peer, &range) {
                Ok(via) => {
                    self.take(peer, range, Hop { via, device: self.place.underlay, onlink: false, mtu: 0 });
                }
                Err(problem) => outcome = Err(problem),
            }
        }
        outcome
    }

    fn through(&mut self, peer: &Peer, address: IpAddr, tunnel: Tunnel) -> Result<(), Problem> {
        let unpublished = || {
            let node = peer.name.clone();
            match peer.unreadable.iter().find(|(what, _)| *what == VTEP_MAC) {
                Some((what, text)) => {
                    let expected = "a hardware address of one interface such as 02:00:00:00:00:01";
                    Problem::Unreadable { node, what, text: text.clone(), expected }
                }
                None => Problem::Unpublished { node, what: VTEP_MAC },
            }
        };
        let mac = peer.mac.ok_or_else(unpublished)?;
        if let Some(holder) = self.macs.get(&mac) {
            return Err(Problem::SameMac { node: peer.name.clone(), mac, holder: holder.clone() });
        }
        let ranges = self.free(peer);
        if ranges.is_empty() {
            return Ok(());
        }
        self.macs.insert(mac, peer.name.clone());
        self.entries.forwards.insert(mac, address);
        for range in ranges {
            // The first address of a range is no pod's; it stands for the peer's end of the tunnel.
            let via = range.network();
            self.entries.neighbours.insert(via, mac);
            self.take(peer, range, Hop { via, device: tunnel.index, onlink: true, mtu: tunnel.mtu });
        }
        Ok(())
    }

    fn encrypted(&mut self, peer: &Peer, address: IpAddr, tunnel: Tunnel) -> Result<(), Problem> {
        let unpublished = || Problem::Unpublished { node: peer.name.clone(), what: PUBLIC_KEY };
        let key = peer.public_key.clone().filter(|key| is_key(key)).ok_or_else(unpublished)?;
        if let Some(holder) = self.keys.get(&key) {
            return Err(Problem::SameKey { node: peer.name.clone(), holder: holder.clone() });
        }
        let ranges = self.free(peer);
        if ranges.is_empty() {
            return Ok(());
        }
        self.keys.insert(key.clone(), peer.name.clone());
        for range in &ranges {
            let via = if range.network().is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            self.take(peer, *range, Hop { via, device: tunnel.index, onlink: false, mtu: tunnel.mtu });
        }
        self.entries.keys.insert(key, KeyHolder { address, ranges });
        Ok(())
    }

    fn take(&mut self, peer: &Peer, range: Range, hop: Hop) {
        self.holders.insert(range, peer.name.clone());
        self.entries.routes.insert(range, hop);
    }

    /// The peer's ranges that nobody else has, and that take nothing away; the others become problems.
    fn free(&mut self, peer: &Peer) -> Vec<Range> {
        let mut free = Vec::new();
        for range in &peer.ranges {
            if let Some(problem) = self.conflict(&peer.name, *range) {
                self.problems.push(problem);
                continue;
            }
            let (node, range) = (peer.name.clone(), *range);
            if let Some(subnet) = self.subnet_around(&range) {
                self.problems.push(Problem::Inside { node, range, subnet });
            }
            free.push(range);
        }
        free
    }

    fn conflict(&self, node: &str, range: Range) -> Option<Problem> {
        let node = node.to_owned();
        if let Some((other, holder)) = self.holders.iter().find(|(held, _)| held.overlaps(&range)) {
            return Some(Problem::Overlap { node, range, other: *other, holder: holder.clone() });
        }
        if let Some(what) = self.held(&range) {
            return Some(Problem::Holds { node, range, what });
        }
        let route = self.host.routes.get(&range)?.clone();
        Some(Problem::OtherRoute { node, range, route })
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Whether a text may be 32 bytes in base64; whether they are a key is for the kernel to say.
fn is_key(text: &str) -> bool {
    let Some(digits) = text.strip_suffix('=') else { return false };
    digits.len() == 43 && digits.chars().all(|c| c.is_ascii_alphanumeric() || c == '+' || c == '/')
}

fn no_address(peer: &Peer, like: IpAddr) -> Problem {
    Problem::Family { node: peer.name.clone(), family: if like.is_ipv4() { "IPv4" } else { "IPv6" } }
}

#[cfg(test)]
#[path = "entries_tests.rs"]
mod tests;
