//! The node's links, addresses and default routes, followed through netlink, and the route that keeps the service range on this machine.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result};
use futures::{Stream, StreamExt, TryStreamExt};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::{
        BridgePortState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, LinkAttribute,
        LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType},
    tc::{TcAttribute, TcMessage},
};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder, sys::AsyncSocket as _};

use super::{cidr::Cidr, rules};

/// Loses against every other route to the same addresses.
const METRIC: u32 = u32::MAX - 1;
/// How routes of ours are told from others (`ip route` shows it as `proto 75`).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(75);
/// What the kernel calls it where packets wait for nothing.
const NO_QUEUE: &str = "noqueue";
/// How the overlay marks its routes.
const OVERLAY: RouteProtocol = RouteProtocol::Other(76);
/// Linux' ESRCH and EEXIST: the route is not there, or there already.
const NO_SUCH_ROUTE: i32 = -3;
const ROUTE_EXISTS: i32 = -17;

/// A connection to the kernel that also hears of every change of a link, an address or a route. Its task ends with the
/// stream.
pub(super) struct Kernel {
    handle: Handle,
    /// The same with lists that the kernel filters: it tells the addresses in other network namespaces only so.
    strict: Handle,
    neighbours: bool,
    /// The other ends of links, as they were found.
    peers: Mutex<BTreeMap<(u32, Peer), PeerFacts>>,
}

/// The other end of a link.
#[derive(Clone, Debug)]
struct PeerFacts {
    mac: [u8; 6],
    addresses: Vec<IpAddr>,
}

/// What the machine has, as far as clients outside are concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Machine {
    /// Its links.
    pub(super) links: Vec<LinkFacts>,
    /// Its addresses, each with the index of its link, the first of a link and family first.
    pub(super) addresses: Vec<(u32, IpAddr)>,
    /// Links that default routes lead to.
    pub(super) uplinks: BTreeSet<u32>,
    /// Unicast routes of the main table, the best one to each destination.
    pub(super) routes: Vec<RouteFacts>,
    /// Neighbours whose link address is known.
    pub(super) neighbours: BTreeMap<(u32, IpAddr), [u8; 6]>,
    /// Link addresses of the other ends of bridges' ports, where those are in another network namespace.
    pub(super) peers: BTreeMap<u32, [u8; 6]>,
    /// IP addresses of these ends, each with the port.
    pub(super) pods: Vec<(IpAddr, u32)>,
    /// Routes are chosen by more than their destination.
    pub(super) has_rules: bool,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RouteFacts {
    pub(super) to: Cidr,
    pub(super) link: u32,
    pub(super) via: Option<IpAddr>,
    /// It leads to the pods of another node.
    pub(super) of_overlay: bool,
    /// Bytes that a packet may have on the way, where the route says so.
    pub(super) mtu: Option<u32>,
    pub(super) metric: u32,
}

/// A link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LinkFacts {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: String,
    pub(super) up: bool,
    pub(super) layer: LinkLayerType,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
    pub(super) kind: Option<InfoKind>,
    /// The link that takes its packets.
    pub(super) master: Option<u32>,
    /// Its other end in another network namespace.
    pub(super) peer: Option<Peer>,
    /// Nothing wants to see, hold or refuse its packets: no queue, no VLANs, no isolation of ports.
    pub(super) plain: bool,
}

/// The other end of a link, in another network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Peer {
    /// Its number there.
    index: u32,
    /// The kernel's number of that namespace.
    netns: i32,
}

