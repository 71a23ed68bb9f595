//! Volumes, claims, storage classes, and what drivers register.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Errors, names, path::Path, resources};
use crate::{
    quantity::Quantity,
    status::FieldError,
    value::{list, map, text},
};

const ACCESS_MODES: &[&str] = &["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"];
const VOLUME_MODES: &[&str] = &["Block", "Filesystem"];
/// Fields of a PersistentVolume's spec that are no source.
const NO_SOURCE: &[&str] = &[
    "accessModes",
    "capacity",
    "claimRef",
    "mountOptions",
    "nodeAffinity",
    "persistentVolumeReclaimPolicy",
    "storageClassName",
    "volumeAttributesClassName",
    "volumeMode",
];

/// Checks a PersistentVolume.
pub(super) fn volume(errors: &mut Errors, object: &Value) {
    let spec = Path::new("spec");
    access_modes(errors, &spec, object);
    match object.pointer("/spec/capacity/storage").map(resources::parse) {
        None => errors.required(&spec.child("capacity")),
        Some(Some(size)) if size > Quantity::ZERO => {}
        Some(_) => {
            let capacity = spec.child("capacity");
            let shown = object.pointer("/spec/capacity/storage").cloned().unwrap_or_default();
            errors.invalid(&capacity.key("storage"), shown, "must be greater than zero");
        }
    }
    let sources = volume_sources(object);
    match sources.as_slice() {
        [] => errors.push(FieldError::required(&spec, "must specify a volume type")),
        [source] => volume_source(errors, &spec, source, object),
        [_, others @ ..] => {
            for source in others {
                errors.forbidden(&spec.child(source), "may not specify more than 1 volume type");
            }
        }
    }
    let policy = text(object, "/spec/persistentVolumeReclaimPolicy");
    let at = spec.child("persistentVolumeReclaimPolicy");
    errors.one_of(&at, policy, &["Delete", "Recycle", "Retain"]);
    errors.one_of(&spec.child("volumeMode"), text(object, "/spec/volumeMode"), VOLUME_MODES);
    class_name(errors, &spec, object);
}

fn volume_sources(object: &Value) -> Vec<&str> {
    let fields = map(object, "/spec").into_iter().flatten().filter(|(_, value)| !value.is_null());
    fields.map(|(key, _)| key.as_str()).filter(|key| !NO_SOURCE.contains(key)).collect()
}

fn volume_source(errors: &mut Errors, spec: &Path<'_>, source: &str, object: &Value) {
    let at = spec.child(source);
    let mut needs = |field: &str| {
        if text(object, &format!("/spec/{source}/{field}")).is_empty() {
            errors.required(&at.child(field));
        }
    };
    match source {
        "csi" => {
            needs("driver");
            needs("volumeHandle");
        }
        "nfs" => {
            needs("server");
            needs("path");
        }
        "iscsi" => {
            needs("targetPortal");
            needs("iqn");
        }
        "hostPath" | "local" => {
            needs("path");
            if source == "local" && object.pointer("/spec/nodeAffinity/required").is_none() {
                let affinity = spec.child("nodeAffinity");
                errors.push(FieldError::required(&affinity, "Local volume requires node affinity"));
            }
            if text(object, &format!("/spec/{source}/path")).split('/').any(|part| part == "..") {
                let path = text(object, &format!("/spec/{source}/path"));
                errors.invalid(&at.child("path"), path, "must not contain '..'");
            }
        }
        _ => {}
    }
}

/// What may not change in a PersistentVolume.
pub(super) fn update_volume(errors: &mut Errors, new: &Value, old: &Value) {
    let spec = Path::new("spec");
    let source = |object: &Value| -> Vec<(String, Value)> {
        let names = volume_sources(object);
        names.into_iter().map(|name| (name.to_owned(), object["spec"][name].clone())).collect()
    };
    if source(new) != source(old) {
        errors.forbidden(
            &spec.child("persistentvolumesource"),
            "spec.persistentvolumesource is immutable after creation",
        );
    }
    errors.immutable(
        &spec.child("volumeMode"),
        new.pointer("/spec/volumeMode"),
        old.pointer("/spec/volumeMode"),
    );
    let affinity = "/spec/nodeAffinity";
    if old.pointer(affinity).is_some() {
        errors.immutable(&spec.child("nodeAffinity"), new.pointer(affinity), old.pointer(affinity));
    }
}

