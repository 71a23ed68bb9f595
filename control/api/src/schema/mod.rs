//! Strict field checking against the types' schemas.
//!
//! Input: a decoded object and its resource (or OpenAPI definition). Output: unknown fields and the first wrong type,
//! worded as kubectl users know them from upstream's decoder. Works on static tables ([`shape`]) made from
//! k8s-openapi's schemas; allocates only for what it reports. Never changes an object, but for [`prune`].

mod check;
pub(crate) mod shape;
#[path = "../gen/shapes.rs"]
#[rustfmt::skip] // Generated; one line per field.
mod shapes;

use serde_json::Value;
use shape::{Shape, Ty};

use crate::{
    kinds::{ResourceInfo, by_kind},
    quantity::Quantity,
    status::ApiError,
};

/// The most unknown fields that are listed; upstream truncates likewise.
const MAX_LISTED: usize = 100;

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SchemaReport {
    /// The first wrong type, worded as Go's decoder words it.
    pub type_error: Option<String>,
    /// `unknown field "spec.foo"`.
    pub unknown: Vec<String>,
}

impl SchemaReport {
    /// The 400 for a wrong type, whatever `fieldValidation` says.
    pub fn decode_error(&self, info: &ResourceInfo) -> Option<ApiError> {
        self.type_error.as_ref().map(|why| cannot_handle(info, why))
    }

    /// The 400 under `fieldValidation=Strict`; `duplicates` come from [`crate::decode`].
    pub fn strict_error(&self, info: &ResourceInfo, duplicates: &[String]) -> Option<ApiError> {
        if let Some(error) = self.decode_error(info) {
            return Some(error);
        }
        let all = self.warnings(duplicates);
        if all.is_empty() {
            return None;
        }
        Some(cannot_handle(info, &format!("strict decoding error: {}", all.join(", "))))
    }

    /// The warnings under `fieldValidation=Warn`.
    pub fn warnings(&self, duplicates: &[String]) -> Vec<String> {
        self.unknown.iter().chain(duplicates).cloned().collect()
    }
}

/// Checks an object of a resource.
pub fn check(info: &ResourceInfo, object: &Value) -> SchemaReport {
    check_definition(info.definition, object)
}

/// Checks a body by its OpenAPI definition, for example `io.k8s.api.autoscaling.v1.Scale`; definitions that are not
/// served are not checked.
pub fn check_definition(definition: &str, object: &Value) -> SchemaReport {
    Shape::of_definition(definition).map_or_else(SchemaReport::default, |shape| check::run(shape, object))
}

/// Checks an object by its own `apiVersion` and `kind`.
pub fn check_object(object: &Value) -> Option<SchemaReport> {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    by_kind(text("apiVersion"), text("kind")).map(|info| check(info, object))
}

/// Brings an object that passed [`check`] into the form upstream's types would write: without the fields the schema
/// does not know and without `null`s, quantities as canonical text.
pub fn prune(info: &ResourceInfo, object: &mut Value) {
    if let Some(shape) = Shape::of_definition(info.definition) {
        prune_struct(shape, object);
    }
}

fn prune_struct(shape: &Shape, value: &mut Value) {
    let Some(map) = value.as_object_mut() else { return };
    map.retain(|name, child| match shape.field(name) {
        None => false,
        Some(_) if child.is_null() => false,
        Some(field) => {
            prune_value(field.ty, child);
            true
        }
    });
}

fn prune_value(ty: Ty, value: &mut Value) {
    match (ty, value) {
        (Ty::Object(index), value) => prune_struct(Shape::at(index), value),
        (Ty::Quantity, Value::String(text)) => {
            if let Some(canonical) = Quantity::canonical(text.trim()).ok().filter(|c| c != text) {
                *text = canonical;
            }
        }
        (Ty::Quantity, value @ Value::Number(_)) => {
            if let Ok(canonical) = Quantity::canonical(&value.to_string()) {
                *value = Value::String(canonical);
            }
        }
        (Ty::List(of), Value::Array(items)) => items.iter_mut().for_each(|item| prune_value(*of, item)),
        (Ty::Map(of), Value::Object(map)) => map.values_mut().for_each(|item| prune_value(*of, item)),
        _ => {}
    }
}

fn cannot_handle(info: &ResourceInfo, why: &str) -> ApiError {
    let (kind, version) = (info.kind, info.version);
    ApiError::bad_request(format!("{kind} in version \"{version}\" cannot be handled as a {kind}: {why}"))
}
