//! The kernel's tables over netlink: what the overlay put there, and how it is changed.
//!
//! Routes of ours carry a protocol number of their own, by which stale ones of an earlier run are found; neighbours and
//! FDB entries are those of the tunnel device. Other routes are read for the path's MTU and never changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use agent_core::overlay::{Action, Entries, Hop, Host, Mac, Range};
use anyhow::{Context, Result};
use futures::{Stream, StreamExt, TryStreamExt};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};

/// How routes of the overlay are told from others (`ip route` shows it as `proto 76`).
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(cni_plugins_host::overlay::ROUTE_PROTOCOL);
/// Linux' ENOENT, ESRCH, EADDRNOTAVAIL: what is to be removed is not there.
const NOT_THERE: [i32; 4] = [-2, -3, -19, -99];
/// Metric that the kernel gives IPv6 routes that say none.
const IPV6_METRIC: u32 = 1024;
/// Number of the metric that is the MTU, of linux/rtnetlink.h.
const RTAX_MTU: u32 = 2;
/// Changes that are taken in at once, at most.
const BURST: usize = 1024;

/// A connection for requests.
#[derive(Clone)]
pub(super) struct Kernel {
    pub(super) handle: Handle,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: Range,
    pub(super) hop: Hop,
    pub(super) protocol: RouteProtocol,
    metric: u32,
}

impl Kernel {
    /// Connects to this thread's network namespace.
    pub(super) fn open() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Unicast routes of the main table, both families.
    pub(super) async fn routes(&self) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            let listed: Vec<RouteMessage> =
                self.handle.route().get(filter).execute().try_collect().await.context("list the routes")?;
            routes.extend(listed.iter().filter_map(route_of));
        }
        Ok(routes)
    }

    /// The overlay's entries: routes of ours, and what is on the tunnel.
    pub(super) async fn entries(&self, routes: &[Route], tunnel: Option<u32>) -> Result<Observed> {
        let mut observed = Observed::default();
        for route in routes.iter().filter(|route| route.protocol == PROTOCOL) {
            let usual = if route.destination.network().is_ipv4() { 0 } else { IPV6_METRIC };
            if route.metric == usual {
                observed.entries.routes.insert(route.destination, route.hop);
            } else {
                observed.strays.push(route.clone());
            }
        }
        let Some(tunnel) = tunnel else { return Ok(observed) };
        for neighbour in self
            .neighbours(AddressFamily::Inet, tunnel)
            .await?
            .into_iter()
            .chain(self.neighbours(AddressFamily::Inet6, tunnel).await?)
        {
            if let (Some(via), Some(mac)) = (destination(&neighbour), mac(&neighbour)) {
                observed.entries.neighbours.insert(via, mac);
            }
        }
        for forward in self.neighbours(AddressFamily::Bridge, tunnel).await? {
            if let (Some(to), Some(mac)) = (destination(&forward), mac(&forward)) {
                observed.entries.forwards.insert(mac, to);
            }
        }
        Ok(observed)
    }

    /// Permanent neighbours of one family on a device.
    async fn neighbours(&self, family: AddressFamily, device: u32) -> Result<Vec<NeighbourMessage>> {
        let request = self.handle.neighbours().get().set_address_family(family);
        let listed: Vec<NeighbourMessage> =
            request.execute().try_collect().await.context("list the neighbours")?;
        // A state is a set of bits; entries made by `bridge fdb add` have another beside this one.
        let permanent = u16::from(NeighbourState::Permanent);
        let ours = |it: &NeighbourMessage| {
            it.header.ifindex == device && u16::from(it.header.state) & permanent != 0
        };
        Ok(listed.into_iter().filter(ours).collect())
    }

    /// Carries one change out.
    pub(super) async fn apply(&self, action: &Action, tunnel: Option<u32>) -> Result<()> {
        let done = match action {
            Action::SetRoute(range, hop) => {
                self.handle.route().add(route_message(*range, *hop)?).replace().execute().await
            }
            Action::RemoveRoute(range, hop) => {
                gone(self.handle.route().del(route_message(*range, *hop)?).execute().await)
            }
            Action::SetNeighbour(via, mac) => {
                let device = tunnel.context("no tunnel")?;
                let request = self.handle.neighbours().add(device, *via).link_layer_address(&mac.0);
                request.replace().execute().await
            }
            Action::SetForward(mac, to) => {
                let device = tunnel.context("no tunnel")?;
                let request = self.handle.neighbours().add_bridge(device, &mac.0).destination(*to);
                request.flags(NeighbourFlags::Own).replace().execute().await
            }
            Action::RemoveNeighbour(via) => {
                let device = tunnel.context("no tunnel")?;
                let request = self.handle.neighbours().add(device, *via).message_mut().clone();
                gone(self.handle.neighbours().del(request).execute().await)
            }
            Action::RemoveForward(mac, to) => {
                let device = tunnel.context("no tunnel")?;
                let mut request = self.handle.neighbours().add_bridge(device, &mac.0).destination(*to);
                request.message_mut().header.flags = NeighbourFlags::Own;
                gone(self.handle.neighbours().del(request.message_mut().clone()).execute().await)
            }
        };
        done.with_context(|| format!("{action:?}"))
    }

    /// Removes a route of ours that has no business to be there.
    pub(super) async fn remove_stray(&self, route: &Route) -> Result<()> {
        let mut message = route_message(route.destination, route.hop)?;
        message.attributes.push(RouteAttribute::Priority(route.metric));
        gone(self.handle.route().del(message).execute().await).context("remove a stray route")
    }

    /// Links of this namespace.
    pub(super) async fn links(&self) -> Result<Vec<LinkMessage>> {
        self.handle.link().get().execute().try_collect().await.context("list the links")
    }

    /// Addresses of this namespace.
    pub(super) async fn addresses(&self) -> Result<Vec<(u32, IpAddr, u8, AddressMessage)>> {
        let listed: Vec<AddressMessage> =
            self.handle.address().get().execute().try_collect().await.context("list the addresses")?;
        let found = listed.into_iter().filter_map(|message| {
            Some((message.header.index, own_address(&message)?, message.header.prefix_len, message))
        });
        Ok(found.collect())
    }
}

