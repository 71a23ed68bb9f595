//! Node health: carries out what `control_decide::node_lifecycle` says about silent and unready nodes.
//!
//! Wakes on nodes at once, and looks at all of them every few seconds, because silence sends no events.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use control_decide::{
    node_lifecycle::{EvictionLimits, Grace, Monitor, is_ready, taints, taints_without_eviction},
    object::{is_being_deleted, is_pod_ready, node_taints, pod_node},
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::core::v1::{Node, NodeCondition, Pod},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Map, json};

use crate::{
    config::Controller,
    context::{Context, now},
    events::{Severity, reference},
    informer::Key,
    queue::Queue,
    write::{WriteError, call, guarded, list_or_null, merge_patch, merge_patch_status},
};

const WORKERS: usize = 2;
const MONITOR_PERIOD: Duration = Duration::from_secs(5);
const LEASES: &str = "kube-node-lease";

#[derive(Default)]
struct State {
    monitor: Monitor,
    limits: EvictionLimits,
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.nodes.on_change(move |change| queue.add(change.key()));
    }
    let state = Arc::new(Mutex::new(State::default()));
    {
        let (context, queue, state) = (Arc::clone(context), Arc::clone(&queue), Arc::clone(&state));
        let shared = Arc::clone(&context);
        shared.spawn(async move { survey_forever(&context, &queue, &state).await });
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.nodes.wait_until_synced().await;
            context.leases.wait_until_synced().await;
            context.pods.wait_until_synced().await;
        }
    };
    let shared = Arc::clone(context);
    context.work(Controller::NodeLifecycle, &queue, WORKERS, ready, move |key| {
        let (context, state) = (Arc::clone(&shared), Arc::clone(&state));
        async move { reconcile(&context, &state, &key).await }
    });
}

async fn survey_forever(context: &Context, queue: &Queue<Key>, state: &Mutex<State>) {
    context.nodes.wait_until_synced().await;
    let mut ticks = tokio::time::interval(MONITOR_PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let nodes = context.nodes.all();
        {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.limits.survey(nodes.iter().map(AsRef::as_ref));
            state.monitor.retain(|name| context.nodes.get(&Key::new("", name)).is_some());
        }
        queue.add_all(nodes.iter().map(|node| Key::of(&node.metadata)));
    }
}

async fn reconcile(
    context: &Context,
    state: &Mutex<State>,
    key: &Key,
) -> Result<Option<Duration>, WriteError> {
    let Some(node) = context.nodes.get(key).filter(|node| !is_being_deleted(&node.metadata)) else {
        return Ok(None);
    };
    let grace = Grace {
        monitor: SignedDuration::try_from(context.config.node_monitor_grace).unwrap_or(SignedDuration::MAX),
        ..Grace::default()
    };
    let silent = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.monitor.check(&node, renewed(context, key), grace, now())
    };
    if let Some(conditions) = silent {
        // The node's own event brings the key back for the taints.
        return mark_silent(context, &node, key, conditions).await.map(|()| None);
    }
    let wanted = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        wanted_taints(&mut state.limits, &node)
    };
    if let Some(taints) = wanted {
        let patch = Map::from_iter([("spec".to_owned(), json!({"taints": list_or_null(&taints)}))]);
        let patch = guarded(node.metadata.resource_version.as_deref(), patch);
        let api: Api<Node> = Api::all(context.client.clone());
        merge_patch(&api, "Node", key, &patch).await?;
    }
    Ok(None)
}

fn wanted_taints(limits: &mut EvictionLimits, node: &Node) -> Option<Vec<k8s_openapi::api::core::v1::Taint>> {
    let at = now();
    if is_ready(node) {
        return taints(node, false, at);
    }
    if limits.all_are_lost() {
        return taints_without_eviction(node).or_else(|| taints(node, false, at));
    }
    let evicts_already = node_taints(node).iter().any(|taint| taint.effect == "NoExecute");
    let evict = evicts_already || taints(node, true, at).is_some() && limits.take_turn(node, at);
    taints(node, evict, at)
}

/// When the node's lease was last renewed, by the node's own clock.
fn renewed(context: &Context, key: &Key) -> Option<Timestamp> {
    let lease = context.leases.get(&Key::new(LEASES, &key.name))?;
    lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0)
}

/// Reports the node as lost, and its pods as not ready, so that Services stop using them.
async fn mark_silent(
    context: &Context,
    node: &Node,
    key: &Key,
    conditions: Vec<NodeCondition>,
) -> Result<(), WriteError> {
    let patch = Map::from_iter([("status".to_owned(), json!({"conditions": conditions}))]);
    let patch = guarded(node.metadata.resource_version.as_deref(), patch);
    let api: Api<Node> = Api::all(context.client.clone());
    merge_patch_status(&api, "Node", key, &patch).await?;
    tracing::warn!(node = %key, "node is silent");
    let involved = reference("v1", "Node", &node.metadata);
    let message = format!("Node {key} status is now: NodeNotReady");
    context.events.publish(involved, Severity::Normal, "NodeNotReady", message, Controller::NodeLifecycle);
    let ready_here = |pod: &&Arc<Pod>| pod_node(pod) == Some(key.name.as_str()) && is_pod_ready(pod);
    for pod in context.pods.all().iter().filter(ready_here) {
        mark_pod_not_ready(context, pod).await?;
    }
    Ok(())
}

async fn mark_pod_not_ready(context: &Context, pod: &Pod) -> Result<(), WriteError> {
    let key = Key::of(&pod.metadata);
    let at = Timestamp::from_second(now().as_second()).map(Time).ok();
    let condition = json!({"type": "Ready", "status": "False", "lastTransitionTime": at});
    let patch = json!({"status": {"conditions": [condition]}});
    let api = context.api::<Pod>(&key.namespace);
    let request =
        async { api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(&patch)).await };
    match call(|| format!("mark Pod {key} as not ready"), request).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}
