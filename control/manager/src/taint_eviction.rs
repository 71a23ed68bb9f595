//! Evicts pods from nodes whose `NoExecute` taints they do not tolerate (any more).
//!
//! Wakes on pods and on nodes whose taints change; waits out `tolerationSeconds` with a timer that any change
//! re-examines.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use control_decide::{
    object::{is_being_deleted, is_pod_terminal, node_taints, pod_node, uid},
    taint_eviction::{Eviction, eviction},
};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Node, Pod, Taint},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::{
    config::Controller,
    context::{Context, now, wait},
    events::{Severity, reference},
    informer::Key,
    queue::Queue,
    write::{WriteError, call, delete},
};

const WORKERS: usize = 4;

/// Since when each pod is on a node with such taints, by uid. Bounded by the number of such pods.
type Since = Mutex<BTreeMap<String, Timestamp>>;

fn evicting(node: &Node) -> Vec<&Taint> {
    node_taints(node).iter().filter(|taint| taint.effect == "NoExecute").collect()
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue = Queue::new();
    let since = Arc::new(Since::default());
    {
        let (queue, since) = (Arc::clone(&queue), Arc::clone(&since));
        context.pods.on_change(move |change| match &change.new {
            Some(pod) if pod_node(pod).is_some() => queue.add(change.key()),
            Some(_) => {}
            None => {
                let gone = change.old.as_ref().map(|pod| uid(&pod.metadata)).unwrap_or_default();
                since.lock().unwrap_or_else(PoisonError::into_inner).remove(gone);
            }
        });
    }
    {
        let (queue, pods) = (Arc::clone(&queue), Arc::clone(&context.pods));
        context.nodes.on_change(move |change| {
            let taints = |node: &Option<Arc<Node>>| {
                node.as_ref().map_or(Vec::new(), |node| evicting(node).into_iter().cloned().collect())
            };
            if taints(&change.old) == taints(&change.new) {
                return;
            }
            let node = change.key().name;
            let here = pods.all().into_iter().filter(|pod| pod_node(pod) == Some(&node));
            here.for_each(|pod| queue.add(Key::of(&pod.metadata)));
        });
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.pods.wait_until_synced().await;
            context.nodes.wait_until_synced().await;
        }
    };
    let shared = Arc::clone(context);
    context.work(Controller::TaintEviction, &queue, WORKERS, ready, move |key| {
        let (context, since) = (Arc::clone(&shared), Arc::clone(&since));
        async move { reconcile(&context, &since, &key).await }
    });
}

async fn reconcile(context: &Context, since: &Since, key: &Key) -> Result<Option<Duration>, WriteError> {
    let Some(pod) = context.pods.get(key) else { return Ok(None) };
    let Some(node) = pod_node(&pod).and_then(|node| context.nodes.get(&Key::new("", node))) else {
        return Ok(None);
    };
    let uid = uid(&pod.metadata);
    if evicting(&node).is_empty() || is_being_deleted(&pod.metadata) || is_pod_terminal(&pod) {
        since.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        return Ok(None);
    }
    let at = now();
    let began = {
        let mut since = since.lock().unwrap_or_else(PoisonError::into_inner);
        *since.entry(uid.to_owned()).or_insert(at)
    };
    match eviction(&pod, node_taints(&node), began) {
        Eviction::Never => Ok(None),
        Eviction::At(deadline) if deadline > at => Ok(Some(wait(deadline.duration_since(at)))),
        Eviction::At(_) => evict(context, &pod, key).await.map(|()| None),
    }
}

async fn evict(context: &Context, pod: &Pod, key: &Key) -> Result<(), WriteError> {
    let api = context.api::<Pod>(&key.namespace);
    let condition = json!({
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "DeletionByTaintManager",
        "message": "Taint manager: deleting due to NoExecute taint",
        "lastTransitionTime": Timestamp::from_second(now().as_second()).map(Time).ok(),
    });
    let patch = json!({"metadata": {"uid": uid(&pod.metadata)}, "status": {"conditions": [condition]}});
    let request =
        async { api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(&patch)).await };
    match call(|| format!("mark Pod {key} as disrupted"), request).await {
        Ok(_) => {}
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error),
    }
    let involved = reference("v1", "Pod", &pod.metadata);
    let message = format!("Marking for deletion Pod {key}");
    context.events.publish(
        involved,
        Severity::Normal,
        "TaintManagerEviction",
        message,
        Controller::TaintEviction,
    );
    delete(&api, "Pod", key, uid(&pod.metadata), DeleteParams::default()).await.map(|_| ())
}
