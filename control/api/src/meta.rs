//! Object metadata: what the server owns and what a write may change.
//!
//! Input: the object a client sent, the stored one, and identity made by the caller. Output: the object to store, or
//! an error. resourceVersion is the server's: set when an object is read from the store, checked here by
//! [`check_preconditions`], never stored by this module. Deletion is in [`deletion`].

mod certificate;
pub mod deletion;
mod pod;
mod service;

pub use deletion::{DeleteOptions, Deletion, Propagation, delete, delete_options, finished_deleting};
use serde_json::{Map, Value, json};

use crate::{
    kinds::ResourceInfo,
    status::{ApiError, FieldError},
    value::{carry, ensure_map, int, text},
};

/// What a new object is given; made by the caller, since this crate has no clock and no random source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewIdentity<'a> {
    /// Fresh UUID.
    pub uid: &'a str,
    /// Now, RFC 3339 with whole seconds and `Z`.
    pub now: &'a str,
    /// Five characters out of [`NAME_ALPHABET`], appended to `generateName`.
    pub name_suffix: &'a str,
}

/// Characters that generated names are made of, as upstream: no vowels and no look-alikes.
pub const NAME_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Longest prefix of `generateName` that is kept before the suffix.
const MAX_GENERATED_BASE: usize = 63 - 5;

/// Which part of an object a write may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateTarget {
    /// The object itself; `status` is kept where it has a subresource.
    Main,
    /// `/status`: everything but `status` and metadata is kept.
    Status,
    /// Another subresource (`scale`, `binding`, `finalize`): status is kept, spec may change.
    Spec,
    /// `pods/ephemeralcontainers`: of a pod nothing but its ephemeral containers changes.
    EphemeralContainers,
    /// `certificatesigningrequests/approval`: nothing but the conditions Approved and Denied changes.
    Approval,
    /// `pods/resize`: of a pod nothing but its containers' resources and resize policies changes.
    Resize,
}

/// `metadata.name`, empty when absent.
pub fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

/// `metadata.namespace`, empty when absent.
pub fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

/// `metadata.uid`, empty when absent.
pub fn uid(object: &Value) -> &str {
    text(object, "/metadata/uid")
}

/// `metadata.resourceVersion`, empty when absent.
pub fn resource_version(object: &Value) -> &str {
    text(object, "/metadata/resourceVersion")
}

/// Whether deletion has begun.
pub fn is_deleting(object: &Value) -> bool {
    !text(object, "/metadata/deletionTimestamp").is_empty()
}

/// Completes an object that is to be created: namespace from the URL, name, uid, timestamps, generation; status
/// dropped where it has its own subresource. Call after [`crate::defaults::apply`], before validation.
pub fn prepare_create(
    info: &ResourceInfo,
    object: &mut Value,
    namespace: Option<&str>,
    identity: &NewIdentity<'_>,
) -> Result<(), ApiError> {
    set_type(info, object)?;
    first_status(info, object);
    let metadata =
        ensure_map(object, "metadata").ok_or_else(|| ApiError::bad_request("metadata must be an object"))?;
    set_namespace(info, metadata, namespace)?;
    if !string(metadata, "resourceVersion").is_empty() {
        return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
    }
    let generate = string(metadata, "generateName").to_owned();
    if string(metadata, "name").is_empty() && !generate.is_empty() {
        let base: String = generate.chars().take(MAX_GENERATED_BASE).collect();
        metadata.insert("name".into(), format!("{base}{}", identity.name_suffix).into());
    }
    for key in ["selfLink", "resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        metadata.remove(key);
    }
    metadata.insert("uid".into(), identity.uid.into());
    metadata.insert("creationTimestamp".into(), identity.now.into());
    if info.generation {
        metadata.insert("generation".into(), 1.into());
    } else {
        metadata.remove("generation");
    }
    if name(object).is_empty() {
        let why = FieldError::required("metadata.name", "name or generateName is required");
        return Err(ApiError::invalid(info, "", &[why]));
    }
    Ok(())
}

