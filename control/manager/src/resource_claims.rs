//! Makes the ResourceClaims of pods' templates, tells pods which they are, and gives a claim's devices back when the last pod
//! that used it is over. Upstream's resourceclaim controller; who gets which devices is the scheduler's to say.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use control_decide::{
    object::{controller_of, uid},
    resource_claims::{
        self as decide, ClaimPlan, FINALIZER, Lacking, claim_from, claims_of, is_over, names_claims,
        plan_claim, plan_pod, users_with,
    },
};
use k8s_openapi::api::{
    core::v1::Pod,
    resource::v1::{ResourceClaim, ResourceClaimConsumerReference as Consumer, ResourceClaimTemplate},
};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Map, Value, json};

use crate::{
    config::Controller,
    context::Context,
    events::{Severity, reference},
    informer::{Change, Key},
    queue::Queue,
    write::{WriteError, call, delete, guarded, list_or_null, merge_patch, merge_patch_status},
};

/// What is looked at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    Pod(Key),
    Claim(Key),
}

struct ResourceClaims {
    context: Arc<Context>,
    queue: Arc<Queue<Item>>,
    memory: Mutex<Memory>,
}

/// Bounded by the pods that name claims.
#[derive(Default)]
struct Memory {
    /// Pods by the claims that they name.
    users: BTreeMap<Key, BTreeSet<Key>>,
    /// Claims that were made a moment ago, by the uid of the pod and its name of the claim: the cache may not have them yet.
    made: BTreeMap<(String, String), String>,
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue = Queue::new();
    let controller = Arc::new(ResourceClaims {
        context: Arc::clone(context),
        queue: Arc::clone(&queue),
        memory: Mutex::default(),
    });
    {
        let controller = Arc::clone(&controller);
        context.pods.on_change(move |change| controller.pod_changed(change));
    }
    {
        let controller = Arc::clone(&controller);
        context.resource_claims.on_change(move |change| controller.claim_changed(change));
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.pods.wait_until_synced().await;
            context.resource_claims.wait_until_synced().await;
        }
    };
    context.work(Controller::ResourceClaims, &queue, 2, ready, move |item| {
        let controller = Arc::clone(&controller);
        async move {
            match item {
                Item::Pod(key) => controller.reconcile_pod(&key).await?,
                Item::Claim(key) => controller.reconcile_claim(&key).await?,
            }
            Ok::<Option<Duration>, WriteError>(None)
        }
    });
}

impl ResourceClaims {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pod_changed(&self, change: &Change<Pod>) {
        if !change.states().any(|pod| names_claims(pod)) {
            return;
        }
        let key = change.key();
        let keys = |pod: &Arc<Pod>| -> BTreeSet<Key> {
            claims_of(pod).map(|name| Key::new(&key.namespace, name)).collect()
        };
        let (before, now) = (change.old.as_ref().map(keys), change.new.as_ref().map(keys));
        {
            let mut memory = self.memory();
            for claim in before.iter().flatten() {
                if let Some(pods) = memory.users.get_mut(claim) {
                    pods.remove(&key);
                }
            }
            for claim in now.iter().flatten() {
                memory.users.entry(claim.clone()).or_default().insert(key.clone());
            }
            memory.users.retain(|_, pods| !pods.is_empty());
            let gone = change.old.as_ref().map(|pod| uid(&pod.metadata));
            let stays = change.new.as_ref().map(|pod| uid(&pod.metadata));
            if let Some(gone) = gone.filter(|gone| stays != Some(*gone)) {
                memory.made.retain(|(of, _), _| of != gone);
            }
        }
        if change.new.as_ref().is_none_or(|pod| is_over(pod)) {
            self.queue.add_all(before.into_iter().chain(now).flatten().map(Item::Claim));
        }
        if change.new.is_some() {
            self.queue.add(Item::Pod(key));
        }
    }

    fn claim_changed(&self, change: &Change<ResourceClaim>) {
        let key = change.key();
        let mut pods = {
            let mut memory = self.memory();
            if change.new.is_none() {
                memory.made.retain(|_, name| *name != key.name);
            }
            memory.users.get(&key).cloned().unwrap_or_default()
        };
        let owners = change.states().filter_map(|claim| controller_of(&claim.metadata));
        pods.extend(
            owners.filter(|owner| owner.kind == "Pod").map(|owner| Key::new(&key.namespace, &owner.name)),
        );
        self.queue.add_all(pods.into_iter().map(Item::Pod));
        if change.new.is_some() {
            self.queue.add(Item::Claim(key));
        }
    }

