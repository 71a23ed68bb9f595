//! Nodes.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Column, NAME, age, name, or_none, text_column, wide};
use crate::value::{flag, list, map, text};

/// kubectl's columns.
pub(super) const COLUMNS: &[Column] = &[
    NAME,
    text_column("Status", "Whether the node is ready and takes pods."),
    text_column("Roles", "Roles of the node, from its labels."),
    AGE,
    text_column("Version", "Version of the kubelet."),
    wide("Internal-IP", "Address within the cluster."),
    wide("External-IP", "Address outside of the cluster."),
    wide("OS-Image", "Operating system."),
    wide("Kernel-Version", "Kernel."),
    wide("Container-Runtime", "Container runtime and its version."),
];

/// A node's cells.
pub(super) fn cells(node: &Value, now: Timestamp) -> Vec<Value> {
    let or_unknown = |pointer: &str| match text(node, pointer) {
        "" => "<unknown>".into(),
        found => Value::from(found),
    };
    vec![
        name(node),
        status(node).into(),
        roles(node).into(),
        age(node, now),
        text(node, "/status/nodeInfo/kubeletVersion").into(),
        or_none(address(node, "InternalIP")),
        or_none(address(node, "ExternalIP")),
        or_unknown("/status/nodeInfo/osImage"),
        or_unknown("/status/nodeInfo/kernelVersion"),
        or_unknown("/status/nodeInfo/containerRuntimeVersion"),
    ]
}

fn status(node: &Value) -> String {
    let ready = list(node, "/status/conditions").iter().find(|c| c["type"] == "Ready");
    let mut status = match ready.map(|c| text(c, "/status")) {
        None => "Unknown",
        Some("True") => "Ready",
        Some(_) => "NotReady",
    }
    .to_owned();
    if flag(node, "/spec/unschedulable") {
        status.push_str(",SchedulingDisabled");
    }
    status
}

fn roles(node: &Value) -> String {
    let mut roles: Vec<&str> = map(node, "/metadata/labels")
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) => Some(role),
            None if key == "kubernetes.io/role" => value.as_str(),
            None => None,
        })
        .filter(|role| !role.is_empty())
        .collect();
    roles.sort_unstable();
    roles.dedup();
    if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") }
}

fn address<'a>(node: &'a Value, kind: &str) -> &'a str {
    let found = list(node, "/status/addresses").iter().find(|a| a["type"] == kind);
    found.map_or("", |a| text(a, "/address"))
}
