//! Links: find, make, change, delete.

use nix::errno::Errno;

use super::{
    Netlink, NetlinkError, Step,
    codec::{Message, attributes, find, text, u32_at},
    port::{PortOptions, PortState},
};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_TXQLEN: u16 = 13;
pub(super) const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_GROUP: u16 = 27;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
pub(super) const IFLA_INFO_SLAVE_KIND: u16 = 4;
pub(super) const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const VETH_INFO_PEER: u16 = 1;
/// Queues of either end of a pair. The kernel uses one of them unless somebody sets more by hand, but prepares as many as the
/// machine has processors, each with files in sysfs: a fifth of the time that a pair takes on two processors.
const QUEUES: u32 = 1;
/// Leaves statistics out of answers.
const RTEXT_FILTER_SKIP_STATS: u32 = 8;

const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
const IFF_PROMISC: u32 = 0x100;
const IFF_ALLMULTI: u32 = 0x200;

/// What is known of a link.
#[allow(clippy::struct_excessive_bools, reason = "they are the kernel's independent flags")]
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
    /// Whether it leads to this host only.
    pub loopback: bool,
    /// Whether it is set to receive every packet.
    pub promiscuous: bool,
    /// Whether it is set to receive every multicast packet.
    pub all_multicast: bool,
    /// Length of its transmit queue.
    pub tx_queue: u32,
    /// Link kind, `bridge`, `veth`, …; absent for physical devices.
    pub kind: Option<String>,
    /// Index of the bridge or bond it is a port of.
    pub controller: Option<u32>,
    /// Index, in its own namespace, of the link below it; of a veth, the peer.
    pub peer: Option<u32>,
    /// Device group.
    pub group: u32,
    /// Free text (`ip link set … alias`).
    pub alias: String,
    /// How it is a bridge's port.
    pub port: Option<PortState>,
    /// Of a bridge: whether it separates VLANs.
    pub vlan_filtering: bool,
}

/// A veth pair to make: one end here, up, the other in a network namespace, down.
#[derive(Debug)]
pub struct VethPair<'a> {
    /// Name here.
    pub host_name: &'a str,
    /// Bridge to attach the end here to, if any.
    pub bridge_index: Option<u32>,
    /// Hardware address here; the kernel chooses when absent.
    pub host_mac: Option<[u8; 6]>,
    /// Name there.
    pub peer_name: &'a str,
    /// Hardware address there; the kernel chooses when absent.
    pub peer_mac: Option<[u8; 6]>,
    /// Open descriptor of the namespace; the same namespace when absent.
    pub peer_netns: Option<i32>,
    /// MTU of both.
    pub mtu: u32,
}

/// A bridge to make.
#[derive(Debug)]
pub struct BridgeSpec<'a> {
    /// Name.
    pub name: &'a str,
    /// A fixed hardware address, so that it does not follow its ports'.
    pub mac: [u8; 6],
    /// Free text, so that whoever made it finds it again.
    pub alias: &'a str,
    /// Whether it separates VLANs.
    pub vlan_filtering: bool,
}

/// Which link.
#[derive(Debug, Clone, Copy)]
pub enum LinkRef<'a> {
    /// By name.
    Name(&'a str),
    /// By index.
    Index(u32),
}

/// What to change of a link; absent fields stay.
#[derive(Debug, Clone, Default)]
pub struct LinkChange<'a> {
    /// Administratively up.
    pub up: Option<bool>,
    /// Receive everything.
    pub promiscuous: Option<bool>,
    /// Receive all multicast.
    pub all_multicast: Option<bool>,
    /// Hardware address.
    pub mac: Option<[u8; 6]>,
    /// MTU.
    pub mtu: Option<u32>,
    /// Transmit queue.
    pub tx_queue: Option<u32>,
    /// Device group.
    pub group: Option<u32>,
    /// Free text.
    pub alias: Option<&'a str>,
}

impl LinkChange<'_> {
    /// Whether anything is to be changed.
    pub fn is_some(&self) -> bool {
        self.up.is_some()
            || self.promiscuous.is_some()
            || self.all_multicast.is_some()
            || self.mac.is_some()
            || self.mtu.is_some()
            || self.tx_queue.is_some()
            || self.group.is_some()
            || self.alias.is_some()
    }
}

impl std::fmt::Display for LinkRef<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LinkRef::Name(name) => write!(f, "link {name}"),
            LinkRef::Index(index) => write!(f, "link {index}"),
        }
    }
}

impl Step {
    /// Asks for a link; the answer's body is read by [`Link::read`]. Absence is tolerated.
    pub fn get_link(link: LinkRef<'_>) -> Self {
        let message = message(RTM_GETLINK, 0, link, 0, 0).u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
        Step::new(format!("get {link}"), message).tolerating(Errno::ENODEV)
    }

