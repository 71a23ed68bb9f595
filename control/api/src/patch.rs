//! The three patch formats: JSON patch, JSON merge patch, strategic merge patch.
//!
//! Input: the current object and a decoded patch document. Output: the patched object, not yet defaulted or validated.
//! Never looks at metadata rules ([`crate::meta`]) and never panics on foreign documents.

pub(crate) mod strategic;

use json_patch::PatchOperation;
use serde_json::Value;

use crate::{
    kinds::ResourceInfo,
    meta,
    schema::shape::Shape,
    status::{ApiError, Reason},
};

/// The most operations of one JSON patch, as upstream.
const MAX_OPERATIONS: usize = 10_000;

/// The most bytes that `copy` operations of one JSON patch may add up to, as upstream.
const MAX_COPIED_BYTES: usize = 3 << 20;

/// Applies an RFC 6902 patch.
pub fn json_patch(info: &ResourceInfo, current: &Value, patch: &Value) -> Result<Value, ApiError> {
    let operations = patch.as_array().map_or(0, Vec::len);
    if operations > MAX_OPERATIONS {
        let message =
            format!("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {operations}");
        return Err(ApiError::new(Reason::RequestEntityTooLarge, message));
    }
    let parsed: json_patch::Patch = serde_json::from_value(patch.clone())
        .map_err(|e| ApiError::bad_request(format!("error decoding patch: {e}")))?;
    let mut patched = current.clone();
    let mut copied = 0;
    for operation in &parsed.0 {
        // One at a time, so that a chain of copies that doubles the document is seen before it is made.
        copied += copied_bytes(&patched, operation);
        if copied > MAX_COPIED_BYTES {
            let message = format!("the copies of this JSON patch exceed {MAX_COPIED_BYTES} bytes");
            return Err(ApiError::new(Reason::RequestEntityTooLarge, message));
        }
        json_patch::patch(&mut patched, std::slice::from_ref(operation)).map_err(|e| {
            let message = format!(
                "the server rejected our request due to an error in our request: {} \"{}\": {e}",
                info.qualified_plural(),
                meta::name(current)
            );
            ApiError::new(Reason::Invalid, message)
        })?;
    }
    Ok(patched)
}

/// Applies an RFC 7386 patch.
pub fn merge_patch(_info: &ResourceInfo, current: &Value, patch: &Value) -> Result<Value, ApiError> {
    if !patch.is_object() {
        return Err(ApiError::bad_request("the patch is not a JSON object"));
    }
    let mut patched = current.clone();
    json_patch::merge(&mut patched, patch);
    Ok(patched)
}

/// Applies a strategic merge patch with the resource's merge keys.
pub fn strategic_merge(info: &ResourceInfo, current: &Value, patch: &Value) -> Result<Value, ApiError> {
    let Some(shape) = Shape::of_definition(info.definition) else {
        return Err(ApiError::unsupported_media_type(&[
            "application/json-patch+json",
            "application/merge-patch+json",
        ]));
    };
    let (Some(current), Some(patch)) = (current.as_object(), patch.as_object()) else {
        return Err(ApiError::bad_request("the patch is not a JSON object"));
    };
    strategic::merge_struct(Some(shape), current.clone(), patch).map(Value::Object)
}

fn copied_bytes(document: &Value, operation: &PatchOperation) -> usize {
    let PatchOperation::Copy(copy) = operation else { return 0 };
    document.pointer(copy.from.as_str()).map_or(0, |v| v.to_string().len())
}

#[cfg(test)]
mod tests;
