//! ADD: addresses, bridge, veth pair, addresses and routes in the pod; taken back when a step fails.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
};

use cni_plugins_host::{
    arp,
    netlink::{Link, Netlink, VethPair, format_mac, parse_mac},
    netns, sysctl,
    undo::UndoList,
};
use cni_plugins_types::{CniResult, ErrorCode, Interface, IpNet, Route};

use super::{config::BridgeConfig, ipam, names};
use crate::{
    call::{Call, Command},
    failure::Failure,
};

/// MTU where the host has no default route.
const FALLBACK_MTU: u32 = 1500;

/// Attaches the pod.
pub(super) async fn add(call: &Call, config: &BridgeConfig) -> Result<CniResult, Failure> {
    config.check()?;
    if !netns::is_netns(&call.netns) {
        return Err(Failure::new(
            ErrorCode::UnknownContainer,
            format!("{} is not a network namespace", call.netns.display()),
        ));
    }
    let host = Netlink::open()?;
    let pod = Netlink::open_in(&call.netns)?;
    // Before anything is taken: undoing must not touch what a successful ADD of this attachment holds.
    if pod.link(&call.ifname).await?.is_some() {
        return Err(Failure::new(
            ErrorCode::INTERNAL,
            format!("{} exists already in {}", call.ifname, call.netns.display()),
        ));
    }
    let mut undo = UndoList::new();
    match attach(call, config, &host, &pod, &mut undo).await {
        Ok(result) => Ok(result),
        Err(failure) => Err(failure.with_undo_failures(&undo.run().await)),
    }
}

async fn attach<'a>(
    call: &'a Call,
    config: &'a BridgeConfig,
    host: &'a Netlink,
    pod: &Netlink,
    undo: &mut UndoList<'a>,
) -> Result<CniResult, Failure> {
    undo.push("release addresses", release(call, config));
    let mut result = ipam::delegate(call, config).await?.unwrap_or_default();
    if config.is_default_gateway {
        add_default_routes(&mut result);
    }
    let bridge = prepare_bridge(config, host, &result).await?;
    let host_name = names::host_interface(&call.network, &call.container_id, &call.ifname);
    let mac = pod_mac(config, &result, &host_name)?;
    let mtu = mtu(config, host).await?;
    let netns = File::open(&call.netns).map_err(|error| Failure::io("open the network namespace", &error))?;
    let pair = VethPair {
        host_name: &host_name,
        bridge_index: bridge.index,
        peer_name: &call.ifname,
        peer_mac: mac,
        peer_netns: netns.as_raw_fd(),
        mtu,
    };
    let port = create_pair(host, &pair).await?;
    let name = host_name.clone();
    undo.push("delete the veth pair", async move { host.delete_link(&name).await.map(|_| ()) });
    let alias = names::alias(&call.network, &call.container_id, &call.ifname);
    host.configure_port(port.index, config.hairpin_mode, &alias).await?;
    configure_pod(call, pod, &result, mac).await?;
    describe_interfaces(&mut result, call, &bridge, &port, mac, mtu);
    Ok(result)
}

/// Gives back what this ADD took.
async fn release(call: &Call, config: &BridgeConfig) -> Result<(), Failure> {
    let release = Call { command: Command::Del, ..call.clone() };
    ipam::delegate(&release, config).await.map(|_| ())
}

/// One default route per family that has a gateway, unless IPAM gave one.
fn add_default_routes(result: &mut CniResult) {
    for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        let same_family = |addr: IpAddr| addr.is_ipv4() == any.is_ipv4();
        let has_gateway = result.ips.iter().any(|ip| same_family(ip.address.addr()) && ip.gateway.is_some());
        let has_route =
            result.routes.iter().any(|route| route.dst.prefix_len() == 0 && same_family(route.dst.addr()));
        if has_gateway && !has_route {
            result.routes.extend(IpNet::new(any, 0).map(Route::to));
        }
    }
}

