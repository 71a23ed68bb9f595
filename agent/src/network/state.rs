//! The overlay's state, left in a file for `keelson-vxlan` (docs/network.md).

use agent_core::overlay::Range;
use anyhow::{Context, Result};
use cni_plugins_host::netlink::wireguard::IpNet;
use cni_plugins_host::overlay::{self, State};

use super::NetworkConfig;

/// Pods may be attached.
pub(super) fn ready(config: &NetworkConfig, ranges: &[Range], has_tunnel: bool, mtu: u32) -> State {
    State {
        ready: true,
        device: has_tunnel.then(|| config.device.clone()),
        mtu,
        pod_cidrs: ranges.iter().filter_map(|range| IpNet::new(range.network(), range.prefix())).collect(),
        cluster_cidrs: config.cluster.clone(),
        ..named(config)
    }
}

/// They must wait.
pub(super) fn not_ready(config: &NetworkConfig, reason: String) -> State {
    State { reason, ..named(config) }
}

fn named(config: &NetworkConfig) -> State {
    State { node: config.node.clone(), mode: config.mode.to_string(), ..State::default() }
}

/// Writes it where it differs.
pub(super) async fn leave(config: &NetworkConfig, state: State) -> Result<()> {
    let path = config.state_file.clone();
    let written = tokio::task::spawn_blocking(move || overlay::write(&path, &state)).await?;
    written.map(drop).with_context(|| format!("cannot write {}", config.state_file.display()))
}
