//! Deployments and ReplicaSets.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Column, NAME, age, name, number_column, text_column, wide};
use crate::{
    selector::LabelSelector,
    value::{int, list, text},
};

const CONTAINERS: Column = wide("Containers", "Names of the containers.");
const IMAGES: Column = wide("Images", "Images of the containers.");
const SELECTOR: Column = wide("Selector", "Labels of the pods it owns.");

/// kubectl's columns of a Deployment.
pub(super) const DEPLOYMENT: &[Column] = &[
    NAME,
    text_column("Ready", "Pods that are ready, of those wanted."),
    number_column("Up-to-date", "Pods made from the newest template."),
    number_column("Available", "Pods that have been ready for long enough."),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

/// kubectl's columns of a ReplicaSet.
pub(super) const REPLICA_SET: &[Column] = &[
    NAME,
    number_column("Desired", "Pods wanted."),
    number_column("Current", "Pods there are."),
    number_column("Ready", "Pods that are ready."),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

/// A Deployment's cells.
pub(super) fn deployment(object: &Value, now: Timestamp) -> Vec<Value> {
    let count = |pointer: &str| int(object, pointer).unwrap_or(0);
    let mut cells = vec![
        name(object),
        format!("{}/{}", count("/status/readyReplicas"), count("/spec/replicas")).into(),
        count("/status/updatedReplicas").into(),
        count("/status/availableReplicas").into(),
        age(object, now),
    ];
    cells.extend(wide_cells(object));
    cells
}

/// A ReplicaSet's cells.
pub(super) fn replica_set(object: &Value, now: Timestamp) -> Vec<Value> {
    let count = |pointer: &str| Value::from(int(object, pointer).unwrap_or(0));
    let mut cells = vec![
        name(object),
        count("/spec/replicas"),
        count("/status/replicas"),
        count("/status/readyReplicas"),
        age(object, now),
    ];
    cells.extend(wide_cells(object));
    cells
}

fn wide_cells(object: &Value) -> [Value; 3] {
    let containers = list(object, "/spec/template/spec/containers");
    let join = |pointer: &str| containers.iter().map(|c| text(c, pointer)).collect::<Vec<_>>().join(",");
    let selector = object.pointer("/spec/selector").and_then(|s| LabelSelector::from_json(s).ok());
    let shown = selector.map(|s| s.to_string()).filter(|s| !s.is_empty());
    [join("/name").into(), join("/image").into(), shown.unwrap_or_else(|| "<none>".to_owned()).into()]
}
