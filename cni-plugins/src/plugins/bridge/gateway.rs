//! The host's side of pods' routes: the bridge, the gateways' addresses, forwarding; or, without a bridge,
//! a route to each pod.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use cni_plugins_host::{
    netlink::{BridgeSpec, Link, LinkChange, LinkRef, Netlink, Step, VethPair},
    sysctl,
};
use cni_plugins_types::{CniResult, IpNet, Route};
use nix::errno::Errno;

use super::{
    config::{BridgeConfig, Mode},
    names, pod,
};
use crate::failure::Failure;

/// Gateways of pods that have a link of their own and whose IPAM plugin names none.
const OWN_LINK: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1)), IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1))];

/// Adds what the configuration wants to IPAM's answer: gateways, default routes, single addresses.
pub(super) fn complete(config: &BridgeConfig, result: &mut CniResult) {
    if config.mode == Mode::Routed {
        for ip in &mut result.ips {
            let own = OWN_LINK.into_iter().find(|own| same_family(*own, ip.address.addr()));
            ip.gateway = ip.gateway.or(own);
        }
        // Pods of the subnet are reached through the host as well.
        let subnets =
            result.ips.iter().filter_map(|ip| IpNet::new(ip.address.network(), ip.address.prefix_len()));
        let known =
            result.routes.iter().any(|route| route.dst.prefix_len() == 0) || config.is_default_gateway;
        if !known {
            result.routes.extend(subnets.map(Route::to).collect::<Vec<_>>());
        }
        for ip in &mut result.ips {
            ip.address = single(ip.address.addr());
        }
    } else if config.is_gateway() {
        // As host-local's users expect: the first address of the subnet.
        for ip in &mut result.ips {
            let first = || cni_plugins_types::ipnet::next_addr(ip.address.network());
            ip.gateway = ip.gateway.or_else(first);
        }
    }
    if config.is_default_gateway {
        add_default_routes(result);
    }
}

/// Refuses a pod's address that the host is to have as the gateway: an IPAM plugin that names no gateway may give away the
/// first address, and both ends would then have the same addresses.
pub(super) fn require_other_than_pods(config: &BridgeConfig, result: &CniResult) -> Result<(), Failure> {
    if config.mode == Mode::Bridge && !config.is_gateway() {
        return Ok(());
    }
    let gateways: BTreeSet<IpAddr> = result.ips.iter().filter_map(|ip| ip.gateway).collect();
    match result.addresses_in_sandbox().find(|addr| gateways.contains(addr)) {
        Some(addr) => Err(Failure::config(format!(
            "ipam: gives the pod {addr}, which the host is to have as the gateway; let it name another gateway"
        ))),
        None => Ok(()),
    }
}

/// One default route per family that has a gateway, unless IPAM gave one.
fn add_default_routes(result: &mut CniResult) {
    for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        let has_gateway =
            result.ips.iter().any(|ip| same_family(ip.address.addr(), any) && ip.gateway.is_some());
        let has_route = result
            .routes
            .iter()
            .any(|route| route.dst.prefix_len() == 0 && same_family(route.dst.addr(), any));
        if has_gateway && !has_route {
            result.routes.extend(IpNet::new(any, 0).map(Route::to));
        }
    }
}

/// The bridge, with the gateways' addresses and forwarding when it is the gateway.
pub(super) fn prepare_bridge(
    config: &BridgeConfig,
    host: &Netlink,
    result: &CniResult,
) -> Result<Link, Failure> {
    let gateways = gateways(result);
    // Of a bridge that is nobody's gateway another host of the segment may have a counterpart with the same addresses.
    let gateway = gateways.first().filter(|_| config.is_gateway());
    let mac = gateway.map_or_else(names::random_mac, |gateway| names::mac_for(gateway.addr()));
    let v6 = result.addresses_in_sandbox().any(|addr| addr.is_ipv6());
    let bridge = ensure_bridge(config, host, mac, v6)?;
    if !config.is_gateway() {
        return Ok(bridge);
    }
    let index = match config.untagged() {
        Some(vlan) => ensure_vlan_port(config, host, &bridge, vlan)?,
        None => bridge.index,
    };
    for gateway in gateways {
        if host.run_one(Step::add_address(index, gateway, false))? {
            only_address(config, host, index, gateway)?;
        }
        forward(gateway.addr())?;
    }
    Ok(bridge)
}

