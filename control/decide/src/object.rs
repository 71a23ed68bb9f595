//! Questions that several controllers ask of pods, nodes and metadata.
//!
//! Input: Kubernetes objects. Output: booleans, references and copies. Never changes an object and never
//! looks at anything but its arguments.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::core::v1::{Node, Pod, PodCondition, Taint, Toleration},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};

/// Labels or annotations as Kubernetes objects hold them.
pub type StringMap = BTreeMap<String, String>;

/// The owner that manages the object (`controller: true`), if any.
pub fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// True when the object's managing owner has this uid.
pub fn is_controlled_by(meta: &ObjectMeta, uid: &str) -> bool {
    controller_of(meta).is_some_and(|owner| owner.uid == uid)
}

/// The name, or an empty string for an object that has none yet.
pub fn name(meta: &ObjectMeta) -> &str {
    meta.name.as_deref().unwrap_or_default()
}

/// The namespace, or an empty string for a cluster-scoped object.
pub fn namespace(meta: &ObjectMeta) -> &str {
    meta.namespace.as_deref().unwrap_or_default()
}

/// The uid, or an empty string for an object that has none yet.
pub fn uid(meta: &ObjectMeta) -> &str {
    meta.uid.as_deref().unwrap_or_default()
}

/// When the object was created; the epoch when unknown.
pub fn created(meta: &ObjectMeta) -> Timestamp {
    meta.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0)
}

/// True once deletion of the object was asked for.
pub fn is_being_deleted(meta: &ObjectMeta) -> bool {
    meta.deletion_timestamp.is_some()
}

/// The value of an annotation.
pub fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

/// True when the object carries the finalizer.
pub fn has_finalizer(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|held| held == finalizer)
}

/// The pod's phase; an empty string before the API server has defaulted it.
pub fn pod_phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// The node the pod is bound to.
pub fn pod_node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|node| !node.is_empty())
}

/// True when all containers of the pod have ended for good.
pub fn is_pod_terminal(pod: &Pod) -> bool {
    matches!(pod_phase(pod), "Succeeded" | "Failed")
}

/// True when the pod counts towards its owner's replicas: neither ended nor being deleted.
pub fn is_pod_active(pod: &Pod) -> bool {
    !is_pod_terminal(pod) && !is_being_deleted(&pod.metadata)
}

/// A condition of the pod's status.
pub fn pod_condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.iter().flatten().find(|condition| condition.type_ == kind)
}

/// True when the pod's Ready condition is True.
pub fn is_pod_ready(pod: &Pod) -> bool {
    pod_condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

/// Since when the pod is ready; `None` when it is not ready.
pub fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let condition = pod_condition(pod, "Ready").filter(|condition| condition.status == "True")?;
    Some(condition.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0))
}

/// True when the pod has been ready for `min_ready_seconds`.
pub fn is_pod_available(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> bool {
    ready_since(pod).is_some_and(|since| {
        min_ready_seconds <= 0
            || now.duration_since(since) >= SignedDuration::from_secs(i64::from(min_ready_seconds))
    })
}

/// A condition status of the node ("True", "False", "Unknown"), if it reports that condition.
pub fn node_condition<'a>(node: &'a Node, kind: &str) -> Option<&'a str> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == kind).map(|condition| condition.status.as_str())
}

/// The node's taints.
pub fn node_taints(node: &Node) -> &[Taint] {
    node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default()
}

/// True when the toleration covers the taint (key, value and effect).
///
/// <https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/>
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    if !effect.is_empty() && effect != taint.effect || !key.is_empty() && key != taint.key {
        return false;
    }
    let toleration_value = toleration.value.as_deref().unwrap_or_default();
    let taint_value = taint.value.as_deref().unwrap_or_default();
    match toleration.operator.as_deref().unwrap_or_default() {
        "" | "Equal" => !key.is_empty() && toleration_value == taint_value,
        "Exists" => true,
        "Lt" => compares(taint_value, toleration_value, |taint, bound| taint < bound),
        "Gt" => compares(taint_value, toleration_value, |taint, bound| taint > bound),
        _ => false,
    }
}

fn compares(taint: &str, bound: &str, holds: fn(i64, i64) -> bool) -> bool {
    matches!((taint.parse(), bound.parse()), (Ok(taint), Ok(bound)) if holds(taint, bound))
}

/// The pod's tolerations.
pub fn pod_tolerations(pod: &Pod) -> &[Toleration] {
    pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default()
}

/// Kubernetes objects count replicas in `i32`; a length never exceeds it in practice and saturates if so.
pub fn count(length: usize) -> i32 {
    i32::try_from(length).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taint(key: &str, value: &str, effect: &str) -> Taint {
        Taint { key: key.into(), value: Some(value.into()), effect: effect.into(), time_added: None }
    }

    fn toleration(key: &str, operator: &str, value: &str, effect: &str) -> Toleration {
        Toleration {
            key: Some(key.into()),
            operator: Some(operator.into()),
            value: Some(value.into()),
            effect: Some(effect.into()),
            toleration_seconds: None,
        }
    }

    #[test]
    fn tolerations_follow_the_documented_table() {
        let dedicated = taint("dedicated", "gpu", "NoSchedule");
        for (description, toleration, expected) in [
            ("equal", toleration("dedicated", "Equal", "gpu", "NoSchedule"), true),
            ("default operator", toleration("dedicated", "", "gpu", "NoSchedule"), true),
            ("other value", toleration("dedicated", "Equal", "cpu", "NoSchedule"), false),
            ("other effect", toleration("dedicated", "Equal", "gpu", "NoExecute"), false),
            ("every effect", toleration("dedicated", "Equal", "gpu", ""), true),
            ("exists ignores the value", toleration("dedicated", "Exists", "", "NoSchedule"), true),
            ("exists without key covers all", toleration("", "Exists", "", ""), true),
            ("equal without key covers nothing", toleration("", "Equal", "gpu", ""), false),
        ] {
            assert_eq!(tolerates(&toleration, &dedicated), expected, "{description}");
        }
    }
}
