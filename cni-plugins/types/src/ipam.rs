//! Address allocation as a pure step: configuration and what is held in, the next address out.
//!
//! A *range set* is a list of ranges of one family; every set yields one address per attachment (two
//! sets give dual stack). Allocation rotates: it starts after the address given last, so that a freed
//! address rests as long as possible. [`leases`] is what is held, as a log of changes; reading and
//! writing it is the caller's work (`keelson-ipam`), as this crate does no IO.

pub mod leases;

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, de};

use crate::{
    ipnet::{IpNet, next_addr, prev_addr},
    result::{Dns, Route},
};

/// The `ipam` section for `keelson-ipam`; the keys are those of the reference plugins host-local and
/// static, and `exclude` and `sticky`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IpamConfig {
    /// Directory of the allocations; one sub-directory per network.
    #[serde(default)]
    pub data_dir: Option<String>,
    /// One address is taken of each set.
    #[serde(default)]
    pub ranges: Vec<Vec<RangeConfig>>,
    /// Short form of a single range: its subnet.
    #[serde(default)]
    pub subnet: Option<IpNet>,
    /// Short form: see [`RangeConfig::range_start`].
    #[serde(default)]
    pub range_start: Option<IpAddr>,
    /// Short form: see [`RangeConfig::range_end`].
    #[serde(default)]
    pub range_end: Option<IpAddr>,
    /// Short form: see [`RangeConfig::gateway`].
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    /// Addresses or subnets never given out, of whatever range.
    #[serde(default)]
    pub exclude: Vec<Exclusion>,
    /// Addresses that every attachment gets besides, or instead of, those of ranges.
    #[serde(default)]
    pub addresses: Vec<StaticAddress>,
    /// Routes handed through to the result.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// A file like `/etc/resolv.conf` whose content goes into the result.
    #[serde(default)]
    pub resolv_conf: Option<String>,
    /// Resolver configuration for the result.
    #[serde(default)]
    pub dns: Dns,
    /// Whether a pod (by namespace and name) gets the address it had before, while it is free.
    #[serde(default)]
    pub sticky: bool,
}

/// One range as configured.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RangeConfig {
    /// The subnet, whose prefix the addresses get.
    pub subnet: IpNet,
    /// First address to give; default: the first after the network address.
    #[serde(default)]
    pub range_start: Option<IpAddr>,
    /// Last address to give; default: the last before the broadcast address.
    #[serde(default)]
    pub range_end: Option<IpAddr>,
    /// Gateway, never given out; default: the first address of the subnet.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    /// Further addresses or subnets never given out.
    #[serde(default)]
    pub exclude: Vec<Exclusion>,
}

/// A configured address.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct StaticAddress {
    /// Address with prefix.
    pub address: IpNet,
    /// Its gateway.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
}

/// An address or a subnet that is not given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exclusion(IpNet);

impl<'de> Deserialize<'de> for Exclusion {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let one = |addr: IpAddr| IpNet::new(addr, if addr.is_ipv4() { 32 } else { 128 });
        text.parse()
            .ok()
            .or_else(|| text.parse().ok().and_then(one))
            .map(Exclusion)
            .ok_or_else(|| de::Error::custom(format!("{text:?} is neither an address nor a subnet")))
    }
}

/// A checked range: `first..=last` inside one subnet.
#[derive(Debug, Clone)]
pub struct Range {
    subnet: IpNet,
    first: IpAddr,
    last: IpAddr,
    gateway: IpAddr,
    exclude: Vec<Exclusion>,
}

/// Ranges of one family, at least one.
#[derive(Debug, Clone)]
pub struct RangeSet(Vec<Range>);

/// Why a configuration of ranges is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Neither `ranges`, `subnet` nor `addresses` is there, or a set is empty.
    #[error("ipam: no ranges are configured: give ranges, subnet or addresses")]
    Empty,
    /// The subnet leaves no room for a gateway and one pod.
    #[error("subnet: {0} is too small to allocate from")]
    TooSmall(IpNet),
    /// `subnet` has host bits.
    #[error("subnet: {0} is not a network address; did you mean {1}?")]
    HostBits(IpNet, IpNet),
    /// No interface can have addresses of the subnet.
    #[error("subnet: {0} has {1} addresses, which no pod can have")]
    NoHosts(IpNet, &'static str),
    /// The gateway is the subnet's broadcast address.
    #[error("gateway: {0} is the broadcast address of subnet {1}")]
    Broadcast(IpAddr, IpNet),
    /// The gateway is the subnet's network address.
    #[error("gateway: {0} is the network address of subnet {1}, which no host has")]
    Network(IpAddr, IpNet),
    /// `rangeStart`, `rangeEnd` or `gateway` is outside, or start is after end.
    #[error("{field}: {addr} is not usable in subnet {subnet}")]
    Outside {
        /// The offending key.
        field: &'static str,
        /// Its value.
        addr: IpAddr,
        /// The subnet it should be in.
        subnet: IpNet,
    },
    /// Two ranges share addresses, or a set mixes families.
    #[error("ipam: subnets {0} and {1} overlap or are of different families in one set of ranges")]
    Conflict(IpNet, IpNet),
    /// A range of a configuration cannot be.
    #[error("{at}.{source}")]
    At {
        /// Where it is, `ipam.ranges[0][1]`.
        at: String,
        /// What is wrong with it; begins with its key.
        source: Box<RangeError>,
    },
}

