//! Removes pods that nobody else will: carries out `control_decide::pod_gc` plans, every 20 s.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use control_decide::{
    object::{is_pod_terminal, uid},
    pod_gc::Missing,
};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Node, Pod},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;

use crate::{
    context::{Context, now},
    informer::Key,
    write::{WriteError, call, chain, delete},
};

const PERIOD: Duration = Duration::from_secs(20);

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let shared = Arc::clone(context);
    context.spawn(async move {
        shared.pods.wait_until_synced().await;
        shared.nodes.wait_until_synced().await;
        let mut missing = Missing::default();
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            collect(&shared, &mut missing).await;
        }
    });
}

async fn collect(context: &Context, missing: &mut Missing) {
    let nodes: BTreeSet<_> = context.nodes.all().iter().map(|node| Key::of(&node.metadata).name).collect();
    let pods = context.pods.all();
    let plan = missing.plan(&pods, &nodes, context.config.terminated_pod_threshold, now());
    for pod in plan.ended.iter().chain(&plan.unscheduled) {
        log(remove(context, pod, None).await, pod);
    }
    for (node, pods) in plan.orphaned {
        // The cache may be wrong about the node; only the API server may declare it gone.
        let api: Api<Node> = Api::all(context.client.clone());
        match call(|| format!("get Node {node}"), api.get_metadata_opt(&node)).await {
            Ok(None) => {
                let message = format!("PodGC: node no longer exists: {node}");
                for pod in pods {
                    log(remove(context, &pod, Some(&message)).await, &pod);
                }
            }
            Ok(Some(_)) => {}
            Err(error) => {
                tracing::warn!(node, error = %chain(&error), "cannot tell whether the node exists");
            }
        }
    }
}

fn log(outcome: Result<(), WriteError>, pod: &Pod) {
    let pod = Key::of(&pod.metadata);
    match outcome {
        Ok(()) => tracing::info!(%pod, "removed a leftover pod"),
        Err(error) => {
            tracing::warn!(%pod, error = %chain(&error), "leftover pod not removed, trying again later");
        }
    }
}

/// Deletes the pod without grace; with a message, first records why it did not end by itself.
async fn remove(context: &Context, pod: &Pod, disruption: Option<&str>) -> Result<(), WriteError> {
    let key = Key::of(&pod.metadata);
    let api = context.api::<Pod>(&key.namespace);
    if let Some(message) = disruption.filter(|_| !is_pod_terminal(pod)) {
        let condition = json!({
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "DeletionByPodGC",
            "message": message,
            "lastTransitionTime": Timestamp::from_second(now().as_second()).map(Time).ok(),
        });
        let patch = json!({"status": {"phase": "Failed", "conditions": [condition]}});
        let request =
            async { api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(&patch)).await };
        match call(|| format!("mark Pod {key} as failed"), request).await {
            Ok(_) => {}
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    let at_once = DeleteParams::default().grace_period(0);
    delete(&api, "Pod", &key, uid(&pod.metadata), at_once).await.map(|_| ())
}
