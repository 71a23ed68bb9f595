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

/// Passes `call` on (its command need not be the one this process was called with); returns what ADD
/// gives, nothing for other commands or without IPAM.
pub(super) fn delegate(call: &Call, config: &BridgeConfig) -> Result<Option<CniResult>, Failure> {
    let Some(ipam) = &config.ipam else { return Ok(None) };
    if ipam.kind == Plugin::Ipam.name() {
        return plugins::ipam::run(call);
    }
    let output = invoke::delegate(&call.path, &ipam.kind, call.command.as_str(), &call.config, &[], DEADLINE);
    let output = match output {
        Err(invoke::PluginError::NotFound { .. }) => {
            return Err(Failure::config(format!("ipam.type: no plugin {:?} in CNI_PATH", ipam.kind)));
        }
        output => output?,
    };
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