/// The bridge, with the gateways' addresses and forwarding when it is the gateway.
async fn prepare_bridge(config: &BridgeConfig, host: &Netlink, result: &CniResult) -> Result<Link, Failure> {
    let gateways: Vec<IpNet> = result
        .ips
        .iter()
        .filter_map(|ip| ip.gateway.and_then(|gateway| IpNet::new(gateway, ip.address.prefix_len())))
        .collect();
    let mac_source = gateways.first().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpNet::addr);
    let bridge = host.ensure_bridge(&config.bridge, names::mac_for(mac_source)).await?;
    if bridge.kind.as_deref().is_some_and(|kind| kind != "bridge") {
        return Err(Failure::config(format!("{} exists and is not a bridge", config.bridge)));
    }
    if !config.is_gateway() {
        return Ok(bridge);
    }
    for gateway in gateways {
        host.add_address(bridge.index, gateway).await?;
        let forwarding =
            if gateway.addr().is_ipv4() { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" };
        sysctl::set(forwarding, "1")?;
    }
    Ok(bridge)
}

/// Makes the pair. As the pod has no such interface, a host end with this name is left over from a
/// killed call for the same attachment.
async fn create_pair(host: &Netlink, pair: &VethPair<'_>) -> Result<Link, Failure> {
    if host.link(pair.host_name).await?.is_some() {
        host.delete_link(pair.host_name).await?;
    }
    host.create_veth(pair).await?;
    let port = host.link(pair.host_name).await?;
    port.ok_or_else(|| Failure::new(ErrorCode::INTERNAL, format!("{} vanished", pair.host_name)))
}

async fn configure_pod(call: &Call, pod: &Netlink, result: &CniResult, mac: [u8; 6]) -> Result<(), Failure> {
    let link = pod.link(&call.ifname).await?;
    let link = link.ok_or_else(|| Failure::new(ErrorCode::INTERNAL, format!("{} vanished", call.ifname)))?;
    pod.set_up(link.index).await?;
    for ip in &result.ips {
        pod.add_address(link.index, ip.address).await?;
    }
    for route in &result.routes {
        let same_family = |addr: &IpAddr| addr.is_ipv4() == route.dst.addr().is_ipv4();
        let default_gateway = result.ips.iter().filter_map(|ip| ip.gateway).find(same_family);
        pod.add_route(link.index, route, route.gw.or(default_gateway)).await?;
    }
    announce(call, link.index, mac, result)
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
    netns::run_in(&call.netns, || addresses.iter().try_for_each(|addr| arp::announce(index, mac, *addr)))?
        .map_err(|error| Failure::io("announce the address by ARP", &error))
}

fn pod_mac(config: &BridgeConfig, result: &CniResult, host_name: &str) -> Result<[u8; 6], Failure> {
    if let Some(text) = &config.runtime_config.mac {
        return parse_mac(text).ok_or_else(|| Failure::config(format!("invalid mac {text:?}")));
    }
    let first = result.addresses_in_sandbox().next();
    // Without an address the attachment's own name is as unique.
    let fallback = || {
        let mut bytes = [0_u8; 16];
        bytes.iter_mut().zip(host_name.bytes()).for_each(|(slot, byte)| *slot = byte);
        IpAddr::V6(bytes.into())
    };
    Ok(names::mac_for(first.unwrap_or_else(fallback)))
}

async fn mtu(config: &BridgeConfig, host: &Netlink) -> Result<u32, Failure> {
    if config.mtu != 0 {
        return Ok(config.mtu);
    }
    let Some(index) = host.default_route_link().await? else { return Ok(FALLBACK_MTU) };
    Ok(host.link_by_index(index).await?.map_or(FALLBACK_MTU, |link| link.mtu))
}

fn describe_interfaces(
    result: &mut CniResult,
    call: &Call,
    bridge: &Link,
    port: &Link,
    mac: [u8; 6],
    mtu: u32,
) {
    let on_host = |link: &Link| Interface {
        name: link.name.clone(),
        mac: format_mac(&link.mac),
        mtu: Some(link.mtu),
        ..Interface::default()
    };
    let in_pod = Interface {
        name: call.ifname.clone(),
        mac: format_mac(&mac),
        mtu: Some(mtu),
        sandbox: call.netns.to_string_lossy().into_owned(),
        ..Interface::default()
    };
    result.interfaces = vec![on_host(bridge), on_host(port), in_pod];
    for ip in &mut result.ips {
        ip.interface = Some(2);
    }
}
