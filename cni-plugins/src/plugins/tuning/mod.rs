//! `keelson-tuning`: hardware address, MTU, modes, queue length and kernel parameters of the pod's interface
//! and namespace. Chained behind the plugin that made the interface, whose result it hands on.
//!
//! What was there before is recorded before it is changed ([`crate::state`]), so that DEL, GC and a failed
//! ADD put it back.

mod config;

use std::collections::BTreeMap;

use cni_plugins_host::{
    netlink::{Link, LinkChange, LinkRef, Netlink, Step, format_mac, parse_mac},
    netns, sysctl,
};
use cni_plugins_types::CniResult;
use serde::{Deserialize, Serialize};

use self::config::TuningConfig;
use crate::{
    call::{Attachment, Call, Command},
    failure::Failure,
    state::StateDir,
};

/// Directory of the records.
const PLUGIN: &str = "tuning";

/// What was there before.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Before {
    netns: String,
    /// Identity of the namespace: another one under the same path is not ours to change.
    inode: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    promiscuous: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    all_multicast: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_queue: Option<u32>,
    #[serde(default)]
    sysctls: BTreeMap<String, String>,
}

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    let state = StateDir::of(call, PLUGIN)?;
    match call.command {
        Command::Add => add(call, &TuningConfig::of(call)?, &state).map(Some),
        Command::Del => restore(&state, &call.network, &Attachment::of(call)).map(|()| None),
        Command::Check => check(call, &TuningConfig::of(call)?).map(|()| None),
        Command::Gc => gc(call, &state).map(|()| None),
        Command::Status => TuningConfig::of(call).map(|_| None),
        Command::Version => Ok(None),
    }
}

fn add(call: &Call, config: &TuningConfig, state: &StateDir) -> Result<CniResult, Failure> {
    let mut result = call.require_prev_result()?;
    let attachment = Attachment::of(call);
    // Of a killed ADD: what it changed must not be taken for what was there before.
    restore(state, &call.network, &attachment)?;
    let pod = Netlink::open_in(&call.netns)?;
    let link = interface(&pod, call)?;
    let sysctls = config.sysctls(call)?;
    let before = before(call, config, &link, &sysctls)?;
    state.write(call, &before)?;
    if let Err(failure) = apply(call, config, &pod, &link, &sysctls) {
        let undone = restore(state, &call.network, &attachment);
        let failures: Vec<String> = undone.err().map(|undo| undo.to_string()).into_iter().collect();
        return Err(failure.with_undo_failures(&failures));
    }
    let inside = |interface: &&mut cni_plugins_types::Interface| {
        interface.name == call.ifname && !interface.sandbox.is_empty()
    };
    if let Some(interface) = result.interfaces.iter_mut().find(inside) {
        if let Some(mac) = config.mac(call)? {
            interface.mac = format_mac(&mac);
        }
        if config.mtu().is_some() {
            interface.mtu = config.mtu();
        }
    }
    Ok(result)
}

fn before(
    call: &Call,
    config: &TuningConfig,
    link: &Link,
    sysctls: &BTreeMap<String, String>,
) -> Result<Before, Failure> {
    let read = || sysctls.keys().map(|name| Ok((name.clone(), sysctl::get(name)?))).collect();
    let sysctls: Result<_, sysctl::SysctlError> = netns::visit(&call.netns, read)?;
    let sysctls = sysctls.map_err(|error| {
        Failure::config(format!("sysctl: {} cannot be read in the pod: {}", error.name, error.source))
    })?;
    Ok(Before {
        netns: call.netns.to_string_lossy().into_owned(),
        inode: netns::identity(&call.netns)?,
        mac: config.mac(call)?.map(|_| format_mac(&link.mac)),
        mtu: config.mtu().map(|_| link.mtu),
        promiscuous: config.promisc.map(|_| link.promiscuous),
        all_multicast: config.allmulti.map(|_| link.all_multicast),
        tx_queue: config.tx_q_len.map(|_| link.tx_queue),
        sysctls,
    })
}

