//! Address allocation as a pure step: configuration and what is held in, the next address out.
//!
//! A *range set* is a list of ranges of one family; every set yields one address per attachment (two
//! sets give dual stack). Allocation rotates: it starts after the address given last, so that a freed
//! address rests as long as possible. Keeping what is held, and stickiness across calls, is the
//! caller's work (`keelson-ipam`), as this crate does no IO.

use std::net::IpAddr;

use serde::Deserialize;

use crate::{
    ipnet::{IpNet, next_addr, prev_addr},
    result::Route,
};

/// The `ipam` section for `keelson-ipam`; the keys are those of the reference plugin host-local.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IpamConfig {
    /// Directory of the allocations; one sub-directory per network.
    #[serde(default)]
    pub data_dir: Option<String>,
    /// One address is taken of each set.
    #[serde(default)]
    pub ranges: Vec<Vec<RangeConfig>>,
    /// Short form: a single range.
    #[serde(flatten)]
    pub single: Option<RangeConfig>,
    /// Routes handed through to the result.
    #[serde(default)]
    pub routes: Vec<Route>,
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
    pub exclude: Vec<ExcludeEntry>,
}

/// An address or a subnet that is not given out.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum ExcludeEntry {
    /// A subnet.
    Net(IpNet),
    /// One address.
    Addr(IpAddr),
}

impl ExcludeEntry {
    fn covers(&self, addr: IpAddr) -> bool {
        match self {
            ExcludeEntry::Net(net) => net.contains(addr),
            ExcludeEntry::Addr(excluded) => *excluded == addr,
        }
    }
}

/// A checked range: `first..=last` inside one subnet.
#[derive(Debug, Clone)]
pub struct Range {
    subnet: IpNet,
    first: IpAddr,
    last: IpAddr,
    gateway: IpAddr,
    exclude: Vec<ExcludeEntry>,
}

/// Ranges of one family, at least one.
#[derive(Debug, Clone)]
pub struct RangeSet(Vec<Range>);

/// Why a configuration of ranges is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Neither `ranges` nor `subnet` is there, or a set is empty.
    #[error("no ranges are configured")]
    Empty,
    /// The subnet leaves no room for a gateway and one pod.
    #[error("subnet {0} is too small to allocate from")]
    TooSmall(IpNet),
    /// `rangeStart`, `rangeEnd` or `gateway` is outside, or start is after end.
    #[error("{field} {addr} is not usable in subnet {subnet}")]
    Outside {
        /// The offending key.
        field: &'static str,
        /// Its value.
        addr: IpAddr,
        /// The subnet it should be in.
        subnet: IpNet,
    },
    /// Two ranges share addresses, or a set mixes families.
    #[error("subnets {0} and {1} overlap or are of different families in one set")]
    Conflict(IpNet, IpNet),
}

/// An address chosen from a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Address with the subnet's prefix.
    pub address: IpNet,
    /// Gateway of the subnet.
    pub gateway: IpAddr,
}

/// Why no address is given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// Every address is held.
    #[error("no IP addresses available in {0}")]
    Exhausted(String),
    /// The requested address is held by another, or excluded, or outside the set.
    #[error("requested IP address {0} is not available")]
    NotAvailable(IpAddr),
}

impl IpamConfig {
    /// Checks the configured ranges and fills in the defaults.
    pub fn range_sets(&self) -> Result<Vec<RangeSet>, RangeError> {
        let short = self.single.iter().map(std::slice::from_ref);
        let sets: Vec<RangeSet> = short
            .chain(self.ranges.iter().map(Vec::as_slice))
            .map(RangeSet::new)
            .collect::<Result<_, _>>()?;
        if sets.is_empty() {
            return Err(RangeError::Empty);
        }
        let all: Vec<&Range> = sets.iter().flat_map(|set| &set.0).collect();
        for (index, range) in all.iter().enumerate() {
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
        if first > last {
            return Err(RangeError::Outside { field: "rangeStart", addr: first, subnet });
        }
        Ok(Self { subnet, first, last, gateway, exclude: config.exclude.clone() })
    }

    fn overlaps(&self, other: &Range) -> bool {
        self.first.is_ipv4() == other.first.is_ipv4() && self.first <= other.last && other.first <= self.last
    }

    fn may_give(&self, addr: IpAddr) -> bool {
        addr.is_ipv4() == self.first.is_ipv4()
            && (self.first..=self.last).contains(&addr)
            && addr != self.gateway
            && !self.exclude.iter().any(|entry| entry.covers(addr))
    }

    fn allocation(&self, addr: IpAddr) -> Option<Allocation> {
        let address = IpNet::new(addr, self.subnet.prefix_len())?;
        Some(Allocation { address, gateway: self.gateway })
    }
}

impl RangeSet {
    /// Checks the ranges of one set.
    pub fn new(configs: &[RangeConfig]) -> Result<Self, RangeError> {
        let ranges: Vec<Range> = configs.iter().map(Range::new).collect::<Result<_, _>>()?;
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
        self.candidates(last_given)
            .find(|(range, addr)| range.may_give(*addr) && !is_held(*addr))
            .and_then(|(range, addr)| range.allocation(addr))
            .ok_or_else(|| AllocateError::Exhausted(self.describe()))
    }

    /// `addr` itself, when this set may give it and nobody holds it.
    pub fn allocate_exactly(
        &self,
        addr: IpAddr,
        mut is_held: impl FnMut(IpAddr) -> bool,
    ) -> Result<Allocation, AllocateError> {
        self.find(addr).filter(|_| !is_held(addr)).ok_or(AllocateError::NotAvailable(addr))
    }

    /// The ranges as text for messages, `10.244.0.1-10.244.0.254`.
    pub fn describe(&self) -> String {
        let texts: Vec<String> =
            self.0.iter().map(|range| format!("range {}-{}", range.first, range.last)).collect();
        texts.join(", ")
    }

    /// Every address of the set once, starting after `last_given`.
    fn candidates(&self, last_given: Option<IpAddr>) -> impl Iterator<Item = (&Range, IpAddr)> {
        let start = last_given
            .and_then(|last| self.0.iter().position(|range| (range.first..=range.last).contains(&last)))
            .unwrap_or(0);
        let split = last_given.filter(|last| (self.0[start].first..=self.0[start].last).contains(last));
        let head = &self.0[start];
        let after_split =
            addresses(split.map_or(Some(head.first), next_addr), head.last).map(move |addr| (head, addr));
        let others = self.0[start + 1..].iter().chain(&self.0[..start]);
        let others =
            others.flat_map(|range| addresses(Some(range.first), range.last).map(move |a| (range, a)));
        let up_to_split = split
            .into_iter()
            .flat_map(move |last| addresses(Some(head.first), last))
            .map(move |addr| (head, addr));
        after_split.chain(others).chain(up_to_split)
    }
}

fn addresses(first: Option<IpAddr>, last: IpAddr) -> impl Iterator<Item = IpAddr> {
    std::iter::successors(first.filter(|first| *first <= last), move |addr| {
        next_addr(*addr).filter(|next| *next <= last)
    })
}

#[cfg(test)]
mod tests;
