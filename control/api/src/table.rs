//! Tables (in progress).
use serde_json::Value;
use crate::kinds::ResourceInfo;
/// What each row carries as its `object`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    /// Nothing.
    None,
    /// PartialObjectMetadata.
    Metadata,
    /// The whole object.
    Object,
}
/// Renders a `meta.k8s.io/v1` Table; the caller sets its `metadata` (list resourceVersion, continue).
pub fn render(info: &ResourceInfo, objects: &[&Value], now: jiff::Timestamp, include: Include) -> Value { let _ = (info, objects, now, include); Value::Null }