    async fn reconcile_pod(&self, key: &Key) -> Result<(), WriteError> {
        let Some(pod) = self.context.pods.get(key).filter(|pod| names_claims(pod)) else { return Ok(()) };
        let claims = &self.context.resource_claims;
        let mut plan = plan_pod(
            &pod,
            |name| claims.get(&Key::new(&key.namespace, name)),
            || claims.in_namespace(&key.namespace),
        );
        let mut problem = None;
        for lacking in &plan.lacking {
            match self.provide(&pod, key, lacking).await {
                Ok(name) => {
                    plan.untold.insert(lacking.pod_claim.clone(), name);
                }
                Err(error) if error.is_namespace_terminating() => {}
                Err(error) => problem = Some(error),
            }
        }
        plan.untold.retain(|pod_claim, name| !is_told(&pod, pod_claim, name));
        if !plan.untold.is_empty() {
            self.tell(&pod, key, &plan.untold).await?;
        }
        for claim in &plan.unreserved {
            let users = users_with(claim, &pod);
            let status = json!({ "reservedFor": users });
            match self.write_status(claim, status).await {
                // It has changed, and the pod will be looked at again.
                Err(error) if !error.is_conflict() && !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        problem.map_or(Ok(()), Err)
    }

    /// The claim that the pod lacks in the cache: one that is there, or a new one. Its name.
    async fn provide(&self, pod: &Pod, key: &Key, lacking: &Lacking) -> Result<String, WriteError> {
        let of = (uid(&pod.metadata).to_owned(), lacking.pod_claim.clone());
        let made = self.memory().made.get(&of).cloned();
        if let Some(made) = made {
            return Ok(made);
        }
        let claims = self.context.api::<ResourceClaim>(&key.namespace);
        if let Some(lost) = &lacking.lost {
            let known = call(|| format!("read ResourceClaim {lost}"), claims.get_opt(lost)).await?;
            if known.is_some_and(|known| {
                controller_of(&known.metadata).is_some_and(|owner| owner.uid == uid(&pod.metadata))
            }) {
                return Ok(lost.clone());
            }
        }
        let told = |error: WriteError, what: String| {
            let message = format!("PodResourceClaim {}: {what}: {}", lacking.pod_claim, error.message());
            let involved = reference("v1", "Pod", &pod.metadata);
            let events = &self.context.events;
            let reason = "FailedResourceClaimCreation";
            events.publish(involved, Severity::Warning, reason, message, Controller::ResourceClaims);
            error
        };
        let templates = self.context.api::<ResourceClaimTemplate>(&key.namespace);
        let name = &lacking.template;
        let read = call(|| format!("read ResourceClaimTemplate {name}"), templates.get(name)).await;
        let template = read.map_err(|error| told(error, format!("resource claim template {name:?}")))?;
        let claim = claim_from(pod, &lacking.pod_claim, &template);
        let creation = async { claims.create(&PostParams::default(), &claim).await };
        let created = call(|| format!("create a ResourceClaim for pod {key}"), creation).await;
        let created = created.map_err(|error| {
            let is_quiet = error.is_namespace_terminating();
            if is_quiet { error } else { told(error, "create ResourceClaim".to_owned()) }
        })?;
        let name = created.metadata.name.unwrap_or_default();
        tracing::info!(claim = %name, pod = %key, "ResourceClaim made");
        self.memory().made.insert(of, name.clone());
        Ok(name)
    }

    /// Writes into the pod's status which claims were made for it.
    async fn tell(&self, pod: &Pod, key: &Key, made: &BTreeMap<String, String>) -> Result<(), WriteError> {
        let statuses: Vec<Value> = made
            .iter()
            .map(|(pod_claim, name)| json!({"name": pod_claim, "resourceClaimName": name}))
            .collect();
        let patch = json!({
            "metadata": {"uid": uid(&pod.metadata)}, "status": {"resourceClaimStatuses": statuses}});
        let pods = self.context.api::<Pod>(&key.namespace);
        let params = PatchParams::default();
        let request = async { pods.patch_status(&key.name, &params, &Patch::Strategic(&patch)).await };
        match call(|| format!("patch the status of Pod {key}"), request).await {
            // It is gone, or another one has its name: then it needs nothing.
            Err(error) if !error.is_not_found() && !error.is_conflict() => Err(error),
            _ => Ok(()),
        }
    }

    async fn reconcile_claim(&self, key: &Key) -> Result<(), WriteError> {
        let Some(claim) = self.context.resource_claims.get(key) else { return Ok(()) };
        let mut gone = BTreeSet::new();
        for user in decide::users(&claim).iter().filter(|user| decide::is_pod(user)) {
            if self.is_gone(&key.namespace, user).await? {
                gone.insert(user.uid.clone());
            }
        }
        let owner = controller_of(&claim.metadata).filter(|owner| owner.kind == "Pod");
        let owner = owner.and_then(|owner| self.context.pods.get(&Key::new(&key.namespace, &owner.name)));
        let plan = plan_claim(&claim, |user| gone.contains(&user.uid), owner.as_deref());
        match self.carry_out(&claim, key, &plan).await {
            // It has changed, and will be looked at again, or it is gone.
            Err(error) if error.is_conflict() || error.is_not_found() => Ok(()),
            done => done,
        }
    }

    /// Whether the pod is over. One that the cache does not have may be too new for it.
    async fn is_gone(&self, namespace: &str, user: &Consumer) -> Result<bool, WriteError> {
        let cached = self.context.pods.get(&Key::new(namespace, &user.name));
        if let Some(pod) = cached.filter(|pod| uid(&pod.metadata) == user.uid) {
            return Ok(is_over(&pod));
        }
        let pods = self.context.api::<Pod>(namespace);
        let found = call(|| format!("read Pod {namespace}/{}", user.name), pods.get_opt(&user.name)).await?;
        Ok(found.is_none_or(|pod| uid(&pod.metadata) != user.uid || is_over(&pod)))
    }

    async fn carry_out(&self, claim: &ResourceClaim, key: &Key, plan: &ClaimPlan) -> Result<(), WriteError> {
        let mut version = claim.metadata.resource_version.clone();
        if plan.users.is_some() || plan.deallocate {
            let mut status = Map::new();
            if let Some(users) = &plan.users {
                status.insert("reservedFor".into(), list_or_null(users));
            }
            if plan.deallocate {
                status.insert("allocation".into(), Value::Null);
                status.insert("devices".into(), Value::Null);
            }
            version = self.write_status(claim, Value::Object(status)).await?;
            tracing::info!(claim = %key, deallocated = plan.deallocate, "pods that used a ResourceClaim are over");
        }
        let claims = self.context.api::<ResourceClaim>(&key.namespace);
        if plan.unprotect {
            let finalizers = claim.metadata.finalizers.iter().flatten();
            let left: Vec<&String> = finalizers.filter(|finalizer| *finalizer != FINALIZER).collect();
            let metadata = json!({ "finalizers": list_or_null(&left) });
            let patch = guarded(version.as_deref(), Map::from_iter([("metadata".to_owned(), metadata)]));
            merge_patch(&claims, "ResourceClaim", key, &patch).await?;
        }
        if plan.delete {
            let own = uid(&claim.metadata);
            delete(&claims, "ResourceClaim", key, own, DeleteParams::default()).await?;
            tracing::info!(claim = %key, "ResourceClaim of a pod that is over deleted");
        }
        Ok(())
    }

    /// Patches the status of the version of the claim that was looked at; the version after that.
    async fn write_status(&self, claim: &ResourceClaim, status: Value) -> Result<Option<String>, WriteError> {
        let key = Key::of(&claim.metadata);
        let version = claim.metadata.resource_version.as_deref();
        let patch = guarded(version, Map::from_iter([("status".to_owned(), status)]));
        let claims = self.context.api::<ResourceClaim>(&key.namespace);
        let written = merge_patch_status(&claims, "ResourceClaim", &key, &patch).await?;
        Ok(written.metadata.resource_version)
    }
}

/// Whether the pod's status says so already.
fn is_told(pod: &Pod, pod_claim: &str, name: &str) -> bool {
    let mut statuses = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    statuses.any(|status| status.name == pod_claim && status.resource_claim_name.as_deref() == Some(name))
}
