//! Gives every node its pod address range, one per family.
//!
//! One worker, so that two nodes can never be given the same range; what was written but is not in the cache
//! yet is remembered.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use control_decide::{
    cidr::Cidr,
    node_ipam::{Holdings, Pool, allocate, held_by},
};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use serde_json::{Map, json};

use crate::{
    config::Controller,
    context::Context,
    events::{Severity, reference},
    informer::Key,
    queue::Queue,
    write::{WriteError, guarded, merge_patch},
};

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>, pools: Vec<Pool>) {
    let queue = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.nodes.on_change(move |change| queue.add(change.key()));
    }
    let ready = {
        let context = Arc::clone(context);
        async move { context.nodes.wait_until_synced().await }
    };
    let (shared, pools, pending) = (Arc::clone(context), Arc::new(pools), Arc::new(Mutex::default()));
    context.work(Controller::NodeIpam, &queue, 1, ready, move |key| {
        let (context, pools, pending) = (Arc::clone(&shared), Arc::clone(&pools), Arc::clone(&pending));
        async move { reconcile(&context, &pools, &pending, &key).await }
    });
}

async fn reconcile(
    context: &Context,
    pools: &[Pool],
    pending: &Mutex<Holdings>,
    key: &Key,
) -> Result<Option<Duration>, WriteError> {
    let Some(node) = context.nodes.get(key) else { return Ok(None) };
    let holdings = holdings(context, pending);
    let ranges = match allocate(&node, pools, &holdings) {
        Ok(None) => return Ok(None),
        Ok(Some(ranges)) => ranges,
        Err(source) => {
            let involved = reference("v1", "Node", &node.metadata);
            let message = format!("Node {key} status is now: CIDRNotAvailable");
            context.events.publish(
                involved,
                Severity::Warning,
                "CIDRNotAvailable",
                message,
                Controller::NodeIpam,
            );
            return Err(WriteError::NoPodRange { node: key.name.clone(), source });
        }
    };
    // Remembered before the write: should its answer get lost, the range must not be given to another.
    pending.lock().unwrap_or_else(PoisonError::into_inner).insert(key.name.clone(), ranges.clone());
    let texts: Vec<_> = ranges.iter().map(Cidr::to_string).collect();
    let spec = json!({"podCIDR": texts.first(), "podCIDRs": texts});
    let patch = Map::from_iter([("spec".to_owned(), spec)]);
    let patch = guarded(node.metadata.resource_version.as_deref(), patch);
    let api: Api<Node> = Api::all(context.client.clone());
    merge_patch(&api, "Node", key, &patch).await?;
    tracing::info!(node = %key, ranges = %texts.join(","), "node has its pod range");
    Ok(None)
}

/// What nodes hold by the cache, and what was written but is not shown there yet.
fn holdings(context: &Context, pending: &Mutex<Holdings>) -> Holdings {
    let nodes = context.nodes.all();
    let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
    let mut holdings = Holdings::new();
    let mut still_pending = Holdings::new();
    for node in nodes {
        let name = Key::of(&node.metadata).name;
        let held = held_by(&node);
        let held = match pending.get(&name) {
            Some(written) if held.is_empty() => {
                still_pending.insert(name.clone(), written.clone());
                written.clone()
            }
            _ => held,
        };
        if !held.is_empty() {
            holdings.insert(name, held);
        }
    }
    *pending = still_pending;
    holdings
}
