//! Nodes.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Errors, names, path::Path};
use crate::{
    status::FieldError,
    value::{list, text},
};

/// Checks a node.
pub(super) fn check(errors: &mut Errors, object: &Value) {
    let spec = Path::new("spec");
    let taints = spec.child("taints");
    let mut seen = BTreeSet::new();
    for (index, taint) in list(object, "/spec/taints").iter().enumerate() {
        let at = taints.index(index);
        let (key, value, effect) = (text(taint, "/key"), text(taint, "/value"), text(taint, "/effect"));
        for why in names::qualified_name(key) {
            errors.invalid(&at.child("key"), key, why);
        }
        errors.syntax(&at.child("value"), value, names::label_value(value));
        if effect.is_empty() {
            errors.required(&at.child("effect"));
        }
        errors.one_of(&at.child("effect"), effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        if !seen.insert((key, effect)) {
            let mut duplicate = FieldError::duplicate(&at, taint.clone());
            "taints must be unique by key and effect pair".clone_into(&mut duplicate.detail);
            errors.push(duplicate);
        }
    }
}

/// What may not change once it is set.
pub(super) fn update(errors: &mut Errors, new: &Value, old: &Value) {
    let spec = Path::new("spec");
    let before = list(old, "/spec/podCIDRs");
    if !before.is_empty() && before != list(new, "/spec/podCIDRs") {
        let why = "node updates may not change podCIDR except from \"\" to valid";
        errors.forbidden(&spec.child("podCIDRs"), why);
    }
    let before = text(old, "/spec/providerID");
    if !before.is_empty() && before != text(new, "/spec/providerID") {
        let why = "node updates may not change providerID except from \"\" to valid";
        errors.forbidden(&spec.child("providerID"), why);
    }
}
