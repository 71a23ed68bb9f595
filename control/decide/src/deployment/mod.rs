//! Deployments: which ReplicaSets to create, resize and delete, and what status to report.
//!
//! Input: a Deployment, the ReplicaSets it owns, (for `Recreate`) their pods, and the time.
//! Output: a [`Plan`] with the writes of one step of the rollout. Each step is followed by another look at
//! the world, so a rollout is a sequence of plans; none of them ever takes the number of available pods
//! below `replicas - maxUnavailable` or the total above `replicas + maxSurge`.
//!
//! Semantics: <https://kubernetes.io/docs/concepts/workloads/controllers/deployment/>, including the
//! reasons and messages of conditions, which `kubectl rollout status` and users' scripts read.

mod history;
mod replica_set;
mod rollout;
mod scaling;
mod sizes;
mod status;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    apps::v1::{Deployment, DeploymentSpec, DeploymentStatus, ReplicaSet},
    core::v1::Pod,
};

pub use self::{
    history::{Collision, DESIRED_REPLICAS, MAX_REPLICAS, REVISION, resolve_collision},
    replica_set::{POD_TEMPLATE_HASH, template_hash},
    sizes::Sizes,
    status::creation_failed,
};
use crate::object::{self, StringMap};

/// What the controller knows about one Deployment.
#[derive(Clone, Copy, Debug)]
pub struct Observed<'a> {
    /// The Deployment itself.
    pub deployment: &'a Deployment,
    /// The ReplicaSets it controls, in any order.
    pub replica_sets: &'a [Arc<ReplicaSet>],
    /// Pods of those ReplicaSets; only read for the `Recreate` strategy.
    pub pods: &'a [Arc<Pod>],
}

/// The writes that take the Deployment one step further, in the order to do them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Writes to ReplicaSets and to the Deployment's metadata.
    pub actions: Vec<Action>,
    /// The status to write after the actions; `None` when it is unchanged.
    pub status: Option<DeploymentStatus>,
    /// Look again after this time even if nothing changes (progress deadline).
    pub requeue_after: Option<SignedDuration>,
}

/// One write.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Create the ReplicaSet of the current template. If the name is taken, see [`resolve_collision`].
    CreateReplicaSet(Box<ReplicaSet>),
    /// Change fields of an existing ReplicaSet, guarded by the resourceVersion seen.
    UpdateReplicaSet(ReplicaSetUpdate),
    /// Delete a ReplicaSet that the history no longer needs.
    DeleteReplicaSet {
        /// Name of the ReplicaSet.
        name: String,
        /// The uid that must still be there.
        uid: String,
    },
    /// Set annotations of the Deployment, guarded by the resourceVersion seen.
    AnnotateDeployment(StringMap),
}

/// Fields of a ReplicaSet to change; the rest stays as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplicaSetUpdate {
    /// Name of the ReplicaSet.
    pub name: String,
    /// The version the decision was based on.
    pub resource_version: String,
    /// New size, with the old one for the event `ScalingReplicaSet`.
    pub resize: Option<Resize>,
    /// New `minReadySeconds`.
    pub min_ready_seconds: Option<i32>,
    /// Annotations to set.
    pub annotations: StringMap,
}

/// A change of a ReplicaSet's `replicas`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    /// Replicas before.
    pub from: i32,
    /// Replicas after.
    pub to: i32,
}

/// The next step for the Deployment.
pub fn plan(observed: &Observed<'_>, now: Timestamp) -> Plan {
    let Some(spec) = observed.deployment.spec.as_ref() else { return Plan::default() };
    let mut context = Context::new(observed, spec, now);
    if object::is_being_deleted(&observed.deployment.metadata) {
        return context.finish_with_plain_status();
    }
    context.sync_revision();
    if spec.paused == Some(true) {
        context.scale();
        context.clean_up_history();
        return context.finish_with_plain_status();
    }
    if context.is_scaling_event() {
        context.scale();
        return context.finish_with_plain_status();
    }
    if context.recreates() {
        context.roll_out_by_recreating();
    } else {
        context.roll_out_in_place();
    }
    context.finish_with_rollout_status()
}

