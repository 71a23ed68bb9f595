//! Strict field checking (in progress).
use serde_json::Value;
use crate::{kinds::ResourceInfo, status::ApiError};
/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SchemaReport {
    /// The first wrong type, worded as Go's decoder words it.
    pub type_error: Option<String>,
    /// `unknown field "spec.foo"`.
    pub unknown: Vec<String>,
}
impl SchemaReport {
    /// The 400 for a wrong type.
    pub fn decode_error(&self, info: &ResourceInfo) -> Option<ApiError> { let _ = info; None }
    /// The 400 under `fieldValidation=Strict`.
    pub fn strict_error(&self, info: &ResourceInfo, duplicates: &[String]) -> Option<ApiError> { let _ = (info, duplicates); None }
    /// The warnings under `fieldValidation=Warn`.
    pub fn warnings(&self, duplicates: &[String]) -> Vec<String> { self.unknown.iter().chain(duplicates).cloned().collect() }
}
/// Checks an object against its schema.
pub fn check(info: &ResourceInfo, object: &Value) -> SchemaReport { let _ = (info, object); SchemaReport::default() }
/// Removes fields the schema does not know.
pub fn prune(info: &ResourceInfo, object: &mut Value) { let _ = (info, object); }
/// Checks a body by its OpenAPI definition (`io.k8s.api.autoscaling.v1.Scale`).
pub fn check_definition(definition: &str, object: &Value) -> SchemaReport { let _ = (definition, object); SchemaReport::default() }
