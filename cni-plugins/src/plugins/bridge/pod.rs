//! The pod's side: interface up, addresses, routes.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use cni_plugins_host::{
    arp,
    netlink::{Link, LinkChange, LinkRef, Netlink, NetlinkError, Step},
    netns, sysctl,
};
use cni_plugins_types::{CniResult, Route};
use nix::errno::Errno;

use super::{
    config::{BridgeConfig, Mode},
    gateway::{same_family, single},
};
use crate::{call::Call, failure::Failure};

/// Below this the kernel takes IPv6 off an interface.
const LEAST_FOR_IPV6: u32 = 1280;
/// There while the kernel has IPv6.
const IPV6: &str = "/proc/sys/net/ipv6";

/// Configures the pod's interface as `result` says.
pub(super) fn configure(
    call: &Call,
    config: &BridgeConfig,
    pod: &Netlink,
    result: &CniResult,
    requested_mac: Option<[u8; 6]>,
) -> Result<(), Failure> {
    if config.disable_container_interface {
        return Ok(());
    }
    if result.addresses_in_sandbox().any(|addr| addr.is_ipv6()) {
        netns::visit(&call.netns, || prepare_ipv6(&call.ifname, config.enabledad))??;
    }
    let this = LinkRef::Name(&call.ifname);
    let up = LinkChange { up: Some(true), ..LinkChange::default() };
    let answers = pod.run(vec![Step::set_link(this, &up), Step::get_link(this)])?;
    let link = answers.iter().flatten().find_map(|body| Link::read(body));
    let link = link.ok_or_else(|| Failure::bug(format!("{} vanished", call.ifname)))?;
    let mut steps: Vec<Step> =
        result.ips.iter().map(|ip| Step::add_address(link.index, ip.address, config.enabledad)).collect();
    if config.mode == Mode::Routed {
        // The gateway is in no subnet of the pod's: a route of its own leads to it.
        let gateways = result.ips.iter().filter_map(|ip| ip.gateway);
        steps.extend(gateways.map(|gateway| Step::add_route(&link, &Route::to(single(gateway)), None)));
    }
    for route in &result.routes {
        steps.push(Step::add_route(&link, route, next_hop(result, route)));
    }
    pod.run(steps).map_err(refused)?;
    match requested_mac {
        // Every other address is computed from the IP address, so that what neighbours know stays true.
        Some(mac) => announce(call, link.index, mac, result),
        None => Ok(()),
    }
}

/// An address or a route that cannot be: a mistake in what IPAM gives.
fn refused(error: NetlinkError) -> Failure {
    const MISTAKES: [Errno; 5] =
        [Errno::EINVAL, Errno::ENETUNREACH, Errno::EHOSTUNREACH, Errno::EADDRNOTAVAIL, Errno::EAFNOSUPPORT];
    let is_mistake = MISTAKES.into_iter().any(|errno| error.is(errno));
    let failure = Failure::from(error);
    if is_mistake { Failure::config(format!("ipam: {}", failure.message())) } else { failure }
}

/// The next hop of a route: its own, else the gateway of its family.
pub(super) fn next_hop(result: &CniResult, route: &Route) -> Option<IpAddr> {
    let gateways = result.ips.iter().filter_map(|ip| ip.gateway);
    route.gw.or_else(|| gateways.into_iter().find(|gateway| same_family(*gateway, route.dst.addr())))
}

/// Refuses IPv6 addresses, before anything is made, where the kernel has no IPv6.
pub(super) fn require_families(result: &CniResult) -> Result<(), Failure> {
    match result.addresses_in_sandbox().find(IpAddr::is_ipv6) {
        Some(addr) if !Path::new(IPV6).exists() => {
            Err(Failure::config(format!("ipam: gives the address {addr}, but this kernel has no IPv6")))
        }
        _ => Ok(()),
    }
}

/// Refuses an MTU (0 for none given) that has no room for the addresses.
pub(super) fn require_mtu(result: &CniResult, mtu: u32) -> Result<(), Failure> {
    match result.addresses_in_sandbox().find(IpAddr::is_ipv6) {
        Some(addr) if (1..LEAST_FOR_IPV6).contains(&mtu) => Err(Failure::config(format!(
            "mtu: {mtu} is less than {LEAST_FOR_IPV6}, which IPv6 needs, and ipam gives {addr}"
        ))),
        _ => Ok(()),
    }
}

/// Makes addresses of an interface of the calling thread's namespace usable at once: the link-local one
/// would otherwise be tentative for a second.
pub(super) fn prepare_ipv6(ifname: &str, detect_duplicates: bool) -> Result<(), Failure> {
    let this = format!("net/ipv6/conf/{ifname}");
    sysctl::set(&format!("{this}/disable_ipv6"), "0")?;
    if !detect_duplicates {
        sysctl::set(&format!("{this}/accept_dad"), "0")?;
    } else if Path::new("/proc/sys").join(&this).join("optimistic_dad").exists() {
        sysctl::set(&format!("{this}/optimistic_dad"), "1")?;
    }
    Ok(())
}

/// Gratuitous ARP for every IPv4 address.
fn announce(call: &Call, index: u32, mac: [u8; 6], result: &CniResult) -> Result<(), Failure> {
    let addresses: Vec<Ipv4Addr> = result
        .addresses_in_sandbox()
        .filter_map(|addr| match addr {
            IpAddr::V4(v4) => Some(v4),
            IpAddr::V6(_) => None,
        })
        .collect();
    if addresses.is_empty() {
        return Ok(());
    }
    netns::visit(&call.netns, || addresses.iter().try_for_each(|addr| arp::announce(index, mac, *addr)))?
        .map_err(|error| Failure::io("announce the address by ARP", &error))
}
