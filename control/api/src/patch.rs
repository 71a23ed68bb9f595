//! Patches (in progress).
use serde_json::Value;
use crate::{kinds::ResourceInfo, status::ApiError};
/// RFC 6902.
pub fn json_patch(info: &ResourceInfo, current: &Value, patch: &Value) -> Result<Value, ApiError> { let _ = (info, patch); Ok(current.clone()) }
/// RFC 7386.
pub fn merge_patch(info: &ResourceInfo, current: &Value, patch: &Value) -> Result<Value, ApiError> { let _ = (info, patch); Ok(current.clone()) }
/// Strategic merge.
pub fn strategic_merge(info: &ResourceInfo, current: &Value, patch: &Value) -> Result<Value, ApiError> { let _ = (info, patch); Ok(current.clone()) }