/// What the overlay has in the kernel.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// Entries as the plan knows them.
    pub(super) entries: Entries,
    /// Routes of ours with a metric that ours never have.
    pub(super) strays: Vec<Route>,
}

/// A stream with an item for every burst of changes to links, addresses, routes and neighbours.
pub(super) fn changes() -> Result<impl Stream<Item = Vec<Change>> + Unpin> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    let (connection, _, messages) =
        rtnetlink::new_multicast_connection(&groups).context("open a netlink socket")?;
    tokio::spawn(connection);
    Ok(messages.map(|(message, _)| change_of(&message)).ready_chunks(BURST))
}

/// What a message of the kernel is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// A link.
    Link(u32),
    /// An address of a link.
    Address(u32),
    /// A neighbour or FDB entry on a link.
    Neighbour(u32),
    /// A route; `ours` by its protocol.
    Route { destination: Option<Range>, ours: bool },
    /// Messages were lost: anything may have changed.
    Anything,
}

fn change_of(message: &NetlinkMessage<RouteNetlinkMessage>) -> Change {
    let NetlinkPayload::InnerMessage(message) = &message.payload else { return Change::Anything };
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            Change::Link(link.header.index)
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            Change::Address(address.header.index)
        }
        RouteNetlinkMessage::NewNeighbour(it) | RouteNetlinkMessage::DelNeighbour(it) => {
            Change::Neighbour(it.header.ifindex)
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            Change::Route { destination: route_destination(route), ours: route.header.protocol == PROTOCOL }
        }
        _ => Change::Anything,
    }
}

fn gone(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if NOT_THERE.contains(&message.raw_code()) => Ok(()),
        other => other,
    }
}

fn route_message(destination: Range, hop: Hop) -> Result<RouteMessage> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.network(), destination.prefix())?
        .output_interface(hop.device)
        .protocol(PROTOCOL);
    if !hop.via.is_unspecified() {
        builder = builder.gateway(hop.via)?;
    }
    if hop.onlink {
        builder = builder.onlink();
    }
    let mut message = builder.build();
    if hop.mtu != 0 {
        // Locked, since for packets that are passed on the kernel looks at no other of IPv6; its bits count metrics.
        let metrics = vec![RouteMetric::Lock(1 << RTAX_MTU), RouteMetric::Mtu(hop.mtu)];
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    Ok(message)
}

