//! The node's own addresses, followed through netlink, and the route that keeps the service range on this machine.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::{Context, Result};
use futures::{Stream, StreamExt, TryStreamExt};
use netlink_packet_route::{
    AddressFamily,
    address::AddressAttribute,
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType},
};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};

use super::cidr::Cidr;

/// Loses against every other route to the same addresses.
const METRIC: u32 = u32::MAX - 1;
/// How routes of ours are told from others (`ip route` shows it as `proto 75`).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(75);
/// Linux' ESRCH and EEXIST: the route is not there, or there already.
const NO_SUCH_ROUTE: i32 = -3;
const ROUTE_EXISTS: i32 = -17;

/// A connection to the kernel that also hears of every change of an address. Its task ends with the stream.
pub(super) struct Addresses {
    handle: Handle,
}

impl Addresses {
    /// Connects; the stream has an item, or several merged, whenever an address came or went.
    pub(super) fn watch() -> Result<(Self, impl Stream<Item = ()> + Unpin)> {
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(&groups).context("open a netlink socket")?;
        tokio::spawn(connection);
        // A burst, as when many pods start, is one reason to look.
        Ok((Self { handle }, messages.ready_chunks(256).map(drop)))
    }

    /// All addresses of this network namespace that packets from elsewhere can be sent to.
    pub(super) async fn list(&self) -> Result<BTreeSet<IpAddr>> {
        let messages: Vec<_> =
            self.handle.address().get().execute().try_collect().await.context("list the node's addresses")?;
        let all = messages.into_iter().filter_map(|message| {
            let pick = |local: bool| {
                message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(ip) if local => Some(*ip),
                    AddressAttribute::Address(ip) if !local => Some(*ip),
                    _ => None,
                })
            };
            // On a point-to-point link the address is the peer's, and the local one is ours.
            pick(true).or_else(|| pick(false))
        });
        Ok(all.filter(|ip| is_reachable(*ip)).collect())
    }
}

fn is_reachable(ip: IpAddr) -> bool {
    let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    !ip.is_loopback() && !link_local
}

/// Of the node's addresses, those that lead to NodePorts; 127.0.0.1 and ::1 stand for all of loopback. No ranges:
/// all of them.
pub(super) fn node_port_addresses(own: &BTreeSet<IpAddr>, ranges: &[Cidr]) -> BTreeSet<IpAddr> {
    let loopback = [IpAddr::from([127, 0, 0, 1]), IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)];
    let all = own.iter().copied().chain(loopback);
    all.filter(|ip| ranges.is_empty() || ranges.iter().any(|range| range.contains(*ip))).collect()
}

/// Adds `unreachable <range>` so that a packet which no hook translated never leaves the machine. Returns other
/// routes into the range: they win over ours, and would carry such packets away.
pub(super) async fn guard_range(range: &Cidr) -> Result<Vec<String>> {
    let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
    tokio::spawn(connection);
    let clashes = other_routes(&handle, range).await?;
    match handle.route().add(route(range)).execute().await {
        Err(error) if code(&error) != Some(ROUTE_EXISTS) => {
            Err(error).with_context(|| format!("add route unreachable {range}"))
        }
        _ => Ok(clashes),
    }
}

/// Removes what [`guard_range`] added.
pub(super) async fn unguard_range(range: &Cidr) -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
    tokio::spawn(connection);
    match handle.route().del(route(range)).execute().await {
        Err(error) if code(&error) != Some(NO_SUCH_ROUTE) => {
            Err(error).with_context(|| format!("remove route unreachable {range}"))
        }
        _ => Ok(()),
    }
}

fn code(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code()),
        _ => None,
    }
}

fn route(range: &Cidr) -> RouteMessage {
    let builder =
        RouteMessageBuilder::<IpAddr>::new().kind(RouteType::Unreachable).protocol(PROTOCOL).priority(METRIC);
    // The prefix was checked against the family when the range was parsed.
    match builder.clone().destination_prefix(range.network, range.prefix) {
        Ok(builder) => builder.build(),
        Err(_) => builder.build(),
    }
}

async fn other_routes(handle: &Handle, range: &Cidr) -> Result<Vec<String>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family =
        if range.network.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let routes: Vec<RouteMessage> =
        handle.route().get(filter).execute().try_collect().await.context("list the routes")?;
    let foreign = routes.iter().filter(|route| {
        route.header.table == RouteHeader::RT_TABLE_MAIN && route.header.protocol != PROTOCOL
    });
    let clashing = foreign.filter_map(destination).filter(|other| other.prefix > 0 && other.overlaps(range));
    Ok(clashing.map(|other| other.to_string()).collect())
}

fn destination(route: &RouteMessage) -> Option<Cidr> {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    Cidr::new(address, route.header.destination_prefix_length).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ports_answer_within_the_ranges_only() {
        let own: BTreeSet<IpAddr> = [[192, 0, 2, 1].into(), [198, 51, 100, 1].into()].into();
        assert_eq!(node_port_addresses(&own, &[]).len(), 4, "all, and loopback of both families");
        let ranges = ["192.0.2.0/24".parse().unwrap()];
        assert_eq!(node_port_addresses(&own, &ranges), [[192, 0, 2, 1].into()].into());
        let ranges = ["127.0.0.0/8".parse().unwrap()];
        assert_eq!(node_port_addresses(&own, &ranges), [[127, 0, 0, 1].into()].into());
    }

    #[test]
    fn link_local_addresses_are_nobodys_node() {
        assert!(is_reachable([192, 0, 2, 1].into()));
        assert!(!is_reachable([127, 0, 0, 1].into()));
        assert!(!is_reachable("fe80::1".parse().unwrap()));
    }
}