/// Completes the new form of a stored object: server-owned metadata is kept, status and spec are separated, the
/// generation goes up when the desired state changed.
pub fn prepare_update(
    info: &ResourceInfo,
    target: UpdateTarget,
    new: &mut Value,
    old: &Value,
) -> Result<(), ApiError> {
    set_type(info, new)?;
    match target {
        UpdateTarget::Status => {
            keep_all_but_status(new, old);
            if info.kind == "CertificateSigningRequest" {
                certificate::keep_approval(new, old);
            }
        }
        UpdateTarget::Approval => certificate::keep_all_but_approval(new, old),
        UpdateTarget::Main | UpdateTarget::Spec if info.has_status() => carry(new, old, "status"),
        UpdateTarget::Main | UpdateTarget::Spec => {}
        UpdateTarget::EphemeralContainers => pod::keep_all_but_ephemeral_containers(new, old),
        UpdateTarget::Resize => pod::keep_all_but_resources(new, old),
    }
    if info.kind == "Namespace" && target == UpdateTarget::Main {
        // Namespace finalizers go through /finalize only.
        carry(new, old, "spec");
    }
    if info.kind == "CertificateSigningRequest" && target == UpdateTarget::Main {
        // What was asked for stays what was asked for: somebody may have approved it.
        carry(new, old, "spec");
    }
    if info.kind == "Service" && new["spec"].is_object() {
        service::drop_old_types_fields(new, old);
    }
    let old_metadata = old.get("metadata").cloned().unwrap_or_default();
    let metadata =
        ensure_map(new, "metadata").ok_or_else(|| ApiError::bad_request("metadata must be an object"))?;
    let asked = string(metadata, "name");
    if !asked.is_empty() && asked != name(old) {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({asked}) does not match the name on the URL ({})",
            name(old)
        )));
    }
    let asked = string(metadata, "namespace");
    if info.namespaced && !asked.is_empty() && asked != namespace(old) {
        return Err(namespace_mismatch(asked, namespace(old)));
    }
    for key in SERVER_OWNED {
        match old_metadata.get(*key) {
            Some(value) => metadata.insert((*key).to_owned(), value.clone()),
            None => metadata.remove(*key),
        };
    }
    metadata.remove("selfLink");
    if let (None, Some(managed)) = (metadata.get("managedFields"), old_metadata.get("managedFields")) {
        metadata.insert("managedFields".into(), managed.clone());
    }
    if info.generation && desired_state_changed(new, old) {
        let generation = int(old, "/metadata/generation").unwrap_or(0) + 1;
        new["metadata"]["generation"] = generation.into();
    }
    Ok(())
}

/// An update that names a uid or resourceVersion must name the stored one; an empty resourceVersion means "whatever
/// is there" where the resource allows that.
pub fn check_preconditions(info: &ResourceInfo, new: &Value, old: &Value) -> Result<(), ApiError> {
    let (asked_uid, stored_uid) = (uid(new), uid(old));
    if !asked_uid.is_empty() && asked_uid != stored_uid {
        let why = format!(
            "Precondition failed: UID in precondition: {asked_uid}, UID in object meta: {stored_uid}"
        );
        return Err(ApiError::conflict(info, name(old), &why));
    }
    let asked = resource_version(new);
    if asked.is_empty() || asked == "0" {
        if info.unconditional_update {
            return Ok(());
        }
        let why = FieldError::invalid("metadata.resourceVersion", 0, "must be specified for an update");
        return Err(ApiError::invalid(info, name(old), &[why]));
    }
    if asked == resource_version(old) { Ok(()) } else { Err(ApiError::stale(info, name(old))) }
}

/// Whether two objects differ in anything but resourceVersion and managedFields; an update that changes nothing need
/// not be written.
pub fn same_but_version(a: &Value, b: &Value) -> bool {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { return a == b };
    let rest = |map: &Map<String, Value>| map.iter().filter(|(k, _)| *k != "metadata").count();
    rest(a) == rest(b)
        && a.iter().filter(|(k, _)| *k != "metadata").all(|(k, v)| b.get(k) == Some(v))
        && same_metadata(a.get("metadata"), b.get("metadata"))
}

