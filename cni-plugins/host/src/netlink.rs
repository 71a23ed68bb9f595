//! Links, addresses and routes over netlink, in this network namespace or another.
//!
//! Input: names, indices and addresses. Output: [`Link`]s and done changes; each failure names the
//! step and carries the kernel's errno. The socket of [`Netlink::open_in`] is made inside the other
//! namespace and used from here, so no thread has to stay there.
//!
//! Knows nothing of bridges' purpose or of pods; that is with the plugins.

#![allow(unsafe_code, reason = "the netlink library takes a socket of our own only by raw descriptor")]

use std::{
    io,
    net::IpAddr,
    os::fd::{FromRawFd, IntoRawFd, RawFd},
    path::Path,
};

use cni_plugins_types::{IpNet, Route};
use futures::{StreamExt, TryStreamExt};
use netlink_packet_route::{
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage},
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteScope},
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket},
};
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    proto::sys::TokioSocket,
};
use tokio::task::JoinHandle;

use crate::netns::{self, NetnsError};

/// A connection to one namespace's netlink.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

/// What is known of a link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index in its namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Hardware address; empty for links without.
    pub mac: Vec<u8>,
    /// MTU.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Link kind, `bridge`, `veth`, …; absent for physical devices.
    pub kind: Option<String>,
    /// Index of the bridge or bond it is a port of.
    pub controller: Option<u32>,
    /// Free text (`ip link set … alias`).
    pub alias: String,
}

/// A veth pair to make: one end here, up and attached to a bridge, the other in a network namespace.
#[derive(Debug)]
pub struct VethPair<'a> {
    /// Name here.
    pub host_name: &'a str,
    /// Bridge to attach the end here to.
    pub bridge_index: u32,
    /// Name there.
    pub peer_name: &'a str,
    /// Hardware address there.
    pub peer_mac: [u8; 6],
    /// Open descriptor of the namespace.
    pub peer_netns: RawFd,
    /// MTU of both.
    pub mtu: u32,
}

/// A failed netlink step.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused.
    #[error("cannot {step}")]
    Request {
        /// What was tried, with its object.
        step: String,
        /// The kernel's errno.
        #[source]
        source: io::Error,
    },
    /// The other namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

impl NetlinkError {
    /// Whether the kernel answered with `errno`.
    pub fn is(&self, errno: Errno) -> bool {
        matches!(self, NetlinkError::Request { source, .. } if source.raw_os_error() == Some(errno as i32))
    }
}

