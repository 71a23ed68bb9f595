//! Asks the configured IPAM plugin: ours in this process, others as executables.

use std::time::Duration;

use cni_plugins_host::invoke;
use cni_plugins_types::CniResult;

use super::config::BridgeConfig;
use crate::{
    call::Call,
    failure::Failure,
    plugins::{self, Plugin},
};

/// Limit for an executed IPAM plugin; a lease from a DHCP server may take some of it.
const DEADLINE: Duration = Duration::from_secs(30);

/// Passes `call` on (its command need not be the one this process was called with); returns what ADD gives, nothing for other commands or without IPAM.
pub(super) async fn delegate(call: &Call, config: &BridgeConfig) -> Result<Option<CniResult>, Failure> {
    let Some(ipam) = &config.ipam else { return Ok(None) };
    if ipam.kind == Plugin::Ipam.name() {
        return plugins::ipam::run(call);
    }
    let output =
        invoke::delegate(&call.path, &ipam.kind, call.command.as_str(), &call.config, DEADLINE).await?;
    output
        .map(|value| CniResult::from_value(value, call.cni_version))
        .transpose()
        .map_err(|error| Failure::config(format!("{} gave no usable result: {error}", ipam.kind)))
}
