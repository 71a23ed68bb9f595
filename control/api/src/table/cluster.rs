//! Certificate requests, classes of pods, and devices that are claimed.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Column, NAME, age, human_duration, name, number_column, or_none, text_column};
use crate::value::{flag, int, list, text};

/// kubectl's columns of a CertificateSigningRequest.
pub(super) const CERTIFICATE_REQUEST: &[Column] = &[
    NAME,
    AGE,
    text_column("SignerName", "Who is to sign it."),
    text_column("Requestor", "Who asked."),
    text_column("RequestedDuration", "How long the certificate is to be valid."),
    text_column("Condition", "What became of it."),
];

/// kubectl's columns of a RuntimeClass.
pub(super) const RUNTIME_CLASS: &[Column] =
    &[NAME, text_column("Handler", "The runtime's name for it."), AGE];

/// kubectl's columns of a PriorityClass.
pub(super) const PRIORITY_CLASS: &[Column] = &[
    NAME,
    number_column("Value", "Priority of its pods."),
    Column {
        kind: "boolean",
        ..text_column("Global-Default", "Whether pods that name no class are of this one.")
    },
    AGE,
    text_column("PreemptionPolicy", "Whether its pods push others out."),
];

/// kubectl's columns of a DeviceClass and of a ResourceClaimTemplate.
pub(super) const NAME_AND_AGE: &[Column] = &[NAME, AGE];

/// kubectl's columns of a ResourceClaim.
pub(super) const RESOURCE_CLAIM: &[Column] =
    &[NAME, text_column("State", "Whether it has its devices, and whether a pod uses them."), AGE];

/// kubectl's columns of a ResourceSlice.
pub(super) const RESOURCE_SLICE: &[Column] = &[
    NAME,
    text_column("Node", "The node that has the devices."),
    text_column("Driver", "Driver of the devices."),
    text_column("Pool", "Pool that the slice is part of."),
    AGE,
];

/// A CertificateSigningRequest's cells.
pub(super) fn certificate_request(object: &Value, now: Timestamp) -> Vec<Value> {
    let duration = match int(object, "/spec/expirationSeconds") {
        None => "<none>".to_owned(),
        Some(seconds) => human_duration(seconds),
    };
    vec![
        name(object),
        age(object, now),
        or_none(text(object, "/spec/signerName")),
        text(object, "/spec/username").into(),
        duration.into(),
        request_state(object).into(),
    ]
}

fn request_state(object: &Value) -> String {
    let has = |kind: &str| list(object, "/status/conditions").iter().any(|found| found["type"] == kind);
    let mut state = match (has("Denied"), has("Approved")) {
        (true, _) => "Denied",
        (false, true) => "Approved",
        (false, false) => "Pending",
    }
    .to_owned();
    if has("Failed") {
        state.push_str(",Failed");
    }
    if !text(object, "/status/certificate").is_empty() {
        state.push_str(",Issued");
    }
    state
}

/// A RuntimeClass' cells.
pub(super) fn runtime_class(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), text(object, "/handler").into(), age(object, now)]
}

/// A PriorityClass' cells.
pub(super) fn priority_class(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        name(object),
        int(object, "/value").unwrap_or(0).into(),
        flag(object, "/globalDefault").into(),
        age(object, now),
        text(object, "/preemptionPolicy").into(),
    ]
}

/// A name and an age.
pub(super) fn name_and_age(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), age(object, now)]
}

/// A ResourceClaim's cells.
pub(super) fn resource_claim(object: &Value, now: Timestamp) -> Vec<Value> {
    let deleted = !text(object, "/metadata/deletionTimestamp").is_empty();
    let allocated = object.pointer("/status/allocation").is_some_and(Value::is_object);
    let reserved = allocated && !list(object, "/status/reservedFor").is_empty();
    let states = [
        ("deleted", deleted),
        ("pending", !allocated && !deleted),
        ("allocated", allocated),
        ("reserved", reserved),
    ];
    let shown: Vec<&str> = states.into_iter().filter(|(_, holds)| *holds).map(|(state, _)| state).collect();
    vec![name(object), shown.join(",").into(), age(object, now)]
}

/// A ResourceSlice's cells.
pub(super) fn resource_slice(object: &Value, now: Timestamp) -> Vec<Value> {
    let node = match text(object, "/spec/nodeName") {
        "" => "<unset>",
        node => node,
    };
    vec![
        name(object),
        node.into(),
        text(object, "/spec/driver").into(),
        text(object, "/spec/pool/name").into(),
        age(object, now),
    ]
}