impl Kernel {
    /// Connects; the stream has an item, or several merged, whenever something came, went or changed. Neighbours matter
    /// to drivers alone, and change often: they are left out where nobody asks.
    pub(super) fn watch(neighbours: bool) -> Result<(Self, impl Stream<Item = ()> + Unpin)> {
        let mut groups = vec![
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Tc,
        ];
        if neighbours {
            groups.push(MulticastGroup::Neigh);
        }
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(&groups).context("open a netlink socket")?;
        tokio::spawn(connection);
        let (mut connection, strict, _) = rtnetlink::new_connection().context("open a netlink socket")?;
        let strictly = connection.socket_mut().socket_mut().set_netlink_get_strict_chk(true);
        strictly.context("have the kernel filter lists")?;
        tokio::spawn(connection);
        // A burst, as when many pods start, is one reason to look.
        let peers = Mutex::default();
        Ok((Self { handle, strict, neighbours, peers }, messages.ready_chunks(256).map(drop)))
    }

    /// Looks at everything.
    pub(super) async fn look(&self) -> Result<Machine> {
        let links: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.context("list the links")?;
        let addresses: Vec<AddressMessage> =
            self.handle.address().get().execute().try_collect().await.context("list the node's addresses")?;
        let (mut uplinks, mut best) = (BTreeSet::new(), Vec::new());
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            let routes: Vec<RouteMessage> =
                self.handle.route().get(filter).execute().try_collect().await.context("list the routes")?;
            uplinks.extend(routes.iter().flat_map(default_route_links));
            best.extend(routes.iter().filter_map(route_facts));
        }
        // The best first, and the others to the same destination away.
        best.sort_by_key(|route: &RouteFacts| (route.to.network, route.to.prefix, route.metric));
        best.dedup_by_key(|route| (route.to.network, route.to.prefix));
        let mut addresses: Vec<(bool, u32, IpAddr)> = addresses.iter().filter_map(own_address).collect();
        // Stable: what the kernel prefers comes first.
        addresses.sort_by_key(|(secondary, index, _)| (*index, *secondary));
        let mut links: Vec<LinkFacts> = links.iter().map(link_facts).collect();
        // Where the kernel does not tell, packets may wait or be filtered anywhere.
        let queued = self.queued().await;
        for link in &mut links {
            link.plain &= queued.as_ref().is_ok_and(|queued| !queued.contains(&link.index));
        }
        let peers = self.peers_of(&links).await;
        let mut pods: Vec<(IpAddr, u32)> = peers
            .iter()
            .flat_map(|(port, peer)| peer.addresses.iter().map(|ip| (*ip, *port)))
            .filter(|(ip, _)| is_reachable(*ip))
            .collect();
        pods.sort();
        Ok(Machine {
            peers: peers.into_iter().map(|(port, peer)| (port, peer.mac)).collect(),
            pods,
            // Where the kernel does not tell, there may be any.
            has_rules: rules::has_others(&self.handle).await.unwrap_or(true),
            links,
            addresses: addresses.into_iter().map(|(_, index, ip)| (index, ip)).collect(),
            uplinks,
            routes: best,
            neighbours: if self.neighbours { self.neighbours().await? } else { BTreeMap::new() },
        })
    }

    /// Forgets the addresses of links' other ends, which the kernel does not tell the changes of.
    pub(super) fn forget_peers(&self) {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Links that packets wait before, or that filters see.
    async fn queued(&self) -> Result<BTreeSet<u32>> {
        let listed: Vec<TcMessage> = self
            .handle
            .qdisc()
            .get()
            .execute()
            .try_collect()
            .await
            .context("list what packets wait in (qdiscs)")?;
        let queued = listed.iter().filter(|message| {
            message
                .attributes
                .iter()
                .any(|attribute| matches!(attribute, TcAttribute::Kind(kind) if kind != NO_QUEUE))
        });
        Ok(queued.filter_map(|message| u32::try_from(message.header.index).ok()).collect())
    }

    /// The other ends of bridges' ports.
    async fn peers_of(&self, links: &[LinkFacts]) -> BTreeMap<u32, PeerFacts> {
        let known = self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut found = BTreeMap::new();
        let ports = links.iter().filter(|link| link.master.is_some());
        for (port, peer) in ports.filter_map(|link| Some((link.index, link.peer?))) {
            let mut facts = match known.get(&(port, peer)) {
                Some(facts) => facts.clone(),
                None => match self.address_of(peer).await {
                    Some(mac) => PeerFacts { mac, addresses: Vec::new() },
                    None => continue,
                },
            };
            // A pod gets them after its link.
            if facts.addresses.is_empty() {
                facts.addresses = self.addresses_of(peer).await;
            }
            found.insert((port, peer), facts);
        }
        let peers = found.iter().map(|((port, _), facts)| (*port, facts.clone())).collect();
        *self.peers.lock().unwrap_or_else(PoisonError::into_inner) = found;
        peers
    }

    /// The address of a link of another network namespace; nothing where it has gone meanwhile.
    async fn address_of(&self, peer: Peer) -> Option<[u8; 6]> {
        let mut request = self.handle.link().get().match_index(peer.index);
        request.message_mut().attributes.push(LinkAttribute::IfNetnsId(peer.netns));
        let message: LinkMessage = request.execute().try_next().await.ok()??;
        let address = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(address) => address.as_slice().try_into().ok(),
            _ => None,
        });
        address.filter(|_| message.header.flags.contains(LinkFlags::Up))
    }

    /// The IP addresses of a link of another network namespace.
    async fn addresses_of(&self, peer: Peer) -> Vec<IpAddr> {
        let mut request = self.strict.address().get();
        let message = request.message_mut();
        message.header.index = peer.index;
        message.attributes.push(AddressAttribute::TargetNetNsId(peer.netns));
        let listed: Vec<AddressMessage> = match request.execute().try_collect().await {
            Ok(listed) => listed,
            Err(error) => {
                tracing::debug!(%error, "the kernel does not tell a pod's addresses");
                return Vec::new();
            }
        };
        // Not those that a detection of duplicates has not passed.
        let usable = |message: &&AddressMessage| {
            message.header.index == peer.index
                && !message
                    .header
                    .flags
                    .intersects(AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed)
        };
        listed.iter().filter(usable).filter_map(own_address).map(|(_, _, ip)| ip).collect()
    }

    /// Neighbours whose link address is known.
    async fn neighbours(&self) -> Result<BTreeMap<(u32, IpAddr), [u8; 6]>> {
        let listed: Vec<NeighbourMessage> =
            self.handle.neighbours().get().execute().try_collect().await.context("list the neighbours")?;
        let known = listed.iter().filter_map(|message| {
            let mut found = (None, None);
            for attribute in &message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                        found.0 = Some(IpAddr::V4(*ip));
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                        found.0 = Some(IpAddr::V6(*ip));
                    }
                    NeighbourAttribute::LinkLayerAddress(mac) => found.1 = mac.as_slice().try_into().ok(),
                    _ => {}
                }
            }
            Some(((message.header.ifindex, found.0?), found.1?))
        });
        Ok(known.collect())
    }
}

