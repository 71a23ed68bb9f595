//! ConfigMaps and Secrets.

use serde_json::Value;

use super::{Errors, names, path::Path};
use crate::{
    status::FieldError,
    value::{flag, map, text},
};

/// The most bytes of all values together.
const MAX_DATA: usize = 1 << 20;

/// Checks a ConfigMap.
pub(super) fn config_map(errors: &mut Errors, object: &Value) {
    let mut size = 0;
    for key in ["data", "binaryData"] {
        let at = Path::new(key);
        for (name, value) in map(object, &format!("/{key}")).into_iter().flatten() {
            errors.syntax(&at.key(name), name, names::config_key(name));
            size += value.as_str().map_or(0, str::len);
            if key == "binaryData" && map(object, "/data").is_some_and(|d| d.contains_key(name)) {
                let why = format!("duplicate of key present in data: {name}");
                errors.invalid(&at.key(name), name.as_str(), why);
            }
        }
    }
    if size > MAX_DATA {
        errors.push(FieldError::too_long("", MAX_DATA));
    }
}

/// Checks a Secret.
pub(super) fn secret(errors: &mut Errors, object: &Value) {
    let at = Path::new("data");
    let mut size = 0;
    for (name, value) in map(object, "/data").into_iter().flatten() {
        errors.syntax(&at.key(name), name, names::config_key(name));
        // Base64 carries three bytes in four characters.
        size += value.as_str().map_or(0, |v| v.len() / 4 * 3);
    }
    if size > MAX_DATA {
        errors.push(FieldError::too_long(&at, MAX_DATA));
    }
    let needed: &[&str] = match text(object, "/type") {
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    };
    for key in needed.iter().filter(|k| map(object, "/data").is_none_or(|d| !d.contains_key(**k))) {
        errors.required(&at.key(key));
    }
    let account = "/metadata/annotations/kubernetes.io~1service-account.name";
    if text(object, "/type") == "kubernetes.io/service-account-token" && text(object, account).is_empty() {
        let metadata = Path::new("metadata");
        let annotations = metadata.child("annotations");
        errors.required(&annotations.key("kubernetes.io/service-account.name"));
    }
}

/// What may not change in a ConfigMap.
pub(super) fn update_config_map(errors: &mut Errors, new: &Value, old: &Value) {
    frozen(errors, new, old, &["data", "binaryData"]);
}

/// What may not change in a Secret.
pub(super) fn update_secret(errors: &mut Errors, new: &Value, old: &Value) {
    errors.immutable(&Path::new("type"), new.get("type"), old.get("type"));
    frozen(errors, new, old, &["data"]);
}

fn frozen(errors: &mut Errors, new: &Value, old: &Value, keys: &[&str]) {
    if !flag(old, "/immutable") {
        return;
    }
    let why = "field is immutable when `immutable` is set";
    if !flag(new, "/immutable") {
        errors.forbidden(&Path::new("immutable"), why);
    }
    for key in keys.iter().filter(|k| new.get(**k) != old.get(**k)) {
        errors.forbidden(&Path::new(key), why);
    }
}
