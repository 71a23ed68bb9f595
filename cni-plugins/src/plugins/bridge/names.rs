//! Names computed from an attachment, so that it can be found again without stored state.

use std::{
    collections::BTreeSet,
    hash::{BuildHasher, Hasher, RandomState},
    net::IpAddr,
};

use cni_plugins_host::netlink::Link;
use cni_plugins_types::{CniResult, config::is_name};

use crate::call::Attachment;

/// Alias of bridges made here.
pub(super) const BRIDGE_ALIAS: &str = "cni-bridge";
/// How the alias of a pod's interface begins.
const HERE: &str = "cni:";
/// How it begins after DEL, until the kernel has removed it.
pub(super) const GONE: &str = "cni-gone:";
const PREFIX: &str = "veth";
/// Interface names have 15 characters; the prefix leaves 11, which are 44 bits of the hash.
const HASH_DIGITS: usize = 11;

/// Name of an attachment's interface on the host.
pub(super) fn host_interface(network: &str, container_id: &str, ifname: &str) -> String {
    let mut hash = Fnv1a::default();
    for part in [network, container_id, ifname] {
        hash.write(part.as_bytes());
        hash.write(&[0]);
    }
    let digits = format!("{:016x}", hash.0);
    format!("{PREFIX}{}", &digits[..HASH_DIGITS])
}

/// Alias of that interface: for people, and for GC to know the network.
pub(super) fn alias(network: &str, container_id: &str, ifname: &str) -> String {
    format!("{HERE}{network}:{container_id}:{ifname}")
}

/// The names of the attachments that GC keeps.
pub(super) fn valid_names(network: &str, valid: &[Attachment]) -> BTreeSet<String> {
    valid.iter().map(|kept| host_interface(network, &kept.container_id, &kept.ifname)).collect()
}

/// Whether `link` belongs to `network` and is none of the `kept`. A port of `bridge` without alias is of an
/// ADD that did not come to set one; its name tells whether it is one of ours.
pub(super) fn is_stale(link: &Link, network: &str, bridge: Option<u32>, kept: &BTreeSet<String>) -> bool {
    let this_network = match attachment(&link.alias) {
        Some(rest) => rest.split(':').next() == Some(network),
        None => link.alias.is_empty() && bridge.is_some() && link.controller == bridge,
    };
    has_our_name(link) && this_network && is_name(network) && !kept.contains(&link.name)
}

/// Whether `link` is the host's end of any pod's pair.
pub(super) fn is_ours(link: &Link) -> bool {
    has_our_name(link) && attachment(&link.alias).is_some()
}

fn attachment(alias: &str) -> Option<&str> {
    alias.strip_prefix(GONE).or_else(|| alias.strip_prefix(HERE))
}

fn has_our_name(link: &Link) -> bool {
    link.name.strip_prefix(PREFIX).is_some_and(|rest| {
        rest.len() == HASH_DIGITS && rest.chars().all(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase())
    })
}

/// The hardware address of an attachment: from its first IP address, else from its own name, which is as
/// unique.
pub(super) fn mac_of_attachment(result: &CniResult, host_name: &str) -> [u8; 6] {
    let from_name = || {
        let mut bytes = [0_u8; 16];
        bytes.iter_mut().zip(host_name.bytes()).for_each(|(slot, byte)| *slot = byte);
        IpAddr::V6(bytes.into())
    };
    mac_for(result.addresses_in_sandbox().next().unwrap_or_else(from_name))
}

/// A locally administered hardware address from an IP address, the same for whoever has the address
/// next: neighbours' entries stay right when it is used again.
pub(super) fn mac_for(addr: IpAddr) -> [u8; 6] {
    let last = match addr {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => {
            let mut hash = Fnv1a::default();
            hash.write(&v6.octets());
            let bytes = hash.0.to_be_bytes();
            [bytes[0], bytes[1], bytes[2], bytes[3]]
        }
    };
    [0x0a, 0x58, last[0], last[1], last[2], last[3]]
}

/// A locally administered hardware address that nobody else has.
pub(super) fn random_mac() -> [u8; 6] {
    // Seeded by the kernel's random numbers.
    let bytes = RandomState::new().build_hasher().finish().to_be_bytes();
    [bytes[0] & 0xfc | 2, bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]]
}

/// FNV-1a, 64 bits: short, stable across builds (names must survive an upgrade), no secret involved.
struct Fnv1a(u64);

impl Default for Fnv1a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv1a {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_differ_and_stay() {
        let name = host_interface("keelson", "abc", "eth0");
        assert_eq!(name.len(), 15);
        assert_ne!(name, host_interface("keelson", "abc", "eth1"));
        assert_ne!(host_interface("a", "bc", "eth0"), host_interface("ab", "c", "eth0"));
        // Written down: a changed name would orphan the interfaces of running pods at an upgrade.
        assert_eq!(name, "veth94ba9041008");
    }

    #[test]
    fn gc_takes_only_unexplained_ports_of_its_network() {
        let port = |name: &str, alias: &str| Link {
            name: name.to_owned(),
            alias: alias.to_owned(),
            controller: Some(7),
            ..Link::default()
        };
        let valid = [Attachment { container_id: "abc".to_owned(), ifname: "eth0".to_owned() }];
        let kept = valid_names("net", &valid);
        let name = host_interface("net", "abc", "eth0");
        let gone = host_interface("net", "gone", "eth0");
        let stale = |link: &Link| is_stale(link, "net", Some(7), &kept);
        assert!(!stale(&port(&name, "cni:net:abc:eth0")));
        assert!(stale(&port(&gone, "cni:net:gone:eth0")));
        assert!(stale(&port(&gone, "cni-gone:net:gone:eth0")));
        assert!(stale(&port(&gone, "")));
        assert!(!stale(&Link { controller: None, ..port(&gone, "") }));
        assert!(!stale(&port(&gone, "cni:other:gone:eth0")));
        assert!(!stale(&port("eth7", "")));
        assert!(!stale(&port(&gone, "a person's")));
    }

    #[test]
    fn mac_is_local_and_unicast() {
        let mac = mac_for("10.244.0.2".parse().unwrap());
        assert_eq!(mac, [0x0a, 0x58, 10, 244, 0, 2]);
        assert_eq!(mac_for("fd00::2".parse().unwrap())[0] & 3, 2);
        assert_eq!(random_mac()[0] & 3, 2);
        assert_ne!(random_mac(), random_mac());
    }
}