fn same_metadata(a: Option<&Value>, b: Option<&Value>) -> bool {
    let (Some(a), Some(b)) = (a.and_then(Value::as_object), b.and_then(Value::as_object)) else {
        return a == b;
    };
    let counts = |key: &str| !matches!(key, "resourceVersion" | "managedFields");
    a.iter().filter(|(k, _)| counts(k)).all(|(k, v)| b.get(k) == Some(v))
        && b.keys().filter(|k| counts(k)).all(|k| a.contains_key(k))
}

const SERVER_OWNED: &[&str] = &[
    "name",
    "namespace",
    "generateName",
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
];

/// The status of a new object. Nodes bring theirs; what has a status subresource starts with nothing else.
fn first_status(info: &ResourceInfo, object: &mut Value) {
    let first = match info.kind {
        "Node" => return,
        "Namespace" => json!({ "phase": "Active" }),
        "Pod" => json!({ "phase": "Pending", "qosClass": crate::admit::qos_class(object) }),
        "Service" => json!({ "loadBalancer": {} }),
        "PersistentVolume" | "PersistentVolumeClaim" => json!({ "phase": "Pending" }),
        _ => {
            if info.has_status()
                && let Some(map) = object.as_object_mut()
            {
                map.remove("status");
            }
            return;
        }
    };
    if let Some(map) = object.as_object_mut() {
        map.insert("status".to_owned(), first);
    }
}

/// A status write may touch `status`, and labels and annotations with it, as upstream's strategies let it.
fn keep_all_but_status(new: &mut Value, old: &Value) {
    let asked = std::mem::replace(new, old.clone());
    carry(new, &asked, "status");
    let (Some(metadata), Some(asked)) = (ensure_map(new, "metadata"), asked.get("metadata")) else { return };
    for key in ["labels", "annotations", "managedFields"] {
        if let Some(value) = asked.get(key) {
            metadata.insert(key.to_owned(), value.clone());
        }
    }
}

/// Anything outside metadata and status counts, and the start of deletion does too.
fn desired_state_changed(new: &Value, old: &Value) -> bool {
    let (Some(new), Some(old)) = (new.as_object(), old.as_object()) else { return true };
    let counts = |key: &str| !matches!(key, "metadata" | "status" | "apiVersion" | "kind");
    new.iter().filter(|(k, _)| counts(k)).any(|(k, v)| old.get(k) != Some(v))
        || old.keys().filter(|k| counts(k)).any(|k| !new.contains_key(k))
}

/// Fills in kind and apiVersion, refuses others than the URL's.
fn set_type(info: &ResourceInfo, object: &mut Value) -> Result<(), ApiError> {
    let wanted = info.api_version();
    let map = object.as_object_mut().ok_or_else(|| ApiError::bad_request("the body is not an object"))?;
    let (kind, api_version) = (string(map, "kind"), string(map, "apiVersion"));
    let differs = |found: &str, wanted: &str| !found.is_empty() && found != wanted;
    if differs(kind, info.kind) || differs(api_version, &wanted) {
        return Err(ApiError::bad_request(format!(
            "{kind} in version \"{api_version}\" cannot be handled as a {}: the object provided is unrecognized \
             (must be of type {}): the API version in the data ({api_version}) does not match the expected API \
             version ({wanted})",
            info.kind, info.kind
        )));
    }
    map.insert("kind".into(), info.kind.into());
    map.insert("apiVersion".into(), wanted.into());
    Ok(())
}

fn set_namespace(
    info: &ResourceInfo,
    metadata: &mut Map<String, Value>,
    namespace: Option<&str>,
) -> Result<(), ApiError> {
    let Some(wanted) = namespace.filter(|_| info.namespaced) else {
        metadata.remove("namespace");
        return Ok(());
    };
    let asked = string(metadata, "namespace");
    if !asked.is_empty() && asked != wanted {
        return Err(namespace_mismatch(asked, wanted));
    }
    metadata.insert("namespace".into(), wanted.into());
    Ok(())
}

fn namespace_mismatch(asked: &str, wanted: &str) -> ApiError {
    ApiError::bad_request(format!(
        "the namespace of the provided object does not match the namespace sent on the request ({asked} and \
         {wanted})"
    ))
}

fn string<'a>(map: &'a Map<String, Value>, key: &str) -> &'a str {
    map.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests;
