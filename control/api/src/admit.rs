//! Built-in admission (in progress).
use serde_json::Value;
use crate::status::ApiError;
/// The ServiceAccount a pod asks for.
pub fn service_account_name(pod: &Value) -> &str { let n = crate::value::text(pod, "/spec/serviceAccountName"); if n.is_empty() { "default" } else { n } }
/// What admission adds to a new pod.
pub fn pod(pod: &mut Value, service_account: Option<&Value>, volume_suffix: &str) -> Result<(), ApiError> { let _ = (pod, service_account, volume_suffix); Ok(()) }
/// What admission adds to a new node.
pub fn node(node: &mut Value) { let _ = node; }
