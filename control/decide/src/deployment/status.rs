//! What a Deployment reports: counts, and the conditions Available, Progressing and ReplicaFailure.
//!
//! Reasons and messages are upstream's; `kubectl rollout status` depends on them.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet},
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::{
    Context,
    replica_set::{actual_replicas, available_replicas, ready_replicas},
};
use crate::object;

const AVAILABLE: &str = "Available";
const PROGRESSING: &str = "Progressing";
const REPLICA_FAILURE: &str = "ReplicaFailure";
const NEW_SET_AVAILABLE: &str = "NewReplicaSetAvailable";
const DEADLINE_EXCEEDED: &str = "ProgressDeadlineExceeded";
const PAUSED: &str = "DeploymentPaused";

fn condition<'a>(status: &'a DeploymentStatus, kind: &str) -> Option<&'a DeploymentCondition> {
    status.conditions.iter().flatten().find(|condition| condition.type_ == kind)
}

fn remove_condition(status: &mut DeploymentStatus, kind: &str) {
    if let Some(conditions) = status.conditions.as_mut() {
        conditions.retain(|condition| condition.type_ != kind);
        if conditions.is_empty() {
            status.conditions = None;
        }
    }
}

/// Sets the condition unless it already has this status and reason; keeps the time of the last transition
/// when only the reason changes.
fn set_condition(status: &mut DeploymentStatus, mut wanted: DeploymentCondition) {
    if let Some(current) = condition(status, &wanted.type_)
        && current.status == wanted.status
    {
        if current.reason == wanted.reason {
            return;
        }
        wanted.last_transition_time.clone_from(&current.last_transition_time);
    }
    remove_condition(status, &wanted.type_);
    status.conditions.get_or_insert_default().push(wanted);
}

/// The status that tells why the new ReplicaSet could not be created; `None` when it is told already, or
/// the Deployment has no deadline and so reports no progress.
pub fn creation_failed(
    deployment: &Deployment,
    set_name: &str,
    error: &str,
    now: Timestamp,
) -> Option<DeploymentStatus> {
    deployment.spec.as_ref()?.progress_deadline_seconds.filter(|seconds| *seconds != i32::MAX)?;
    let mut status = deployment.status.clone().unwrap_or_default();
    let now = Time(whole_seconds(now));
    let failure = DeploymentCondition {
        type_: PROGRESSING.into(),
        status: "False".into(),
        reason: Some("ReplicaSetCreateError".into()),
        message: Some(format!("Failed to create new replica set \"{set_name}\": {error}")),
        last_transition_time: Some(now.clone()),
        last_update_time: Some(now),
    };
    set_condition(&mut status, failure);
    (deployment.status.as_ref() != Some(&status)).then_some(status)
}