fn route_of(message: &RouteMessage) -> Option<Route> {
    if message.header.table != RouteHeader::RT_TABLE_MAIN || message.header.kind != RouteType::Unicast {
        return None;
    }
    let destination = route_destination(message)?;
    let unspecified: IpAddr =
        if destination.network().is_ipv4() { [0, 0, 0, 0].into() } else { [0; 16].into() };
    let onlink = message.header.flags.contains(RouteFlags::Onlink);
    let mut hop = Hop { via: unspecified, device: 0, onlink, mtu: 0 };
    let mut metric = 0;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Gateway(gateway) => hop.via = ip(gateway)?,
            RouteAttribute::Oif(index) => hop.device = *index,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Metrics(metrics) => {
                hop.mtu = metrics.iter().find_map(mtu).unwrap_or(0);
            }
            _ => {}
        }
    }
    Some(Route { destination, hop, protocol: message.header.protocol, metric })
}

/// The MTU among a route's metrics.
pub(super) fn mtu(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    }
}

fn route_destination(message: &RouteMessage) -> Option<Range> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    });
    let default: IpAddr =
        if message.header.address_family == AddressFamily::Inet { [0; 4].into() } else { [0; 16].into() };
    let is_default = message.header.destination_prefix_length == 0;
    let address = address.or_else(|| is_default.then_some(default))?;
    Some(Range::of(address, message.header.destination_prefix_length))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

fn destination(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some((*v4).into()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some((*v6).into()),
        // An FDB entry's address comes without its family.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
            v4.or_else(|_longer| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from)).ok()
        }
        _ => None,
    })
}

fn mac(message: &NeighbourMessage) -> Option<Mac> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok().map(Mac),
        _ => None,
    })
}

/// On a point-to-point link the address is the peer's, and the local one is ours.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let pick = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(ip) if local => Some(*ip),
            AddressAttribute::Address(ip) if !local => Some(*ip),
            _ => None,
        })
    };
    pick(true).or_else(|| pick(false))
}

/// What is not the overlay's; but a route that it had, and that somebody has led elsewhere, is its own.
pub(super) fn others(routes: &[Route], underlay: u32, had: &Entries) -> Host {
    let mut host = Host::default();
    let is_ours = |route: &Route| route.protocol == PROTOCOL;
    let ours: BTreeSet<Range> =
        routes.iter().filter(|route| is_ours(route)).map(|it| it.destination).collect();
    for route in routes.iter().filter(|route| !is_ours(route)) {
        let Hop { via, device, .. } = route.hop;
        if device == underlay && !via.is_unspecified() {
            host.gateways.insert(via);
        }
        if !ours.contains(&route.destination) && !had.routes.contains_key(&route.destination) {
            let via = if via.is_unspecified() { String::new() } else { format!(" via {via}") };
            let words = format!("of protocol {}{via}, interface {device}", u8::from(route.protocol));
            host.routes.insert(route.destination, words);
        }
    }
    host
}

/// The MTU that routes state for the path to an address; 0 where none does.
pub(super) fn path_mtu(routes: &[Route], to: IpAddr) -> u32 {
    leading(routes, to).map_or(0, |route| route.hop.mtu)
}

/// The route that leads to an address.
pub(super) fn leading(routes: &[Route], to: IpAddr) -> Option<&Route> {
    let leading = routes.iter().filter(|route| route.destination.contains(to));
    leading.max_by_key(|route| route.destination.prefix())
}

/// Peers whose path is narrower than the device.
pub(super) fn path_mtus(routes: &[Route], peers: impl Iterator<Item = IpAddr>) -> BTreeMap<IpAddr, u32> {
    let stated: Vec<Route> = routes.iter().filter(|route| route.protocol != PROTOCOL).cloned().collect();
    if stated.iter().all(|route| route.hop.mtu == 0) {
        return BTreeMap::new();
    }
    peers.map(|peer| (peer, path_mtu(&stated, peer))).filter(|(_, mtu)| *mtu != 0).collect()
}
