//! Address ranges in CIDR notation, as node addresses are allocated from them.
//!
//! Input: text. Output: ranges, their n-th subnets and whether two overlap. Never looks up anything.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use thiserror::Error;

/// A range of addresses: a network address and the length of its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

/// Text that is not a range.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is not an address range such as 10.244.0.0/16")]
pub struct CidrError {
    text: String,
}

impl Cidr {
    /// The range of `prefix` bits around the address.
    fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let width = width(address);
        (prefix <= width).then(|| {
            let bits = to_bits(address) & mask(prefix, width);
            Cidr { address: from_bits(bits, address.is_ipv4()), prefix }
        })
    }

    /// True for IPv4 ranges.
    pub fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// The length of the prefix.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// All subnets of the given prefix length, in order.
    pub fn subnets(self, prefix: u8) -> impl Iterator<Item = Cidr> {
        let width = width(self.address);
        let valid = prefix >= self.prefix && prefix <= width;
        let extra = u32::from(prefix.saturating_sub(self.prefix)).min(127);
        let count = if valid { 1_u128 << extra } else { 0 };
        let step = u32::from(width.saturating_sub(prefix));
        (0..count).map(move |index| {
            let offset = index.checked_shl(step).unwrap_or(0);
            Cidr { address: from_bits(to_bits(self.address) | offset, self.is_ipv4()), prefix }
        })
    }

    /// True when the two ranges share an address.
    pub fn overlaps(&self, other: &Cidr) -> bool {
        let width = width(self.address);
        let common = mask(self.prefix.min(other.prefix), width);
        self.is_ipv4() == other.is_ipv4() && to_bits(self.address) & common == to_bits(other.address) & common
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn mask(prefix: u8, width: u8) -> u128 {
    let all = if width == 32 { u128::from(u32::MAX) } else { u128::MAX };
    let host_bits = u32::from(width - prefix);
    all & u128::MAX.checked_shl(host_bits).unwrap_or(0)
}

fn to_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn from_bits(bits: u128, ipv4: bool) -> IpAddr {
    match u32::try_from(bits) {
        Ok(bits) if ipv4 => IpAddr::V4(Ipv4Addr::from_bits(bits)),
        _ => IpAddr::V6(Ipv6Addr::from_bits(bits)),
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let parsed = text
            .split_once('/')
            .and_then(|(address, prefix)| Cidr::new(address.parse().ok()?, prefix.parse().ok()?));
        parsed.ok_or_else(|| CidrError { text: text.to_owned() })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().expect("a valid range")
    }

    #[test]
    fn subnets_come_in_order() {
        let subnets: Vec<_> = cidr("10.244.0.0/22").subnets(24).map(|subnet| subnet.to_string()).collect();
        assert_eq!(subnets, ["10.244.0.0/24", "10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24"]);
        let second = cidr("fd00::/48").subnets(64).nth(1).expect("many");
        assert_eq!(second.to_string(), "fd00:0:0:1::/64");
        assert_eq!(cidr("10.0.0.0/24").subnets(16).count(), 0);
        assert_eq!(cidr("10.0.0.7/32").subnets(32).count(), 1);
    }

    #[test]
    fn overlap_is_containment_either_way() {
        assert!(cidr("10.244.0.0/16").overlaps(&cidr("10.244.7.0/24")));
        assert!(cidr("10.244.7.0/24").overlaps(&cidr("10.244.0.0/16")));
        assert!(!cidr("10.244.6.0/24").overlaps(&cidr("10.244.7.0/24")));
        assert!(!cidr("::/0").overlaps(&cidr("0.0.0.0/0")));
        assert!("10.0.0.0/33".parse::<Cidr>().is_err());
    }
}
