//! Routes.

use std::net::IpAddr;

use cni_plugins_types::{IpNet, Route};
use nix::errno::Errno;

use super::{
    Link, Netlink, NetlinkError, Step, address_from,
    codec::{Message, attributes, u32_at},
    family, octets,
};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
/// The answer is the route of the table, not what became of it for one destination.
const RTM_F_FIB_MATCH: u32 = 0x2000;
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;
const RT_TABLE_MAIN: u8 = 254;
const RT_TABLE_COMPAT: u8 = 252;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RT_SCOPE_NOWHERE: u8 = 255;
const RTN_UNICAST: u8 = 1;

/// A route that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteEntry {
    /// Destination.
    pub dst: IpNet,
    /// Next hop, if not directly connected.
    pub gateway: Option<IpAddr>,
    /// Link it leaves through.
    pub link: Option<u32>,
    /// Table.
    pub table: u32,
    /// Who made it, as a number.
    pub protocol: u8,
    /// Metric; of several routes to one destination the least counts.
    pub priority: u32,
}

impl Step {
    /// Adds a route through a link; `gateway` absent means directly connected. One that is there
    /// already is tolerated.
    pub fn add_route(link: &Link, route: &Route, gateway: Option<IpAddr>) -> Self {
        let scope = match (route.scope, gateway) {
            (Some(scope), _) => scope,
            (None, Some(_)) => RT_SCOPE_UNIVERSE,
            (None, None) => RT_SCOPE_LINK,
        };
        let metrics = [(RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)];
        let has_metrics = metrics.iter().any(|(_, value)| value.is_some()).then_some(metrics);
        let message = message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, route, (RTPROT_BOOT, scope))
            .u32(RTA_OIF, link.index)
            .when(gateway, |message, gateway| message.attr(RTA_GATEWAY, &octets(gateway)))
            .when(has_metrics, |message, metrics| {
                message.nested(RTA_METRICS, |list| {
                    metrics.into_iter().fold(list, |list, (kind, value)| {
                        list.when(value, |list, value| list.u32(kind, value))
                    })
                })
            });
        let via = gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        Step::new(format!("add route to {}{via} through {}", route.dst, link.name), message)
            .tolerating(Errno::EEXIST)
    }

    /// Makes `dst` directly connected through link `index`, in place of any other route to it.
    pub fn replace_route(index: u32, dst: IpNet) -> Self {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        let message =
            message(RTM_NEWROUTE, flags, &Route::to(dst), (RTPROT_BOOT, RT_SCOPE_LINK)).u32(RTA_OIF, index);
        Step::new(format!("set the route to {dst} through link {index}"), message)
    }

    /// Takes the route to `dst` through link `index` away; absence is tolerated.
    pub fn delete_route(index: u32, dst: IpNet) -> Self {
        let message =
            message(RTM_DELROUTE, 0, &Route::to(dst), (RTPROT_BOOT, RT_SCOPE_LINK)).u32(RTA_OIF, index);
        Step::new(format!("remove the route to {dst} through link {index}"), message).tolerating(Errno::ESRCH)
    }

    /// Takes the route to `dst` that a protocol number marks out of the main table; absence is tolerated.
    pub fn delete_route_of(protocol: u8, dst: IpNet) -> Self {
        let message = message(RTM_DELROUTE, 0, &Route::to(dst), (protocol, RT_SCOPE_NOWHERE));
        Step::new(format!("remove the route to {dst} with protocol {protocol}"), message)
            .tolerating(Errno::ESRCH)
    }
}