impl Context<'_> {
    fn condition_now(&self, kind: &str, status: &str, reason: &str, message: String) -> DeploymentCondition {
        DeploymentCondition {
            type_: kind.into(),
            status: status.into(),
            reason: Some(reason.into()),
            message: Some(message),
            last_transition_time: Some(Time(whole_seconds(self.now))),
            last_update_time: Some(Time(whole_seconds(self.now))),
        }
    }

    /// The deadline for progress, if the Deployment has one.
    fn deadline(&self) -> Option<SignedDuration> {
        let seconds = self.spec.progress_deadline_seconds.filter(|seconds| *seconds != i32::MAX)?;
        Some(SignedDuration::from_secs(i64::from(seconds)))
    }

    fn old_status(&self) -> DeploymentStatus {
        self.deployment.status.clone().unwrap_or_default()
    }

    /// Counts and availability as reported by the ReplicaSets, with the paused and found conditions.
    pub(super) fn plain_status(&self) -> DeploymentStatus {
        let old = self.old_status();
        let total: i32 = self.all().map(actual_replicas).sum();
        let available: i32 = self.all().map(available_replicas).sum();
        let some = |number: i32| (number != 0).then_some(number);
        let mut status = DeploymentStatus {
            observed_generation: self.deployment.metadata.generation,
            replicas: some(total),
            updated_replicas: some(self.new.map_or(0, actual_replicas)),
            ready_replicas: some(self.all().map(ready_replicas).sum()),
            available_replicas: some(available),
            unavailable_replicas: some((total - available).max(0)),
            collision_count: old.collision_count,
            conditions: old.conditions,
            ..DeploymentStatus::default()
        };
        let availability = if available >= self.sizes.fewest_available() {
            ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
        } else {
            ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
        };
        let (value, reason, message) = availability;
        set_condition(&mut status, self.condition_now(AVAILABLE, value, reason, message.into()));
        self.note_pause(&mut status);
        self.note_new_set(&mut status);
        status
    }

    /// Time spent paused must not count against the deadline; resuming starts it anew.
    fn note_pause(&self, status: &mut DeploymentStatus) {
        let progressing = condition(status, PROGRESSING).and_then(|condition| condition.reason.as_deref());
        if self.deadline().is_none() || progressing == Some(DEADLINE_EXCEEDED) {
            return;
        }
        let paused = self.spec.paused == Some(true);
        let (reason, message) = match (paused, progressing == Some(PAUSED)) {
            (true, false) => (PAUSED, "Deployment is paused"),
            (false, true) => ("DeploymentResumed", "Deployment is resumed"),
            _ => return,
        };
        set_condition(status, self.condition_now(PROGRESSING, "Unknown", reason, message.into()));
    }

    /// The first sign of progress: the ReplicaSet was created now, or found to exist.
    fn note_new_set(&self, status: &mut DeploymentStatus) {
        if self.deadline().is_none() {
            return;
        }
        let (reason, message) = match (&self.created, self.new) {
            (Some(created), _) => {
                let name = object::name(&created.metadata);
                ("NewReplicaSetCreated", format!("Created new replica set \"{name}\""))
            }
            (None, Some(new)) if condition(status, PROGRESSING).is_none() => {
                let name = object::name(&new.metadata);
                ("FoundNewReplicaSet", format!("Found new replica set \"{name}\""))
            }
            _ => return,
        };
        set_condition(status, self.condition_now(PROGRESSING, "True", reason, message));
    }

    /// True when every desired pod is of the new template and available.
    pub(super) fn is_complete(&self) -> bool {
        let status = self.deployment.status.as_ref();
        status.is_some_and(|status| self.completes(status))
    }

    fn completes(&self, status: &DeploymentStatus) -> bool {
        let desired = self.sizes.desired;
        status.updated_replicas.unwrap_or(0) == desired
            && status.replicas.unwrap_or(0) == desired
            && status.available_replicas.unwrap_or(0) == desired
            && status.observed_generation >= self.deployment.metadata.generation
    }

    /// [`Self::plain_status`] with the conditions of a running rollout.
    pub(super) fn rollout_status(&self) -> DeploymentStatus {
        let old = self.old_status();
        let mut status = self.plain_status();
        if self.deadline().is_none() {
            remove_condition(&mut status, PROGRESSING);
        } else {
            self.report_progress(&old, &mut status);
        }
        match self.replica_failure() {
            Some(failure) => set_condition(&mut status, failure),
            None => remove_condition(&mut status, REPLICA_FAILURE),
        }
        status
    }

    fn report_progress(&self, old: &DeploymentStatus, status: &mut DeploymentStatus) {
        let reason = condition(old, PROGRESSING).and_then(|condition| condition.reason.as_deref());
        let settled = status.replicas == status.updated_replicas && reason == Some(NEW_SET_AVAILABLE);
        if settled {
            return;
        }
        let subject = self.subject();
        if self.completes(status) {
            let message = format!("{subject} has successfully progressed.");
            set_condition(status, self.condition_now(PROGRESSING, "True", NEW_SET_AVAILABLE, message));
        } else if self.created.is_none() && progressed(old, status) {
            let message = format!("{subject} is progressing.");
            let mut wanted = self.condition_now(PROGRESSING, "True", "ReplicaSetUpdated", message);
            // The update time must move on with every progress, so the old condition is replaced whole.
            if let Some(current) = condition(status, PROGRESSING).filter(|current| current.status == "True") {
                wanted.last_transition_time.clone_from(&current.last_transition_time);
            }
            remove_condition(status, PROGRESSING);
            set_condition(status, wanted);
        } else if self.timed_out(status) {
            let message = format!("{subject} has timed out progressing.");
            set_condition(status, self.condition_now(PROGRESSING, "False", DEADLINE_EXCEEDED, message));
        }
    }

    fn subject(&self) -> String {
        match self.new {
            Some(new) => format!("ReplicaSet \"{}\"", object::name(&new.metadata)),
            None => format!("Deployment \"{}\"", object::name(&self.deployment.metadata)),
        }
    }

    fn timed_out(&self, status: &DeploymentStatus) -> bool {
        let Some(current) = condition(status, PROGRESSING) else { return false };
        match current.reason.as_deref() {
            Some(NEW_SET_AVAILABLE) => false,
            Some(DEADLINE_EXCEEDED) => true,
            _ => self.time_left(current).is_some_and(|left| left.is_negative()),
        }
    }

    fn time_left(&self, progressing: &DeploymentCondition) -> Option<SignedDuration> {
        let updated = progressing.last_update_time.as_ref()?.0;
        Some(self.deadline()? - self.now.duration_since(updated))
    }

    /// When to look again at a rollout that may get stuck without any further event.
    pub(super) fn progress_check_after(&self, status: &DeploymentStatus) -> Option<SignedDuration> {
        let progressing = condition(status, PROGRESSING)?;
        let done = self.completes(status) || self.spec.paused == Some(true);
        if done || progressing.reason.as_deref() == Some(DEADLINE_EXCEEDED) {
            return None;
        }
        Some(self.time_left(progressing)?.max(SignedDuration::ZERO) + SignedDuration::from_secs(1))
    }

    /// The first ReplicaSet's trouble with making pods, the new one's before the old ones'.
    fn replica_failure(&self) -> Option<DeploymentCondition> {
        let mut sets = self.new.into_iter().chain(self.old.iter().copied());
        sets.find_map(failure_of)
    }
}

fn failure_of(set: &ReplicaSet) -> Option<DeploymentCondition> {
    let conditions = set.status.as_ref()?.conditions.as_ref()?;
    let failure = conditions.iter().find(|condition| condition.type_ == REPLICA_FAILURE)?;
    Some(DeploymentCondition {
        type_: REPLICA_FAILURE.into(),
        status: failure.status.clone(),
        reason: failure.reason.clone(),
        message: failure.message.clone(),
        last_transition_time: failure.last_transition_time.clone(),
        last_update_time: failure.last_transition_time.clone(),
    })
}

/// True when pods were replaced, became ready or available since the old status.
fn progressed(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let updated = |status: &DeploymentStatus| status.updated_replicas.unwrap_or(0);
    let outdated = |status: &DeploymentStatus| status.replicas.unwrap_or(0) - updated(status);
    updated(new) > updated(old)
        || outdated(new) < outdated(old)
        || new.ready_replicas > old.ready_replicas
        || new.available_replicas > old.available_replicas
}

/// API times have whole seconds; keeping that here makes written and read statuses comparable.
fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}
