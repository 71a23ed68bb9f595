//! An address with its prefix length, as CNI writes them (`10.244.0.5/24`), and arithmetic on it.
//!
//! The address keeps its host bits, as interface addresses need them; [`IpNet::network`] drops them.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An IP address and a prefix length valid for its family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpNet {
    addr: IpAddr,
    prefix_len: u8,
}

impl IpNet {
    /// Joins address and prefix; `None` when the prefix is longer than the address.
    pub fn new(addr: IpAddr, prefix_len: u8) -> Option<Self> {
        (prefix_len <= width(addr)).then_some(Self { addr, prefix_len })
    }

    /// The address, host bits included.
    pub fn addr(&self) -> IpAddr {
        self.addr
    }

    /// The prefix length in bits.
    pub fn prefix_len(&self) -> u8 {
        self.prefix_len
    }

    /// The address with all host bits zero.
    pub fn network(&self) -> IpAddr {
        from_bits(self.addr, to_bits(self.addr) & !self.host_mask())
    }

    /// The address with all host bits one; for IPv4 the broadcast address.
    pub fn last(&self) -> IpAddr {
        from_bits(self.addr, to_bits(self.addr) | self.host_mask())
    }

    /// Whether `other` is of this family and below this prefix.
    pub fn contains(&self, other: IpAddr) -> bool {
        self.addr.is_ipv4() == other.is_ipv4()
            && to_bits(other) & !self.host_mask() == to_bits(self.network())
    }

    /// Whether one address is in both.
    pub fn overlaps(&self, other: &IpNet) -> bool {
        self.contains(other.network()) || other.contains(self.network())
    }

    fn host_mask(&self) -> u128 {
        let host_bits = u32::from(width(self.addr) - self.prefix_len);
        1_u128.checked_shl(host_bits).map_or(u128::MAX, |bit| bit - 1)
    }
}

/// The address after `addr`, or `None` after the last of its family.
pub fn next_addr(addr: IpAddr) -> Option<IpAddr> {
    match addr {
        IpAddr::V4(v4) => v4.to_bits().checked_add(1).map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(v6) => v6.to_bits().checked_add(1).map(|bits| IpAddr::V6(bits.into())),
    }
}

/// The address before `addr`, or `None` before the first of its family.
pub fn prev_addr(addr: IpAddr) -> Option<IpAddr> {
    to_bits(addr).checked_sub(1).map(|bits| from_bits(addr, bits))
}

fn width(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

fn to_bits(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn from_bits(family: IpAddr, bits: u128) -> IpAddr {
    match family {
        // The bits came from an IPv4 address and masks below 2^32; the upper part is zero.
        IpAddr::V4(_) => IpAddr::V4(u32::try_from(bits & u128::from(u32::MAX)).unwrap_or(u32::MAX).into()),
        IpAddr::V6(_) => IpAddr::V6(bits.into()),
    }
}

impl fmt::Display for IpNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.prefix_len)
    }
}

/// Text that is not `address/prefix`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid CIDR address {0:?}")]
pub struct InvalidIpNet(pub String);

impl FromStr for IpNet {
    type Err = InvalidIpNet;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidIpNet(text.to_owned());
        let (addr, prefix_len) = text.split_once('/').ok_or_else(invalid)?;
        let addr = addr.parse().ok();
        let prefix_len = prefix_len.parse().ok();
        addr.zip(prefix_len).and_then(|(addr, len)| IpNet::new(addr, len)).ok_or_else(invalid)
    }
}

impl Serialize for IpNet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for IpNet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn network_and_last_of_both_families() {
        let v4 = net("10.244.3.7/24");
        assert_eq!(v4.network().to_string(), "10.244.3.0");
        assert_eq!(v4.last().to_string(), "10.244.3.255");
        let v6 = net("fd00::1234/112");
        assert_eq!(v6.network().to_string(), "fd00::");
        assert_eq!(v6.last().to_string(), "fd00::ffff");
        assert_eq!(net("0.0.0.0/0").last().to_string(), "255.255.255.255");
        assert_eq!(net("::/0").last().to_string(), "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff");
    }

    #[test]
    fn contains_respects_family_and_prefix() {
        let subnet = net("10.0.0.0/8");
        assert!(subnet.contains("10.255.0.1".parse().unwrap()));
        assert!(!subnet.contains("11.0.0.1".parse().unwrap()));
        assert!(!subnet.contains("::a00:1".parse().unwrap()));
        assert!(subnet.overlaps(&net("10.244.0.0/16")) && net("10.244.0.0/16").overlaps(&subnet));
    }

    #[test]
    fn bad_text_is_named() {
        for text in ["", "10.0.0.1", "10.0.0.1/33", "::/129", "10.0.0/8", "a/8"] {
            assert_eq!(text.parse::<IpNet>(), Err(InvalidIpNet(text.to_owned())));
        }
    }
}
