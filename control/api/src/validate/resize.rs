//! Other resources for a pod's containers, without a new pod.

use serde_json::Value;

use super::{Errors, path::Path, resources};
use crate::{
    admit::qos_class,
    value::{list, map, text},
};

/// Checks what `pods/resize` asks for; everything else was kept from the stored pod.
pub(super) fn check(errors: &mut Errors, new: &Value, old: &Value) {
    let spec = Path::new("spec");
    if old.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some() {
        errors.forbidden(&Path::new("metadata"), "static pods cannot be resized");
    }
    if matches!(text(old, "/status/phase"), "Succeeded" | "Failed") {
        errors.forbidden(&spec, "cannot resize a pod that has ended");
    }
    if qos_class(new) != qos_class(old) {
        errors.invalid(&spec, qos_class(new), "Pod QOS Class may not change as a result of resizing");
    }
    for key in ["containers", "initContainers"] {
        let at = spec.child(key);
        let pointer = format!("/spec/{key}");
        for (index, (after, before)) in list(new, &pointer).iter().zip(list(old, &pointer)).enumerate() {
            let at = at.index(index);
            if key == "initContainers"
                && text(after, "/restartPolicy") != "Always"
                && after.get("resources") != before.get("resources")
            {
                errors.forbidden(&at.child("resources"), "cannot resize non-restartable init containers");
            }
            for side in ["limits", "requests"] {
                changes(
                    errors,
                    &at.child("resources").child(side),
                    &format!("/resources/{side}"),
                    after,
                    before,
                );
            }
        }
    }
}

/// Only cpu and memory change, and what was set stays set.
fn changes(errors: &mut Errors, at: &Path<'_>, pointer: &str, after: &Value, before: &Value) {
    let (new, old) = (map(after, pointer), map(before, pointer));
    let amount = |list: Option<&serde_json::Map<String, Value>>, name: &str| {
        list?.get(name).and_then(resources::parse)
    };
    let names = new.into_iter().chain(old).flat_map(serde_json::Map::keys);
    let names: std::collections::BTreeSet<&String> = names.collect();
    for name in names {
        let (wanted, had) = (amount(new, name), amount(old, name));
        if wanted == had {
            continue;
        }
        if !matches!(name.as_str(), "cpu" | "memory") {
            errors.forbidden(at, "only cpu and memory resources are mutable");
        } else if wanted.is_none() {
            errors.forbidden(
                &at.key(name),
                &format!("{} cannot be removed", pointer.rsplit('/').next().unwrap_or_default()),
            );
        }
    }
}
