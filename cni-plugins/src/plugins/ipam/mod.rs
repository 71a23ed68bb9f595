//! `keelson-ipam`: gives each attachment one address per range set and takes them back.
//!
//! Choosing is pure ([`cni_plugins_types::ipam`]); [`store`] keeps what is held on disk. An attachment
//! that asks again gets the addresses it holds. Requested addresses come from the `ips` capability,
//! `args.cni.ips` or `IP=` in `CNI_ARGS`.

pub(crate) mod store;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use cni_plugins_host::{file, netns};
use cni_plugins_types::{
    CniResult, ErrorCode, IpConfig, IpNet,
    ipam::{
        AllocateError, IpamConfig, RangeConfig, RangeSet,
        leases::{Lease, Leases, Owner, Request},
    },
    result::Dns,
};
use serde::Deserialize;

use self::store::Store;
use crate::{
    call::{Call, Command},
    failure::Failure,
};

/// Where allocations are kept when the configuration names no directory.
pub(crate) const DEFAULT_DATA_DIR: &str = "/var/lib/cni/keelson";
/// Largest resolver file that is read.
const MAX_RESOLV_CONF: u64 = 64 << 10;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    ipam: IpamConfig,
    #[serde(default)]
    runtime_config: RuntimeConfig,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    #[serde(default)]
    ips: Vec<String>,
    #[serde(default)]
    ip_ranges: Vec<Vec<RangeConfig>>,
}

impl Input {
    /// Reads a call's object, with the ranges that the runtime adds.
    fn of(call: &Call) -> Result<Self, Failure> {
        let mut input: Self = call.parse()?;
        input.ipam.ranges.append(&mut input.runtime_config.ip_ranges);
        Ok(input)
    }
}

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    let dir = data_dir(call);
    match call.command {
        Command::Add => add(call, &Input::of(call)?, &dir).map(Some),
        Command::Del => {
            change(&dir, |leases| leases.release(&owner(call)).into_iter().collect()).map(|()| None)
        }
        Command::Check => Input::of(call).and_then(|_| check(&dir, call)).map(|()| None),
        Command::Gc => {
            let valid: std::collections::BTreeSet<Owner> = call
                .valid_attachments()?
                .into_iter()
                .map(|kept| Owner { container_id: kept.container_id, ifname: kept.ifname })
                .collect();
            change(&dir, |leases| leases.release_all_but(|lease| valid.contains(&lease.owner))).map(|()| None)
        }
        Command::Status => status(&Input::of(call)?.ipam, &dir).map(|()| None),
        Command::Version => Ok(None),
    }
}

fn add(call: &Call, config: &Input, dir: &Path) -> Result<CniResult, Failure> {
    let sets = config.ipam.range_sets()?;
    check_routes(&config.ipam)?;
    let dns = dns(&config.ipam)?;
    let asked = requested(call, &config.runtime_config)?;
    let wanted: Vec<IpAddr> = asked.iter().map(|(_, addr)| *addr).collect();
    let owner = owner(call);
    let pod = if config.ipam.sticky { call.pod().unwrap_or_default() } else { String::new() };
    let netns = call.netns.to_string_lossy();
    let request = Request {
        owner: &owner,
        netns: &netns,
        pod: &pod,
        sets: &sets,
        fixed: &config.ipam.addresses,
        wanted: &wanted,
    };
    let mut store = Store::open(dir)?;
    let taken = match store.leases().take(&request) {
        Err(AllocateError::Exhausted(_)) => {
            // A runtime that never calls GC: addresses of namespaces that are gone can be told from here.
            let abandoned = store.leases().release_all_but(|lease| lease.owner == owner || may_live(lease));
            store.commit(&abandoned)?;
            store.leases().take(&request)
        }
        taken => taken,
    };
    let (given, changes) = taken.map_err(|error| refused(error, &call.network, &asked))?;
    store.commit(&changes)?;
    let ips = given
        .into_iter()
        .map(|given| IpConfig { address: given.address, gateway: given.gateway, interface: None })
        .collect();
    Ok(CniResult { ips, routes: config.ipam.routes.clone(), dns, ..CniResult::default() })
}

/// Refuses a route through a gateway of the other family.
fn check_routes(config: &IpamConfig) -> Result<(), Failure> {
    for (index, route) in config.routes.iter().enumerate() {
        if let Some(gw) = route.gw.filter(|gw| gw.is_ipv4() != route.dst.addr().is_ipv4()) {
            return Err(Failure::config(format!(
                "ipam.routes[{index}].gw: {gw} is of another family than dst {}",
                route.dst
            )));
        }
    }
    Ok(())
}

/// Whether the attachment may still be there. One whose namespace is a file of its own that is gone is
/// not; of a namespace below `/proc` the process may have gone and the namespace not. What cannot be looked at may be there.
fn may_live(lease: &Lease) -> bool {
    let path = Path::new(&lease.netns);
    lease.netns.is_empty() || path.starts_with("/proc") || netns::probe(path).unwrap_or(true)
}

/// Says which network is full, and by which field an address was asked for.
fn refused(error: AllocateError, network: &str, asked: &[(&str, IpAddr)]) -> Failure {
    let field_of = |addr: IpAddr| asked.iter().find(|(_, one)| *one == addr).map(|(field, _)| *field);
    let about = match &error {
        AllocateError::Exhausted(_) => format!("network {network:?}"),
        AllocateError::NotAvailable(addr) | AllocateError::Outside(addr) => {
            field_of(*addr).unwrap_or("ipam.addresses").to_owned()
        }
    };
    let failure = Failure::from(error);
    Failure::new(failure.code(), format!("{about}: {}", failure.message()))
}

