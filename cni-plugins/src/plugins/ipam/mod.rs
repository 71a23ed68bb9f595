//! `keelson-ipam`: gives each attachment one address per range set and takes them back.
//!
//! Choosing is pure ([`cni_plugins_types::ipam`]); [`store`] keeps what is held on disk. An attachment
//! that asks again gets the addresses it holds. Requested addresses come from the `ips` capability or
//! `IP=` in `CNI_ARGS`.

mod store;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use cni_plugins_types::{
    CniResult, ErrorCode, IpConfig, IpNet, Route,
    ipam::{IpamConfig, RangeConfig, RangeSet},
};
use serde::Deserialize;

use self::store::{Owner, Store, StoreError};
use crate::{
    call::{Call, Command},
    failure::Failure,
};

/// Where allocations are kept when the configuration names no directory.
const DEFAULT_DATA_DIR: &str = "/var/lib/cni/keelson";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    ipam: IpamConfig,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    #[serde(default)]
    prev_result: Option<CniResult>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    #[serde(default)]
    ips: Vec<String>,
    #[serde(default)]
    ip_ranges: Vec<Vec<RangeConfig>>,
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Failure::io(&format!("{} {}", error.step, error.path.display()), &error.source)
    }
}

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    let mut config: Input = call.parse()?;
    config.ipam.ranges.append(&mut config.runtime_config.ip_ranges);
    let dir = data_dir(&config.ipam, &call.network);
    match call.command {
        Command::Add => {
            let sets = config.ipam.range_sets()?;
            let requested = requested(call, &config.runtime_config)?;
            add(&Store::open(&dir)?, &Owner::of(call), &sets, requested, &config.ipam.routes).map(Some)
        }
        Command::Del => release(&dir, |store| store.release(&Owner::of(call))),
        Command::Check => check(&dir, &Owner::of(call), config.prev_result.as_ref()).map(|()| None),
        Command::Gc => {
            let valid = call.valid_attachments()?;
            release(&dir, |store| store.release_all_but(|owner| valid.iter().any(|kept| owner.is(kept))))
        }
        Command::Status => status(&config.ipam, &dir),
        Command::Version => Ok(None),
    }
}

fn add(
    store: &Store,
    owner: &Owner,
    sets: &[RangeSet],
    mut requested: Vec<IpAddr>,
    routes: &[Route],
) -> Result<CniResult, Failure> {
    let mut ips = Vec::with_capacity(sets.len());
    for (index, set) in sets.iter().enumerate() {
        let wanted = requested.iter().position(|addr| set.find(*addr).is_some());
        let wanted = wanted.map(|position| requested.swap_remove(position));
        match store.allocate(owner, index, set, wanted) {
            Ok(given) => {
                ips.push(IpConfig { address: given.address, gateway: Some(given.gateway), interface: None });
            }
            Err(failure) => {
                // All or nothing: what earlier sets gave goes back.
                store.release(owner)?;
                return Err(failure);
            }
        }
    }
    if let Some(addr) = requested.first() {
        store.release(owner)?;
        return Err(Failure::config(format!("requested IP address {addr} is in none of the ranges")));
    }
    Ok(CniResult { ips, routes: routes.to_vec(), ..CniResult::default() })
}

/// Runs a release unless nothing was ever allocated here.
fn release(
    dir: &Path,
    work: impl FnOnce(&Store) -> Result<(), StoreError>,
) -> Result<Option<CniResult>, Failure> {
    if dir.exists() {
        work(&Store::open(dir)?)?;
    }
    Ok(None)
}

fn check(dir: &Path, owner: &Owner, prev_result: Option<&CniResult>) -> Result<(), Failure> {
    let held = Store::open(dir)?.held_by(owner)?;
    let missing = |reason: String| Failure::new(ErrorCode::INTERNAL, reason);
    if held.is_empty() {
        return Err(missing(format!("container {} holds no address", owner.container_id())));
    }
    for addr in prev_result.into_iter().flat_map(CniResult::addresses_in_sandbox) {
        if !held.contains(&addr) {
            return Err(missing(format!(
                "address {addr} is not reserved for container {}",
                owner.container_id()
            )));
        }
    }
    Ok(())
}

fn status(config: &IpamConfig, dir: &Path) -> Result<Option<CniResult>, Failure> {
    config.range_sets()?;
    let opened = Store::open(dir).map_err(Failure::from);
    match opened {
        Ok(_) => Ok(None),
        Err(failure) => Err(Failure::new(ErrorCode::NotAvailable, failure.to_string())),
    }
}

fn data_dir(config: &IpamConfig, network: &str) -> PathBuf {
    Path::new(config.data_dir.as_deref().unwrap_or(DEFAULT_DATA_DIR)).join(network)
}

/// Addresses asked for, with or without prefix.
fn requested(call: &Call, runtime: &RuntimeConfig) -> Result<Vec<IpAddr>, Failure> {
    let from_args = call.args.iter().filter(|(key, _)| key == "IP").map(|(_, value)| value);
    from_args
        .chain(&runtime.ips)
        .flat_map(|list| list.split(','))
        .filter(|text| !text.is_empty())
        .map(|text| {
            let addr = text.parse().or_else(|_| text.parse::<IpNet>().map(|net| net.addr()));
            addr.map_err(|error| Failure::config(format!("invalid requested IP address {text:?}: {error}")))
        })
        .collect()
}
