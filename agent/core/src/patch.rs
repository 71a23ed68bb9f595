//! The smallest strategic-merge patch from the API's pod status to ours. Pure.
//!
//! Never touches conditions, or whole fields, that the kubelet does not own; carries the uid, so that the API refuses
//! to apply it to a successor of the same name.

use k8s_openapi::api::core::v1::{PodCondition, PodStatus};
use serde_json::{Map, Value, json};

use crate::status::conditions::{OWNED, PASSING};

/// Fields of the status that the kubelet owns and replaces whole. `podIPs` and `hostIPs` merge by key and are
/// handled apart.
const FIELDS: [&str; 11] = [
    "phase",
    "reason",
    "message",
    "hostIP",
    "podIP",
    "startTime",
    "qosClass",
    "observedGeneration",
    "containerStatuses",
    "initContainerStatuses",
    "ephemeralContainerStatuses",
];
/// Lists merged by `ip`.
const ADDRESS_FIELDS: [&str; 2] = ["podIPs", "hostIPs"];

/// The patch body for `pods/<name>/status`, `None` when the API already says the same.
pub fn status_patch(uid: &str, api: &PodStatus, ours: &PodStatus) -> Option<Value> {
    let (api_fields, our_fields) = (as_object(api), as_object(ours));
    let mut status = Map::new();
    for field in FIELDS {
        let (theirs, wanted) = (api_fields.get(field), our_fields.get(field));
        if theirs != wanted {
            status.insert(field.to_owned(), wanted.cloned().unwrap_or(Value::Null));
        }
    }
    for field in ADDRESS_FIELDS {
        if api_fields.get(field) != our_fields.get(field) {
            status.insert(field.to_owned(), addresses(api_fields.get(field), our_fields.get(field)));
        }
    }
    let mut conditions = changed_conditions(api, ours);
    conditions.extend(passed_conditions(api, ours));
    if !conditions.is_empty() {
        status.insert("conditions".to_owned(), Value::Array(conditions));
    }
    (!status.is_empty()).then(|| json!({ "metadata": { "uid": uid }, "status": status }))
}

fn as_object(status: &PodStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(fields)) => fields,
        // A PodStatus is a plain struct: it serializes to an object.
        _ => Map::new(),
    }
}

/// Adds ours and deletes, by merge key, those that only the API has.
fn addresses(theirs: Option<&Value>, wanted: Option<&Value>) -> Value {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let mut merged = list(wanted);
    let surplus: Vec<Value> = list(theirs)
        .into_iter()
        .filter(|address| !merged.contains(address))
        .map(|address| json!({ "$patch": "delete", "ip": address.get("ip") }))
        .collect();
    merged.extend(surplus);
    Value::Array(merged)
}

/// Owned conditions that differ; fields that became empty are nulled, because the merge keeps absent ones.
fn changed_conditions(api: &PodStatus, ours: &PodStatus) -> Vec<Value> {
    ours.conditions
        .iter()
        .flatten()
        .filter(|condition| OWNED.contains(&condition.type_.as_str()))
        .filter_map(|condition| {
            let known = api.conditions.iter().flatten().find(|known| known.type_ == condition.type_);
            if known.is_some_and(|known| says_the_same(known, condition)) {
                return None;
            }
            let Ok(Value::Object(mut fields)) = serde_json::to_value(condition) else { return None };
            if known.is_some() {
                for field in ["reason", "message"] {
                    fields.entry(field).or_insert(Value::Null);
                }
            }
            Some(Value::Object(fields))
        })
        .collect()
}

/// Conditions of ours that hold no longer.
fn passed_conditions(api: &PodStatus, ours: &PodStatus) -> Vec<Value> {
    let is_told = |kind: &str| ours.conditions.iter().flatten().any(|condition| condition.type_ == kind);
    let known = api.conditions.iter().flatten().map(|condition| condition.type_.as_str());
    known
        .filter(|kind| PASSING.contains(kind) && !is_told(kind))
        .map(|kind| json!({ "$patch": "delete", "type": kind }))
        .collect()
}

/// Times do not count while the status is the same: the scheduler wrote PodScheduled with its own.
fn says_the_same(known: &PodCondition, ours: &PodCondition) -> bool {
    known.status == ours.status
        && known.reason == ours.reason
        && known.message == ours.message
        // PodScheduled is the scheduler's first; its generation is not worth a write of its own.
        && (ours.type_ == "PodScheduled" || known.observed_generation == ours.observed_generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(value: Value) -> PodStatus {
        serde_json::from_value(value).expect("a pod status")
    }

    #[test]
    fn no_difference_no_patch() {
        let api = status(json!({"phase": "Running", "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
            {"type": "example.com/mine", "status": "False"}]}));
        let ours = status(json!({"phase": "Running", "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}));
        assert_eq!(status_patch("u", &api, &ours), None);
    }

    #[test]
    fn a_condition_that_has_passed_is_deleted() {
        let api = status(json!({"conditions": [{"type": "PodResizeInProgress", "status": "True"},
            {"type": "example.com/mine", "status": "False"}]}));
        let patch = status_patch("u", &api, &status(json!({}))).expect("differs");
        assert_eq!(
            patch["status"]["conditions"],
            json!([{"$patch": "delete", "type": "PodResizeInProgress"}])
        );
    }

    #[test]
    fn only_the_difference_is_sent_and_emptied_fields_are_nulled() {
        let api = status(json!({"phase": "Pending", "podIP": "10.0.0.9", "podIPs": [{"ip": "10.0.0.9"}],
            "hostIP": "192.168.0.1", "conditions": [
            {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "m"}]}));
        let ours = status(json!({"phase": "Running", "podIP": "10.0.0.10", "podIPs": [{"ip": "10.0.0.10"}],
            "hostIP": "192.168.0.1", "conditions": [{"type": "Ready", "status": "True"}]}));
        let patch = status_patch("u", &api, &ours).expect("differs");
        assert_eq!(
            patch,
            json!({"metadata": {"uid": "u"}, "status": {
                "phase": "Running", "podIP": "10.0.0.10",
                "podIPs": [{"ip": "10.0.0.10"}, {"$patch": "delete", "ip": "10.0.0.9"}],
                "conditions": [{"type": "Ready", "status": "True", "reason": null, "message": null}]}})
        );
    }
}
