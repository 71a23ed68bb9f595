//! Makes the claim of each `ephemeral` volume of a pod: named after pod and volume, from the volume's template, owned by the pod
//! and so gone with it. A claim of that name that is somebody else's stays theirs, and the pod is told.

use std::{sync::Arc, time::Duration};

use control_decide::{
    object::is_being_deleted,
    volumes::{claim_for, ephemeral_volumes},
};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::PostParams;

use crate::{
    config::Controller,
    context::Context,
    events::{Severity, reference},
    informer::Key,
    queue::Queue,
    write::{WriteError, call},
};

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.pods.on_change(move |change| {
            if change.states().any(|pod| ephemeral_volumes(pod).next().is_some()) {
                queue.add(change.key());
            }
        });
    }
    {
        // One that goes too early is made again.
        let (queue, pods) = (Arc::clone(&queue), Arc::clone(&context.pods));
        context.claims.on_change(move |change| {
            let owners =
                change.states().filter_map(|claim| control_decide::object::controller_of(&claim.metadata));
            let names = owners.filter(|owner| owner.kind == "Pod").map(|owner| owner.name.clone());
            for name in names {
                let key = Key::new(&change.key().namespace, &name);
                if pods.get(&key).is_some() {
                    queue.add(key);
                }
            }
        });
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.pods.wait_until_synced().await;
            context.claims.wait_until_synced().await;
        }
    };
    let shared = Arc::clone(context);
    context.work(Controller::EphemeralVolumes, &queue, 1, ready, move |key| {
        let context = Arc::clone(&shared);
        async move { reconcile(&context, &key).await }
    });
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, WriteError> {
    let Some(pod) = context.pods.get(key).filter(|pod| !is_being_deleted(&pod.metadata)) else {
        return Ok(None);
    };
    for (volume, template) in ephemeral_volumes(&pod) {
        let claim = claim_for(&pod, volume, template);
        let name = claim.metadata.name.clone().unwrap_or_default();
        let claim_key = Key::new(&key.namespace, &name);
        let known = context.claims.get(&claim_key);
        let is_own = |claim: &PersistentVolumeClaim| {
            control_decide::object::controller_of(&claim.metadata)
                .is_some_and(|owner| Some(&owner.uid) == pod.metadata.uid.as_ref())
        };
        match known {
            Some(known) if is_own(&known) => continue,
            Some(_) => {
                let message = format!(
                    "ephemeral volume {volume}: PVC {claim_key} was not created for pod {key} (pod is not owner)"
                );
                let involved = reference("v1", "Pod", &pod.metadata);
                let events = &context.events;
                events.publish(
                    involved,
                    Severity::Warning,
                    "FailedBinding",
                    message,
                    Controller::EphemeralVolumes,
                );
                continue;
            }
            None => {}
        }
        let api = context.api::<PersistentVolumeClaim>(&key.namespace);
        let creation = async { api.create(&PostParams::default(), &claim).await };
        match call(|| format!("create PersistentVolumeClaim {claim_key}"), creation).await {
            Ok(_) => tracing::info!(claim = %claim_key, pod = %key, "claim of an ephemeral volume made"),
            // Whose it is tells the cache, in a moment.
            Err(error) if error.is_already_exists() || error.is_namespace_terminating() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