fn apply(
    call: &Call,
    config: &TuningConfig,
    pod: &Netlink,
    link: &Link,
    sysctls: &BTreeMap<String, String>,
) -> Result<(), Failure> {
    let change = LinkChange {
        mac: config.mac(call)?,
        mtu: config.mtu(),
        promiscuous: config.promisc,
        all_multicast: config.allmulti,
        tx_queue: config.tx_q_len,
        ..LinkChange::default()
    };
    if change.is_some() {
        pod.run(vec![Step::set_link(LinkRef::Index(link.index), &change)]).map_err(|error| {
            Failure::config(format!(
                "mac, mtu, promisc, allmulti or txQLen: {}",
                Failure::from(error).message()
            ))
        })?;
    }
    let set = || sysctls.iter().try_for_each(|(name, value)| sysctl::set(name, value).map(|_| ()));
    netns::visit(&call.netns, set)?.map_err(|error| {
        Failure::config(format!("sysctl: {}={} is refused: {}", error.name, error.value, error.source))
    })
}

/// Puts back what a record tells and removes it. A namespace that is gone needs nothing.
fn restore(state: &StateDir, network: &str, attachment: &Attachment) -> Result<(), Failure> {
    let before: Option<Before> = state.read(network, attachment)?;
    if let Some(before) = before {
        let path = std::path::Path::new(&before.netns);
        if netns::probe(path)? && netns::identity(path)? == before.inode {
            put_back(path, &attachment.ifname, &before)?;
        }
    }
    state.remove(network, attachment)
}

fn put_back(path: &std::path::Path, ifname: &str, before: &Before) -> Result<(), Failure> {
    let pod = Netlink::open_in(path)?;
    // The plugin that made the interface may have taken it away already.
    if pod.link(ifname)?.is_some() {
        let change = LinkChange {
            mac: before.mac.as_deref().and_then(parse_mac),
            mtu: before.mtu,
            promiscuous: before.promiscuous,
            all_multicast: before.all_multicast,
            tx_queue: before.tx_queue,
            ..LinkChange::default()
        };
        if change.is_some() {
            pod.run(vec![Step::set_link(LinkRef::Name(ifname), &change)])?;
        }
    }
    let set = || {
        let still_there = before.sysctls.iter().filter(|(name, _)| sysctl::get(name).is_ok());
        still_there.into_iter().try_for_each(|(name, value)| sysctl::set(name, value).map(|_| ()))
    };
    netns::visit(path, set)??;
    Ok(())
}

fn check(call: &Call, config: &TuningConfig) -> Result<(), Failure> {
    call.require_prev_result()?;
    let pod = Netlink::open_in(&call.netns)?;
    let link = interface(&pod, call)?;
    let mac = config.mac(call)?;
    let differs = [
        ("mac", mac.is_some_and(|mac| link.mac != mac)),
        ("mtu", config.mtu().is_some_and(|mtu| link.mtu != mtu)),
        ("promisc", config.promisc.is_some_and(|on| link.promiscuous != on)),
        ("allmulti", config.allmulti.is_some_and(|on| link.all_multicast != on)),
        ("txQLen", config.tx_q_len.is_some_and(|len| link.tx_queue != len)),
    ];
    if let Some((key, _)) = differs.into_iter().find(|(_, differs)| *differs) {
        return Err(Failure::different(format!("{} has another {key} than configured", call.ifname)));
    }
    let sysctls = config.sysctls(call)?;
    let wrong = || {
        let mut values = sysctls.iter().map(|(name, value)| (name, value, sysctl::get(name)));
        values.find(|(_, value, found)| !found.as_ref().is_ok_and(|found| sysctl::same(found, value))).map(
            |(name, value, found)| format!("sysctl {name} is {:?}, not {value:?}", found.unwrap_or_default()),
        )
    };
    netns::visit(&call.netns, wrong)?.map_or(Ok(()), |wrong| Err(Failure::different(wrong)))
}

fn gc(call: &Call, state: &StateDir) -> Result<(), Failure> {
    let valid = call.valid_attachments()?;
    let mut first_failure = None;
    for stale in state.list(&call.network)?.into_iter().filter(|found| !valid.contains(found)) {
        if let Err(failure) = restore(state, &call.network, &stale) {
            first_failure.get_or_insert(failure);
        }
    }
    first_failure.map_or(Ok(()), Err)
}

fn interface(pod: &Netlink, call: &Call) -> Result<Link, Failure> {
    let link = pod.link(&call.ifname)?;
    link.ok_or_else(|| {
        Failure::config(format!(
            "CNI_IFNAME: the pod has no interface {}; tuning comes after the plugin that makes it",
            call.ifname
        ))
    })
}
