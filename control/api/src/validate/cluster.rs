//! Certificate requests, classes of pods, and devices that are claimed.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use super::{Errors, names, path::Path};
use crate::{
    admit::SYSTEM_PRIORITIES,
    status::FieldError,
    value::{int, list, text},
};

/// The shortest life that a certificate may be asked for.
const LEAST_SECONDS: i64 = 600;
/// The most that a class may give; more is the system's.
const HIGHEST_USER_PRIORITY: i64 = 1_000_000_000;
const APPROVAL: [&str; 2] = ["Approved", "Denied"];

/// Checks a CertificateSigningRequest.
pub(super) fn certificate_request(errors: &mut Errors, object: &Value) {
    let spec = Path::new("spec");
    let decoded = STANDARD.decode(text(object, "/spec/request")).unwrap_or_default();
    let request = spec.child("request");
    if decoded.is_empty() {
        errors.required(&request);
    } else if !String::from_utf8_lossy(&decoded).contains("-----BEGIN CERTIFICATE REQUEST-----") {
        let why = "PEM block type must be CERTIFICATE REQUEST";
        errors.invalid(&request, text(object, "/spec/request"), why);
    }
    if list(object, "/spec/usages").is_empty() {
        errors.push(FieldError::required(&spec.child("usages"), "usages must be specified"));
    }
    signer_name(errors, &spec.child("signerName"), text(object, "/spec/signerName"));
    if let Some(seconds) = int(object, "/spec/expirationSeconds").filter(|seconds| *seconds < LEAST_SECONDS) {
        let why = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.invalid(&spec.child("expirationSeconds"), seconds, why);
    }
}

fn signer_name(errors: &mut Errors, at: &Path<'_>, name: &str) {
    if name.is_empty() {
        errors.required(at);
        return;
    }
    match name.split_once('/') {
        Some((domain, path)) if domain.contains('.') && !path.is_empty() && !path.contains('/') => {
            errors.syntax(at, name, names::subdomain_1123(domain));
        }
        _ => errors.invalid(
            at,
            name,
            "must be a fully qualified domain and path of the form 'example.com/signer-name'",
        ),
    }
}

/// Checks a new status of a CertificateSigningRequest, of `approval` and of `status`.
pub(super) fn certificate_request_status(errors: &mut Errors, new: &Value, old: &Value) {
    let status = Path::new("status");
    let conditions = status.child("conditions");
    let has =
        |object: &Value, kind: &str| list(object, "/status/conditions").iter().any(|c| c["type"] == kind);
    for (index, condition) in list(new, "/status/conditions").iter().enumerate() {
        let at = conditions.index(index);
        let kind = text(condition, "/type");
        if kind.is_empty() {
            errors.required(&at.child("type"));
        }
        match text(condition, "/status") {
            "" => errors.required(&at.child("status")),
            "True" => {}
            other if APPROVAL.contains(&kind) || kind == "Failed" => {
                errors.push(FieldError::not_supported(&at.child("status"), other, &["True"]));
            }
            other => errors.one_of(&at.child("status"), other, &["True", "False", "Unknown"]),
        }
    }
    if APPROVAL.iter().all(|kind| has(new, kind)) {
        let why = "Approved and Denied conditions are mutually exclusive";
        errors.invalid(&conditions, list(new, "/status/conditions").to_vec(), why);
    }
    for kind in APPROVAL.iter().chain(&["Failed"]).filter(|kind| has(old, kind) && !has(new, kind)) {
        errors.forbidden(&conditions, &format!("updates may not remove a condition of type {kind:?}"));
    }
    let issued = text(old, "/status/certificate");
    if !issued.is_empty() && issued != text(new, "/status/certificate") {
        let why = "updates may not set certificate content when content already set";
        errors.forbidden(&status.child("certificate"), why);
    }
}

/// Checks a RuntimeClass.
pub(super) fn runtime_class(errors: &mut Errors, object: &Value) {
    let handler = text(object, "/handler");
    errors.syntax(&Path::new("handler"), handler, names::label_1123(handler));
}

/// What may not change in a RuntimeClass.
pub(super) fn update_runtime_class(errors: &mut Errors, new: &Value, old: &Value) {
    errors.immutable(&Path::new("handler"), new.get("handler"), old.get("handler"));
}

