//! Volumes, claims, and what storage drivers register.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Column, NAME, age, name, number_column, text_column, wide};
use crate::value::{flag, list, text};

/// kubectl's columns of a PersistentVolume.
pub(super) const VOLUME: &[Column] = &[
    NAME,
    text_column("Capacity", "Size of the volume."),
    text_column("Access Modes", "How it may be mounted."),
    text_column("Reclaim Policy", "What becomes of it when its claim is gone."),
    text_column("Status", "Whether a claim has it."),
    text_column("Claim", "The claim that has it."),
    text_column("StorageClass", "Class it belongs to."),
    text_column("VolumeAttributesClass", "Class of its mutable attributes."),
    text_column("Reason", "Why it is in this state."),
    AGE,
    wide("VolumeMode", "Block device or file system."),
];

/// kubectl's columns of a PersistentVolumeClaim.
pub(super) const CLAIM: &[Column] = &[
    NAME,
    text_column("Status", "Whether it has a volume."),
    text_column("Volume", "Its volume."),
    text_column("Capacity", "Size of the volume."),
    text_column("Access Modes", "How the volume may be mounted."),
    text_column("StorageClass", "Class it asks for."),
    text_column("VolumeAttributesClass", "Class of mutable attributes that it asks for."),
    AGE,
    wide("VolumeMode", "Block device or file system."),
];

/// kubectl's columns of a StorageClass.
pub(super) const CLASS: &[Column] = &[
    NAME,
    text_column("Provisioner", "Who makes its volumes."),
    text_column("ReclaimPolicy", "What becomes of a volume when its claim is gone."),
    text_column("VolumeBindingMode", "When a claim gets its volume."),
    Column { kind: "boolean", ..text_column("AllowVolumeExpansion", "Whether volumes can grow.") },
    AGE,
];

/// kubectl's columns of a CSIDriver.
pub(super) const DRIVER: &[Column] = &[
    NAME,
    Column {
        kind: "boolean",
        ..text_column("AttachRequired", "Whether volumes are attached to nodes first.")
    },
    Column { kind: "boolean", ..text_column("PodInfoOnMount", "Whether the driver is told of the pod.") },
    Column {
        kind: "boolean",
        ..text_column("StorageCapacity", "Whether it publishes how much it has left.")
    },
    text_column("TokenRequests", "Audiences of the tokens it is given."),
    Column {
        kind: "boolean",
        ..text_column("RequiresRepublish", "Whether volumes are published again and again.")
    },
    text_column("Modes", "Kinds of volumes it serves."),
    AGE,
];

/// kubectl's columns of a CSINode.
pub(super) const CSI_NODE: &[Column] =
    &[NAME, number_column("Drivers", "Drivers registered on the node."), AGE];

/// kubectl's columns of a CSIStorageCapacity.
pub(super) const CAPACITY: &[Column] =
    &[NAME, text_column("StorageClassName", "Class it is about."), text_column("Capacity", "What is left.")];

/// kubectl's columns of a VolumeAttachment.
pub(super) const ATTACHMENT: &[Column] = &[
    NAME,
    text_column("Attacher", "Driver that attaches it."),
    text_column("PV", "The volume."),
    text_column("Node", "The node."),
    Column { kind: "boolean", ..text_column("Attached", "Whether it is attached.") },
    AGE,
];

/// kubectl's columns of a VolumeAttributesClass.
pub(super) const ATTRIBUTES_CLASS: &[Column] =
    &[NAME, text_column("DriverName", "Driver that knows the attributes."), AGE];

/// A PersistentVolume's cells.
pub(super) fn volume(object: &Value, now: Timestamp) -> Vec<Value> {
    let claim = match (text(object, "/spec/claimRef/namespace"), text(object, "/spec/claimRef/name")) {
        ("", "") => String::new(),
        (namespace, claim) => format!("{namespace}/{claim}"),
    };
    vec![
        name(object),
        text(object, "/spec/capacity/storage").into(),
        modes(object, "/spec/accessModes").into(),
        text(object, "/spec/persistentVolumeReclaimPolicy").into(),
        phase(object).into(),
        claim.into(),
        class(object).into(),
        or_unset(text(object, "/spec/volumeAttributesClassName")),
        text(object, "/status/reason").into(),
        age(object, now),
        or_unset(text(object, "/spec/volumeMode")),
    ]
}

