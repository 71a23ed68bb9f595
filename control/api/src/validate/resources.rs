//! Requests and limits.

use serde_json::Value;

use super::{Errors, names, path::Path};
use crate::{quantity::Quantity, value::map};

/// Checks a container's (or a pod's) `resources`.
pub(super) fn check(errors: &mut Errors, at: &Path<'_>, resources: &Value) {
    let limits_at = at.child("limits");
    let requests_at = at.child("requests");
    for (name, amount) in map(resources, "/limits").into_iter().flatten() {
        amount_of(errors, &limits_at.key(name), name, amount);
    }
    for (name, amount) in map(resources, "/requests").into_iter().flatten() {
        amount_of(errors, &requests_at.key(name), name, amount);
        let Some(limit) = map(resources, "/limits").and_then(|l| l.get(name)) else { continue };
        let (Some(wanted), Some(most)) = (parse(amount), parse(limit)) else { continue };
        let shown = shown(limit);
        if wanted != most && !may_overcommit(name) {
            errors.invalid(
                &requests_at,
                text_of(amount),
                format!("must be equal to {name} limit of {shown}"),
            );
        } else if wanted > most {
            let why = format!("must be less than or equal to {name} limit of {shown}");
            errors.invalid(&requests_at, text_of(amount), why);
        }
    }
}

/// Reads a quantity from JSON, where it may be a number.
pub(super) fn parse(amount: &Value) -> Option<Quantity> {
    match amount {
        Value::String(text) => Quantity::parse(text).ok(),
        Value::Number(number) => Quantity::parse(&number.to_string()).ok(),
        _ => None,
    }
}

fn amount_of(errors: &mut Errors, at: &Path<'_>, name: &str, amount: &Value) {
    for why in names::qualified_name(name) {
        errors.invalid(at, name, why);
    }
    let native = !name.contains('/') || name.contains("kubernetes.io/");
    if native && !is_standard(name) {
        errors.invalid(at, name, "must be a standard resource for containers");
    }
    let Some(quantity) = parse(amount) else {
        errors.invalid(at, amount.clone(), crate::quantity::ParseQuantityError::Format.to_string());
        return;
    };
    if quantity.is_negative() {
        errors.invalid(at, text_of(amount), "must be greater than or equal to 0");
    }
    if !native && !quantity.is_integer() {
        errors.invalid(at, text_of(amount), "must be an integer");
    }
}

fn is_standard(name: &str) -> bool {
    matches!(name, "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-")
}

fn may_overcommit(name: &str) -> bool {
    matches!(name, "cpu" | "memory" | "ephemeral-storage")
}

fn text_of(amount: &Value) -> Value {
    Value::String(shown(amount))
}

fn shown(amount: &Value) -> String {
    amount.as_str().map_or_else(|| amount.to_string(), str::to_owned)
}
