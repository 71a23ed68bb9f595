//! Deployments and ReplicaSets.

use serde_json::{Value, json};

use super::{Errors, metadata, path::Path, pod};
use crate::{
    selector::LabelSelector,
    status::FieldError,
    value::{int, list, map, text},
};

/// Checks a Deployment.
pub(super) fn deployment(errors: &mut Errors, object: &Value) {
    let at = Path::new("spec");
    let Some(spec) = object.get("spec").filter(|s| s.is_object()) else {
        errors.required(&at);
        return;
    };
    common(errors, &at, spec);
    strategy(errors, &at.child("strategy"), spec);
    errors.at_least_zero(&at.child("revisionHistoryLimit"), int(spec, "/revisionHistoryLimit"));
    if let Some(deadline) = int(spec, "/progressDeadlineSeconds") {
        let at = at.child("progressDeadlineSeconds");
        errors.at_least_zero(&at, Some(deadline));
        if deadline <= int(spec, "/minReadySeconds").unwrap_or(0) {
            errors.invalid(&at, deadline, "must be greater than minReadySeconds");
        }
    }
}

/// Checks a ReplicaSet.
pub(super) fn replica_set(errors: &mut Errors, object: &Value) {
    let at = Path::new("spec");
    match object.get("spec").filter(|s| s.is_object()) {
        Some(spec) => common(errors, &at, spec),
        None => errors.required(&at),
    }
}

/// What may not change.
pub(super) fn update(errors: &mut Errors, new: &Value, old: &Value) {
    let pointer = "/spec/selector";
    errors.immutable(&Path::new("spec").child("selector"), new.pointer(pointer), old.pointer(pointer));
}

/// Checks a status write.
pub(super) fn status(errors: &mut Errors, object: &Value) {
    let at = Path::new("status");
    for key in [
        "observedGeneration",
        "replicas",
        "updatedReplicas",
        "readyReplicas",
        "availableReplicas",
        "unavailableReplicas",
    ] {
        errors.at_least_zero(&at.child(key), int(object, &format!("/status/{key}")));
    }
    let replicas = int(object, "/status/replicas").unwrap_or(0);
    for key in ["readyReplicas", "availableReplicas"] {
        let found = int(object, &format!("/status/{key}")).unwrap_or(0);
        if found > replicas {
            errors.invalid(&at.child(key), found, "cannot be greater than status.replicas");
        }
    }
}

fn common(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    errors.at_least_zero(&at.child("replicas"), int(spec, "/replicas"));
    errors.at_least_zero(&at.child("minReadySeconds"), int(spec, "/minReadySeconds"));
    let selector = selector(errors, &at.child("selector"), spec);
    template(errors, &at.child("template"), spec, selector.as_ref());
}

fn selector(errors: &mut Errors, at: &Path<'_>, spec: &Value) -> Option<LabelSelector> {
    let Some(found) = spec.get("selector").filter(|s| s.is_object()) else {
        errors.required(at);
        return None;
    };
    metadata::labels(errors, &at.child("matchLabels"), map(found, "/matchLabels"));
    let expressions = at.child("matchExpressions");
    for (index, expression) in list(found, "/matchExpressions").iter().enumerate() {
        let at = expressions.index(index);
        let values = list(expression, "/values").len();
        match text(expression, "/operator") {
            "In" | "NotIn" if values == 0 => {
                let why = "must be specified when `operator` is 'In' or 'NotIn'";
                errors.push(FieldError::required(&at.child("values"), why));
            }
            "Exists" | "DoesNotExist" if values > 0 => {
                let why = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                errors.forbidden(&at.child("values"), why);
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.invalid(&at.child("operator"), other, "not a valid selector operator"),
        }
    }
    let parsed = LabelSelector::from_json(found).ok()?;
    if parsed.is_empty() {
        errors.invalid(at, found.clone(), "empty selector is invalid for deployment");
        return None;
    }
    Some(parsed)
}

fn template(errors: &mut Errors, at: &Path<'_>, spec: &Value, selector: Option<&LabelSelector>) {
    let Some(found) = spec.get("template").filter(|t| t.is_object()) else {
        errors.required(at);
        return;
    };
    let labels_at = at.child("metadata");
    let labels_at = labels_at.child("labels");
    let labels = map(found, "/metadata/labels");
    if selector.is_some_and(|s| !s.matches_labels(labels)) {
        let shown = labels.map_or_else(|| json!({}), |l| Value::Object(l.clone()));
        errors.invalid(&labels_at, shown, "`selector` does not match template `labels`");
    }
    metadata::labels(errors, &labels_at, labels);
    let at = at.child("spec");
    let Some(pod_spec) = found.get("spec").filter(|s| s.is_object()) else {
        errors.required(&at.child("containers"));
        return;
    };
    pod::spec(errors, &at, pod_spec);
    errors.one_of(&at.child("restartPolicy"), text(pod_spec, "/restartPolicy"), &["Always"]);
    if int(pod_spec, "/activeDeadlineSeconds").is_some() {
        errors.forbidden(
            &at.child("activeDeadlineSeconds"),
            "activeDeadlineSeconds in ReplicaSet is not Supported",
        );
    }
}

fn strategy(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    let rolling = spec.pointer("/strategy/rollingUpdate").filter(|r| !r.is_null());
    match (text(spec, "/strategy/type"), rolling) {
        ("Recreate", Some(_)) => {
            let why = "may not be specified when strategy `type` is 'Recreate'";
            errors.forbidden(&at.child("rollingUpdate"), why);
        }
        ("RollingUpdate", Some(rolling)) => rolling_update(errors, &at.child("rollingUpdate"), rolling),
        ("RollingUpdate", None) => {
            let why = "this should be defaulted and never be nil";
            errors.push(FieldError::required(&at.child("rollingUpdate"), why));
        }
        (other, _) => errors.one_of(&at.child("type"), other, &["Recreate", "RollingUpdate"]),
    }
}

fn rolling_update(errors: &mut Errors, at: &Path<'_>, rolling: &Value) {
    for key in ["maxUnavailable", "maxSurge"] {
        match rolling.get(key) {
            Some(Value::String(share)) if percent(share).is_none() => {
                let why = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or \
                           '93%', regex used for validation is '[0-9]+%')";
                errors.invalid(&at.child(key), share.as_str(), why);
            }
            other => errors.at_least_zero(&at.child(key), other.and_then(Value::as_i64)),
        }
    }
    let zero = |key: &str| match rolling.get(key) {
        Some(Value::String(share)) => percent(share) == Some(0),
        Some(Value::Number(number)) => number.as_i64() == Some(0),
        _ => false,
    };
    let unavailable = rolling.get("maxUnavailable").cloned().unwrap_or_default();
    if zero("maxUnavailable") && zero("maxSurge") {
        errors.invalid(&at.child("maxUnavailable"), unavailable, "may not be 0 when `maxSurge` is 0");
    } else if unavailable.as_str().and_then(percent).is_some_and(|p| p > 100) {
        errors.invalid(&at.child("maxUnavailable"), unavailable, "must not be greater than 100%");
    }
}

fn percent(share: &str) -> Option<u32> {
    let digits = share.strip_suffix('%')?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(digits.parse().unwrap_or(u32::MAX))
}
