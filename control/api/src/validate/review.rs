//! Small kinds: leases, events, bindings, reviews.

use serde_json::Value;

use super::{Errors, path::Path};
use crate::value::{int, text};

/// Checks a Lease.
pub(super) fn lease(errors: &mut Errors, object: &Value) {
    let at = Path::new("spec");
    if let Some(seconds) = int(object, "/spec/leaseDurationSeconds").filter(|s| *s <= 0) {
        errors.invalid(&at.child("leaseDurationSeconds"), seconds, "must be greater than 0");
    }
    errors.at_least_zero(&at.child("leaseTransitions"), int(object, "/spec/leaseTransitions"));
}

/// Checks an Event: it lives where the object is that it is about, cluster-wide ones in `default`.
pub(super) fn event(errors: &mut Errors, object: &Value) {
    let (namespace, about) = (text(object, "/metadata/namespace"), text(object, "/involvedObject/namespace"));
    let fits = if about.is_empty() {
        matches!(namespace, "default" | "kube-system" | "")
    } else {
        namespace == about
    };
    if !fits {
        let at = Path::new("involvedObject");
        errors.invalid(&at.child("namespace"), about, "does not match event.namespace");
    }
}

/// Checks a Binding.
pub(super) fn binding(errors: &mut Errors, object: &Value) {
    let at = Path::new("target");
    errors.one_of(&at.child("kind"), text(object, "/target/kind"), &["Node"]);
    if text(object, "/target/name").is_empty() {
        errors.required(&at.child("name"));
    }
}

/// Checks a TokenReview.
pub(super) fn token_review(errors: &mut Errors, object: &Value) {
    if text(object, "/spec/token").is_empty() {
        errors.required(&Path::new("spec").child("token"));
    }
}

/// Checks the access reviews.
pub(super) fn access_review(errors: &mut Errors, object: &Value) {
    let has = |key: &str| object["spec"].get(key).is_some_and(Value::is_object);
    let at = Path::new("spec");
    if has("resourceAttributes") == has("nonResourceAttributes") {
        let why = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
        errors.invalid(&at.child("resourceAttributes"), Value::Null, why);
    }
    let asks_for_itself = object["kind"] == "SelfSubjectAccessReview";
    let nobody = text(object, "/spec/user").is_empty()
        && object.pointer("/spec/groups").and_then(Value::as_array).is_none_or(Vec::is_empty);
    if !asks_for_itself && nobody {
        errors.invalid(&at.child("user"), "", "at least one of user or group must be specified");
    }
}
