//! What a Node object says about its network: pod ranges, the address of the underlay, the tunnel's identity.
//!
//! Published as annotations by every node's agent and read by all others; the names are documented in docs/network.md.

use std::fmt;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Node;
use serde::{Deserialize, Serialize};

use super::range::{Mac, Range};

/// Annotation: how the node sends to its peers (`vxlan`, `host-gw`, `wireguard`).
pub const MODE: &str = "keelson.io/overlay-mode";
/// Annotation: addresses at which the node takes packets of its peers, one per family, with a comma between.
pub const ADDRESSES: &str = "keelson.io/overlay-addresses";
/// Annotation: hardware address of the node's VXLAN device.
pub const VTEP_MAC: &str = "keelson.io/vtep-mac";
/// Annotation: WireGuard public key, base64.
pub const PUBLIC_KEY: &str = "keelson.io/wireguard-public-key";

/// How packets for pods of other nodes travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Inside UDP, over any network that carries packets between the nodes.
    #[default]
    Vxlan,
    /// As they are, by routes through the nodes; all nodes must share a subnet.
    HostGw,
    /// Inside UDP and encrypted.
    Wireguard,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Wireguard => "wireguard",
        })
    }
}

/// One node as its peers see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Node name.
    pub name: String,
    /// When its object was made, in seconds since 1970; of two that claim the same, the older one keeps it.
    pub since: Option<i64>,
    /// Its pods' addresses, one range per family.
    pub ranges: Vec<Range>,
    /// Where it takes packets: what it publishes, else its InternalIPs.
    pub addresses: Vec<IpAddr>,
    /// What it publishes as its mode, as text: a newer agent may know more.
    pub mode: Option<String>,
    /// Hardware address of its VXLAN device.
    pub mac: Option<Mac>,
    /// Annotations that say something that cannot be used, with their values.
    pub unreadable: Vec<(&'static str, String)>,
    /// WireGuard public key, base64.
    pub public_key: Option<String>,
}

impl Peer {
    /// Reads a Node object; what cannot be read counts as not said, and is kept to be told.
    pub fn of(node: &Node) -> Self {
        let annotation = |name: &str| node.metadata.annotations.as_ref().and_then(|all| all.get(name));
        let published = annotation(ADDRESSES).map(|text| parse_addresses(text));
        let mac = annotation(VTEP_MAC).map(|text| text.parse::<Mac>().map_err(|_why| text.clone()));
        let mut unreadable = Vec::new();
        if let Some((_, junk)) = &published {
            unreadable.extend(junk.iter().map(|text| (ADDRESSES, text.clone())));
        }
        if let Some(Err(text)) = &mac {
            unreadable.push((VTEP_MAC, text.clone()));
        }
        Self {
            name: node.metadata.name.clone().unwrap_or_default(),
            since: node.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second()),
            ranges: pod_ranges(node),
            addresses: published.map_or_else(|| internal_ips(node), |(addresses, _)| addresses),
            mode: annotation(MODE).cloned(),
            mac: mac.and_then(Result::ok),
            unreadable,
            public_key: annotation(PUBLIC_KEY).cloned(),
        }
    }

    /// Its address of the same family as `like`.
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| address.is_ipv4() == like.is_ipv4())
    }
}

/// The addresses, and the parts that are none.
fn parse_addresses(text: &str) -> (Vec<IpAddr>, Vec<String>) {
    let mut found = (Vec::new(), Vec::new());
    for part in text.split(',').map(str::trim) {
        match part.parse() {
            Ok(address) => found.0.push(address),
            Err(_) => found.1.push(part.to_owned()),
        }
    }
    found
}

/// `spec.podCIDRs`, or the single `spec.podCIDR`; what is not a range is left out.
pub fn pod_ranges(node: &Node) -> Vec<Range> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let several = spec.pod_cidrs.iter().flatten();
    let mut ranges: Vec<Range> = several.filter_map(|text| text.parse().ok()).collect();
    if ranges.is_empty() {
        ranges.extend(spec.pod_cidr.iter().filter_map(|text| text.parse::<Range>().ok()));
    }
    ranges
}

fn internal_ips(node: &Node) -> Vec<IpAddr> {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    addresses
        .filter(|address| address.type_ == "InternalIP")
        .filter_map(|it| it.address.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_node_says_what_its_peers_need() {
        let mut object = json!({
            "metadata": {"name": "a", "annotations": {MODE: "vxlan", VTEP_MAC: "02:00:00:00:00:0a"}},
            "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24", "fd00::/64", "junk"]},
            "status": {"addresses": [{"type": "Hostname", "address": "a"}, {"type": "InternalIP", "address": "192.0.2.1"}]},
        });
        let read = |object: &serde_json::Value| Peer::of(&serde_json::from_value(object.clone()).unwrap());
        let peer = read(&object);
        assert_eq!(
            peer.ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.244.0.0/24", "fd00::/64"]
        );
        assert_eq!(
            peer.addresses,
            [IpAddr::from([192, 0, 2, 1])],
            "the InternalIP where nothing is published"
        );
        assert_eq!(peer.mac, Some(Mac([2, 0, 0, 0, 0, 10])));
        assert_eq!((peer.since, peer.unreadable.len()), (None, 0));
        object["metadata"]["annotations"][ADDRESSES] = json!("192.0.2.9, 2001:db8::1,all");
        object["metadata"]["creationTimestamp"] = json!("1970-01-01T00:01:00Z");
        object["metadata"]["annotations"][VTEP_MAC] = json!("nonsense");
        let peer = read(&object);
        let v6: IpAddr = "2001:db8::1".parse().unwrap();
        assert_eq!(peer.address_like(v6), Some(v6));
        assert_eq!((peer.mac, peer.since), (None, Some(60)));
        assert_eq!(peer.unreadable, [(ADDRESSES, "all".to_owned()), (VTEP_MAC, "nonsense".to_owned())]);
    }
}
