//! ReplicaSets: how many pods to create or which to delete, and what status to report.
//!
//! Input: a ReplicaSet, the pods of its namespace that it owns or could own, and the time. Output: a
//! [`Plan`]. It assumes that the pods given are no older than the ReplicaSet's own last writes; the
//! executor asks [`expectations::Expectations`] for that and otherwise uses the status only.

pub mod expectations;
pub mod rank;

use std::{collections::BTreeMap, sync::Arc};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::{
        apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus},
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time},
};

use crate::{
    adoption::{Claim, claim, controller_reference},
    object, selector,
};

/// The most pods created or deleted in one step.
pub const BURST: usize = 500;

/// What to write for one ReplicaSet.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Orphans to take over.
    pub adopt: Vec<Arc<Pod>>,
    /// Pods that the selector no longer covers.
    pub release: Vec<Arc<Pod>>,
    /// How many pods to create from [`pod_of`].
    pub create: usize,
    /// Pods to delete, the least valuable first.
    pub delete: Vec<Arc<Pod>>,
    /// The pods that are or become ours and count as replicas.
    pub owned: Vec<Arc<Pod>>,
}

/// Decides about the pods. `related_on_node` counts, per node, the active pods of all ReplicaSets of the
/// same owner: where an update has doubled pods up, those go first.
pub fn plan(
    set: &ReplicaSet,
    pods: &[Arc<Pod>],
    related_on_node: &BTreeMap<String, usize>,
    now: Timestamp,
) -> Plan {
    let mut plan = Plan::default();
    let Some(spec) = set.spec.as_ref() else { return plan };
    for pod in pods {
        match claim(&set.metadata, &spec.selector, &pod.metadata) {
            Claim::Owned if object::is_pod_active(pod) => plan.owned.push(Arc::clone(pod)),
            Claim::Adopt if object::is_pod_active(pod) => {
                plan.adopt.push(Arc::clone(pod));
                plan.owned.push(Arc::clone(pod));
            }
            Claim::Release => plan.release.push(Arc::clone(pod)),
            Claim::Owned | Claim::Adopt | Claim::Foreign => {}
        }
    }
    if object::is_being_deleted(&set.metadata) {
        return plan;
    }
    let desired = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    let actual = plan.owned.len();
    plan.create = desired.saturating_sub(actual).min(BURST);
    let surplus = actual.saturating_sub(desired).min(BURST);
    if surplus > 0 {
        let mut ranked = plan.owned.clone();
        rank::sort_for_deletion(&mut ranked, related_on_node, now);
        ranked.truncate(surplus);
        plan.delete = ranked;
    }
    plan
}

