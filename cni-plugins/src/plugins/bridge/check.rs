//! CHECK: what is there against what ADD reported.

use cni_plugins_host::netlink::{Link, Netlink, format_mac};
use cni_plugins_types::{CniResult, Interface, IpNet};

use super::{
    config::{BridgeConfig, Mode},
    gateway, ipam, names, pod,
};
use crate::{call::Call, failure::Failure, plugins::masquerade};

/// Compares; the error names the first difference.
pub(super) fn check(call: &Call, config: &BridgeConfig) -> Result<(), Failure> {
    let result = call.require_prev_result()?;
    let host = Netlink::open()?;
    if config.mode == Mode::Bridge {
        check_bridge(call, config, &host, &result)?;
    } else {
        check_host_routes(call, &host, &result)?;
    }
    check_pod(call, config, &result)?;
    if config.ip_masq {
        let addresses: Vec<IpNet> = reported_ips(call, &result).iter().map(|ip| ip.address).collect();
        masquerade::check(call, &addresses, &config.ip_masq_except)?;
    }
    ipam::delegate(call, config).map(|_| ())
}

fn check_bridge(
    call: &Call,
    config: &BridgeConfig,
    host: &Netlink,
    result: &CniResult,
) -> Result<(), Failure> {
    let bridge = host.link(&config.bridge)?.filter(|link| link.kind.as_deref() == Some("bridge"));
    let bridge = bridge.ok_or_else(|| different(format!("bridge {} is missing", config.bridge)))?;
    if !bridge.up {
        return Err(different(format!("bridge {} is down", config.bridge)));
    }
    let name = names::host_interface(&call.network, &call.container_id, &call.ifname);
    let port = host.link(&name)?.filter(|port| port.controller == Some(bridge.index) && port.up);
    let port =
        port.ok_or_else(|| different(format!("{name} is missing, down or not a port of {}", config.bridge)))?;
    let state = port.port.unwrap_or_default();
    let wanted = [
        ("hairpinMode", config.hairpin_mode, state.hairpin),
        ("portIsolation", config.port_isolation, state.isolated),
        ("macspoofchk", config.macspoofchk, state.locked),
    ];
    if let Some((key, ..)) = wanted.into_iter().find(|(_, wanted, found)| *wanted && !found) {
        return Err(different(format!("port {name} does not have {key}")));
    }
    if state.disabled {
        return Err(different(format!("port {name} of {} is disabled", config.bridge)));
    }
    if !config.is_gateway() {
        return Ok(());
    }
    let index = match config.untagged() {
        Some(vlan) => host.link(&gateway::vlan_port_name(config, vlan))?.map(|link| link.index),
        None => Some(bridge.index),
    };
    let addresses = index.map(|index| host.addresses(index)).transpose()?.unwrap_or_default();
    match gateway::gateways(result).into_iter().find(|gateway| !addresses.contains(gateway)) {
        Some(gateway) => Err(different(format!("bridge {} lost its address {gateway}", config.bridge))),
        None => Ok(()),
    }
}

fn check_host_routes(call: &Call, host: &Netlink, result: &CniResult) -> Result<(), Failure> {
    let name = names::host_interface(&call.network, &call.container_id, &call.ifname);
    let port = host.link(&name)?.filter(|port| port.up);
    let port = port.ok_or_else(|| different(format!("{name} is missing or down")))?;
    for ip in &result.ips {
        let towards = host.link_towards(ip.address.addr())?;
        if towards != Some(port.index) {
            return Err(different(format!("the route to {} does not lead to {name}", ip.address)));
        }
    }
    Ok(())
}

fn check_pod(call: &Call, config: &BridgeConfig, result: &CniResult) -> Result<(), Failure> {
    let pod = Netlink::open_in(&call.netns)?;
    let link = pod.link(&call.ifname)?.filter(|link| link.up || config.disable_container_interface);
    let link = link.ok_or_else(|| different(format!("{} is missing or down", call.ifname)))?;
    let reported = result.interfaces.iter().find(|interface| is_inside(call, interface));
    if let Some(reported) = reported {
        check_interface(&link, reported)?;
    }
    let addresses = pod.addresses(link.index)?;
    let mine = reported_ips(call, result);
    if let Some(ip) = mine.into_iter().find(|ip| !addresses.contains(&ip.address)) {
        return Err(different(format!("{} does not have the address {}", call.ifname, ip.address)));
    }
    for v6 in [false, true] {
        let wanted: Vec<_> = result.routes.iter().filter(|route| route.dst.addr().is_ipv6() == v6).collect();
        if wanted.is_empty() {
            continue;
        }
        let routes = pod.routes(v6)?;
        for route in wanted {
            let hop = pod::next_hop(result, route);
            let is_there = |entry: &cni_plugins_host::netlink::RouteEntry| {
                entry.dst.network() == route.dst.network()
                    && entry.dst.prefix_len() == route.dst.prefix_len()
                    && (entry.gateway == hop || hop.is_none())
                    && route.table.is_none_or(|table| table == entry.table)
            };
            if !routes.iter().any(is_there) {
                return Err(different(format!("{} does not have the route to {}", call.ifname, route.dst)));
            }
        }
    }
    Ok(())
}

fn check_interface(link: &Link, reported: &Interface) -> Result<(), Failure> {
    let mac = format_mac(&link.mac);
    if !reported.mac.is_empty() && !reported.mac.eq_ignore_ascii_case(&mac) {
        return Err(different(format!("{} has the hardware address {mac}, not {}", link.name, reported.mac)));
    }
    match reported.mtu {
        Some(mtu) if mtu != 0 && mtu != link.mtu => {
            Err(different(format!("{} has the MTU {}, not {mtu}", link.name, link.mtu)))
        }
        _ => Ok(()),
    }
}

/// The addresses that the result puts on the pod's interface.
fn reported_ips<'a>(call: &Call, result: &'a CniResult) -> Vec<&'a cni_plugins_types::IpConfig> {
    let index = result.interfaces.iter().position(|interface| is_inside(call, interface));
    let is_mine = |on: Option<u32>| match (on.and_then(|on| usize::try_from(on).ok()), index) {
        (Some(on), Some(index)) => on == index,
        _ => true,
    };
    result.ips.iter().filter(|ip| is_mine(ip.interface)).collect()
}

fn is_inside(call: &Call, interface: &Interface) -> bool {
    interface.name == call.ifname && !interface.sandbox.is_empty()
}

fn different(what: String) -> Failure {
    Failure::different(what)
}
