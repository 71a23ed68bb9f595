//! placeholder
use serde_json::Value;
use crate::kinds::ResourceInfo;
/// Fills in upstream's defaults, in place; idempotent. Call on create, update and after patches.
pub fn apply(info: &ResourceInfo, object: &mut Value) { let _ = (info, object); }