impl Machine {
    /// All addresses that packets from elsewhere can be sent to.
    pub(super) fn reachable(&self) -> BTreeSet<IpAddr> {
        self.addresses.iter().map(|(_, ip)| *ip).filter(|ip| is_reachable(*ip)).collect()
    }
}

/// Whether a link has a driver of its own, which may run programs itself.
pub(super) fn has_drivers() -> bool {
    let links = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    links.into_iter().any(|link| link.path().join("device").exists())
}

fn link_facts(message: &LinkMessage) -> LinkFacts {
    let header = &message.header;
    let mut facts = LinkFacts {
        index: header.index,
        name: String::new(),
        alias: String::new(),
        up: header.flags.contains(LinkFlags::Up),
        layer: header.link_layer_type,
        mac: [0; 6],
        mtu: 0,
        kind: None,
        master: None,
        peer: None,
        plain: true,
    };
    let (mut end, mut netns) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => facts.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => facts.alias.clone_from(alias),
            LinkAttribute::Mtu(mtu) => facts.mtu = *mtu,
            LinkAttribute::Address(mac) => facts.mac = mac.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::Controller(index) => facts.master = Some(*index),
            LinkAttribute::Qdisc(kind) => facts.plain &= kind == NO_QUEUE,
            LinkAttribute::Link(index) => end = Some(*index),
            LinkAttribute::LinkNetNsId(id) => netns = Some(*id),
            LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| facts.take_info(info)),
            _ => {}
        }
    }
    facts.peer = end.zip(netns).map(|(index, netns)| Peer { index, netns });
    facts
}

