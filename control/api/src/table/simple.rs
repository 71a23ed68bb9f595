//! Kinds that print a line of plain fields.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Column, NAME, age, name, number_column, text_column};
use crate::value::{list, map, text};

/// kubectl's columns of a Namespace.
pub(super) const NAMESPACE: &[Column] = &[NAME, text_column("Status", "Whether it is being removed."), AGE];
/// kubectl's columns of a ConfigMap.
pub(super) const CONFIG_MAP: &[Column] = &[NAME, number_column("Data", "How many keys."), AGE];
/// kubectl's columns of a Secret.
pub(super) const SECRET: &[Column] =
    &[NAME, text_column("Type", "What it is for."), number_column("Data", "How many keys."), AGE];
/// kubectl's columns of a ServiceAccount.
pub(super) const SERVICE_ACCOUNT: &[Column] = &[NAME, number_column("Secrets", "How many secrets."), AGE];
/// kubectl's columns of a Lease.
pub(super) const LEASE: &[Column] = &[NAME, text_column("Holder", "Who holds it."), AGE];
/// Columns of any other kind.
pub(super) const ANY: &[Column] =
    &[NAME, Column { kind: "date", ..text_column("Created At", "When the object was created.") }];

/// A Namespace's cells.
pub(super) fn namespace(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), text(object, "/status/phase").into(), age(object, now)]
}

/// A ConfigMap's cells.
pub(super) fn config_map(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), (keys(object, "/data") + keys(object, "/binaryData")).into(), age(object, now)]
}

/// A Secret's cells.
pub(super) fn secret(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), text(object, "/type").into(), keys(object, "/data").into(), age(object, now)]
}

/// A ServiceAccount's cells.
pub(super) fn service_account(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), list(object, "/secrets").len().into(), age(object, now)]
}

/// A Lease's cells.
pub(super) fn lease(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), text(object, "/spec/holderIdentity").into(), age(object, now)]
}

/// Any object's cells.
pub(super) fn any(object: &Value, _now: Timestamp) -> Vec<Value> {
    vec![name(object), text(object, "/metadata/creationTimestamp").into()]
}

fn keys(object: &Value, pointer: &str) -> usize {
    map(object, pointer).map_or(0, serde_json::Map::len)
}
