//! ReplicaSets: carries out `control_decide::replicaset` plans.
//!
//! Wakes on ReplicaSets, their pods, and pods without a controller. Creates pods in batches of 1, 2, 4, …,
//! so that a template the API server refuses costs one request, not five hundred.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use control_decide::{
    object::{controller_of, is_being_deleted, is_controlled_by, is_pod_active, pod_node, uid},
    replicaset::{Failure, Plan, next_availability, owner_reference, plan, pod_of, status},
};
use futures::future::join_all;
use k8s_openapi::api::{apps::v1::ReplicaSet, core::v1::Pod};
use kube::api::{DeleteParams, PostParams};
use serde_json::{Map, json};

use crate::{
    config::Controller,
    context::{Context, now, wait},
    events::{Severity, reference},
    informer::Key,
    owners,
    queue::Queue,
    write::{WriteError, call, delete, guarded, list_or_null, merge_patch, merge_patch_status, status_patch},
    written::{CATCH_UP, Written},
};

const WORKERS: usize = 4;
/// Deletions in flight at once, per ReplicaSet.
const PARALLEL_DELETIONS: usize = 16;

/// What this controller wrote and has not seen yet.
#[derive(Default)]
struct Memory {
    sets: Written,
    pods: Written,
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.replica_sets.on_change(move |change| queue.add(change.key()));
    }
    {
        let (queue, sets) = (Arc::clone(&queue), Arc::clone(&context.replica_sets));
        context.pods.on_change(move |change| {
            owners::wake(&queue, "ReplicaSet", &sets, |owner| Some(&owner.spec.as_ref()?.selector), change);
        });
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.replica_sets.wait_until_synced().await;
            context.pods.wait_until_synced().await;
        }
    };
    let (shared, memory) = (Arc::clone(context), Arc::new(Memory::default()));
    context.work(Controller::ReplicaSet, &queue, WORKERS, ready, move |key| {
        let (context, memory) = (Arc::clone(&shared), Arc::clone(&memory));
        async move { reconcile(&context, &memory, &key).await }
    });
}

async fn reconcile(context: &Context, memory: &Memory, key: &Key) -> Result<Option<Duration>, WriteError> {
    if !memory.sets.is_seen(key, context.replica_sets.version(), |_| false) {
        return Ok(Some(CATCH_UP));
    }
    let Some(set) = context.replica_sets.get(key) else {
        memory.pods.forget(key);
        return Ok(None);
    };
    let version = context.pods.version();
    let pods = context.pods.in_namespace(&key.namespace);
    let is_live = |wanted: &str| {
        pods.iter().any(|pod| uid(&pod.metadata) == wanted && !is_being_deleted(&pod.metadata))
    };
    let caught_up = memory.pods.is_seen(key, version, is_live);
    let now_at = now();
    let plan = plan(&set, &pods, &related_on_node(context, &set, &pods), now_at);
    let apply = Apply { context, memory, key, set: &set };
    if !apply.claim(&plan).await? {
        return Ok(None);
    }
    let outcome = if caught_up { apply.carry_out(&plan).await } else { Ok(()) };
    let failure = outcome.as_ref().err().map(|failure| failure.reported.clone());
    let next = status(&set, &plan.owned, failure, now_at);
    if set.status.as_ref() != Some(&next) {
        let patch = status_patch(set.metadata.resource_version.as_deref(), set.status.as_ref(), &next);
        let api = context.api::<ReplicaSet>(&key.namespace);
        let answer = merge_patch_status(&api, "ReplicaSet", key, &patch).await?;
        memory.sets.note(key, &answer.metadata);
    }
    match outcome {
        Ok(()) => Ok(next_availability(&set, &plan.owned, now_at).map(wait)),
        Err(failure) => Err(failure.error),
    }
}

/// Per node, the active pods of all ReplicaSets with the same owner; only computed when pods may have to go.
fn related_on_node(context: &Context, set: &ReplicaSet, pods: &[Arc<Pod>]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    let own = |pod: &&Arc<Pod>| is_controlled_by(&pod.metadata, uid(&set.metadata)) && is_pod_active(pod);
    let desired = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    if pods.iter().filter(own).count() <= usize::try_from(desired).unwrap_or(0) {
        return counts;
    }
    let owner = controller_of(&set.metadata).map(|owner| owner.uid.as_str());
    let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
    let siblings: Vec<_> = context
        .replica_sets
        .in_namespace(namespace)
        .into_iter()
        .filter(|sibling| owner.is_some_and(|owner| is_controlled_by(&sibling.metadata, owner)))
        .collect();
    let is_related = |pod: &Pod| {
        siblings.iter().any(|sibling| is_controlled_by(&pod.metadata, uid(&sibling.metadata)))
            || is_controlled_by(&pod.metadata, uid(&set.metadata))
    };
    for pod in pods.iter().filter(|pod| is_pod_active(pod) && is_related(pod)) {
        if let Some(node) = pod_node(pod) {
            *counts.entry(node.to_owned()).or_default() += 1;
        }
    }
    counts
}

/// A failed attempt, for the retry and for the status.
struct Failed {
    error: WriteError,
    reported: Failure,
}