impl Netlink {
    /// Index of the link that packets to `addr` leave through; `None` when there is no route.
    pub fn link_towards(&self, addr: IpAddr) -> Result<Option<u32>, NetlinkError> {
        let bits = if addr.is_ipv4() { 32 } else { 128 };
        let header = [family(addr), bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let request = Message::new(RTM_GETROUTE, 0).header(&header).attr(RTA_DST, &octets(addr));
        let step = Step::new(format!("find the route to {addr}"), request);
        match self.run(vec![step]) {
            Ok(answers) => {
                Ok(answers.iter().flatten().find_map(|body| read(body)).and_then(|found| found.link))
            }
            Err(error) if matches!(error.errno(), Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Indices of the links that the default routes of a family leave through, the most preferred first.
    ///
    /// The kernel is asked which of its routes leads to somewhere outside (documentation addresses; nothing is sent). Only
    /// where that is not the default route, as those addresses are blocked here or this host's own, all routes are looked
    /// through.
    pub fn default_links(&self, v6: bool) -> Result<Vec<u32>, NetlinkError> {
        let outside: IpAddr = if v6 {
            [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1].into()
        } else {
            [192, 0, 2, 1].into()
        };
        let bits = if v6 { 128 } else { 32 };
        let flags = RTM_F_FIB_MATCH.to_ne_bytes();
        let header = [family(outside), bits, 0, 0, 0, 0, 0, 0, flags[0], flags[1], flags[2], flags[3]];
        let request = Message::new(RTM_GETROUTE, 0).header(&header).attr(RTA_DST, &octets(outside));
        match self.run(vec![Step::new("find the default route", request)]) {
            Ok(answers) => {
                let found = answers.iter().flatten().find_map(|body| read(body));
                if let Some(link) =
                    found.filter(|found| found.dst.prefix_len() == 0).and_then(|found| found.link)
                {
                    return Ok(vec![link]);
                }
            }
            // No route at all leads there, so there is no default route.
            Err(error) if error.is(Errno::ENETUNREACH) => return Ok(Vec::new()),
            // A filter made of routes answers with whatever it is told to.
            Err(_) => {}
        }
        let mut all: Vec<RouteEntry> =
            self.routes(v6)?.into_iter().filter(|route| route.dst.prefix_len() == 0).collect();
        // Other tables are for some packets only.
        all.sort_by_key(|route| (route.table != u32::from(RT_TABLE_MAIN), route.priority));
        Ok(all.into_iter().filter_map(|route| route.link).collect())
    }

    /// Every unicast route of one family.
    pub fn routes(&self, v6: bool) -> Result<Vec<RouteEntry>, NetlinkError> {
        let family = if v6 { 10 } else { 2 };
        let request = Message::new(RTM_GETROUTE, 0).header(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut found = Vec::new();
        self.dump("list routes", &request, |body| {
            if body.get(7) == Some(&RTN_UNICAST) {
                found.extend(read(body));
            }
        })?;
        Ok(found)
    }
}

/// `made`: protocol and scope.
fn message(kind: u16, flags: u16, route: &Route, made: (u8, u8)) -> Message {
    let table = route.table.map_or(RT_TABLE_MAIN, |table| u8::try_from(table).unwrap_or(RT_TABLE_COMPAT));
    let addr = route.dst.network();
    let mut header = [0; 12];
    header[..8].copy_from_slice(&[
        family(addr),
        route.dst.prefix_len(),
        0,
        0,
        table,
        made.0,
        made.1,
        RTN_UNICAST,
    ]);
    let dst = (route.dst.prefix_len() > 0).then(|| octets(addr));
    Message::new(kind, flags)
        .header(&header)
        .when(dst, |message, dst| message.attr(RTA_DST, &dst))
        .when(route.table, |message, table| message.u32(RTA_TABLE, table))
        .when(route.priority, |message, priority| message.u32(RTA_PRIORITY, priority))
}

fn read(body: &[u8]) -> Option<RouteEntry> {
    let prefix_len = *body.get(1)?;
    let mut dst: IpAddr = if *body.first()? == 2 { [0; 4].into() } else { [0; 16].into() };
    let mut table = u32::from(*body.get(4)?);
    let (mut gateway, mut link, mut priority) = (None, None, 0);
    for (kind, payload) in attributes(body.get(12..)?) {
        match kind {
            RTA_DST => dst = address_from(payload)?,
            RTA_GATEWAY => gateway = address_from(payload),
            RTA_OIF => link = u32_at(payload, 0),
            RTA_PRIORITY => priority = u32_at(payload, 0)?,
            // Of several next hops the first stands for all.
            RTA_MULTIPATH => link = link.or(u32_at(payload, 4)),
            RTA_TABLE => table = u32_at(payload, 0)?,
            _ => {}
        }
    }
    Some(RouteEntry {
        dst: IpNet::new(dst, prefix_len)?,
        gateway,
        link,
        table,
        protocol: *body.get(5)?,
        priority,
    })
}