/// Checks a PersistentVolumeClaim.
pub(super) fn claim(errors: &mut Errors, object: &Value) {
    let spec = Path::new("spec");
    access_modes(errors, &spec, object);
    let resources_at = spec.child("resources");
    let requests = resources_at.child("requests");
    match object.pointer("/spec/resources/requests/storage") {
        None => errors.required(&resources_at.key("storage")),
        Some(amount) => {
            if resources::parse(amount).is_none_or(|size| size <= Quantity::ZERO) {
                errors.invalid(&requests.key("storage"), amount.clone(), "must be greater than zero");
            }
        }
    }
    errors.one_of(&spec.child("volumeMode"), text(object, "/spec/volumeMode"), VOLUME_MODES);
    class_name(errors, &spec, object);
}

/// What may not change in a PersistentVolumeClaim: all but the size of a bound one, and the volume of one that has none.
pub(super) fn update_claim(errors: &mut Errors, new: &Value, old: &Value) {
    let spec = Path::new("spec");
    let bound = text(old, "/status/phase") == "Bound";
    let request = "/spec/resources/requests/storage";
    let (asked, had) =
        (new.pointer(request).and_then(resources::parse), old.pointer(request).and_then(resources::parse));
    let rest = |object: &Value, with_size: bool, with_volume: bool| {
        let mut spec = object["spec"].clone();
        if let Some(spec) = spec.as_object_mut() {
            if !with_volume {
                spec.remove("volumeName");
            }
            spec.remove("volumeAttributesClassName");
        }
        if !with_size
            && let Some(requests) = spec.pointer_mut("/resources/requests").and_then(Value::as_object_mut)
        {
            requests.remove("storage");
        }
        spec
    };
    let with_volume = !text(old, "/spec/volumeName").is_empty();
    if rest(new, !bound, with_volume) != rest(old, !bound, with_volume) {
        errors.forbidden(
            &spec,
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
        );
    } else if bound
        && asked < had
        && asked < old.pointer("/status/capacity/storage").and_then(resources::parse)
    {
        let resources_at = spec.child("resources");
        let requests = resources_at.child("requests");
        errors.forbidden(&requests.child("storage"), "field can not be less than status.capacity");
    }
}

fn access_modes(errors: &mut Errors, spec: &Path<'_>, object: &Value) {
    let at = spec.child("accessModes");
    let modes: Vec<&str> = list(object, "/spec/accessModes").iter().filter_map(Value::as_str).collect();
    if modes.is_empty() {
        errors.push(FieldError::required(&at, "at least 1 access mode is required"));
    }
    for mode in &modes {
        errors.one_of(&at, mode, ACCESS_MODES);
    }
    if modes.len() > 1 && modes.contains(&"ReadWriteOncePod") {
        errors.forbidden(&at, "may not use ReadWriteOncePod with other access modes");
    }
}

fn class_name(errors: &mut Errors, spec: &Path<'_>, object: &Value) {
    let class = text(object, "/spec/storageClassName");
    if !class.is_empty() {
        errors.syntax(&spec.child("storageClassName"), class, names::subdomain_1123(class));
    }
}

/// Checks a StorageClass.
pub(super) fn class(errors: &mut Errors, object: &Value) {
    let provisioner = text(object, "/provisioner");
    let at = Path::new("provisioner");
    if provisioner.is_empty() {
        errors.required(&at);
    } else {
        for why in names::qualified_name(&provisioner.to_lowercase()) {
            errors.invalid(&at, provisioner, why);
        }
    }
    let policy = text(object, "/reclaimPolicy");
    errors.one_of(&Path::new("reclaimPolicy"), policy, &["Delete", "Retain"]);
    let mode = text(object, "/volumeBindingMode");
    errors.one_of(&Path::new("volumeBindingMode"), mode, &["Immediate", "WaitForFirstConsumer"]);
}

/// What may not change in a StorageClass.
pub(super) fn update_class(errors: &mut Errors, new: &Value, old: &Value) {
    for field in ["parameters", "provisioner", "reclaimPolicy", "volumeBindingMode"] {
        if new.get(field) != old.get(field) {
            errors.forbidden(&Path::new(field), &format!("updates to {field} are forbidden."));
        }
    }
}