impl Netlink {
    /// Connects to the calling thread's namespace. Must run inside a tokio runtime with IO.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self::from_descriptor(netlink_socket().map_err(open_error)?))
    }

    /// Connects to the namespace at `path`. Must run inside a tokio runtime with IO.
    pub fn open_in(path: &Path) -> Result<Self, NetlinkError> {
        Ok(Self::from_descriptor(netns::run_in(path, netlink_socket)?.map_err(open_error)?))
    }

    fn from_descriptor(descriptor: RawFd) -> Self {
        // SAFETY: the descriptor was just returned by `into_raw_fd` of a socket we own and nobody else
        // has it; the new object owns and closes it.
        let socket = unsafe { TokioSocket::from_raw_fd(descriptor) };
        let (connection, handle, _messages) = rtnetlink::from_socket(socket);
        Self { handle, connection: tokio::spawn(connection) }
    }

    /// The link called `name`, if there is one.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let found = self.handle.link().get().match_name(name).execute().try_next().await;
        absent_is_none(found.map_err(|error| request(format!("get link {name}"), error)))
    }

    /// The link with this index, if there is one.
    pub async fn link_by_index(&self, index: u32) -> Result<Option<Link>, NetlinkError> {
        let found = self.handle.link().get().match_index(index).execute().try_next().await;
        absent_is_none(found.map_err(|error| request(format!("get link {index}"), error)))
    }

    /// The ports of a bridge.
    pub async fn ports(&self, bridge_index: u32) -> Result<Vec<Link>, NetlinkError> {
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| request("list links".to_owned(), error))?;
        Ok(links.iter().map(Link::from).filter(|link| link.controller == Some(bridge_index)).collect())
    }

    /// Makes a bridge, up, with a fixed hardware address (so that it does not follow its ports'). When a
    /// parallel call or an earlier run made it, it is taken as it is.
    pub async fn ensure_bridge(&self, name: &str, mac: [u8; 6]) -> Result<Link, NetlinkError> {
        if let Some(link) = self.link(name).await?.filter(|link| link.up) {
            return Ok(link);
        }
        let message = LinkBridge::new(name).address(mac.to_vec()).build();
        let step = || format!("create bridge {name}");
        match self.handle.link().add(message).execute().await.map_err(|error| request(step(), error)) {
            Err(error) if !error.is(Errno::EEXIST) => return Err(error),
            _ => {}
        }
        let link = self
            .link(name)
            .await?
            .ok_or_else(|| request_io(step(), io::Error::from_raw_os_error(Errno::ENODEV as i32)))?;
        if !link.up {
            self.set_up(link.index).await?;
        }
        Ok(Link { up: true, ..link })
    }

    /// Makes a veth pair in one request, so that no half of it can exist alone. The peer stays down: the
    /// kernel connects the two after it has configured the peer, and only then can that be opened.
    pub async fn create_veth(&self, pair: &VethPair<'_>) -> Result<(), NetlinkError> {
        let peer = LinkUnspec::new_with_name(pair.peer_name)
            .address(pair.peer_mac.to_vec())
            .mtu(pair.mtu)
            .setns_by_fd(pair.peer_netns)
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(pair.host_name)
            .mtu(pair.mtu)
            .controller(pair.bridge_index)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .up()
            .build();
        self.handle.link().add(message).execute().await.map_err(|error| {
            request(format!("create veth {} with peer {}", pair.host_name, pair.peer_name), error)
        })
    }

    /// Sets a bridge port's hairpin mode (packets may leave where they came in) and its alias.
    pub async fn configure_port(&self, index: u32, hairpin: bool, alias: &str) -> Result<(), NetlinkError> {
        let message = LinkBridgePort::new(index).hairpin(hairpin).alias(alias).build();
        self.handle
            .link()
            .set_port(message)
            .execute()
            .await
            .map_err(|error| request(format!("configure bridge port {index}"), error))
    }

    /// Brings a link up.
    pub async fn set_up(&self, index: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|error| request(format!("bring up link {index}"), error))
    }

    /// Deletes the link called `name`; tells whether there was one.
    pub async fn delete_link(&self, name: &str) -> Result<bool, NetlinkError> {
        let message = LinkUnspec::new_with_name(name).build();
        let deleted = self.handle.link().del_with_message(message).execute().await;
        match deleted.map_err(|error| request(format!("delete link {name}"), error)) {
            Ok(()) => Ok(true),
            Err(error) if error.is(Errno::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives a link an address, without duplicate address detection (IPv6 would be unusable for a
    /// second or more). An address that is there already is success.
    pub async fn add_address(&self, index: u32, address: IpNet) -> Result<(), NetlinkError> {
        let mut add = self.handle.address().add(index, address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            add.message_mut().header.flags = AddressHeaderFlags::Nodad;
            add.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let step = || format!("add address {address} to link {index}");
        match add.execute().await.map_err(|error| request(step(), error)) {
            Err(error) if error.is(Errno::EEXIST) => Ok(()),
            added => added,
        }
    }

    /// The addresses of a link.
    pub async fn addresses(&self, index: u32) -> Result<Vec<IpNet>, NetlinkError> {
        let messages: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(|error| request(format!("list addresses of link {index}"), error))?;
        Ok(messages.iter().filter_map(address_of).collect())
    }

    /// Adds a route through link `index`; `gateway` absent means directly connected. A route that is
    /// there already is success.
    pub async fn add_route(
        &self,
        index: u32,
        route: &Route,
        gateway: Option<IpAddr>,
    ) -> Result<(), NetlinkError> {
        let step = || format!("add route to {} through link {index}", route.dst);
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(route.dst.network(), route.dst.prefix_len())
            .map_err(|error| request_io(step(), io::Error::other(error)))?
            .output_interface(index);
        match gateway {
            Some(gateway) => {
                builder =
                    builder.gateway(gateway).map_err(|error| request_io(step(), io::Error::other(error)))?;
            }
            None => builder = builder.scope(RouteScope::Link),
        }
        if let Some(scope) = route.scope {
            builder = builder.scope(scope.into());
        }
        if let Some(priority) = route.priority {
            builder = builder.priority(priority);
        }
        if let Some(table) = route.table {
            builder = builder.table_id(table);
        }
        let mut message = builder.build();
        let metrics = route_metrics(route);
        if !metrics.is_empty() {
            message.attributes.push(RouteAttribute::Metrics(metrics));
        }
        match self.handle.route().add(message).execute().await.map_err(|error| request(step(), error)) {
            Err(error) if error.is(Errno::EEXIST) => Ok(()),
            added => added,
        }
    }

    /// Index of the link the IPv4 default route with the lowest metric uses.
    pub async fn default_route_link(&self) -> Result<Option<u32>, NetlinkError> {
        let filter = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
        let mut routes = std::pin::pin!(self.handle.route().get(filter).execute());
        let mut best: Option<(u32, u32)> = None;
        while let Some(route) = routes.next().await {
            let route = route.map_err(|error| request("list routes".to_owned(), error))?;
            if let Some(candidate) = default_route(&route)
                && best.is_none_or(|best| candidate.0 < best.0)
            {
                best = Some(candidate);
            }
        }
        Ok(best.map(|(_, index)| index))
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Self {
        let mut link = Link {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            ..Link::default()
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(mac) => link.mac.clone_from(mac),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(index) => link.controller = Some(*index),
                LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        link
    }
}

/// A hardware address as text, `0a:58:0a:f4:00:02`.
pub fn format_mac(mac: &[u8]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// A hardware address from text.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> =
        text.split(':').map(|part| u8::from_str_radix(part, 16)).collect::<Result<_, _>>().ok()?;
    bytes.try_into().ok()
}

fn netlink_socket() -> io::Result<RawFd> {
    let socket =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    Ok(socket.into_raw_fd())
}

fn open_error(source: io::Error) -> NetlinkError {
    request_io("open a netlink socket".to_owned(), source)
}

fn request(step: String, error: rtnetlink::Error) -> NetlinkError {
    let source = match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    };
    request_io(step, source)
}

fn request_io(step: String, source: io::Error) -> NetlinkError {
    NetlinkError::Request { step, source }
}

fn absent_is_none(found: Result<Option<LinkMessage>, NetlinkError>) -> Result<Option<Link>, NetlinkError> {
    match found {
        Ok(message) => Ok(message.as_ref().map(Link::from)),
        Err(error) if error.is(Errno::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

fn address_of(message: &AddressMessage) -> Option<IpNet> {
    // IFA_LOCAL is the interface's own address where the link is point-to-point; IPv6 has ADDRESS only.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(addr) => Some(*addr),
        _ => None,
    });
    let any = || {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(addr) => Some(*addr),
            _ => None,
        })
    };
    IpNet::new(local.or_else(any)?, message.header.prefix_len)
}

fn route_metrics(route: &Route) -> Vec<RouteMetric> {
    let mtu = route.mtu.map(RouteMetric::Mtu);
    let advmss = route.advmss.map(RouteMetric::Advmss);
    mtu.into_iter().chain(advmss).collect()
}

/// Metric and output link of a default route in the main table.
fn default_route(route: &RouteMessage) -> Option<(u32, u32)> {
    if route.header.destination_prefix_length != 0 || route.header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let mut metric = 0;
    let mut output = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(index) => output = Some(*index),
            _ => {}
        }
    }
    output.map(|index| (metric, index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_round_trip() {
        let mac = [0x0a, 0x58, 10, 244, 0, 2];
        assert_eq!(format_mac(&mac), "0a:58:0a:f4:00:02");
        assert_eq!(parse_mac("0a:58:0a:f4:00:02"), Some(mac));
        for text in ["", "0a:58", "0a:58:0a:f4:00:zz", "0a:58:0a:f4:00:02:03"] {
            assert_eq!(parse_mac(text), None, "{text}");
        }
    }
}
