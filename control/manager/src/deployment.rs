//! Deployments: carries out `control_decide::deployment` plans.
//!
//! Wakes on Deployments, their ReplicaSets, ReplicaSets without a controller, and (for `Recreate`) pods that
//! go. Writes ReplicaSets and the Deployment's annotations and status.

use std::{sync::Arc, time::Duration};

use control_decide::{
    adoption::{Claim, claim, controller_reference},
    deployment::{
        Action, Collision, Observed, ReplicaSetUpdate, Resize, creation_failed, plan, resolve_collision,
    },
    object::{controller_of, is_controlled_by, uid},
};
use k8s_openapi::api::{
    apps::v1::{Deployment, DeploymentStatus, ReplicaSet},
    core::v1::Pod,
};
use kube::api::{DeleteParams, PostParams};
use serde_json::{Map, Value, json};

use crate::{
    config::Controller,
    context::{Context, now, wait},
    events::{Severity, reference},
    informer::{Informer, Key},
    owners,
    queue::Queue,
    write::{WriteError, call, delete, guarded, list_or_null, merge_patch, merge_patch_status, status_patch},
    written::{CATCH_UP, Written},
};

const WORKERS: usize = 4;

/// What this controller wrote and has not seen yet.
#[derive(Default)]
struct Memory {
    deployments: Written,
    sets: Written,
}

impl Memory {
    fn is_seen(&self, context: &Context, key: &Key) -> bool {
        self.deployments.is_seen(key, context.deployments.version(), |_| false)
            && self.sets.is_seen(key, context.replica_sets.version(), |_| false)
    }
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.deployments.on_change(move |change| queue.add(change.key()));
    }
    {
        let (queue, deployments) = (Arc::clone(&queue), Arc::clone(&context.deployments));
        context.replica_sets.on_change(move |change| {
            owners::wake(
                &queue,
                "Deployment",
                &deployments,
                |owner| Some(&owner.spec.as_ref()?.selector),
                change,
            );
        });
    }
    {
        let queue = Arc::clone(&queue);
        let (sets, deployments) = (Arc::clone(&context.replica_sets), Arc::clone(&context.deployments));
        context.pods.on_change(move |change| {
            if change.new.is_none()
                && let Some(key) = change.old.as_ref().and_then(|pod| deployment_of(pod, &sets))
                && deployments.get(&key).is_some_and(|deployment| recreates(&deployment))
            {
                queue.add(key);
            }
        });
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.deployments.wait_until_synced().await;
            context.replica_sets.wait_until_synced().await;
            context.pods.wait_until_synced().await;
        }
    };
    let (shared, memory) = (Arc::clone(context), Arc::new(Memory::default()));
    context.work(Controller::Deployment, &queue, WORKERS, ready, move |key| {
        let (context, memory) = (Arc::clone(&shared), Arc::clone(&memory));
        async move { reconcile(&context, &memory, &key).await }
    });
}

fn deployment_of(pod: &Pod, sets: &Informer<ReplicaSet>) -> Option<Key> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let owner = controller_of(&pod.metadata).filter(|owner| owner.kind == "ReplicaSet")?;
    let set = sets.get(&Key::new(namespace, &owner.name))?;
    let owner = controller_of(&set.metadata).filter(|owner| owner.kind == "Deployment")?;
    Some(Key::new(namespace, &owner.name))
}

fn recreates(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref());
    strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate")
}