/// An address chosen from a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Address with the subnet's prefix.
    pub address: IpNet,
    /// Gateway of the subnet.
    pub gateway: Option<IpAddr>,
}

/// Why no address is given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// Every address is held.
    #[error("no IP addresses available in {0}")]
    Exhausted(String),
    /// The requested address is held by another.
    #[error("requested IP address {0} is not available")]
    NotAvailable(IpAddr),
    /// The requested address is excluded or outside every range.
    #[error("requested IP address {0} is in none of the ranges, or excluded")]
    Outside(IpAddr),
}

impl IpamConfig {
    /// Checks the configured ranges and fills in the defaults. Without ranges, `addresses` must be there.
    pub fn range_sets(&self) -> Result<Vec<RangeSet>, RangeError> {
        let short = self.subnet.map(|subnet| RangeConfig {
            subnet,
            range_start: self.range_start,
            range_end: self.range_end,
            gateway: self.gateway,
            exclude: Vec::new(),
        });
        let short = short.iter().map(|config| ("ipam".to_owned(), std::slice::from_ref(config)));
        let listed = self.ranges.iter().enumerate();
        let listed = listed.map(|(index, set)| (format!("ipam.ranges[{index}]"), set.as_slice()));
        let sets: Vec<RangeSet> = short
            .chain(listed)
            .map(|(at, configs)| RangeSet::new(&at, configs, &self.exclude))
            .collect::<Result<_, _>>()?;
        if sets.is_empty() && self.addresses.is_empty() {
            return Err(RangeError::Empty);
        }
        let all: Vec<&Range> = sets.iter().flat_map(|set| &set.0).collect();
        // In order of their beginnings, ranges overlap when neighbours do; only to name the first two is every pair looked at.
        let mut ordered = all.clone();
        ordered.sort_by_key(|range| range.first);
        let any_overlap = ordered.windows(2).any(|pair| pair[0].overlaps(pair[1]));
        for (index, range) in all.iter().enumerate().filter(|_| any_overlap) {
            if let Some(other) = all[..index].iter().find(|other| other.overlaps(range)) {
                return Err(RangeError::Conflict(other.subnet, range.subnet));
            }
        }
        Ok(sets)
    }
}

impl Range {
    /// Checks `config`, see [`RangeConfig`] for the defaults.
    pub fn new(config: &RangeConfig) -> Result<Self, RangeError> {
        let subnet = config.subnet;
        let bits = if subnet.addr().is_ipv4() { 32 } else { 128 };
        if subnet.prefix_len() + 2 > bits {
            return Err(RangeError::TooSmall(subnet));
        }
        if subnet.addr() != subnet.network() {
            let network = IpNet::new(subnet.network(), subnet.prefix_len()).unwrap_or(subnet);
            return Err(RangeError::HostBits(subnet, network));
        }
        let network = subnet.network();
        let kinds = [
            ("unspecified", network.is_unspecified()),
            ("loopback", network.is_loopback()),
            ("multicast", network.is_multicast()),
            // Of which an interface would get what no IPv4 host reaches.
            ("IPv4-mapped", matches!(network, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some())),
        ];
        if let Some((kind, _)) = kinds.into_iter().find(|(_, is)| *is) {
            return Err(RangeError::NoHosts(subnet, kind));
        }
        let too_small = RangeError::TooSmall(subnet);
        let lowest = next_addr(subnet.network()).ok_or_else(|| too_small.clone())?;
        let highest = prev_addr(subnet.last()).ok_or(too_small)?;
        let inside = |field, addr: Option<IpAddr>, default| match addr {
            Some(addr) if !subnet.contains(addr) => Err(RangeError::Outside { field, addr, subnet }),
            Some(addr) => Ok(addr),
            None => Ok(default),
        };
        let first = inside("rangeStart", config.range_start, lowest)?.max(lowest);
        let last = inside("rangeEnd", config.range_end, highest)?.min(highest);
        let gateway = inside("gateway", config.gateway, lowest)?;
        if gateway.is_ipv4() && gateway == subnet.last() {
            return Err(RangeError::Broadcast(gateway, subnet));
        }
        // Of IPv6 it is the routers' anycast address, which a router may be reached by.
        if gateway.is_ipv4() && gateway == subnet.network() {
            return Err(RangeError::Network(gateway, subnet));
        }
        if first > last {
            return Err(RangeError::Outside { field: "rangeStart", addr: first, subnet });
        }
        Ok(Self { subnet, first, last, gateway, exclude: config.exclude.clone() })
    }

