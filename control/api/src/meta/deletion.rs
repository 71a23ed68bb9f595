//! What a DELETE does: remove, wait for a grace period, or wait for finalizers.
//!
//! Input: the stored object, the options and the time. Output: a [`Deletion`]. Never removes anything itself.

use serde_json::{Value, json};

use super::{is_deleting, name, resource_version, uid};
use crate::{
    kinds::ResourceInfo,
    status::ApiError,
    value::{flag, int, list, text},
};

/// What a DELETE request asks for (`metav1.DeleteOptions`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    /// `gracePeriodSeconds`.
    pub grace_period_seconds: Option<i64>,
    /// `preconditions.uid`.
    pub uid: Option<String>,
    /// `preconditions.resourceVersion`.
    pub resource_version: Option<String>,
    /// `propagationPolicy` (or the old `orphanDependents`).
    pub propagation: Option<Propagation>,
    /// `dryRun` contains `All`.
    pub dry_run: bool,
}

/// What happens to dependents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// The collector deletes them later.
    Background,
    /// They go first.
    Foreground,
    /// They stay, without the owner reference.
    Orphan,
}

/// What a deletion does to the stored object.
#[derive(Debug, Clone, PartialEq)]
pub enum Deletion {
    /// Remove it now.
    Remove,
    /// Store this (deletionTimestamp, grace period, finalizers) and wait.
    Update(Value),
    /// It is already being deleted at least that fast: answer with the object as it is.
    Pending,
}

/// Reads a `DeleteOptions` body; query parameters override fields, which the caller does by setting them.
pub fn delete_options(body: &Value) -> Result<DeleteOptions, ApiError> {
    let policy = match text(body, "/propagationPolicy") {
        "" => None,
        other => Some(propagation(other)?),
    };
    let orphan = body.get("orphanDependents").and_then(Value::as_bool);
    let owned = |pointer: &str| Some(text(body, pointer).to_owned()).filter(|t| !t.is_empty());
    Ok(DeleteOptions {
        grace_period_seconds: int(body, "/gracePeriodSeconds"),
        uid: owned("/preconditions/uid"),
        resource_version: owned("/preconditions/resourceVersion"),
        propagation: policy.or(orphan.map(|o| if o { Propagation::Orphan } else { Propagation::Background })),
        dry_run: list(body, "/dryRun").iter().any(|d| d == "All"),
    })
}

/// Reads a propagation policy's name.
pub fn propagation(name: &str) -> Result<Propagation, ApiError> {
    match name {
        "Background" => Ok(Propagation::Background),
        "Foreground" => Ok(Propagation::Foreground),
        "Orphan" => Ok(Propagation::Orphan),
        other => Err(ApiError::bad_request(format!(
            "DeleteOptions.meta.k8s.io \"\" is invalid: propagationPolicy: Unsupported value: \"{other}\": \
             supported values: \"Background\", \"Foreground\", \"Orphan\", \"nil\""
        ))),
    }
}

/// What deleting the object amounts to at `now` (RFC 3339, whole seconds).
pub fn delete(
    info: &ResourceInfo,
    old: &Value,
    options: &DeleteOptions,
    now: &str,
) -> Result<Deletion, ApiError> {
    check(info, old, options)?;
    let grace = grace_period(info, old, options);
    let finalizers = finalizers_after(info, old, options.propagation);
    if grace == 0 && finalizers.is_empty() {
        return Ok(Deletion::Remove);
    }
    let unchanged = list(old, "/metadata/finalizers") == finalizers.as_slice();
    if is_deleting(old) {
        let left = int(old, "/metadata/deletionGracePeriodSeconds").unwrap_or(0);
        if unchanged && grace >= left {
            return Ok(Deletion::Pending);
        }
    }
    Ok(Deletion::Update(mark(info, old, grace, finalizers, now)))
}

/// After an update: the object only waited for its last finalizer, and is to be removed instead of stored.
pub fn finished_deleting(info: &ResourceInfo, object: &Value) -> bool {
    let waits = info.graceful_delete && int(object, "/metadata/deletionGracePeriodSeconds").unwrap_or(0) > 0;
    is_deleting(object) && !waits && pending_finalizers(info, object).is_empty()
}

