//! Writes what peers must know into this node's annotations.
//!
//! Level-triggered: compares what should be there with the object as watched, so that a value that somebody changed or
//! that a new object lacks is written again. A slow API server delays nobody but this task.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use agent_core::overlay::node::{ADDRESSES, MODE, PUBLIC_KEY, VTEP_MAC};
use agent_core::overlay::{Mac, Mode};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::chain::chain;

/// Annotations by name; `None` must be absent.
pub type Annotations = BTreeMap<&'static str, Option<String>>;

/// Deadline of one write.
const DEADLINE: Duration = Duration::from_secs(10);
/// Pauses after a failed write, doubled up to the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// What a node of this mode says of itself.
pub(super) fn annotations(
    mode: Mode,
    addresses: &[IpAddr],
    mac: Option<Mac>,
    public_key: Option<&str>,
) -> Annotations {
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    BTreeMap::from([
        (MODE, Some(mode.to_string())),
        (ADDRESSES, Some(addresses.join(","))),
        (VTEP_MAC, mac.map(|mac| mac.to_string())),
        (PUBLIC_KEY, public_key.map(str::to_owned)),
    ])
}

/// Keeps the object right for ever.
pub(super) async fn run(
    client: Client,
    name: String,
    mut node: watch::Receiver<Option<Arc<Node>>>,
    mut wanted: watch::Receiver<Option<Annotations>>,
) {
    let api: Api<Node> = Api::all(client);
    let mut pause = RETRY.0;
    loop {
        let annotations = wanted.borrow_and_update().clone();
        let current = node.borrow_and_update().clone();
        if let (Some(annotations), Some(current)) = (annotations, current)
            && differs(&annotations, &current)
        {
            if write(&api, &name, &annotations).await {
                info!(node = %name, "overlay annotations published");
                pause = RETRY.0;
            } else {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
                continue;
            }
        }
        // Cancel-safe: watches keep what was not seen. A sender that is gone means that the agent is stopping.
        let gone = tokio::select! {
            changed = wanted.changed() => changed.is_err(),
            changed = node.changed() => changed.is_err(),
        };
        if gone {
            return std::future::pending().await;
        }
    }
}

fn differs(wanted: &Annotations, node: &Node) -> bool {
    let current = node.metadata.annotations.as_ref();
    wanted.iter().any(|(name, value)| current.and_then(|all| all.get(*name)) != value.as_ref())
}

async fn write(api: &Api<Node>, name: &str, annotations: &Annotations) -> bool {
    let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
    let params = PatchParams::default();
    match tokio::time::timeout(DEADLINE, api.patch(name, &params, &patch)).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => {
            warn!(error = %chain(&error), "overlay annotations not written; trying again");
            false
        }
        Err(_elapsed) => {
            warn!("overlay annotations not written: no answer from the API server; trying again");
            false
        }
    }
}
