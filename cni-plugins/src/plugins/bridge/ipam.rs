//! Asks the configured IPAM plugin: ours in this process, others as executables.

use std::time::Duration;

use cni_plugins_host::invoke;
use cni_plugins_types::{CniResult, ErrorCode};

use super::config::BridgeConfig;
use crate::{
    call::{Call, Command},
    failure::Failure,
    plugins::{self, Plugin},
};

/// Limit for an executed IPAM plugin; a lease from a DHCP server may take some of it.
const DEADLINE: Duration = Duration::from_secs(30);

/// Whether an ADD that fails may have taken an address all the same. Ours takes none when it fails.
pub(super) fn may_leave_some(config: &BridgeConfig) -> bool {
    config.ipam.as_ref().is_some_and(|ipam| ipam.kind != Plugin::Ipam.name())
}

/// Refuses a plugin that is not there.
pub(super) fn require(call: &Call, config: &BridgeConfig) -> Result<(), Failure> {
    let Some(ipam) = config.ipam.as_ref().filter(|ipam| ipam.kind != Plugin::Ipam.name()) else {
        return Ok(());
    };
    invoke::find_plugin(&call.path, &ipam.kind)
        .map(|_| ())
        .map_err(|_not_found| Failure::config(format!("ipam.type: no plugin {:?} in CNI_PATH", ipam.kind)))
}

/// Passes `call` on (its command need not be the one this process was called with); returns what ADD
/// gives, nothing for other commands or without IPAM.
pub(super) fn delegate(call: &Call, config: &BridgeConfig) -> Result<Option<CniResult>, Failure> {
    let Some(ipam) = &config.ipam else { return Ok(None) };
    if ipam.kind == Plugin::Ipam.name() {
        return plugins::ipam::run(call);
    }
    require(call, config)?;
    let output = invoke::delegate(&call.path, &ipam.kind, call.command.as_str(), &call.config, &[], DEADLINE)
        .map_err(|error| Failure::of_plugin("ipam", &ipam.kind, error))?;
    if call.command != Command::Add {
        return Ok(None);
    }
    let unusable = |why: String| {
        Failure::new(ErrorCode::Decode, format!("ipam: {} gave no usable result: {why}", ipam.kind))
    };
    let value = output.ok_or_else(|| unusable("nothing".to_owned()))?;
    let result =
        CniResult::from_value(value, call.cni_version).map_err(|error| unusable(error.to_string()))?;
    if result.ips.is_empty() {
        return Err(unusable("it has no ips".to_owned()));
    }
    Ok(Some(result))
}

/// Gives back what an ADD took.
pub(super) fn release(call: &Call, config: &BridgeConfig) -> Result<(), Failure> {
    let release = Call { command: Command::Del, ..call.clone() };
    delegate(&release, config).map(|_| ())
}