/// The error for a kernel whose bridges know no VLANs.
pub(super) fn no_vlan_filtering(config: &BridgeConfig) -> Failure {
    let vlan = config.untagged().map_or("vlanTrunk".to_owned(), |vlan| vlan.to_string());
    Failure::unsupported("vlan", &vlan, "this kernel is built without CONFIG_BRIDGE_VLAN_FILTERING")
}

/// Routes and addresses for a pod with a link of its own.
pub(super) fn prepare_routes(
    config: &BridgeConfig,
    host: &Netlink,
    port: &Link,
    result: &CniResult,
) -> Result<(), Failure> {
    if result.addresses_in_sandbox().any(|addr| addr.is_ipv6()) {
        pod::prepare_ipv6(&port.name, config.enabledad)?;
    }
    let mut steps = Vec::new();
    for ip in &result.ips {
        if let Some(gateway) = ip.gateway {
            steps.push(Step::add_address_only(port.index, single(gateway)));
        }
        steps.push(Step::replace_route(port.index, ip.address));
    }
    host.run(steps)?;
    result.ips.iter().try_for_each(|ip| forward(ip.address.addr()))
}

/// An address alone, `/32` or `/128`.
pub(super) fn single(addr: IpAddr) -> IpNet {
    let bits = if addr.is_ipv4() { 32 } else { 128 };
    IpNet::new(addr, bits).unwrap_or_else(|| unreachable!("{bits} bits are the whole of {addr}"))
}

/// Whether both are IPv4 or both IPv6.
pub(super) fn same_family(one: IpAddr, other: IpAddr) -> bool {
    one.is_ipv4() == other.is_ipv4()
}

/// The gateways' addresses with their subnets' prefix.
pub(super) fn gateways(result: &CniResult) -> Vec<IpNet> {
    let with_prefix = |ip: &cni_plugins_types::IpConfig| IpNet::new(ip.gateway?, ip.address.prefix_len());
    result.ips.iter().filter_map(with_prefix).collect()
}

/// The link that carries the gateways' addresses in a VLAN.
pub(super) fn vlan_port_name(config: &BridgeConfig, vlan: u16) -> String {
    let name = format!("{}.{vlan}", config.bridge);
    // As the reference names it, unless that is too long.
    if name.len() <= 15 { name } else { names::host_interface(&config.bridge, &vlan.to_string(), "vlan") }
}

fn ensure_bridge(config: &BridgeConfig, host: &Netlink, mac: [u8; 6], v6: bool) -> Result<Link, Failure> {
    let filtering = config.separates_vlans();
    let mut bridge = match host.link(&config.bridge)? {
        Some(bridge) => bridge,
        None => create_bridge(config, host, mac, v6)?,
    };
    if bridge.kind.as_deref() != Some("bridge") {
        return Err(Failure::config(format!("bridge: {} exists and is not a bridge", config.bridge)));
    }
    if filtering && !bridge.vlan_filtering {
        match host.run(vec![Step::filter_vlans(&config.bridge)]) {
            Err(error) if error.is(Errno::EOPNOTSUPP) => return Err(no_vlan_filtering(config)),
            done => drop(done?),
        }
        bridge.vlan_filtering = host.link(&config.bridge)?.is_some_and(|bridge| bridge.vlan_filtering);
        if !bridge.vlan_filtering {
            return Err(no_vlan_filtering(config));
        }
    }
    let change = LinkChange {
        up: (!bridge.up).then_some(true),
        promiscuous: (config.promisc_mode && !bridge.promiscuous).then_some(true),
        ..LinkChange::default()
    };
    if change.up.or(change.promiscuous).is_some() {
        host.run(vec![Step::set_link(LinkRef::Index(bridge.index), &change)])?;
    }
    Ok(bridge)
}