async fn reconcile(context: &Context, memory: &Memory, key: &Key) -> Result<Option<Duration>, WriteError> {
    if !memory.is_seen(context, key) {
        return Ok(Some(CATCH_UP));
    }
    let Some(deployment) = context.deployments.get(key) else { return Ok(None) };
    let sets = claim_sets(context, memory, &deployment, key).await?;
    let pods = if recreates(&deployment) { pods_of(context, &sets, key) } else { Vec::new() };
    let observed = Observed { deployment: &deployment, replica_sets: &sets, pods: &pods };
    let plan = plan(&observed, now());
    let apply = Apply { context, memory, key, deployment: &deployment };
    // An annotation written on the way moves the Deployment's own version on.
    let mut version = deployment.metadata.resource_version.clone();
    for action in plan.actions {
        match action {
            Action::CreateReplicaSet(set) => {
                if !apply.create(&set).await? {
                    return Ok(None);
                }
            }
            Action::UpdateReplicaSet(update) => apply.update(update).await?,
            Action::DeleteReplicaSet { name, uid } => apply.delete(&name, &uid).await?,
            Action::AnnotateDeployment(annotations) => {
                let patch = Map::from_iter([("metadata".to_owned(), json!({"annotations": annotations}))]);
                let patch = guarded(version.as_deref(), patch);
                let api = context.api::<Deployment>(&key.namespace);
                let answer = merge_patch(&api, "Deployment", key, &patch).await?;
                memory.deployments.note(key, &answer.metadata);
                version = answer.metadata.resource_version;
            }
        }
    }
    if let Some(status) = plan.status {
        let patch = status_patch(version.as_deref(), deployment.status.as_ref(), &status);
        let api = context.api::<Deployment>(&key.namespace);
        let answer = merge_patch_status(&api, "Deployment", key, &patch).await?;
        memory.deployments.note(key, &answer.metadata);
    }
    Ok(plan.requeue_after.map(wait))
}

/// The ReplicaSets of the Deployment, after adopting and releasing what the selector says.
async fn claim_sets(
    context: &Context,
    memory: &Memory,
    deployment: &Deployment,
    key: &Key,
) -> Result<Vec<Arc<ReplicaSet>>, WriteError> {
    let Some(spec) = deployment.spec.as_ref() else { return Ok(Vec::new()) };
    let api = context.api::<ReplicaSet>(&key.namespace);
    let mut owned = Vec::new();
    for set in context.replica_sets.in_namespace(&key.namespace) {
        let owners = match claim(&deployment.metadata, &spec.selector, &set.metadata) {
            Claim::Foreign => continue,
            Claim::Owned => {
                owned.push(set);
                continue;
            }
            Claim::Adopt => {
                if !is_still_alive(context, deployment, key).await? {
                    return Ok(owned);
                }
                let mut owners = set.metadata.owner_references.clone().unwrap_or_default();
                owners.push(controller_reference("apps/v1", "Deployment", &deployment.metadata));
                owners
            }
            Claim::Release => {
                let owners = set.metadata.owner_references.iter().flatten();
                owners.filter(|owner| owner.uid != uid(&deployment.metadata)).cloned().collect()
            }
        };
        let patch =
            Map::from_iter([("metadata".to_owned(), json!({"ownerReferences": list_or_null(&owners)}))]);
        let patch = guarded(set.metadata.resource_version.as_deref(), patch);
        let claimed = merge_patch(&api, "ReplicaSet", &Key::of(&set.metadata), &patch).await?;
        memory.sets.note(key, &claimed.metadata);
        if is_controlled_by(&claimed.metadata, uid(&deployment.metadata)) {
            owned.push(Arc::new(claimed));
        }
    }
    Ok(owned)
}

/// Adoption must not race with the owner's deletion, which the cache may not show yet.
async fn is_still_alive(context: &Context, deployment: &Deployment, key: &Key) -> Result<bool, WriteError> {
    let api = context.api::<Deployment>(&key.namespace);
    let live = call(|| format!("get Deployment {key}"), api.get_opt(&key.name)).await?;
    Ok(live.is_some_and(|live| {
        live.metadata.uid == deployment.metadata.uid && live.metadata.deletion_timestamp.is_none()
    }))
}

fn pods_of(context: &Context, sets: &[Arc<ReplicaSet>], key: &Key) -> Vec<Arc<Pod>> {
    let mut pods = context.pods.in_namespace(&key.namespace);
    pods.retain(|pod| sets.iter().any(|set| is_controlled_by(&pod.metadata, uid(&set.metadata))));
    pods
}

/// Carries out actions for one Deployment.
struct Apply<'a> {
    context: &'a Context,
    memory: &'a Memory,
    key: &'a Key,
    deployment: &'a Deployment,
}

