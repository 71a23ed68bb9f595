//! Metadata: names, labels, annotations, finalizers, owners.

use serde_json::Value;

use super::{Errors, names, path::Path};
use crate::{
    kinds::{NameRule, ResourceInfo},
    status::FieldError,
    value::{flag, list, map, text},
};

/// The most bytes all annotations may have together.
const MAX_ANNOTATIONS: usize = 256 << 10;

/// Checks an object's metadata.
pub(super) fn check(errors: &mut Errors, info: &ResourceInfo, object: &Value) {
    if !info.is_stored() {
        return;
    }
    let metadata = Path::new("metadata");
    let (name, generate) = (text(object, "/metadata/name"), text(object, "/metadata/generateName"));
    if name.is_empty() {
        errors.push(FieldError::required(&metadata.child("name"), "name or generateName is required"));
    } else {
        errors.syntax(&metadata.child("name"), name, name_rule(info.name_rule, name));
    }
    if !generate.is_empty() {
        // A prefix may end with a dash, as the name goes on.
        let masked = format!("{}a", generate.trim_end_matches('-'));
        errors.syntax(&metadata.child("generateName"), generate, name_rule(info.name_rule, &masked));
    }
    if info.namespaced {
        let namespace = text(object, "/metadata/namespace");
        if namespace.is_empty() {
            errors.required(&metadata.child("namespace"));
        } else {
            errors.syntax(&metadata.child("namespace"), namespace, names::label_1123(namespace));
        }
    }
    labels(errors, &metadata.child("labels"), map(object, "/metadata/labels"));
    annotations(errors, &metadata.child("annotations"), object);
    finalizers(errors, &metadata.child("finalizers"), object);
    owners(errors, &metadata.child("ownerReferences"), object);
}

/// Checks a map of labels (or a selector's).
pub(super) fn labels(errors: &mut Errors, at: &Path<'_>, found: Option<&serde_json::Map<String, Value>>) {
    for (key, value) in found.into_iter().flatten() {
        for why in names::qualified_name(key) {
            errors.invalid(at, key.as_str(), why);
        }
        let value = value.as_str().unwrap_or_default();
        errors.syntax(at, value, names::label_value(value));
    }
}

fn name_rule(rule: NameRule, name: &str) -> Option<String> {
    match rule {
        NameRule::Subdomain => names::subdomain_1123(name),
        NameRule::Label1123 => names::label_1123(name),
        NameRule::Label1035 => names::label_1035(name),
        NameRule::PathSegment => names::path_segment(name),
    }
}

fn annotations(errors: &mut Errors, at: &Path<'_>, object: &Value) {
    let mut size = 0;
    for (key, value) in map(object, "/metadata/annotations").into_iter().flatten() {
        for why in names::qualified_name(&key.to_lowercase()) {
            errors.invalid(at, key.as_str(), why);
        }
        size += key.len() + value.as_str().map_or(0, str::len);
    }
    if size > MAX_ANNOTATIONS {
        errors.push(FieldError::too_long(at, MAX_ANNOTATIONS));
    }
}

fn finalizers(errors: &mut Errors, at: &Path<'_>, object: &Value) {
    const STANDARD: &[&str] = &["kubernetes", "orphan", "foregroundDeletion"];
    for (index, finalizer) in list(object, "/metadata/finalizers").iter().enumerate() {
        let finalizer = finalizer.as_str().unwrap_or_default();
        let at = at.index(index);
        for why in names::qualified_name(finalizer) {
            errors.invalid(&at, finalizer, why);
        }
        if !finalizer.contains('/') && !STANDARD.contains(&finalizer) {
            errors.invalid(
                &at,
                finalizer,
                "name is neither a standard finalizer name nor is it fully qualified",
            );
        }
    }
}

fn owners(errors: &mut Errors, at: &Path<'_>, object: &Value) {
    let owners = list(object, "/metadata/ownerReferences");
    for (index, owner) in owners.iter().enumerate() {
        let at = at.index(index);
        for key in ["apiVersion", "kind", "name", "uid"] {
            if owner.get(key).and_then(Value::as_str).unwrap_or_default().is_empty() {
                errors.invalid(&at.child(key), "", format!("{key} must not be empty"));
            }
        }
    }
    let controllers: Vec<&Value> = owners.iter().filter(|o| flag(o, "/controller")).collect();
    if let [first, second, ..] = controllers.as_slice() {
        let name = |o: &Value| format!("{}/{}", text(o, "/kind"), text(o, "/name"));
        let why = format!(
            "Only one reference can have Controller set to true. Found \"true\" in references for {} and {}",
            name(first),
            name(second)
        );
        errors.invalid(at, owners.to_vec(), why);
    }
}
