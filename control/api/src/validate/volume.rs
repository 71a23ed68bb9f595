//! Volumes of a pod.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Errors, path::Path, resources};
use crate::value::{int, list, text};

/// Checks a pod's volumes and returns their names.
pub(super) fn check<'a>(errors: &mut Errors, at: &Path<'_>, spec: &'a Value) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    for (index, volume) in list(spec, "/volumes").iter().enumerate() {
        let at = at.index(index);
        errors.own_label(&at.child("name"), text(volume, "/name"), &mut seen);
        let sources =
            volume.as_object().into_iter().flatten().filter(|(key, v)| *key != "name" && !v.is_null());
        for (count, (kind, source)) in sources.enumerate() {
            if count > 0 {
                errors.forbidden(&at.child(kind), "may not specify more than 1 volume type");
            } else {
                source_of(errors, &at.child(kind), kind, source);
            }
        }
    }
    seen
}

fn source_of(errors: &mut Errors, at: &Path<'_>, kind: &str, source: &Value) {
    match kind {
        "hostPath" => {
            let path = text(source, "/path");
            if path.is_empty() {
                errors.required(&at.child("path"));
            } else if path.split('/').any(|part| part == "..") {
                errors.invalid(&at.child("path"), path, "must not contain '..'");
            }
            let types = [
                "BlockDevice",
                "CharDevice",
                "Directory",
                "DirectoryOrCreate",
                "File",
                "FileOrCreate",
                "Socket",
            ];
            errors.one_of(&at.child("type"), text(source, "/type"), &types);
        }
        "emptyDir" => {
            let limit = source.get("sizeLimit").and_then(resources::parse);
            if limit.is_some_and(crate::quantity::Quantity::is_negative) {
                errors.forbidden(&at.child("sizeLimit"), "SizeLimit field must be a valid resource quantity");
            }
        }
        "configMap" => {
            if text(source, "/name").is_empty() {
                errors.required(&at.child("name"));
            }
            files(errors, at, source);
        }
        "secret" => {
            if text(source, "/secretName").is_empty() {
                errors.required(&at.child("secretName"));
            }
            files(errors, at, source);
        }
        "downwardAPI" => downward(errors, at, source),
        "projected" => projected(errors, at, source),
        "persistentVolumeClaim" if text(source, "/claimName").is_empty() => {
            errors.required(&at.child("claimName"));
        }
        _ => {}
    }
}

fn downward(errors: &mut Errors, at: &Path<'_>, source: &Value) {
    mode(errors, &at.child("defaultMode"), source, "/defaultMode");
    let items = at.child("items");
    for (index, item) in list(source, "/items").iter().enumerate() {
        let at = items.index(index);
        file(errors, &at, item);
        if let Some(resource) = item.get("resourceFieldRef").filter(|r| r.is_object())
            && text(resource, "/containerName").is_empty()
        {
            errors.required(&at.child("resourceFieldRef").child("containerName"));
        }
    }
}

/// The files that a part of a projected volume is known to write.
fn paths_of(part: &Value) -> impl Iterator<Item = &str> {
    let lists = ["/configMap/items", "/secret/items", "/downwardAPI/items"];
    let listed = lists.into_iter().flat_map(|list_of| list(part, list_of)).map(|item| text(item, "/path"));
    listed.chain([text(part, "/serviceAccountToken/path")]).filter(|path| !path.is_empty())
}

fn projected(errors: &mut Errors, at: &Path<'_>, source: &Value) {
    mode(errors, &at.child("defaultMode"), source, "/defaultMode");
    let sources = at.child("sources");
    let mut seen = BTreeSet::new();
    for (index, part) in list(source, "/sources").iter().enumerate() {
        let at = sources.index(index);
        for path in paths_of(part).filter(|path| !seen.insert(*path)) {
            errors.invalid(&at, path, "conflicting duplicate paths");
        }
        if let Some(found) = part.get("downwardAPI").filter(|f| f.is_object()) {
            downward(errors, &at.child("downwardAPI"), found);
        }
        for kind in ["configMap", "secret"] {
            let Some(found) = part.get(kind).filter(|f| f.is_object()) else { continue };
            if text(found, "/name").is_empty() {
                errors.required(&at.child(kind).child("name"));
            }
            files(errors, &at.child(kind), found);
        }
        if let Some(token) = part.get("serviceAccountToken").filter(|t| t.is_object()) {
            let at = at.child("serviceAccountToken");
            if int(token, "/expirationSeconds").is_some_and(|s| s < 600) {
                let seconds = int(token, "/expirationSeconds").unwrap_or(0);
                errors.invalid(
                    &at.child("expirationSeconds"),
                    seconds,
                    "may not specify a duration less than 10 minutes",
                );
            }
            if text(token, "/path").is_empty() {
                errors.required(&at.child("path"));
            }
        }
    }
}

/// Keys, paths and modes of the files a ConfigMap or Secret volume writes.
fn files(errors: &mut Errors, at: &Path<'_>, source: &Value) {
    mode(errors, &at.child("defaultMode"), source, "/defaultMode");
    let items = at.child("items");
    for (index, item) in list(source, "/items").iter().enumerate() {
        let at = items.index(index);
        if text(item, "/key").is_empty() {
            errors.required(&at.child("key"));
        }
        file(errors, &at, item);
    }
}

/// Path and mode of one file.
fn file(errors: &mut Errors, at: &Path<'_>, item: &Value) {
    let path = text(item, "/path");
    if path.is_empty() {
        errors.required(&at.child("path"));
    } else if path.starts_with('/') {
        errors.invalid(&at.child("path"), path, "must be a relative path");
    } else if path.split('/').any(|part| part == "..") {
        errors.invalid(&at.child("path"), path, "must not contain '..'");
    }
    mode(errors, &at.child("mode"), item, "/mode");
}

fn mode(errors: &mut Errors, at: &Path<'_>, holder: &Value, pointer: &str) {
    if let Some(mode) = int(holder, pointer).filter(|m| !(0..=0o777).contains(m)) {
        let why = "must be a number between 0 and 0777 (octal), both inclusive";
        errors.invalid(at, mode, why);
    }
}
