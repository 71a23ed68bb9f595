//! `keelson-bridge`: a veth pair from the pod to a bridge, addresses from an IPAM plugin, routes in the
//! pod, the gateway's address on the bridge.
//!
//! The host's end has a name computed from network, container and interface ([`names`]), so DEL and GC
//! find it without any state. `keelson-ipam` runs in this process; any other IPAM type is executed.
//! Changes in the host's namespace beyond links: `net/ipv4/ip_forward` (and
//! `net/ipv6/conf/all/forwarding` with IPv6 addresses) are set to 1 when `isGateway`. No packet filter
//! rule is written.

mod add;
mod config;
mod ipam;
mod names;

use std::time::Duration;

use cni_plugins_host::{netlink::Netlink, unlink};
use cni_plugins_types::{CniResult, ErrorCode};

use self::config::BridgeConfig;
use crate::{
    call::{Call, Command},
    failure::Failure,
};

/// How long a link may take to go: the kernel serves one change of links at a time.
const UNLINK_PATIENCE: Duration = Duration::from_secs(30);

/// Carries out one call.
pub(crate) async fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    let config: BridgeConfig = call.parse()?;
    match call.command {
        Command::Add => add::add(call, &config).await.map(Some),
        Command::Del => del(call, &config).await.map(|()| None),
        Command::Check => check(call, &config).await.map(|()| None),
        Command::Gc => gc(call, &config).await.map(|()| None),
        Command::Status => {
            config.check()?;
            Netlink::open()?;
            ipam::delegate(call, &config).await.map(|_| None)
        }
        Command::Version => Ok(None),
    }
}

/// Removes the pair by the name of its host end, then the addresses; either being gone is success. The
/// pair first: a released address must not be in use any more.
async fn del(call: &Call, config: &BridgeConfig) -> Result<(), Failure> {
    let name = names::host_interface(&call.network, &call.container_id, &call.ifname);
    let deleted = unlink::delete(&name, UNLINK_PATIENCE);
    let released = ipam::delegate(call, config).await;
    deleted?;
    released.map(|_| ())
}

/// Compares with what ADD reported.
async fn check(call: &Call, config: &BridgeConfig) -> Result<(), Failure> {
    let wrong = |what: String| Failure::new(ErrorCode::INTERNAL, what);
    let Some(result) = &config.prev_result else {
        return Err(Failure::config("CHECK needs a prevResult"));
    };
    let host = Netlink::open()?;
    let name = names::host_interface(&call.network, &call.container_id, &call.ifname);
    let bridge = host.link(&config.bridge).await?;
    let bridge = bridge.ok_or_else(|| wrong(format!("bridge {} is missing", config.bridge)))?;
    let port = host.link(&name).await?.filter(|port| port.controller == Some(bridge.index) && port.up);
    port.ok_or_else(|| wrong(format!("{name} is missing, down or not a port of {}", config.bridge)))?;
    let pod = Netlink::open_in(&call.netns)?;
    let link = pod.link(&call.ifname).await?.filter(|link| link.up);
    let link = link.ok_or_else(|| wrong(format!("{} is missing or down", call.ifname)))?;
    let addresses = pod.addresses(link.index).await?;
    if let Some(ip) = result.ips.iter().find(|ip| !addresses.contains(&ip.address)) {
        return Err(wrong(format!("{} does not have the address {}", call.ifname, ip.address)));
    }
    ipam::delegate(call, config).await.map(|_| ())
}

/// Removes this network's pairs that no valid attachment explains, then the addresses.
async fn gc(call: &Call, config: &BridgeConfig) -> Result<(), Failure> {
    let valid = call.valid_attachments()?;
    let netlink = Netlink::open()?;
    let mut first_failure = None;
    if let Some(bridge) = netlink.link(&config.bridge).await? {
        for port in netlink.ports(bridge.index).await? {
            if names::is_stale(&port, &call.network, &valid)
                && let Err(error) = netlink.delete_link(&port.name).await
            {
                first_failure.get_or_insert(Failure::from(error));
            }
        }
    }
    if let Err(failure) = ipam::delegate(call, config).await {
        first_failure.get_or_insert(failure);
    }
    first_failure.map_or(Ok(()), Err)
}
