//! `keelson-bridge`: a veth pair from the pod to a bridge (or, `mode` "routed", to the host's routing
//! table), addresses from an IPAM plugin, routes in the pod, the gateway's address on the host.
//!
//! The host's end has a name computed from network, container and interface ([`names`]), so DEL and GC
//! find it without any state. `keelson-ipam` runs in this process; any other IPAM type is executed.
//! Changes in the host's namespace beyond links: `net/ipv4/ip_forward` (and
//! `net/ipv6/conf/all/forwarding` with IPv6 addresses) are set to 1 when it is the gateway; with `ipMasq`,
//! elements of the nftables map of [`masquerade`].

mod add;
mod check;
mod config;
mod gateway;
mod ipam;
mod names;
mod pod;
mod remove;

use cni_plugins_host::netlink::Netlink;
use cni_plugins_types::CniResult;

use self::config::BridgeConfig;
pub(crate) use self::remove::cleanup;
use crate::{
    call::{Call, Command},
    failure::Failure,
    plugins::masquerade,
};

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    let config = BridgeConfig::of(call)?;
    match call.command {
        Command::Add => add::add(call, &config).map(Some),
        Command::Del => remove::del(call, &config).map(|()| None),
        Command::Check => check::check(call, &config).map(|()| None),
        Command::Gc => remove::gc(call, &config).map(|()| None),
        Command::Status => {
            Netlink::open()?;
            if config.ip_masq {
                masquerade::status()?;
            }
            ipam::delegate(call, &config).map(|_| None)
        }
        Command::Version => Ok(None),
    }
}
