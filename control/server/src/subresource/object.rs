//! `status`, `approval`, `scale`, `finalize`, `ephemeralcontainers` and `resize`: views of a stored object that are read and written on their own.

use control_api::{patch, scale, schema, status::ApiError};
use http::StatusCode;
use serde_json::Value;

use crate::{
    api::{
        Api,
        dispatch::{ResourceRequest, object_reply},
        options::{self, WriteOptions},
        render,
        write::{ObjectRef, Part, Write, decode_any, decode_object},
    },
    cache::Object,
    http::{
        body::{self, Reply},
        negotiate,
    },
};

/// Definition of the Scale kind, for checking its fields.
const SCALE: &str = "io.k8s.api.autoscaling.v1.Scale";

/// Read or write a subresource that has the shape of its object.
pub(super) async fn serve_part(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let part = match request.target.sub() {
        "approval" => Part::APPROVAL,
        "status" => Part::STATUS,
        "ephemeralcontainers" => Part::EPHEMERAL_CONTAINERS,
        "resize" => Part::RESIZE,
        _ => Part::SPEC,
    };
    let form = negotiate::accept(request.headers(), &request.query)?;
    match request.target.verb {
        "patch" => {
            let (info, updated, warnings) = api.patch_object(request, part).await?;
            object_reply(StatusCode::OK, info, &updated.object(), form, &warnings)
        }
        "update" => {
            let ResourceRequest { target, query, user, http } = request;
            let info = target.info;
            let mut write = Write::new(&user, WriteOptions::parse(&query, http.headers())?);
            let format = negotiate::body_format(http.headers())?;
            let bytes = body::read(http.into_body()).await?;
            let object = decode_object(info, &bytes, format, &mut write)?;
            let name = target.name.as_deref().unwrap_or_default();
            let named = ObjectRef { info, namespace: target.namespace.as_deref(), name };
            let updated = api.update(named, part, &mut write, |_, _| Ok(object.clone())).await?;
            object_reply(StatusCode::OK, info, &updated.object(), form, &write.warnings)
        }
        _ => {
            let ObjectRef { info, namespace, name } = request.object()?;
            let freshness = options::freshness(info, &request.query)?;
            let object = api.get_object(info, namespace, name, freshness).await?;
            Ok(body::json_bytes(StatusCode::OK, render::one(info, &object, form)?))
        }
    }
}

/// Read or write the Scale of a workload.
pub(super) async fn serve_scale(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let info = request.target.info;
    if request.target.verb == "get" {
        let ObjectRef { namespace, name, .. } = request.object()?;
        let freshness = options::freshness(info, &request.query)?;
        let object = api.get_object(info, namespace, name, freshness).await?;
        return scale_reply(info, &object);
    }
    let ResourceRequest { target, query, user, http } = request;
    let mut write = Write::new(&user, WriteOptions::parse(&query, http.headers())?);
    let patches = target.verb == "patch";
    let media_type = negotiate::content_type(http.headers()).to_owned();
    let format = if patches { negotiate::BodyFormat::Json } else { negotiate::body_format(http.headers())? };
    let bytes = body::read(http.into_body()).await?;
    let (document, _) = decode_any(&bytes, format)?;
    let name = target.name.as_deref().unwrap_or_default();
    let named = ObjectRef { info, namespace: target.namespace.as_deref(), name };
    let change = |old: &Value, _: &mut Write<'_>| {
        let new_scale = if patches {
            patched(info, &scale::read(info, old)?, &media_type, &document)?
        } else {
            document.clone()
        };
        if let Some(error) = schema::check_definition(SCALE, &new_scale).decode_error(info) {
            return Err(error);
        }
        scale::write(info, old, &new_scale)
    };
    let updated = api.update(named, Part::SPEC, &mut write, change).await?;
    scale_reply(info, &updated.object())
}

fn patched(
    info: &control_api::kinds::ResourceInfo,
    current: &Value,
    media_type: &str,
    document: &Value,
) -> Result<Value, ApiError> {
    match media_type {
        "application/json-patch+json" => patch::json_patch(info, current, document),
        // A Scale has no lists, so that a strategic merge is a merge.
        "application/merge-patch+json" | "application/strategic-merge-patch+json" => {
            patch::merge_patch(info, current, document)
        }
        _ => Err(ApiError::unsupported_media_type(&[
            "application/json-patch+json",
            "application/merge-patch+json",
            "application/strategic-merge-patch+json",
        ])),
    }
}

fn scale_reply(info: &control_api::kinds::ResourceInfo, object: &Object) -> Result<Reply, ApiError> {
    let value = object.value().map_err(ApiError::internal)?;
    Ok(body::json(StatusCode::OK, &scale::read(info, &value)?))
}
