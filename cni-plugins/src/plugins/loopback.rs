//! `keelson-loopback`: brings the namespace's `lo` up and reports its addresses.
//!
//! Chained behind another plugin it hands that one's result on.

use cni_plugins_host::netlink::{Link, LinkChange, LinkRef, Netlink, Step};
use cni_plugins_types::{CniResult, Interface, IpConfig};

use crate::{
    call::{Call, Command},
    failure::Failure,
};

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    match call.command {
        Command::Add => add(call).map(Some),
        Command::Check => check(call).map(|()| None),
        Command::Gc => call.valid_attachments().map(|_| None),
        // The device goes with its namespace.
        Command::Del | Command::Status | Command::Version => Ok(None),
    }
}

fn add(call: &Call) -> Result<CniResult, Failure> {
    let previous = call.prev_result()?;
    let netlink = Netlink::open_in(&call.netns)?;
    let link = loopback(&netlink)?;
    let up = LinkChange { up: Some(true), ..LinkChange::default() };
    netlink.run(vec![Step::set_link(LinkRef::Index(link.index), &up)])?;
    if let Some(previous) = previous {
        return Ok(previous);
    }
    let addresses = netlink.addresses(link.index)?;
    let interface = Interface {
        name: link.name,
        mac: "00:00:00:00:00:00".to_owned(),
        sandbox: call.netns.to_string_lossy().into_owned(),
        ..Interface::default()
    };
    let ips = addresses.into_iter().map(|address| IpConfig { address, gateway: None, interface: Some(0) });
    Ok(CniResult { interfaces: vec![interface], ips: ips.collect(), ..CniResult::default() })
}

fn check(call: &Call) -> Result<(), Failure> {
    call.prev_result()?;
    let netlink = Netlink::open_in(&call.netns)?;
    if loopback(&netlink)?.up {
        return Ok(());
    }
    Err(Failure::different("the loopback interface is down"))
}

fn loopback(netlink: &Netlink) -> Result<Link, Failure> {
    netlink.link("lo")?.ok_or_else(|| Failure::bug("the namespace has no loopback interface"))
}
