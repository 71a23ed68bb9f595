//! The node's Lease in `kube-node-lease`: the sign of life that the control plane watches.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use super::{Pause, RequestError, within};
use crate::config::AgentConfig;

const NAMESPACE: &str = "kube-node-lease";

/// Renews the lease every quarter of its duration, for ever.
pub(super) async fn run(
    client: Client,
    config: Arc<AgentConfig>,
    node: watch::Receiver<Option<Arc<Node>>>,
) -> anyhow::Result<()> {
    let api: Api<Lease> = Api::namespaced(client, NAMESPACE);
    let name = config.keelson.node_name.as_str();
    let seconds = config.node_lease_duration_seconds.max(4);
    let mut ticks = interval(Duration::from_secs(u64::from(seconds)) / 4);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_failing = false;
    loop {
        ticks.tick().await;
        let mut pause = Pause::new();
        while let Err(error) = renew(&api, name, seconds, &node).await {
            if !was_failing {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                warn!(%error, cause, "node lease not renewed; trying again");
            }
            was_failing = true;
            pause.wait().await;
        }
        if was_failing {
            info!("node lease is renewed again");
            was_failing = false;
        }
    }
}

async fn renew(
    api: &Api<Lease>,
    name: &str,
    seconds: u32,
    node: &watch::Receiver<Option<Arc<Node>>>,
) -> Result<(), RequestError> {
    let spec = LeaseSpec {
        holder_identity: Some(name.to_owned()),
        lease_duration_seconds: i32::try_from(seconds).ok(),
        renew_time: Some(MicroTime(Timestamp::now())),
        ..LeaseSpec::default()
    };
    let patch = Patch::Merge(json!({"spec": spec}));
    match within(api.patch(name, &PatchParams::default(), &patch)).await {
        Err(error) if error.code() == Some(404) => {}
        Err(error) => return Err(error),
        Ok(lease) => {
            let owner = metadata(name, node.borrow().as_deref()).owner_references;
            // One that was made before the node's object was known.
            if lease.metadata.owner_references.is_none() && owner.is_some() {
                let patch = Patch::Merge(json!({"metadata": {"ownerReferences": owner}}));
                within(api.patch(name, &PatchParams::default(), &patch)).await?;
            }
            return Ok(());
        }
    }
    let lease = Lease { metadata: metadata(name, node.borrow().as_deref()), spec: Some(spec) };
    within(api.create(&PostParams::default(), &lease)).await.map(|_| ())
}

/// The lease belongs to the node, so that it goes with it.
fn metadata(name: &str, node: Option<&Node>) -> ObjectMeta {
    let owner = node.and_then(|node| node.metadata.uid.clone()).map(|uid| OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: name.to_owned(),
        uid,
        ..OwnerReference::default()
    });
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(NAMESPACE.to_owned()),
        owner_references: owner.map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}