/// Carries out one plan.
struct Apply<'a> {
    context: &'a Context,
    memory: &'a Memory,
    key: &'a Key,
    set: &'a ReplicaSet,
}

impl Apply<'_> {
    /// False when the ReplicaSet turns out to be gone: then there is nothing to do for it.
    async fn claim(&self, plan: &Plan) -> Result<bool, WriteError> {
        if !plan.adopt.is_empty() && !self.is_still_alive().await? {
            return Ok(false);
        }
        let api = self.context.api::<Pod>(&self.key.namespace);
        let adopted = plan.adopt.iter().map(|pod| {
            let mut owners = pod.metadata.owner_references.clone().unwrap_or_default();
            owners.push(owner_reference(self.set));
            (pod, owners)
        });
        let released = plan.release.iter().map(|pod| {
            let owners = pod.metadata.owner_references.iter().flatten();
            let others = owners.filter(|owner| owner.uid != uid(&self.set.metadata));
            (pod, others.cloned().collect())
        });
        for (pod, owners) in adopted.chain(released) {
            let patch =
                Map::from_iter([("metadata".to_owned(), json!({"ownerReferences": list_or_null(&owners)}))]);
            let patch = guarded(pod.metadata.resource_version.as_deref(), patch);
            let claimed = merge_patch(&api, "Pod", &Key::of(&pod.metadata), &patch).await?;
            self.memory.pods.note(self.key, &claimed.metadata);
        }
        Ok(true)
    }

    /// Adoption must not race with the owner's deletion, which the cache may not show yet.
    async fn is_still_alive(&self) -> Result<bool, WriteError> {
        let api = self.context.api::<ReplicaSet>(&self.key.namespace);
        let live = call(|| format!("get ReplicaSet {}", self.key), api.get_opt(&self.key.name)).await?;
        Ok(live.is_some_and(|live| {
            live.metadata.uid == self.set.metadata.uid && live.metadata.deletion_timestamp.is_none()
        }))
    }

    async fn carry_out(&self, plan: &Plan) -> Result<(), Failed> {
        self.create_slowly(plan.create).await?;
        self.delete_all(&plan.delete).await
    }

    async fn create_slowly(&self, mut missing: usize) -> Result<(), Failed> {
        let template = pod_of(self.set);
        let mut batch = 1;
        while missing > 0 {
            let size = batch.min(missing);
            let results = join_all((0..size).map(|_| self.create(&template))).await;
            if let Some(error) = results.into_iter().find_map(Result::err) {
                // Nothing can be created in a namespace that goes; retrying would only make noise.
                return if error.is_namespace_terminating() {
                    Ok(())
                } else {
                    Err(failed("FailedCreate", error))
                };
            }
            missing -= size;
            batch *= 2;
        }
        Ok(())
    }

    async fn create(&self, template: &Pod) -> Result<(), WriteError> {
        let api = self.context.api::<Pod>(&self.key.namespace);
        let creation = async { api.create(&PostParams::default(), template).await };
        match call(|| format!("create a pod of ReplicaSet {}", self.key), creation).await {
            Ok(pod) => {
                self.memory.pods.note(self.key, &pod.metadata);
                let name = pod.metadata.name.unwrap_or_default();
                self.tell(Severity::Normal, "SuccessfulCreate", format!("Created pod: {name}"));
                Ok(())
            }
            Err(error) => {
                if !error.is_namespace_terminating() {
                    let message = format!("Error creating: {}", error.message());
                    self.tell(Severity::Warning, "FailedCreate", message);
                }
                Err(error)
            }
        }
    }

    async fn delete_all(&self, pods: &[Arc<Pod>]) -> Result<(), Failed> {
        for some in pods.chunks(PARALLEL_DELETIONS) {
            let results = join_all(some.iter().map(|pod| self.delete(pod))).await;
            if let Some(error) = results.into_iter().find_map(Result::err) {
                return Err(failed("FailedDelete", error));
            }
        }
        Ok(())
    }

    async fn delete(&self, pod: &Pod) -> Result<(), WriteError> {
        let api = self.context.api::<Pod>(&self.key.namespace);
        let key = Key::of(&pod.metadata);
        match delete(&api, "Pod", &key, uid(&pod.metadata), DeleteParams::default()).await {
            Ok(_) => {
                self.memory.pods.note_deletion(self.key, uid(&pod.metadata));
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                self.tell(Severity::Normal, "SuccessfulDelete", format!("Deleted pod: {name}"));
                Ok(())
            }
            // Another pod has taken the name: ours is gone.
            Err(error) if error.is_conflict() => Ok(()),
            Err(error) => {
                self.tell(Severity::Warning, "FailedDelete", format!("Error deleting: {}", error.message()));
                Err(error)
            }
        }
    }

    fn tell(&self, severity: Severity, reason: &'static str, message: String) {
        let involved = reference("apps/v1", "ReplicaSet", &self.set.metadata);
        self.context.events.publish(involved, severity, reason, message, Controller::ReplicaSet);
    }
}

fn failed(reason: &'static str, error: WriteError) -> Failed {
    let reported = Failure { reason, message: error.message() };
    Failed { error, reported }
}