    /// Makes a veth pair in one request, so that no half of it can exist alone. The peer stays down: the
    /// kernel connects the two after it has configured the peer, and only then can that be opened.
    pub fn create_veth(pair: &VethPair<'_>) -> Self {
        let peer = |data: Message| {
            data.container(VETH_INFO_PEER, |peer| {
                peer.header(&header(0, 0, 0))
                    .string(IFLA_IFNAME, pair.peer_name)
                    .u32(IFLA_MTU, pair.mtu)
                    .u32(IFLA_NUM_TX_QUEUES, QUEUES)
                    .u32(IFLA_NUM_RX_QUEUES, QUEUES)
                    .when(pair.peer_mac, |peer, mac| peer.attr(IFLA_ADDRESS, &mac))
                    .when(pair.peer_netns, |peer, netns| peer.u32(IFLA_NET_NS_FD, netns.cast_unsigned()))
            })
        };
        let create = NLM_F_CREATE | NLM_F_EXCL;
        let message = message(RTM_NEWLINK, create, LinkRef::Name(pair.host_name), IFF_UP, IFF_UP)
            .u32(IFLA_MTU, pair.mtu)
            .u32(IFLA_NUM_TX_QUEUES, QUEUES)
            .u32(IFLA_NUM_RX_QUEUES, QUEUES)
            .when(pair.host_mac, |link, mac| link.attr(IFLA_ADDRESS, &mac))
            .when(pair.bridge_index, |link, bridge| link.u32(IFLA_MASTER, bridge))
            .nested(IFLA_LINKINFO, |info| info.string(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, peer));
        Step::new(format!("create veth {} with peer {}", pair.host_name, pair.peer_name), message)
    }

    /// Makes a bridge, up.
    pub fn create_bridge(bridge: &BridgeSpec<'_>) -> Self {
        let create = NLM_F_CREATE | NLM_F_EXCL;
        let filtering = bridge.vlan_filtering.then_some(1);
        let message = message(RTM_NEWLINK, create, LinkRef::Name(bridge.name), IFF_UP, IFF_UP)
            .attr(IFLA_ADDRESS, &bridge.mac)
            .nested(IFLA_LINKINFO, |info| {
                info.string(IFLA_INFO_KIND, "bridge").nested(IFLA_INFO_DATA, |data| {
                    data.when(filtering, |data, on| data.u8(IFLA_BR_VLAN_FILTERING, on))
                })
            });
        Step::new(format!("create bridge {}", bridge.name), message)
    }

    /// Makes a link of a kind that needs no settings, down.
    pub fn create_link(name: &str, kind: &str) -> Self {
        let message = message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, LinkRef::Name(name), 0, 0)
            .nested(IFLA_LINKINFO, |info| info.string(IFLA_INFO_KIND, kind));
        Step::new(format!("create {kind} link {name}"), message)
    }

    /// Makes an existing bridge separate VLANs.
    pub fn filter_vlans(bridge: &str) -> Self {
        let message = message(RTM_NEWLINK, 0, LinkRef::Name(bridge), 0, 0).nested(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, "bridge")
                .nested(IFLA_INFO_DATA, |data| data.u8(IFLA_BR_VLAN_FILTERING, 1))
        });
        Step::new(format!("turn on VLAN filtering of {bridge}"), message)
    }

    /// Changes a link.
    pub fn set_link(link: LinkRef<'_>, change: &LinkChange<'_>) -> Self {
        let flag = |value: Option<bool>, flag: u32| match value {
            Some(true) => (flag, flag),
            Some(false) => (0, flag),
            None => (0, 0),
        };
        let flags = [
            flag(change.up, IFF_UP),
            flag(change.promiscuous, IFF_PROMISC),
            flag(change.all_multicast, IFF_ALLMULTI),
        ];
        let (flags, mask) = flags.into_iter().fold((0, 0), |(f, m), (flag, mask)| (f | flag, m | mask));
        let message = message(RTM_SETLINK, 0, link, flags, mask)
            .when(change.mac, |link, mac| link.attr(IFLA_ADDRESS, &mac))
            .when(change.mtu, |link, mtu| link.u32(IFLA_MTU, mtu))
            .when(change.tx_queue, |link, len| link.u32(IFLA_TXQLEN, len))
            .when(change.group, |link, group| link.u32(IFLA_GROUP, group))
            .when(change.alias, |link, alias| link.attr(IFLA_IFALIAS, alias.as_bytes()));
        Step::new(format!("configure {link}"), message)
    }

    /// Changes how a link is a bridge's port.
    pub fn set_port(link: LinkRef<'_>, options: &PortOptions) -> Self {
        let message = message(RTM_NEWLINK, 0, link, 0, 0).nested(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_SLAVE_KIND, "bridge")
                .nested(IFLA_INFO_SLAVE_DATA, |data| options.append_to(data))
        });
        Step::new(format!("configure bridge port {link}"), message)
    }

    /// Deletes a link; absence is tolerated.
    pub fn delete_link(link: LinkRef<'_>) -> Self {
        Step::new(format!("delete {link}"), message(RTM_DELLINK, 0, link, 0, 0)).tolerating(Errno::ENODEV)
    }

    /// Deletes every link of a group at once, which costs the kernel little more than one; an empty group
    /// is tolerated.
    pub fn delete_group(group: u32) -> Self {
        let message = Message::new(RTM_DELLINK, 0).header(&header(0, 0, 0)).u32(IFLA_GROUP, group);
        Step::new(format!("delete the links of group {group:#x}"), message).tolerating(Errno::ENODEV)
    }
}

