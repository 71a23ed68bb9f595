//! Validation (in progress).
use serde_json::Value;
use crate::{kinds::ResourceInfo, status::FieldError};
pub mod names;
/// Everything wrong with a new object.
pub fn create(info: &ResourceInfo, object: &Value) -> Vec<FieldError> { let _ = (info, object); Vec::new() }
/// Everything wrong with the new form of an object.
pub fn update(info: &ResourceInfo, new: &Value, old: &Value) -> Vec<FieldError> { let _ = (info, new, old); Vec::new() }
/// Everything wrong with a status write.
pub fn status_update(info: &ResourceInfo, new: &Value, old: &Value) -> Vec<FieldError> { let _ = (info, new, old); Vec::new() }