/// A pod of the ReplicaSet's template; the API server completes its name.
pub fn pod_of(set: &ReplicaSet) -> Pod {
    let template = set.spec.as_ref().and_then(|spec| spec.template.clone()).unwrap_or_default();
    let template_meta = template.metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", object::name(&set.metadata))),
            namespace: set.metadata.namespace.clone(),
            labels: template_meta.labels,
            annotations: template_meta.annotations,
            finalizers: template_meta.finalizers,
            owner_references: Some(vec![owner_reference(set)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// The reference that makes a pod the ReplicaSet's.
pub fn owner_reference(set: &ReplicaSet) -> OwnerReference {
    controller_reference("apps/v1", "ReplicaSet", &set.metadata)
}

/// A failure to create or delete pods, as the condition `ReplicaFailure` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// `FailedCreate` or `FailedDelete`.
    pub reason: &'static str,
    /// The API server's words.
    pub message: String,
}

/// The status for the active pods `owned`, after an attempt that ended with `failure`.
pub fn status(
    set: &ReplicaSet,
    owned: &[Arc<Pod>],
    failure: Option<Failure>,
    now: Timestamp,
) -> ReplicaSetStatus {
    let spec = set.spec.as_ref();
    let min_ready_seconds = spec.and_then(|spec| spec.min_ready_seconds).unwrap_or(0);
    let template_labels =
        spec.and_then(|spec| spec.template.as_ref()?.metadata.as_ref()?.labels.clone()).unwrap_or_default();
    let number = |holds: &dyn Fn(&Pod) -> bool| {
        let count = object::count(owned.iter().filter(|pod| holds(pod)).count());
        (count != 0).then_some(count)
    };
    let empty = object::StringMap::new();
    ReplicaSetStatus {
        replicas: object::count(owned.len()),
        fully_labeled_replicas: number(&|pod| {
            selector::contains(pod.metadata.labels.as_ref().unwrap_or(&empty), &template_labels)
        }),
        ready_replicas: number(&object::is_pod_ready),
        available_replicas: number(&|pod| object::is_pod_available(pod, min_ready_seconds, now)),
        observed_generation: set.metadata.generation,
        conditions: conditions(set, failure, now),
        terminating_replicas: None,
    }
}

fn conditions(
    set: &ReplicaSet,
    failure: Option<Failure>,
    now: Timestamp,
) -> Option<Vec<ReplicaSetCondition>> {
    const REPLICA_FAILURE: &str = "ReplicaFailure";
    let old = set.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let current = old.iter().find(|condition| condition.type_ == REPLICA_FAILURE).cloned();
    let mut conditions: Vec<_> =
        old.into_iter().filter(|condition| condition.type_ != REPLICA_FAILURE).collect();
    if let Some(failure) = failure {
        // The first failure is told until one attempt succeeds, or the status would change all the time.
        conditions.push(current.unwrap_or_else(|| ReplicaSetCondition {
            type_: REPLICA_FAILURE.into(),
            status: "True".into(),
            reason: Some(failure.reason.into()),
            message: Some(failure.message),
            last_transition_time: Timestamp::from_second(now.as_second()).ok().map(Time),
        }));
    }
    (!conditions.is_empty()).then_some(conditions)
}

/// When the next ready pod will have been ready for `minReadySeconds`: no event tells that.
pub fn next_availability(set: &ReplicaSet, owned: &[Arc<Pod>], now: Timestamp) -> Option<SignedDuration> {
    let seconds = set.spec.as_ref()?.min_ready_seconds.filter(|seconds| *seconds > 0)?;
    let wait = SignedDuration::from_secs(i64::from(seconds));
    owned
        .iter()
        .filter_map(|pod| object::ready_since(pod))
        .map(|since| wait - now.duration_since(since))
        .filter(SignedDuration::is_positive)
        .min()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::{
            apps::v1::ReplicaSetSpec,
            core::v1::{PodCondition, PodStatus, PodTemplateSpec},
        },
        apimachinery::pkg::apis::meta::v1::LabelSelector,
    };

    use super::*;
    use crate::object::StringMap;

    fn labels() -> StringMap {
        StringMap::from([("app".into(), "web".into())])
    }

    fn replica_set(replicas: i32) -> ReplicaSet {
        ReplicaSet {
            metadata: ObjectMeta {
                name: Some("web-1".into()),
                uid: Some("set".into()),
                generation: Some(2),
                ..ObjectMeta::default()
            },
            spec: Some(ReplicaSetSpec {
                replicas: Some(replicas),
                selector: LabelSelector { match_labels: Some(labels()), match_expressions: None },
                min_ready_seconds: Some(10),
                template: Some(PodTemplateSpec {
                    metadata: Some(ObjectMeta { labels: Some(labels()), ..ObjectMeta::default() }),
                    spec: None,
                }),
            }),
            status: None,
        }
    }

    fn pod(name: &str, phase: &str, ready_at: Option<i64>, owner: Option<&ReplicaSet>) -> Arc<Pod> {
        Arc::new(Pod {
            metadata: ObjectMeta {
                name: Some(name.into()),
                uid: Some(name.into()),
                labels: Some(labels()),
                owner_references: owner.map(|set| vec![owner_reference(set)]),
                ..ObjectMeta::default()
            },
            spec: None,
            status: Some(PodStatus {
                phase: Some(phase.into()),
                conditions: ready_at.map(|second| {
                    vec![PodCondition {
                        type_: "Ready".into(),
                        status: "True".into(),
                        last_transition_time: Timestamp::from_second(second).ok().map(Time),
                        ..PodCondition::default()
                    }]
                }),
                ..PodStatus::default()
            }),
        })
    }

    #[test]
    fn missing_pods_are_created_and_orphans_adopted_first() {
        let set = replica_set(4);
        let pods = [
            pod("ours", "Running", None, Some(&set)),
            pod("orphan", "Running", None, None),
            pod("ended", "Failed", None, Some(&set)),
        ];
        let plan = plan(&set, &pods, &BTreeMap::new(), Timestamp::UNIX_EPOCH);
        assert_eq!(plan.create, 2);
        assert_eq!(plan.adopt.len(), 1);
        assert!(plan.delete.is_empty());
    }

    #[test]
    fn surplus_pods_go_least_useful_first() {
        let set = replica_set(1);
        let pods = [
            pod("ready", "Running", Some(1), Some(&set)),
            pod("pending", "Pending", None, Some(&set)),
            pod("unready", "Running", None, Some(&set)),
        ];
        let plan = plan(&set, &pods, &BTreeMap::new(), Timestamp::UNIX_EPOCH);
        let names: Vec<_> = plan.delete.iter().map(|pod| object::name(&pod.metadata)).collect();
        assert_eq!(names, ["pending", "unready"]);
    }

    #[test]
    fn a_set_being_deleted_neither_creates_nor_deletes() {
        let mut set = replica_set(3);
        set.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        let plan = plan(&set, &[], &BTreeMap::new(), Timestamp::UNIX_EPOCH);
        assert_eq!((plan.create, plan.delete.len()), (0, 0));
    }

    #[test]
    fn availability_waits_for_min_ready_seconds() {
        let set = replica_set(2);
        let owned = [pod("a", "Running", Some(0), Some(&set)), pod("b", "Running", Some(95), Some(&set))];
        let now = Timestamp::from_second(100).expect("in range");
        let reported = status(&set, &owned, None, now);
        assert_eq!((reported.ready_replicas, reported.available_replicas), (Some(2), Some(1)));
        assert_eq!(reported.fully_labeled_replicas, Some(2));
        assert_eq!(next_availability(&set, &owned, now), Some(SignedDuration::from_secs(5)));
    }

    #[test]
    fn a_failure_is_told_until_an_attempt_succeeds() {
        let mut set = replica_set(1);
        let failure = |message: &str| Failure { reason: "FailedCreate", message: message.into() };
        let first = status(&set, &[], Some(failure("quota")), Timestamp::UNIX_EPOCH);
        set.status = Some(first.clone());
        let second = status(&set, &[], Some(failure("another")), Timestamp::UNIX_EPOCH);
        assert_eq!(first, second);
        assert_eq!(status(&set, &[], None, Timestamp::UNIX_EPOCH).conditions, None);
    }
}