/// Checks a CSIDriver.
pub(super) fn driver(errors: &mut Errors, object: &Value) {
    let spec = Path::new("spec");
    let policy = text(object, "/spec/fsGroupPolicy");
    errors.one_of(&spec.child("fsGroupPolicy"), policy, &["File", "None", "ReadWriteOnceWithFSType"]);
    let modes = spec.child("volumeLifecycleModes");
    for (index, mode) in list(object, "/spec/volumeLifecycleModes").iter().enumerate() {
        errors.one_of(&modes.index(index), mode.as_str().unwrap_or_default(), &["Ephemeral", "Persistent"]);
    }
}

/// What may not change in a CSIDriver.
pub(super) fn update_driver(errors: &mut Errors, new: &Value, old: &Value) {
    let spec = Path::new("spec");
    for field in ["attachRequired", "volumeLifecycleModes"] {
        errors.immutable(&spec.child(field), new["spec"].get(field), old["spec"].get(field));
    }
}

/// Checks a CSINode.
pub(super) fn csi_node(errors: &mut Errors, object: &Value) {
    let spec = Path::new("spec");
    let drivers = spec.child("drivers");
    let mut seen = BTreeSet::new();
    for (index, driver) in list(object, "/spec/drivers").iter().enumerate() {
        let at = drivers.index(index);
        let name = text(driver, "/name");
        if name.is_empty() {
            errors.required(&at.child("name"));
        } else if !seen.insert(name) {
            errors.push(FieldError::duplicate(&at.child("name"), name));
        }
        if text(driver, "/nodeID").is_empty() {
            errors.required(&at.child("nodeID"));
        }
    }
}

/// Checks a CSIStorageCapacity.
pub(super) fn capacity(errors: &mut Errors, object: &Value) {
    let class = text(object, "/storageClassName");
    let at = Path::new("storageClassName");
    if class.is_empty() {
        errors.required(&at);
    } else {
        errors.syntax(&at, class, names::subdomain_1123(class));
    }
}

/// What may not change in a CSIStorageCapacity.
pub(super) fn update_capacity(errors: &mut Errors, new: &Value, old: &Value) {
    for field in ["nodeTopology", "storageClassName"] {
        errors.immutable(&Path::new(field), new.get(field), old.get(field));
    }
}

/// Checks a VolumeAttachment.
pub(super) fn attachment(errors: &mut Errors, object: &Value) {
    let spec = Path::new("spec");
    for field in ["attacher", "nodeName"] {
        if text(&object["spec"], &format!("/{field}")).is_empty() {
            errors.required(&spec.child(field));
        }
    }
    let source = spec.child("source");
    let inline = object.pointer("/spec/source/inlineVolumeSpec").is_some();
    match (text(object, "/spec/source/persistentVolumeName").is_empty(), inline) {
        (true, false) => errors.push(FieldError::required(
            &source,
            "must specify exactly one of inlineVolumeSpec and persistentVolumeName",
        )),
        (false, true) => {
            errors
                .forbidden(&source, "must specify exactly one of inlineVolumeSpec and persistentVolumeName");
        }
        _ => {}
    }
}

/// What may not change in a VolumeAttachment.
pub(super) fn update_attachment(errors: &mut Errors, new: &Value, old: &Value) {
    errors.immutable(&Path::new("spec"), new.get("spec"), old.get("spec"));
}

/// Checks a VolumeAttributesClass.
pub(super) fn attributes_class(errors: &mut Errors, object: &Value) {
    if text(object, "/driverName").is_empty() {
        errors.required(&Path::new("driverName"));
    }
    if map(object, "/parameters").is_none_or(serde_json::Map::is_empty) {
        errors
            .push(FieldError::required(&Path::new("parameters"), "must contain at least one key/value pair"));
    }
}

/// What may not change in a VolumeAttributesClass.
pub(super) fn update_attributes_class(errors: &mut Errors, new: &Value, old: &Value) {
    for field in ["driverName", "parameters"] {
        errors.immutable(&Path::new(field), new.get(field), old.get(field));
    }
}