/// Makes the bridge, or takes the one that a parallel call made meanwhile.
fn create_bridge(config: &BridgeConfig, host: &Netlink, mac: [u8; 6], v6: bool) -> Result<Link, Failure> {
    let spec = BridgeSpec {
        name: &config.bridge,
        mac,
        alias: names::BRIDGE_ALIAS,
        vlan_filtering: config.separates_vlans(),
    };
    let this = LinkRef::Name(&config.bridge);
    let alias = LinkChange { alias: Some(spec.alias), ..LinkChange::default() };
    let answers = host.run(vec![
        Step::create_bridge(&spec).tolerating(Errno::EEXIST),
        Step::set_link(this, &alias),
        Step::get_link(this),
    ]);
    let answers = match answers {
        Err(error) if spec.vlan_filtering && error.is(Errno::EOPNOTSUPP) => {
            return Err(no_vlan_filtering(config));
        }
        answers => answers?,
    };
    if v6 {
        // The host could not ask for a pod's hardware address on behalf of others for the first second.
        pod::prepare_ipv6(&config.bridge, config.enabledad)?;
    }
    let created = answers.iter().flatten().find_map(|body| Link::read(body));
    created.ok_or_else(|| Failure::bug(format!("bridge {} vanished", config.bridge)))
}

/// The gateway of a VLAN is on a pair of its own: one end is a port in the VLAN, the other has the address.
fn ensure_vlan_port(config: &BridgeConfig, host: &Netlink, bridge: &Link, vlan: u16) -> Result<u32, Failure> {
    let name = vlan_port_name(config, vlan);
    if let Some(link) = host.link(&name)? {
        return Ok(link.index);
    }
    let port_name = names::host_interface(&config.bridge, &vlan.to_string(), "gateway");
    let pair = VethPair {
        host_name: &port_name,
        bridge_index: Some(bridge.index),
        host_mac: None,
        peer_name: &name,
        peer_mac: None,
        peer_netns: None,
        mtu: bridge.mtu,
    };
    let up = LinkChange { up: Some(true), alias: Some(names::BRIDGE_ALIAS), ..LinkChange::default() };
    let answers = host.run(vec![
        Step::create_veth(&pair).tolerating(Errno::EEXIST),
        Step::set_link(LinkRef::Name(&port_name), &up),
        Step::set_link(LinkRef::Name(&name), &up),
        Step::get_link(LinkRef::Name(&port_name)),
        Step::get_link(LinkRef::Name(&name)),
    ])?;
    let links: Vec<Link> = answers.iter().flatten().filter_map(|body| Link::read(body)).collect();
    let [port, inside] = links.as_slice() else { return Err(Failure::bug(format!("link {name} vanished"))) };
    let mut steps = vec![Step::add_port_vlans(port.index, Some(vlan), &[])];
    if !config.preserve_default_vlan {
        steps.push(Step::remove_port_vlan(port.index, 1).tolerating(Errno::ENOENT));
    }
    match host.run(steps) {
        Err(error) if error.is(Errno::EOPNOTSUPP) => Err(no_vlan_filtering(config)),
        done => Ok(done.map(|_| inside.index)?),
    }
}

/// Another address of the same subnet on the bridge means that two configurations claim it.
fn only_address(config: &BridgeConfig, host: &Netlink, index: u32, gateway: IpNet) -> Result<(), Failure> {
    let others = host.addresses(index)?;
    let others: Vec<IpNet> =
        others.into_iter().filter(|other| *other != gateway && other.overlaps(&gateway)).collect();
    for other in &others {
        let other = *other;
        if other.addr() == gateway.addr() || config.force_address {
            host.run(vec![Step::delete_address(index, other)])?;
        } else {
            host.run(vec![Step::delete_address(index, gateway)])?;
            return Err(Failure::config(format!(
                "bridge: {} has the address {other}, which overlaps the gateway's {gateway}; remove it or set forceAddress",
                config.bridge
            )));
        }
    }
    if !others.is_empty() {
        // It may have been a secondary address of one of those, with which the kernel takes it away.
        host.run(vec![Step::add_address(index, gateway, false)])?;
    }
    Ok(())
}

fn forward(addr: IpAddr) -> Result<(), Failure> {
    let name = if addr.is_ipv4() { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" };
    sysctl::set(name, "1")?;
    Ok(())
}
