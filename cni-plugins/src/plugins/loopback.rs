//! `keelson-loopback`: brings the namespace's `lo` up and reports its addresses.

use std::net::{IpAddr, Ipv4Addr};

use cni_plugins_host::netlink::{Link, Netlink};
use cni_plugins_types::{CniResult, ErrorCode, Interface, IpConfig, IpNet};

use crate::{
    call::{Call, Command},
    failure::Failure,
};

/// Carries out one call.
pub(crate) async fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    match call.command {
        Command::Add => add(call).await.map(Some),
        Command::Check => check(call).await.map(|()| None),
        // The device goes with its namespace.
        Command::Del | Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

async fn add(call: &Call) -> Result<CniResult, Failure> {
    let netlink = Netlink::open_in(&call.netns)?;
    let link = loopback(&netlink).await?;
    netlink.set_up(link.index).await?;
    let interface = Interface {
        name: link.name,
        mac: "00:00:00:00:00:00".to_owned(),
        sandbox: call.netns.to_string_lossy().into_owned(),
        ..Interface::default()
    };
    let address = IpNet::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8).map(|address| IpConfig {
        address,
        gateway: None,
        interface: Some(0),
    });
    Ok(CniResult { interfaces: vec![interface], ips: address.into_iter().collect(), ..CniResult::default() })
}

async fn check(call: &Call) -> Result<(), Failure> {
    let netlink = Netlink::open_in(&call.netns)?;
    if loopback(&netlink).await?.up {
        return Ok(());
    }
    Err(Failure::new(ErrorCode::INTERNAL, "the loopback interface is down"))
}

async fn loopback(netlink: &Netlink) -> Result<Link, Failure> {
    netlink
        .link("lo")
        .await?
        .ok_or_else(|| Failure::new(ErrorCode::INTERNAL, "the namespace has no loopback interface"))
}