/// Records changes, unless nothing was ever allocated here. A log that cannot be understood stays as it is, and nothing can be
/// taken out of it; ADD refuses it, and tells to remove it when no pod is left, so the pods must be able to go.
fn change(
    dir: &Path,
    plan: impl FnOnce(&Leases) -> Vec<cni_plugins_types::ipam::leases::Change>,
) -> Result<(), Failure> {
    if !dir.exists() {
        return Ok(());
    }
    let mut store = match Store::open(dir) {
        Err(failure) if failure.code() == ErrorCode::Decode => return Ok(()),
        opened => opened?,
    };
    let changes = plan(store.leases());
    store.commit(&changes)
}

fn check(dir: &Path, call: &Call) -> Result<(), Failure> {
    let previous = call.prev_result()?;
    let (owner, store) = (owner(call), Store::open(dir)?);
    let held = store.leases().held_by(&owner);
    if held.is_empty() {
        return Err(Failure::different(format!("container {} holds no address", owner.container_id)));
    }
    // Every address held must be in the result; the result may have others, of other IPAM plugins.
    if let Some(previous) = previous
        && let Some(addr) = held.iter().find(|addr| !previous.addresses_in_sandbox().any(|ip| ip == **addr))
    {
        return Err(Failure::different(format!(
            "address {addr}, reserved for container {}, is not in prevResult",
            owner.container_id
        )));
    }
    Ok(())
}

fn status(config: &IpamConfig, dir: &Path) -> Result<(), Failure> {
    let sets = config.range_sets()?;
    let unavailable = |failure: Failure| failure.with_code(ErrorCode::NotAvailable);
    let store = Store::open(dir).map_err(unavailable)?;
    let full = |set: &RangeSet| store.leases().free_in(set).err();
    match sets.iter().find_map(full) {
        // What an ADD would take back counts as free.
        Some(error) if store.leases().iter().all(may_live) => Err(unavailable(error.into())),
        _ => Ok(()),
    }
}

fn owner(call: &Call) -> Owner {
    Owner { container_id: call.container_id.clone(), ifname: call.ifname.clone() }
}

/// Where the network's allocations are: all that DEL and GC need of the configuration.
fn data_dir(call: &Call) -> PathBuf {
    let given = call.config["ipam"]["dataDir"].as_str().filter(|dir| !dir.is_empty());
    Path::new(given.unwrap_or(DEFAULT_DATA_DIR)).join(&call.network)
}

/// Addresses asked for, with or without prefix, and the field that each is in.
fn requested(call: &Call, runtime: &RuntimeConfig) -> Result<Vec<(&'static str, IpAddr)>, Failure> {
    let mut texts: Vec<(&'static str, &str)> = Vec::new();
    texts.extend(call.arg("IP").map(|text| ("CNI_ARGS IP", text)));
    texts.extend(runtime.ips.iter().map(|text| ("runtimeConfig.ips", text.as_str())));
    let conventional = call.cni_arg("ips").and_then(serde_json::Value::as_array).into_iter().flatten();
    texts.extend(conventional.filter_map(serde_json::Value::as_str).map(|text| ("args.cni.ips", text)));
    let split = texts.iter().flat_map(|(field, list)| list.split(',').map(move |text| (field, text.trim())));
    let mut wanted: Vec<(&'static str, IpAddr)> = Vec::new();
    for (field, text) in split.filter(|(_, text)| !text.is_empty()) {
        let addr = text.parse().ok().or_else(|| text.parse::<IpNet>().ok().map(|net| net.addr()));
        let addr = addr.ok_or_else(|| Failure::config(format!("{field}: {text:?} is not an IP address")))?;
        if wanted.iter().all(|(_, one)| *one != addr) {
            wanted.push((field, addr));
        }
    }
    Ok(wanted)
}

/// The resolver configuration for the result: the file's, or the one written out.
fn dns(config: &IpamConfig) -> Result<Dns, Failure> {
    use std::io::Read;
    let Some(path) = config.resolv_conf.as_deref().filter(|path| !path.is_empty()) else {
        return Ok(config.dns.clone());
    };
    let mut text = String::new();
    file::open_regular(path.as_ref())
        .and_then(|file| file.take(MAX_RESOLV_CONF).read_to_string(&mut text))
        .map_err(|error| Failure::config(format!("ipam.resolvConf: cannot read {path}: {error}")))?;
    Ok(parse_resolv_conf(&text))
}

/// Reads resolv.conf(5): of `domain` and `search` the last counts, `nameserver` and `options` add up.
fn parse_resolv_conf(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let keyword = words.next().unwrap_or_default();
        let words = words.map(str::to_owned);
        match keyword {
            "nameserver" => dns.nameservers.extend(words.take(1)),
            "domain" => dns.domain = words.take(1).collect(),
            "search" => dns.search = words.collect(),
            "options" => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_is_not_understood_keeps_no_pod_from_going() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("leases");
        std::fs::write(&log, "rubbish\n").unwrap();
        assert_eq!(Store::open(dir.path()).map(|_| ()).unwrap_err().code(), ErrorCode::Decode);
        change(dir.path(), |_| unreachable!("nothing is known to be held")).unwrap();
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "rubbish\n");
    }

    #[test]
    fn resolver_files_are_read_as_resolvers_do() {
        let dns = parse_resolv_conf(
            "# a comment\nnameserver 10.0.0.10\nnameserver fd00::a  \nsearch a b\nsearch c.local d\noptions ndots:5\n\
             options edns0 rotate\n;nameserver 1.1.1.1\ndomain x.local\n",
        );
        assert_eq!(dns.nameservers, ["10.0.0.10", "fd00::a"]);
        assert_eq!(dns.search, ["c.local", "d"]);
        assert_eq!(dns.options, ["ndots:5", "edns0", "rotate"]);
        assert_eq!(dns.domain, "x.local");
    }
}
