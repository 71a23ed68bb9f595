//! Patch documents: which kind a request holds, and the change it makes.

use bytes::Bytes;
use control_api::{kinds::ResourceInfo, patch, status::ApiError};
use serde_json::Value;

use super::write::{Write, check_fields, decode_any};
use crate::http::negotiate::BodyFormat;

/// The media types of patches that are understood.
const SERVED: &[&str] =
    &["application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json"];

/// A decoded patch.
#[derive(Clone, Debug)]
pub struct Patch {
    kind: Kind,
    document: Value,
    duplicates: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Json,
    Merge,
    Strategic,
}

impl Patch {
    /// Decode a patch by its media type.
    pub fn decode(media_type: &str, body: &Bytes) -> Result<Self, ApiError> {
        let kind = match media_type {
            "application/json-patch+json" => Kind::Json,
            "application/merge-patch+json" => Kind::Merge,
            "application/strategic-merge-patch+json" => Kind::Strategic,
            _ => return Err(ApiError::unsupported_media_type(SERVED)),
        };
        let (document, duplicates) = decode_any(body, BodyFormat::Json)?;
        Ok(Self { kind, document, duplicates })
    }

    /// The patched object, its fields checked as the write asks.
    pub fn apply(&self, info: &ResourceInfo, old: &Value, write: &mut Write<'_>) -> Result<Value, ApiError> {
        let new = match self.kind {
            Kind::Json => patch::json_patch(info, old, &self.document),
            Kind::Merge => patch::merge_patch(info, old, &self.document),
            Kind::Strategic => patch::strategic_merge(info, old, &self.document),
        }?;
        check_fields(info, new, &self.duplicates, write)
    }
}