impl Netlink {
    /// The link called `name`, if there is one.
    pub fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        Ok(first_link(&self.ask_tolerating(Step::get_link(LinkRef::Name(name)))?))
    }

    /// The link with this index, if there is one.
    pub fn link_by_index(&self, index: u32) -> Result<Option<Link>, NetlinkError> {
        Ok(first_link(&self.ask_tolerating(Step::get_link(LinkRef::Index(index)))?))
    }

    /// Every link.
    pub fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let request =
            Message::new(RTM_GETLINK, 0).header(&header(0, 0, 0)).u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
        let mut links = Vec::new();
        self.dump("list links", &request, |body| links.extend(Link::read(body)))?;
        Ok(links)
    }

    /// The ports of a bridge.
    pub fn ports(&self, bridge_index: u32) -> Result<Vec<Link>, NetlinkError> {
        let links = self.links()?;
        Ok(links.into_iter().filter(|link| link.controller == Some(bridge_index)).collect())
    }

    /// Deletes the link called `name`; tells whether there was one.
    pub fn delete_link(&self, name: &str) -> Result<bool, NetlinkError> {
        self.run_one(Step::delete_link(LinkRef::Name(name)))
    }

    fn ask_tolerating(&self, step: Step) -> Result<Vec<Vec<u8>>, NetlinkError> {
        Ok(self.run(vec![step])?.pop().unwrap_or_default())
    }
}

impl Link {
    /// Reads an `ifinfomsg` with its attributes.
    pub fn read(body: &[u8]) -> Option<Self> {
        let flags = u32_at(body, 8)?;
        let mut link = Link {
            index: u32_at(body, 4)?,
            up: flags & IFF_UP != 0,
            loopback: flags & IFF_LOOPBACK != 0,
            promiscuous: flags & IFF_PROMISC != 0,
            all_multicast: flags & IFF_ALLMULTI != 0,
            ..Link::default()
        };
        for (kind, payload) in attributes(body.get(16..)?) {
            let number = || u32_at(payload, 0);
            match kind {
                IFLA_IFNAME => link.name = text(payload),
                IFLA_ADDRESS => link.mac = payload.to_vec(),
                IFLA_MTU => link.mtu = number()?,
                IFLA_TXQLEN => link.tx_queue = number()?,
                IFLA_MASTER => link.controller = number(),
                IFLA_LINK => link.peer = number(),
                IFLA_GROUP => link.group = number()?,
                IFLA_IFALIAS => link.alias = text(payload),
                IFLA_LINKINFO => link.read_info(payload),
                _ => {}
            }
        }
        Some(link)
    }

    fn read_info(&mut self, info: &[u8]) {
        self.kind = find(info, IFLA_INFO_KIND).map(text);
        if self.kind.as_deref() == Some("bridge") {
            let data = find(info, IFLA_INFO_DATA).unwrap_or_default();
            self.vlan_filtering = find(data, IFLA_BR_VLAN_FILTERING).is_some_and(|on| on == [1]);
        }
        if find(info, IFLA_INFO_SLAVE_KIND).map(text).as_deref() == Some("bridge") {
            self.port = find(info, IFLA_INFO_SLAVE_DATA).map(PortState::read);
        }
    }
}

/// The link in the answer to [`Step::get_link`].
fn first_link(answer: &[Vec<u8>]) -> Option<Link> {
    answer.iter().find_map(|body| Link::read(body))
}

fn message(kind: u16, flags: u16, link: LinkRef<'_>, set: u32, mask: u32) -> Message {
    match link {
        LinkRef::Name(name) => {
            Message::new(kind, flags).header(&header(0, set, mask)).string(IFLA_IFNAME, name)
        }
        LinkRef::Index(index) => Message::new(kind, flags).header(&header(index, set, mask)),
    }
}

/// `ifinfomsg`.
fn header(index: u32, flags: u32, mask: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..].copy_from_slice(&mask.to_ne_bytes());
    header
}