impl LinkFacts {
    /// Takes what the link's kind says of it.
    fn take_info(&mut self, info: &LinkInfo) {
        match info {
            LinkInfo::Kind(kind) => self.kind = Some(kind.clone()),
            LinkInfo::Data(InfoData::Bridge(bridge)) => {
                self.plain &= !bridge.iter().any(filters_in_bridge);
            }
            LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                self.plain &= !port.iter().any(holds_at_port);
            }
            _ => {}
        }
    }
}

/// Whether a bridge does more with frames than to send them to their address.
fn filters_in_bridge(attribute: &InfoBridge) -> bool {
    matches!(
        attribute,
        InfoBridge::VlanFiltering(true)
            | InfoBridge::NfCallIpTables(true)
            | InfoBridge::NfCallIp6Tables(true)
            | InfoBridge::NfCallArpTables(true)
    )
}

/// Whether a bridge's port is closed to some frames.
fn holds_at_port(attribute: &InfoBridgePort) -> bool {
    match attribute {
        InfoBridgePort::State(state) => *state != BridgePortState::Forwarding,
        InfoBridgePort::Isolated(closed) | InfoBridgePort::Locked(closed) | InfoBridgePort::Mab(closed) => {
            *closed
        }
        _ => false,
    }
}

/// Whether the kernel would rather use another address of the link, the link, and the address.
fn own_address(message: &AddressMessage) -> Option<(bool, u32, IpAddr)> {
    let pick = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(ip) if local => Some(*ip),
            AddressAttribute::Address(ip) if !local => Some(*ip),
            _ => None,
        })
    };
    // On a point-to-point link the address is the peer's, and the local one is ours.
    let ip = pick(true).or_else(|| pick(false))?;
    let later = AddressHeaderFlags::Secondary | AddressHeaderFlags::Deprecated;
    Some((message.header.flags.intersects(later), message.header.index, ip))
}

/// A unicast route of the main table; nothing for others.
fn route_facts(route: &RouteMessage) -> Option<RouteFacts> {
    let header = &route.header;
    if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast {
        return None;
    }
    let (mut link, mut via, mut metric, mut mtu) = (None, None, 0, None);
    let gateway = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Gateway(address) => via = gateway(address),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::MultiPath(hops) => {
                let hop = hops.first()?;
                link = Some(hop.interface_index);
                via = hop.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Gateway(address) => gateway(address),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let any = if header.address_family == AddressFamily::Inet {
        IpAddr::from([0, 0, 0, 0])
    } else {
        IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)
    };
    let to = destination(route).or_else(|| Cidr::new(any, header.destination_prefix_length).ok())?;
    let of_overlay = header.protocol == OVERLAY;
    Some(RouteFacts { to, link: link?, via, of_overlay, mtu, metric })
}

/// The links of a default route of the main table; none for other routes.
fn default_route_links(route: &RouteMessage) -> Vec<u32> {
    if route.header.destination_prefix_length != 0
        || route.header.table != RouteHeader::RT_TABLE_MAIN
        || route.header.kind != RouteType::Unicast
    {
        return Vec::new();
    }
    let mut links = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => links.push(*index),
            RouteAttribute::MultiPath(hops) => links.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    links
}

pub(super) fn is_reachable(ip: IpAddr) -> bool {
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

pub(super) fn code(error: &rtnetlink::Error) -> Option<i32> {
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
