//! Patch documents: which kind a request holds, and the change it makes.

use bytes::Bytes;
use control_api::{
    apply::{self, Author},
    kinds::ResourceInfo,
    patch,
    status::{ApiError, FieldError},
};
use serde_json::Value;

use super::write::{Write, check_fields, decode_any, now};
use crate::http::negotiate::BodyFormat;

/// The media types of patches that are understood.
const SERVED: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

/// A decoded patch.
#[derive(Clone, Debug)]
pub(super) struct Patch {
    kind: Kind,
    document: Value,
    duplicates: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Json,
    Merge,
    Strategic,
    /// Server-side apply: the document is an object, or the part of it that the client declares.
    Apply,
}

impl Patch {
    /// Decode a patch by its media type.
    pub(super) fn decode(media_type: &str, body: &Bytes) -> Result<Self, ApiError> {
        let kind = match media_type {
            "application/json-patch+json" => Kind::Json,
            "application/merge-patch+json" => Kind::Merge,
            "application/strategic-merge-patch+json" => Kind::Strategic,
            "application/apply-patch+yaml" => Kind::Apply,
            _ => return Err(ApiError::unsupported_media_type(SERVED)),
        };
        let format = if kind == Kind::Apply { BodyFormat::Yaml } else { BodyFormat::Json };
        let (document, duplicates) = decode_any(body, format)?;
        Ok(Self { kind, document, duplicates })
    }

    /// The patched object, its fields checked as the write asks.
    pub(super) fn apply(
        &self,
        info: &ResourceInfo,
        old: &Value,
        write: &mut Write<'_>,
    ) -> Result<Value, ApiError> {
        let new = match self.kind {
            Kind::Json => patch::json_patch(info, old, &self.document),
            Kind::Merge => patch::merge_patch(info, old, &self.document),
            Kind::Strategic => patch::strategic_merge(info, old, &self.document),
            Kind::Apply => return self.apply_declared(info, Some(old), write),
        }?;
        check_fields(info, new, &self.duplicates, write)
    }

    /// Whether it is a server-side apply, which may create its object.
    pub(super) fn is_apply(&self) -> bool {
        self.kind == Kind::Apply
    }

    /// Server-side apply onto an object, or onto nothing.
    pub(super) fn apply_declared(
        &self,
        info: &ResourceInfo,
        live: Option<&Value>,
        write: &mut Write<'_>,
    ) -> Result<Value, ApiError> {
        if !write.options.named_manager {
            let missing = FieldError::required("fieldManager", "is required for apply patch");
            return Err(ApiError::bad_request(format!(
                "PatchOptions.meta.k8s.io \"\" is invalid: {missing}"
            )));
        }
        let declared = check_fields(info, self.document.clone(), &self.duplicates, write)?;
        let time = now();
        let author =
            Author { manager: &write.options.field_manager, subresource: &write.subresource, now: &time };
        apply::apply(info, live, &declared, &author, write.options.force)
    }
}