/// Checks a PriorityClass.
pub(super) fn priority_class(errors: &mut Errors, object: &Value) {
    let (name, value) = (text(object, "/metadata/name"), int(object, "/value").unwrap_or(0));
    let is_system = SYSTEM_PRIORITIES.iter().any(|(known, priority, _)| *known == name && *priority == value);
    if !is_system {
        let metadata = Path::new("metadata");
        if name.starts_with("system-") {
            errors.forbidden(
                &metadata.child("name"),
                "priority class names with 'system-' prefix are reserved for system use only",
            );
        }
        if value > HIGHEST_USER_PRIORITY {
            let why = format!("maximum allowed value of a user defined priority is {HIGHEST_USER_PRIORITY}");
            errors.forbidden(&Path::new("value"), &why);
        }
    }
    let policy = text(object, "/preemptionPolicy");
    errors.one_of(&Path::new("preemptionPolicy"), policy, &["Never", "PreemptLowerPriority"]);
}

/// What may not change in a PriorityClass.
pub(super) fn update_priority_class(errors: &mut Errors, new: &Value, old: &Value) {
    if int(new, "/value") != int(old, "/value") {
        errors.forbidden(&Path::new("value"), "may not be changed in an update.");
    }
    errors.immutable(
        &Path::new("preemptionPolicy"),
        new.get("preemptionPolicy"),
        old.get("preemptionPolicy"),
    );
}

/// Checks the devices that a ResourceClaim asks for; `at` is its spec, in a template or not.
fn device_requests(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    let devices = at.child("devices");
    let requests = devices.child("requests");
    for (index, request) in list(spec, "/devices/requests").iter().enumerate() {
        let at = requests.index(index);
        let name = text(request, "/name");
        if name.is_empty() {
            errors.required(&at.child("name"));
        } else {
            errors.syntax(&at.child("name"), name, names::label_1123(name));
        }
        let exactly = request.get("exactly").is_some_and(Value::is_object);
        let first = !list(request, "/firstAvailable").is_empty();
        if exactly == first {
            errors
                .push(FieldError::required(&at, "exactly one of `exactly` or `firstAvailable` is required"));
        }
        if exactly && text(request, "/exactly/deviceClassName").is_empty() {
            let exactly = at.child("exactly");
            errors.required(&exactly.child("deviceClassName"));
        }
    }
}

/// Checks a ResourceClaim.
pub(super) fn resource_claim(errors: &mut Errors, object: &Value) {
    device_requests(errors, &Path::new("spec"), &object["spec"]);
}

/// Checks a ResourceClaimTemplate.
pub(super) fn resource_claim_template(errors: &mut Errors, object: &Value) {
    let spec = Path::new("spec");
    device_requests(errors, &spec.child("spec"), &object["spec"]["spec"]);
}

/// What may not change in a ResourceClaim or its template: all that is wanted.
pub(super) fn update_resource_claim(errors: &mut Errors, new: &Value, old: &Value) {
    errors.immutable(&Path::new("spec"), new.get("spec"), old.get("spec"));
}

/// Checks a ResourceSlice.
pub(super) fn resource_slice(errors: &mut Errors, object: &Value) {
    let spec = Path::new("spec");
    if text(object, "/spec/driver").is_empty() {
        errors.required(&spec.child("driver"));
    }
    if text(object, "/spec/pool/name").is_empty() {
        let pool = spec.child("pool");
        errors.required(&pool.child("name"));
    }
    let set = |field: &str| match object["spec"].get(field) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    };
    let places = ["nodeName", "nodeSelector", "allNodes", "perDeviceNodeSelection"];
    let chosen = places.into_iter().filter(|field| set(field)).count();
    let shares_counters = !list(object, "/spec/sharedCounters").is_empty();
    if chosen != 1 && !(chosen == 0 && shares_counters) {
        errors.push(FieldError::required(
            &spec,
            "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required",
        ));
    }
}

/// What may not change in a ResourceSlice.
pub(super) fn update_resource_slice(errors: &mut Errors, new: &Value, old: &Value) {
    let spec = Path::new("spec");
    for field in ["driver", "nodeName"] {
        errors.immutable(&spec.child(field), new["spec"].get(field), old["spec"].get(field));
    }
    let pool = spec.child("pool");
    errors.immutable(&pool.child("name"), new.pointer("/spec/pool/name"), old.pointer("/spec/pool/name"));
}