/// A PersistentVolumeClaim's cells. Size and modes are the volume's, so that a claim without one has none.
pub(super) fn claim(object: &Value, now: Timestamp) -> Vec<Value> {
    let volume = text(object, "/spec/volumeName");
    let (capacity, access) = if volume.is_empty() {
        ("", String::new())
    } else {
        (text(object, "/status/capacity/storage"), modes(object, "/status/accessModes"))
    };
    vec![
        name(object),
        phase(object).into(),
        volume.into(),
        capacity.into(),
        access.into(),
        class(object).into(),
        or_unset(text(object, "/spec/volumeAttributesClassName")),
        age(object, now),
        or_unset(text(object, "/spec/volumeMode")),
    ]
}

/// A StorageClass' cells.
pub(super) fn storage_class(object: &Value, now: Timestamp) -> Vec<Value> {
    const DEFAULT: &str = "/metadata/annotations/storageclass.kubernetes.io~1is-default-class";
    let mut shown = text(object, "/metadata/name").to_owned();
    if text(object, DEFAULT) == "true" {
        shown.push_str(" (default)");
    }
    let or = |pointer: &str, default: &str| match text(object, pointer) {
        "" => Value::from(default),
        found => Value::from(found),
    };
    vec![
        shown.into(),
        text(object, "/provisioner").into(),
        or("/reclaimPolicy", "Delete"),
        or("/volumeBindingMode", "Immediate"),
        flag(object, "/allowVolumeExpansion").into(),
        age(object, now),
    ]
}

/// A CSIDriver's cells.
pub(super) fn csi_driver(object: &Value, now: Timestamp) -> Vec<Value> {
    let attaches = object.pointer("/spec/attachRequired").and_then(Value::as_bool).unwrap_or(true);
    let audiences = if object.pointer("/spec/tokenRequests").is_some() {
        let requests = list(object, "/spec/tokenRequests").iter();
        requests.map(|request| text(request, "/audience")).collect::<Vec<_>>().join(",")
    } else {
        "<unset>".to_owned()
    };
    let modes: Vec<&str> =
        list(object, "/spec/volumeLifecycleModes").iter().filter_map(Value::as_str).collect();
    vec![
        name(object),
        attaches.into(),
        flag(object, "/spec/podInfoOnMount").into(),
        flag(object, "/spec/storageCapacity").into(),
        audiences.into(),
        flag(object, "/spec/requiresRepublish").into(),
        if modes.is_empty() { "<none>".into() } else { modes.join(",").into() },
        age(object, now),
    ]
}

/// A CSINode's cells.
pub(super) fn csi_node(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), list(object, "/spec/drivers").len().into(), age(object, now)]
}

/// A CSIStorageCapacity's cells.
pub(super) fn capacity(object: &Value, _now: Timestamp) -> Vec<Value> {
    let capacity = match text(object, "/capacity") {
        "" => "<unset>",
        found => found,
    };
    vec![name(object), text(object, "/storageClassName").into(), capacity.into()]
}

/// A VolumeAttachment's cells.
pub(super) fn attachment(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        name(object),
        text(object, "/spec/attacher").into(),
        text(object, "/spec/source/persistentVolumeName").into(),
        text(object, "/spec/nodeName").into(),
        flag(object, "/status/attached").into(),
        age(object, now),
    ]
}

/// A VolumeAttributesClass' cells.
pub(super) fn attributes_class(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), text(object, "/driverName").into(), age(object, now)]
}

/// The phase; what is being deleted says so.
fn phase(object: &Value) -> &str {
    if text(object, "/metadata/deletionTimestamp").is_empty() {
        text(object, "/status/phase")
    } else {
        "Terminating"
    }
}

/// The class, by field or by the annotation that was before it.
fn class(object: &Value) -> &str {
    match text(object, "/metadata/annotations/volume.beta.kubernetes.io~1storage-class") {
        "" => text(object, "/spec/storageClassName"),
        class => class,
    }
}

fn or_unset(found: &str) -> Value {
    if found.is_empty() { "<unset>".into() } else { found.into() }
}

/// Access modes in kubectl's short form and order.
fn modes(object: &Value, pointer: &str) -> String {
    const SHORT: [(&str, &str); 4] = [
        ("ReadWriteOnce", "RWO"),
        ("ReadOnlyMany", "ROX"),
        ("ReadWriteMany", "RWX"),
        ("ReadWriteOncePod", "RWOP"),
    ];
    let has = |mode: &str| list(object, pointer).iter().any(|found| found == mode);
    let shown = SHORT.iter().filter(|(mode, _)| has(mode)).map(|(_, short)| *short);
    shown.collect::<Vec<_>>().join(",")
}