/// One planning pass: the world as seen, and the plan as it grows.
struct Context<'a> {
    deployment: &'a Deployment,
    spec: &'a DeploymentSpec,
    pods: &'a [Arc<Pod>],
    sizes: Sizes,
    /// The ReplicaSet of the current template, once it exists.
    new: Option<&'a ReplicaSet>,
    /// All others, oldest first.
    old: Vec<&'a ReplicaSet>,
    now: Timestamp,
    created: Option<Box<ReplicaSet>>,
    updates: BTreeMap<String, ReplicaSetUpdate>,
    deleted: Vec<&'a ReplicaSet>,
    annotations: StringMap,
}

impl<'a> Context<'a> {
    fn new(observed: &Observed<'a>, spec: &'a DeploymentSpec, now: Timestamp) -> Self {
        let mut sorted: Vec<&'a ReplicaSet> = observed.replica_sets.iter().map(AsRef::as_ref).collect();
        sorted.sort_by_key(|set| (object::created(&set.metadata), object::name(&set.metadata)));
        let new = history::find_new(spec, &sorted);
        let old = sorted.into_iter().filter(|set| !new.is_some_and(|new| std::ptr::eq(new, *set))).collect();
        Context {
            deployment: observed.deployment,
            spec,
            pods: observed.pods,
            sizes: Sizes::of(spec),
            new,
            old,
            now,
            created: None,
            updates: BTreeMap::new(),
            deleted: Vec::new(),
            annotations: StringMap::new(),
        }
    }

    fn recreates(&self) -> bool {
        sizes::is_recreate(self.spec)
    }

    /// Every existing ReplicaSet, the new one last.
    fn all(&self) -> impl Iterator<Item = &'a ReplicaSet> + '_ {
        self.old.iter().copied().chain(self.new)
    }

    /// The size of the ReplicaSet after what is planned so far.
    fn planned_replicas(&self, set: &ReplicaSet) -> i32 {
        self.updates
            .get(object::name(&set.metadata))
            .and_then(|update| update.resize)
            .map_or_else(|| replica_set::replicas(set), |resize| resize.to)
    }

    /// The sum of all sizes after what is planned so far.
    fn planned_total(&self) -> i32 {
        self.all().map(|set| self.planned_replicas(set)).sum()
    }

    fn update(&mut self, set: &ReplicaSet) -> &mut ReplicaSetUpdate {
        let name = object::name(&set.metadata);
        self.updates.entry(name.to_owned()).or_insert_with(|| ReplicaSetUpdate {
            name: name.to_owned(),
            resource_version: set.metadata.resource_version.clone().unwrap_or_default(),
            resize: None,
            min_ready_seconds: None,
            annotations: StringMap::new(),
        })
    }

    /// Plans a new size and the annotations that go with every resize. True when the size changes.
    fn resize(&mut self, set: &ReplicaSet, to: i32) -> bool {
        let wanted = history::replica_annotations(self.sizes);
        let changed = history::differing(set.metadata.annotations.as_ref(), wanted);
        let from = replica_set::replicas(set);
        if from == to && changed.is_empty() {
            return false;
        }
        let update = self.update(set);
        update.annotations.extend(changed);
        update.resize = (from != to).then_some(Resize { from, to });
        from != to
    }

    fn into_actions(self) -> Vec<Action> {
        let created = self.created.map(Action::CreateReplicaSet);
        let updates = self.updates.into_values().map(Action::UpdateReplicaSet);
        let deleted = self.deleted.into_iter().map(|set| Action::DeleteReplicaSet {
            name: object::name(&set.metadata).to_owned(),
            uid: object::uid(&set.metadata).to_owned(),
        });
        let annotations =
            (!self.annotations.is_empty()).then_some(Action::AnnotateDeployment(self.annotations));
        created.into_iter().chain(updates).chain(deleted).chain(annotations).collect()
    }

    fn finish_with_plain_status(self) -> Plan {
        let status = self.plain_status();
        self.finish(status)
    }

    fn finish_with_rollout_status(self) -> Plan {
        let status = self.rollout_status();
        self.finish(status)
    }

    fn finish(self, status: DeploymentStatus) -> Plan {
        let requeue_after = self.progress_check_after(&status);
        let changed = self.deployment.status.as_ref() != Some(&status);
        Plan { status: changed.then_some(status), requeue_after, actions: self.into_actions() }
    }
}
