//! Subresources of a pod that change one part of its spec.

use serde_json::Value;

use super::carry;
use crate::value::{list_mut, text};

/// The stored pod with the new one's ephemeral containers.
pub(super) fn keep_all_but_ephemeral_containers(new: &mut Value, old: &Value) {
    let asked = std::mem::replace(new, old.clone());
    carry_version(new, &asked);
    if let (Some(spec), Some(asked)) = (new.get_mut("spec"), asked.get("spec")) {
        carry(spec, asked, "ephemeralContainers");
    }
}

/// The stored pod with the resources and resize policies of the new one's containers of the same names.
pub(super) fn keep_all_but_resources(new: &mut Value, old: &Value) {
    let asked = std::mem::replace(new, old.clone());
    carry_version(new, &asked);
    let (Some(spec), Some(asked)) = (new.get_mut("spec"), asked.get("spec")) else { return };
    for key in ["containers", "initContainers"] {
        let wanted = asked.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        for container in list_mut(spec, key) {
            let name = text(container, "/name").to_owned();
            let Some(wanted) = wanted.iter().find(|other| text(other, "/name") == name) else { continue };
            carry(container, wanted, "resources");
            carry(container, wanted, "resizePolicy");
        }
    }
}

/// What a client writes beside the part: who manages which field.
fn carry_version(new: &mut Value, asked: &Value) {
    if let (Some(metadata), Some(asked)) = (new.get_mut("metadata"), asked.get("metadata"))
        && asked.get("managedFields").is_some()
    {
        carry(metadata, asked, "managedFields");
    }
}
