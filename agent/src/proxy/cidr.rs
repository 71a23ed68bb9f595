//! Address ranges as the configuration writes them. Pure.

use std::{fmt, net::IpAddr, str::FromStr};

use anyhow::{Context, Result, bail, ensure};

/// An address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cidr {
    /// First address.
    pub(crate) network: IpAddr,
    /// Leading bits that are fixed.
    pub(crate) prefix: u8,
}

impl Cidr {
    /// A range from its parts; bits behind the prefix are cleared.
    pub(crate) fn new(address: IpAddr, prefix: u8) -> Result<Self> {
        let width = if address.is_ipv4() { 32 } else { 128 };
        ensure!(prefix <= width, "prefix length {prefix} is more than {width}");
        let kept = bits(address) & mask(prefix, width);
        let network = match address {
            IpAddr::V4(_) => IpAddr::V4(u32::try_from(kept).context("an IPv4 address has 32 bits")?.into()),
            IpAddr::V6(_) => IpAddr::V6(kept.into()),
        };
        Ok(Self { network, prefix })
    }

    /// Whether the address lies within.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        let width = if address.is_ipv4() { 32 } else { 128 };
        address.is_ipv4() == self.network.is_ipv4()
            && bits(address) & mask(self.prefix, width) == bits(self.network)
    }

    /// Whether the two have an address in common.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.network) || other.contains(self.network)
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn mask(prefix: u8, width: u8) -> u128 {
    let all = if width == 32 { u128::from(u32::MAX) } else { u128::MAX };
    let free = width - prefix;
    if free == 128 { 0 } else { all >> free << free }
}

impl FromStr for Cidr {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some((address, prefix)) = text.trim().split_once('/') else {
            bail!("{text:?} is not an address range like 10.96.0.0/12");
        };
        let address: IpAddr =
            address.parse().with_context(|| format!("{address:?} in {text:?} is not an address"))?;
        let prefix =
            prefix.parse().with_context(|| format!("{prefix:?} in {text:?} is not a prefix length"))?;
        Self::new(address, prefix).with_context(|| format!("{text:?} is not an address range"))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_contain_and_overlap() {
        assert!(cidr("10.96.0.0/12").contains([10, 111, 255, 255].into()));
        assert!(!cidr("10.96.0.0/12").contains([10, 112, 0, 0].into()));
        assert!(cidr("0.0.0.0/0").contains([1, 2, 3, 4].into()));
        assert!(cidr("::/0").contains("fd00::1".parse().unwrap()));
        assert!(!cidr("::/0").contains([1, 2, 3, 4].into()));
        assert!(cidr("10.100.0.0/16").overlaps(&cidr("10.96.0.0/12")));
        assert!(!cidr("10.0.0.0/12").overlaps(&cidr("10.96.0.0/12")));
        assert_eq!(cidr("10.99.1.2/12").to_string(), "10.96.0.0/12");
    }

    #[test]
    fn mistakes_are_named() {
        for text in ["10.96.0.0", "10.96.0.0/33", "x/12", "10.96.0.0/y"] {
            let error = format!("{:#}", text.parse::<Cidr>().unwrap_err());
            assert!(error.contains(text), "{error}");
        }
    }
}
