//! Content negotiation: which form of an answer the client accepts, and in which form it sent a body. Pure.

use control_api::{status::ApiError, table::Include};
use http::{HeaderMap, header};

use super::query::Query;

/// The media types that answers come in, for the 406.
const SERVED: &[&str] = &["application/json"];

/// Media type of protobuf bodies.
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// The object or list itself.
    Object,
    /// `PartialObjectMetadata` or its list.
    Metadata,
    /// `meta.k8s.io` Table with what each row carries.
    Table(Include),
    /// `APIGroupDiscoveryList` of that version (`v2`, `v2beta1`).
    Discovery(&'static str),
}

/// The first form of the Accept header that is served.
pub(crate) fn accept(headers: &HeaderMap, query: &Query) -> Result<Form, ApiError> {
    let mut any = false;
    for value in headers.get_all(header::ACCEPT) {
        for range in value.to_str().unwrap_or_default().split(',').map(str::trim).filter(|r| !r.is_empty()) {
            any = true;
            if let Some(form) = media_range(range, query) {
                return Ok(form);
            }
        }
    }
    if any { Err(ApiError::not_acceptable(SERVED)) } else { Ok(Form::Object) }
}

fn media_range(range: &str, query: &Query) -> Option<Form> {
    let mut parts = range.split(';').map(str::trim);
    if !matches!(parts.next()?, "application/json" | "application/*" | "*/*" | "text/*") {
        return None;
    }
    let (mut kind, mut group, mut version) = ("", "", "");
    for (key, value) in parts.filter_map(|part| part.split_once('=')) {
        match key {
            "as" => kind = value,
            "g" => group = value,
            "v" => version = value,
            _ => {}
        }
    }
    match (kind, group, version) {
        ("", ..) => Some(Form::Object),
        ("Table", "meta.k8s.io", "v1" | "v1beta1") => Some(Form::Table(include(query))),
        ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1" | "v1beta1") => {
            Some(Form::Metadata)
        }
        ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2") => Some(Form::Discovery("v2")),
        ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2beta1") => Some(Form::Discovery("v2beta1")),
        _ => None,
    }
}

fn include(query: &Query) -> Include {
    match query.get("includeObject") {
        "None" => Include::None,
        "Object" => Include::Object,
        _ => Include::Metadata,
    }
}

/// How a request body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyFormat {
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// Kubernetes' protobuf.
    Protobuf,
}

/// The format of an object in a body.
pub(crate) fn body_format(headers: &HeaderMap) -> Result<BodyFormat, ApiError> {
    match content_type(headers) {
        "" | "application/json" => Ok(BodyFormat::Json),
        "application/yaml" => Ok(BodyFormat::Yaml),
        PROTOBUF => Ok(BodyFormat::Protobuf),
        _ => Err(ApiError::unsupported_media_type(&["application/json", "application/yaml", PROTOBUF])),
    }
}

/// The media type of the body without parameters.
pub(crate) fn content_type(headers: &HeaderMap) -> &str {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(accepted: &str, want: Option<Form>) {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, accepted.parse().unwrap());
        assert_eq!(accept(&headers, &Query::default()).ok(), want, "{accepted}");
    }

    #[test]
    fn the_first_served_range_wins() {
        check("application/json", Some(Form::Object));
        check("application/vnd.kubernetes.protobuf,application/json", Some(Form::Object));
        check("application/vnd.kubernetes.protobuf", None);
        check(
            "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json",
            Some(Form::Table(Include::Metadata)),
        );
        check("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1", Some(Form::Metadata));
        check(
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json",
            Some(Form::Discovery("v2")),
        );
        check("application/json;as=Nothing;g=x;v=v1", None);
        check("*/*", Some(Form::Object));
    }
}
