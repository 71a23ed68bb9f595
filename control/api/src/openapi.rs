//! OpenAPI (in progress).
use serde_json::Value;
/// `/openapi/v2` as JSON.
pub fn v2_json() -> Vec<u8> { Vec::new() }
/// `/openapi/v2` as gnostic protobuf.
pub fn v2_protobuf() -> Vec<u8> { Vec::new() }
/// `/openapi/v3`.
pub fn v3_index() -> Value { Value::Null }
/// `/openapi/v3/<path>`, path without leading slash: `api/v1`, `apis/apps/v1`.
pub fn v3_group(path: &str) -> Option<Vec<u8>> { let _ = path; None }