impl Apply<'_> {
    /// False when the name is taken by another template: the collision count is written, and the next
    /// reconcile uses another name.
    async fn create(&self, set: &ReplicaSet) -> Result<bool, WriteError> {
        let api = self.context.api::<ReplicaSet>(&self.key.namespace);
        let key = Key::of(&set.metadata);
        let creation = async { api.create(&PostParams::default(), set).await };
        match call(|| format!("create ReplicaSet {key}"), creation).await {
            Ok(created) => {
                self.memory.sets.note(self.key, &created.metadata);
                let to = created.spec.and_then(|spec| spec.replicas).unwrap_or(0);
                if to > 0 {
                    self.tell_resize(&key.name, Resize { from: 0, to });
                }
                Ok(true)
            }
            Err(error) if error.is_already_exists() => {
                let existing = call(|| format!("get ReplicaSet {key}"), api.get(&key.name)).await?;
                match resolve_collision(self.deployment, &existing) {
                    Collision::Ours => Ok(true),
                    Collision::Retry(status) => self.write_status(*status).await.map(|()| false),
                }
            }
            Err(error) if error.is_namespace_terminating() => Ok(false),
            Err(error) => {
                self.tell_failure(&key.name, &error).await?;
                Err(error)
            }
        }
    }

    async fn tell_failure(&self, name: &str, error: &WriteError) -> Result<(), WriteError> {
        let message = error.message();
        if let Some(status) = creation_failed(self.deployment, name, &message, now()) {
            self.write_status(status).await?;
        }
        let message = format!("Failed to create new replica set {name:?}: {message}");
        self.tell(Severity::Warning, "ReplicaSetCreateError", message);
        Ok(())
    }

    async fn write_status(&self, status: DeploymentStatus) -> Result<(), WriteError> {
        let metadata = &self.deployment.metadata;
        let version = metadata.resource_version.as_deref();
        let patch = status_patch(version, self.deployment.status.as_ref(), &status);
        let api = self.context.api::<Deployment>(&self.key.namespace);
        let answer = merge_patch_status(&api, "Deployment", self.key, &patch).await?;
        self.memory.deployments.note(self.key, &answer.metadata);
        Ok(())
    }

    async fn update(&self, update: ReplicaSetUpdate) -> Result<(), WriteError> {
        let mut spec = Map::new();
        if let Some(resize) = update.resize {
            spec.insert("replicas".into(), resize.to.into());
        }
        if let Some(seconds) = update.min_ready_seconds {
            spec.insert("minReadySeconds".into(), seconds.into());
        }
        let mut patch = Map::from_iter([("spec".to_owned(), Value::Object(spec))]);
        if !update.annotations.is_empty() {
            patch.insert("metadata".into(), json!({"annotations": update.annotations}));
        }
        let patch = guarded(Some(&update.resource_version), patch);
        let api = self.context.api::<ReplicaSet>(&self.key.namespace);
        let key = Key::new(&self.key.namespace, &update.name);
        let answer = merge_patch(&api, "ReplicaSet", &key, &patch).await?;
        self.memory.sets.note(self.key, &answer.metadata);
        if let Some(resize) = update.resize {
            self.tell_resize(&update.name, resize);
        }
        Ok(())
    }

    async fn delete(&self, name: &str, uid: &str) -> Result<(), WriteError> {
        let api = self.context.api::<ReplicaSet>(&self.key.namespace);
        let key = Key::new(&self.key.namespace, name);
        delete(&api, "ReplicaSet", &key, uid, DeleteParams::background()).await.map(|_| ())
    }

    fn tell_resize(&self, name: &str, resize: Resize) {
        let direction = if resize.to > resize.from { "up" } else { "down" };
        let message = format!("Scaled {direction} replica set {name} from {} to {}", resize.from, resize.to);
        self.tell(Severity::Normal, "ScalingReplicaSet", message);
    }

    fn tell(&self, severity: Severity, reason: &'static str, message: String) {
        let involved = reference("apps/v1", "Deployment", &self.deployment.metadata);
        self.context.events.publish(involved, severity, reason, message, Controller::Deployment);
    }
}
