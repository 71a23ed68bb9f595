//! Volumes, claims, storage classes and drivers.

use serde_json::{Value, json};

use crate::value::set_default;

/// A PersistentVolume.
pub(super) fn volume(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").filter(|spec| spec.is_object()) else { return };
    set_default(spec, "persistentVolumeReclaimPolicy", "Retain");
    set_default(spec, "volumeMode", "Filesystem");
    if let Some(path) = spec.get_mut("hostPath").and_then(Value::as_object_mut) {
        path.entry("type").or_insert_with(|| json!(""));
    }
    if let Some(target) = spec.get_mut("iscsi").filter(|target| target.is_object()) {
        set_default(target, "iscsiInterface", "default");
    }
}

/// A PersistentVolumeClaim.
pub(super) fn claim(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").filter(|spec| spec.is_object()) else { return };
    set_default(spec, "volumeMode", "Filesystem");
}

/// A StorageClass.
pub(super) fn class(object: &mut Value) {
    set_default(object, "reclaimPolicy", "Delete");
    set_default(object, "volumeBindingMode", "Immediate");
}

/// A CSIDriver.
pub(super) fn driver(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").filter(|spec| spec.is_object()) else { return };
    set_default(spec, "attachRequired", true);
    set_default(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
    for field in ["podInfoOnMount", "storageCapacity", "requiresRepublish", "seLinuxMount"] {
        set_default(spec, field, false);
    }
    let unset = spec.get("volumeLifecycleModes").and_then(Value::as_array).is_none_or(Vec::is_empty);
    if unset && let Some(spec) = spec.as_object_mut() {
        spec.insert("volumeLifecycleModes".to_owned(), json!(["Persistent"]));
    }
}