    fn overlaps(&self, other: &Range) -> bool {
        self.first.is_ipv4() == other.first.is_ipv4() && self.first <= other.last && other.first <= self.last
    }

    fn holds(&self, addr: IpAddr) -> bool {
        addr.is_ipv4() == self.first.is_ipv4() && (self.first..=self.last).contains(&addr)
    }

    fn may_give(&self, addr: IpAddr) -> bool {
        self.holds(addr) && addr != self.gateway && self.excluded_until(addr).is_none()
    }

    /// The last address of the exclusion that covers `addr`, if one does.
    fn excluded_until(&self, addr: IpAddr) -> Option<IpAddr> {
        self.exclude.iter().filter(|entry| entry.0.contains(addr)).map(|entry| entry.0.last()).max()
    }

    fn allocation(&self, addr: IpAddr) -> Option<Allocation> {
        let address = IpNet::new(addr, self.subnet.prefix_len())?;
        Some(Allocation { address, gateway: Some(self.gateway) })
    }

    /// The first address of `from..=to` that may be given and is not held. Excluded subnets are skipped as
    /// a whole: they can be larger than anyone could count.
    fn next_free(
        &self,
        from: Option<IpAddr>,
        to: IpAddr,
        is_held: &mut impl FnMut(IpAddr) -> bool,
    ) -> Option<IpAddr> {
        let mut addr = from?;
        while addr <= to {
            if let Some(last) = self.excluded_until(addr) {
                addr = next_addr(last)?;
            } else if addr == self.gateway || is_held(addr) {
                addr = next_addr(addr)?;
            } else {
                return Some(addr);
            }
        }
        None
    }
}

impl RangeSet {
    /// Checks the ranges of one set; `exclude` holds for all of them. `at` is where the set is: `ipam` for the short form,
    /// which is no list, else `ipam.ranges[0]`.
    fn new(at: &str, configs: &[RangeConfig], exclude: &[Exclusion]) -> Result<Self, RangeError> {
        let checked = configs.iter().enumerate().map(|(index, config)| {
            let at = || if at.ends_with(']') { format!("{at}[{index}]") } else { at.to_owned() };
            Range::new(config).map_err(|source| RangeError::At { at: at(), source: Box::new(source) })
        });
        let mut ranges: Vec<Range> = checked.collect::<Result<_, _>>()?;
        for range in &mut ranges {
            range.exclude.extend_from_slice(exclude);
        }
        let Some(head) = ranges.first() else { return Err(RangeError::Empty) };
        match ranges.iter().find(|range| range.first.is_ipv4() != head.first.is_ipv4()) {
            Some(other) => Err(RangeError::Conflict(head.subnet, other.subnet)),
            None => Ok(Self(ranges)),
        }
    }

    /// The allocation of `addr` when it belongs to this set and may be given out.
    pub fn find(&self, addr: IpAddr) -> Option<Allocation> {
        self.0.iter().find(|range| range.may_give(addr)).and_then(|range| range.allocation(addr))
    }

    /// The next address for which `is_held` is false, searching from the one after `last_given`
    /// round through all ranges.
    pub fn allocate(
        &self,
        last_given: Option<IpAddr>,
        mut is_held: impl FnMut(IpAddr) -> bool,
    ) -> Result<Allocation, AllocateError> {
        let start =
            last_given.and_then(|last| self.0.iter().position(|range| range.holds(last))).unwrap_or(0);
        let head = &self.0[start];
        let split = last_given.filter(|last| head.holds(*last));
        let after = head
            .next_free(split.map_or(Some(head.first), next_addr), head.last, &mut is_held)
            .and_then(|addr| head.allocation(addr));
        let mut others = self.0[start + 1..].iter().chain(&self.0[..start]);
        after
            .or_else(|| {
                others.find_map(|range| {
                    let addr = range.next_free(Some(range.first), range.last, &mut is_held)?;
                    range.allocation(addr)
                })
            })
            .or_else(|| {
                let addr = head.next_free(Some(head.first), split?, &mut is_held)?;
                head.allocation(addr)
            })
            .ok_or_else(|| AllocateError::Exhausted(self.describe()))
    }

    /// The ranges as text for messages, `10.244.0.1-10.244.0.254`.
    pub fn describe(&self) -> String {
        let texts: Vec<String> =
            self.0.iter().map(|range| format!("range {}-{}", range.first, range.last)).collect();
        texts.join(", ")
    }

    /// The subnets the addresses are of.
    pub fn subnets(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.0.iter().map(|range| range.subnet)
    }

    /// Whether `addr` lies in one of the ranges, whether it may be given or not.
    pub fn holds(&self, addr: IpAddr) -> bool {
        self.0.iter().any(|range| range.holds(addr))
    }
}

#[cfg(test)]
mod tests;