fn check(info: &ResourceInfo, old: &Value, options: &DeleteOptions) -> Result<(), ApiError> {
    let pairs = [
        (options.uid.as_deref(), uid(old), "UID in precondition", "UID in object meta"),
        (
            options.resource_version.as_deref(),
            resource_version(old),
            "ResourceVersion in precondition",
            "ResourceVersion in object meta",
        ),
    ];
    for (asked, stored, ours, theirs) in pairs {
        if let Some(asked) = asked.filter(|a| *a != stored) {
            let why = format!("Precondition failed: {ours}: {asked}, {theirs}: {stored}");
            return Err(ApiError::conflict(info, name(old), &why));
        }
    }
    Ok(())
}

/// Pods that run nowhere, or no longer, need no grace; other kinds have none.
fn grace_period(info: &ResourceInfo, old: &Value, options: &DeleteOptions) -> i64 {
    if !info.graceful_delete {
        return 0;
    }
    let idle = text(old, "/spec/nodeName").is_empty()
        || matches!(text(old, "/status/phase"), "Succeeded" | "Failed");
    if idle {
        return 0;
    }
    let own = int(old, "/spec/terminationGracePeriodSeconds").unwrap_or(30);
    // A negative grace period means the least one that still reaches the node.
    match options.grace_period_seconds.unwrap_or(own) {
        asked if asked < 0 => 1,
        asked => asked,
    }
}

/// The finalizers that must be gone before removal, policy included.
fn finalizers_after(info: &ResourceInfo, old: &Value, policy: Option<Propagation>) -> Vec<Value> {
    let mut finalizers = list(old, "/metadata/finalizers").to_vec();
    let gc = |f: &Value| f == "foregroundDeletion" || f == "orphan";
    match policy {
        None => {}
        Some(Propagation::Background) => finalizers.retain(|f| !gc(f)),
        Some(wanted) => {
            finalizers.retain(|f| !gc(f));
            let name = if wanted == Propagation::Orphan { "orphan" } else { "foregroundDeletion" };
            finalizers.push(json!(name));
        }
    }
    if info.kind == "Namespace" && finalizers.is_empty() {
        return list(old, "/spec/finalizers").to_vec();
    }
    finalizers
}

fn pending_finalizers(info: &ResourceInfo, object: &Value) -> Vec<Value> {
    let mut all = list(object, "/metadata/finalizers").to_vec();
    if info.kind == "Namespace" {
        all.extend_from_slice(list(object, "/spec/finalizers"));
    }
    all
}

fn mark(info: &ResourceInfo, old: &Value, grace: i64, finalizers: Vec<Value>, now: &str) -> Value {
    let mut object = old.clone();
    let end = add_seconds(now, grace);
    if !is_deleting(old) && info.generation {
        object["metadata"]["generation"] = (int(old, "/metadata/generation").unwrap_or(0) + 1).into();
    }
    let metadata = &mut object["metadata"];
    let earlier = text(old, "/metadata/deletionTimestamp");
    let end = if earlier.is_empty() || end.as_str() < earlier { end } else { earlier.to_owned() };
    metadata["deletionTimestamp"] = end.into();
    metadata["deletionGracePeriodSeconds"] = grace.into();
    if info.kind == "Namespace" {
        object["status"]["phase"] = "Terminating".into();
    } else if !finalizers.is_empty() {
        metadata["finalizers"] = finalizers.into();
    } else if let Some(map) = metadata.as_object_mut() {
        map.remove("finalizers");
    }
    object
}

fn add_seconds(now: &str, seconds: i64) -> String {
    let later = now
        .parse::<jiff::Timestamp>()
        .ok()
        .and_then(|t| t.checked_add(jiff::SignedDuration::from_secs(seconds)).ok());
    later.map_or_else(|| now.to_owned(), |t| t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

/// Whether dependents of this object block its removal (used by collectors).
pub fn waits_for_dependents(object: &Value) -> bool {
    is_deleting(object) && list(object, "/metadata/finalizers").iter().any(|f| f == "foregroundDeletion")
}

/// Whether an owner reference blocks its owner's foreground deletion.
pub fn blocks_owner(reference: &Value) -> bool {
    flag(reference, "/blockOwnerDeletion")
}
