//! Server-side apply: merge what a manager declares, and keep the record of who owns which field.
//!
//! Input: the live object, the declared one, the manager's name, the time. Output: the new object with its
//! `managedFields`, or a conflict that names every field and its owner. An object that was never applied carries no
//! record and costs nothing: [`track_update`] does nothing for it, and the first apply attributes what is there to
//! the manager `before-first-apply`, as upstream does for untracked objects.
//!
//! Semantics: <https://kubernetes.io/docs/reference/using-api/server-side-apply/>, KEP-555.

mod fields;
mod managed;
mod merge;

use fields::FieldSet;
use managed::{Entry, Managed};
use serde_json::Value;

use crate::{
    kinds::ResourceInfo,
    meta,
    schema::shape::Shape,
    status::{ApiError, Cause, Reason},
};

/// Who owns the fields of an object that existed before anybody applied it.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";

/// Who writes, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Author<'a> {
    /// `fieldManager`.
    pub manager: &'a str,
    /// The subresource written to, or empty.
    pub subresource: &'a str,
    /// Now, RFC 3339.
    pub now: &'a str,
}

/// Applies `declared` to the live object (or to nothing, which creates it). With `force`, fields of other managers
/// are taken over instead of being a conflict. Give `declared` in checked and pruned form ([`crate::schema`]).
pub fn apply(
    info: &ResourceInfo,
    live: Option<&Value>,
    declared: &Value,
    author: &Author<'_>,
    force: bool,
) -> Result<Value, ApiError> {
    let shape = shape_of(info)?;
    if declared.pointer("/metadata/managedFields").is_some_and(|m| m.as_array().is_none_or(|m| !m.is_empty()))
    {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let nothing = empty(info, declared);
    let live_or_nothing = live.unwrap_or(&nothing);
    let mut managed = Managed::read(live_or_nothing);
    if managed.is_empty() && live.is_some() {
        let there = FieldSet::of(shape, live_or_nothing);
        let before = Author { manager: BEFORE_FIRST_APPLY, subresource: "", ..*author };
        managed.put(Entry::new(info, &before, "Update", there));
    }
    let wanted = FieldSet::of(shape, declared).restricted(info, author.subresource);
    let key = Entry::new(info, author, "Apply", wanted.clone());
    let conflicts =
        managed.conflicts(&key, |path| fields::get(live_or_nothing, path) != fields::get(declared, path));
    if !conflicts.is_empty() && !force {
        return Err(conflict_error(info, meta::name(declared), &conflicts));
    }
    for (owner, path) in &conflicts {
        managed.disown(owner, path);
    }
    let owned_before = managed.fields_of(&key);
    let mut merged = merge::structs(shape, live_or_nothing, declared, &wanted);
    merge::remove(&mut merged, &owned_before.clear_of(&wanted.union(&managed.union_of_others(&key))));
    managed.put(key);
    managed.write(&mut merged);
    Ok(merged)
}

/// Records an ordinary write: the fields it changed now belong to its manager. Does nothing for objects without a
/// record.
pub fn track_update(info: &ResourceInfo, old: &Value, new: &mut Value, author: &Author<'_>) {
    let (Ok(shape), mut managed) = (shape_of(info), Managed::read(old)) else { return };
    if managed.is_empty() {
        return;
    }
    let (before, after) = (FieldSet::of(shape, old), FieldSet::of(shape, new));
    let changed = after.filtered(|path| fields::get(old, path) != fields::get(new, path));
    let gone = before.without(&after);
    if changed.is_empty() && gone.is_empty() {
        managed.write(new);
        return;
    }
    let mut own = Entry::new(info, author, "Update", FieldSet::default());
    managed.disown_others(&own, &changed.union(&gone));
    own.fields = managed.fields_of(&own).union(&changed).without(&gone);
    managed.put(own);
    managed.write(new);
}

fn shape_of(info: &ResourceInfo) -> Result<&'static Shape, ApiError> {
    Shape::of_definition(info.definition).ok_or_else(|| {
        ApiError::unsupported_media_type(&["application/json-patch+json", "application/merge-patch+json"])
    })
}

fn empty(info: &ResourceInfo, declared: &Value) -> Value {
    serde_json::json!({
        "apiVersion": info.api_version(),
        "kind": info.kind,
        "metadata": { "name": meta::name(declared) },
    })
}

fn conflict_error(info: &ResourceInfo, name: &str, conflicts: &[(Entry, Vec<String>)]) -> ApiError {
    let mut by_owner: Vec<(String, Vec<String>)> = Vec::new();
    for (owner, path) in conflicts {
        let (owner, field) = (owner.describe(), fields::shown(path));
        match by_owner.iter_mut().find(|(o, _)| *o == owner) {
            Some((_, paths)) => paths.push(field),
            None => by_owner.push((owner, vec![field])),
        }
    }
    let count = conflicts.len();
    let texts: Vec<String> = by_owner
        .iter()
        .map(|(owner, paths)| match paths.as_slice() {
            [only] => format!("conflict with {owner}: {only}"),
            many => format!("conflicts with {owner}:\n- {}", many.join("\n- ")),
        })
        .collect();
    let noun = if count == 1 { "conflict" } else { "conflicts" };
    let separator = if texts.len() > 1 { "\n" } else { " " };
    let message = format!("Apply failed with {count} {noun}:{separator}{}", texts.join("\n"));
    let causes = conflicts.iter().map(|(owner, path)| Cause {
        reason: "FieldManagerConflict".to_owned(),
        message: format!("conflict with {}", owner.describe()),
        field: fields::shown(path),
    });
    let mut error = ApiError::conflict(info, name, "");
    error.message = message;
    error.reason = Reason::Conflict;
    error.causes = causes.collect();
    error
}

#[cfg(test)]
mod tests;
