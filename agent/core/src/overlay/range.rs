//! Address ranges and hardware addresses, as Node objects write them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// A text that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct NotParsed {
    text: String,
    expected: &'static str,
}

/// An address range; bits behind the prefix are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    network: IpAddr,
    prefix: u8,
}

impl Range {
    /// The range of `prefix` bits that `address` lies in; a prefix longer than the address counts as the address.
    pub fn of(address: IpAddr, prefix: u8) -> Self {
        let prefix = prefix.min(width(address));
        let network = match address {
            IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() & mask32(prefix)).into()),
            IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & mask128(prefix)).into()),
        };
        Self { network, prefix }
    }

    /// First address.
    pub fn network(&self) -> IpAddr {
        self.network
    }

    /// Leading bits that are fixed.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether the address lies within.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.network.is_ipv4() && Self::of(address, self.prefix) == *self
    }

    /// Whether the address is the range's first or, with IPv4, its last one, where these are no machine's.
    pub fn is_end(&self, address: IpAddr) -> bool {
        let (IpAddr::V4(first), IpAddr::V4(address)) = (self.network, address) else { return false };
        let last = first.to_bits() | !mask32(self.prefix);
        self.prefix <= 30 && (address == first || address.to_bits() == last)
    }

    /// Whether the two have an address in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.network) || other.contains(self.network)
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn mask32(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

fn mask128(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

impl FromStr for Range {
    type Err = NotParsed;

    fn from_str(text: &str) -> Result<Self, NotParsed> {
        let parsed = text.trim().split_once('/').and_then(|(address, prefix)| {
            let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
            (prefix <= width(address)).then(|| Self::of(address, prefix))
        });
        parsed.ok_or_else(|| NotParsed {
            text: text.to_owned(),
            expected: "an address range such as 10.244.1.0/24",
        })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A locally administered address that depends on the name only: a node keeps it over reboots, so that no peer has
    /// to learn another.
    pub fn of_name(name: &str) -> Self {
        // FNV-1a: well spread for short texts, and the same in every version.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        // And mixed, since names often differ in the last letter only.
        let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let mut bytes = [0; 6];
        bytes.copy_from_slice(&(hash ^ (hash >> 33)).to_be_bytes()[..6]);
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Self(bytes)
    }

    /// Whether one interface can have it: not a group address, not all zero.
    pub fn is_usable(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for Mac {
    type Err = NotParsed;

    fn from_str(text: &str) -> Result<Self, NotParsed> {
        let mut bytes = [0; 6];
        let mut parts = text.trim().split(':');
        let filled = bytes.iter_mut().all(|byte| {
            let parsed = parts.next().filter(|part| part.len() == 2);
            let parsed = parsed.and_then(|part| u8::from_str_radix(part, 16).ok());
            parsed.map(|value| *byte = value).is_some()
        });
        let mac = Self(bytes);
        if filled && parts.next().is_none() && mac.is_usable() {
            return Ok(mac);
        }
        Err(NotParsed {
            text: text.to_owned(),
            expected: "a hardware address of one interface such as 02:00:00:00:00:01",
        })
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_parse_contain_and_overlap() {
        let range: Range = "10.244.1.7/24".parse().unwrap();
        assert_eq!(range.to_string(), "10.244.1.0/24");
        assert!(range.contains([10, 244, 1, 255].into()) && !range.contains([10, 244, 2, 0].into()));
        assert!("0.0.0.0/0".parse::<Range>().unwrap().contains([1, 2, 3, 4].into()));
        assert!("::/0".parse::<Range>().unwrap().overlaps(&"fd00::/64".parse().unwrap()));
        assert!(!range.overlaps(&"fd00::/64".parse().unwrap()));
        for wrong in ["10.244.1.0", "10.244.1.0/33", "x/24", "", "10.0.0.0/-1"] {
            assert!(wrong.parse::<Range>().unwrap_err().to_string().contains("10.244.1.0/24"), "{wrong}");
        }
    }

    #[test]
    fn hardware_addresses_parse_and_are_stable() {
        let mac: Mac = "02:00:ab:CD:00:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:ab:cd:00:01");
        for wrong in ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "01:00:00:00:00:01", "00:00:00:00:00:00"]
        {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        let own = Mac::of_name("node-1");
        assert!(own.is_usable() && own.0[0] & 2 == 2 && own == Mac::of_name("node-1"));
        assert_ne!(own, Mac::of_name("node-2"));
    }
}
