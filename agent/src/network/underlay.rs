//! The interface that packets between nodes leave by: chosen by name, by route, or as the one with the node's address.

use std::net::IpAddr;

use agent_core::overlay::Range;
use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::RouteAttribute;
use rtnetlink::RouteMessageBuilder;

use super::kernel::Kernel;

/// How the interface is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Choice {
    /// By its name.
    Interface(String),
    /// The one that packets to this address leave by.
    Route(IpAddr),
    /// The one that has the node's address, else the one of the default route.
    NodeAddress,
}

/// The interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Underlay {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    /// Its global addresses, the one for the tunnel first, one per family.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) subnets: Vec<Range>,
}

impl Underlay {
    /// Finds it now. `ipv6`: which family the tunnel uses.
    pub(super) async fn find(kernel: &Kernel, choice: &Choice, node_ip: IpAddr, ipv6: bool) -> Result<Self> {
        let addresses = kernel.addresses().await?;
        let index = match choice {
            Choice::Interface(_) => None,
            Choice::Route(to) => Some(route_to(kernel, *to).await?),
            Choice::NodeAddress => match addresses.iter().find(|(_, address, ..)| *address == node_ip) {
                Some((index, ..)) => Some(*index),
                None => Some(route_to(kernel, node_ip).await?),
            },
        };
        let links = kernel.links().await?;
        let named = |link: &&netlink_packet_route::link::LinkMessage| match (index, choice) {
            (Some(index), _) => link.header.index == index,
            (None, Choice::Interface(name)) => attributes(link).0 == *name,
            (None, _) => false,
        };
        let Some(link) = links.iter().find(named) else {
            bail!(
                "the underlay interface {choice:?} does not exist: keelson.network.underlay must name one that does"
            );
        };
        let (name, mtu) = attributes(link);
        let index = link.header.index;
        let own = addresses.iter().filter(|(link, address, ..)| *link == index && is_global(*address));
        let (mut found, subnets): (Vec<IpAddr>, Vec<Range>) =
            own.map(|(_, address, prefix, _)| (*address, Range::of(*address, *prefix))).unzip();
        found.sort_by_key(|address| (address.is_ipv6() != ipv6, *address != node_ip));
        found.dedup_by_key(|address| address.is_ipv6());
        if found.first().is_none_or(|address| address.is_ipv6() != ipv6) {
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            bail!("the underlay interface {name} has no global {family} address");
        }
        Ok(Self { index, name, mtu, addresses: found, subnets })
    }
}

fn attributes(link: &netlink_packet_route::link::LinkMessage) -> (String, u32) {
    let mut found = (String::new(), 0);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.0.clone_from(name),
            LinkAttribute::Mtu(mtu) => found.1 = *mtu,
            _ => {}
        }
    }
    found
}

fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

/// Index of the interface that packets to `to` leave by.
async fn route_to(kernel: &Kernel, to: IpAddr) -> Result<u32> {
    let prefix = if to.is_ipv4() { 32 } else { 128 };
    let query = RouteMessageBuilder::<IpAddr>::new().destination_prefix(to, prefix)?.build();
    let answer = kernel.handle.route().get(query).execute().try_next().await;
    let answer = answer.with_context(|| format!("no route to {to}"))?.context("no route")?;
    let interface = answer.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    interface.with_context(|| format!("the route to {to} has no interface"))
}
