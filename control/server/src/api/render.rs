//! From cached objects to what a client accepts: object, metadata only, or table. Pure.

use bytes::Bytes;
use control_api::{convert, kinds::ResourceInfo, status::ApiError, table};
use control_store::Revision;
use serde_json::{Map, Value, json};

use crate::{cache::Object, http::negotiate::Form};

/// Annotation of the bookmark that ends the initial events of a watch.
pub(crate) const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// The object as it is stored.
pub(crate) fn stored(object: &Object) -> Result<Value, ApiError> {
    object.value().map_err(ApiError::internal)
}

/// One object in the form that the client accepts.
pub(crate) fn one(info: &ResourceInfo, object: &Object, form: Form) -> Result<Bytes, ApiError> {
    if matches!(form, Form::Object | Form::Discovery(_)) && convert::is_identity(info) {
        return Ok(object.body.clone());
    }
    Ok(Bytes::from(shape(info, stored(object)?, form).to_string()))
}

/// A decoded object, as it is stored, in the form that the client accepts and the version of the request.
pub(crate) fn shape(info: &ResourceInfo, object: Value, form: Form) -> Value {
    match form {
        Form::Object | Form::Discovery(_) => convert::from_stored(info, object),
        Form::Metadata => metadata_only(&object),
        Form::Table(include) => {
            let version = object.pointer("/metadata/resourceVersion").cloned().unwrap_or_default();
            let mut table = table::render(info, &[&object], jiff::Timestamp::now(), include);
            table["metadata"] = json!({ "resourceVersion": version });
            table
        }
    }
}

fn metadata_only(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_default(),
    })
}

/// `metadata` of a list.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListMeta {
    /// Revision of the list.
    pub revision: Revision,
    /// Token of the next page, empty on the last.
    pub token: String,
    /// Objects after this page, where known.
    pub remaining: Option<usize>,
}

impl ListMeta {
    /// As JSON.
    pub(crate) fn json(&self) -> Value {
        let mut meta = Map::new();
        meta.insert("resourceVersion".to_owned(), json!(self.revision.to_string()));
        if !self.token.is_empty() {
            meta.insert("continue".to_owned(), json!(self.token));
        }
        if let Some(remaining) = self.remaining.filter(|count| *count > 0) {
            meta.insert("remainingItemCount".to_owned(), json!(remaining));
        }
        Value::Object(meta)
    }
}

/// A list as a table.
pub(crate) fn table(
    info: &ResourceInfo,
    objects: &[impl AsRef<Object>],
    meta: &ListMeta,
    include: table::Include,
) -> Result<Value, ApiError> {
    let values = objects.iter().map(|object| stored(object.as_ref())).collect::<Result<Vec<_>, _>>()?;
    let references: Vec<&Value> = values.iter().collect();
    let mut table = table::render(info, &references, jiff::Timestamp::now(), include);
    table["metadata"] = meta.json();
    Ok(table)
}

/// One item of a list.
pub(crate) fn item(info: &ResourceInfo, object: &Object, form: Form) -> Result<Bytes, ApiError> {
    match form {
        Form::Metadata => Ok(Bytes::from(metadata_only(&stored(object)?).to_string())),
        _ => one(info, object, Form::Object),
    }
}

/// The text before the first item of a list.
pub(crate) fn list_head(info: &ResourceInfo, meta: &ListMeta, form: Form) -> String {
    let (kind, version) = match form {
        Form::Metadata => ("PartialObjectMetadataList", "meta.k8s.io/v1".to_owned()),
        _ => (info.list_kind, info.api_version()),
    };
    let (kind, version) = (json!(kind), json!(version));
    format!("{{\"kind\":{kind},\"apiVersion\":{version},\"metadata\":{},\"items\":[", meta.json())
}

/// The object of a bookmark: nothing but a revision.
pub(crate) fn bookmark(info: &ResourceInfo, revision: Revision, initial_end: bool, form: Form) -> Value {
    let mut metadata = json!({ "resourceVersion": revision.to_string(), "creationTimestamp": null });
    if initial_end {
        metadata["annotations"] = json!({ INITIAL_EVENTS_END: "true" });
    }
    let object = json!({ "kind": info.kind, "apiVersion": info.api_version(), "metadata": metadata });
    match form {
        Form::Object | Form::Discovery(_) => object,
        Form::Metadata => metadata_only(&object),
        Form::Table(_) => json!({
            "kind": "Table",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": { "resourceVersion": revision.to_string() },
            "columnDefinitions": null,
            "rows": [{ "cells": [], "object": metadata_only(&object) }],
        }),
    }
}
