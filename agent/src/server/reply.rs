//! Small answers: text, JSON, errors.

use bytes::Bytes;
use cri_shim_streaming::BoxBody;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use serde::Serialize;

use crate::contracts::LookupError;

/// What every handler returns.
pub(super) type Reply = Response<BoxBody>;

/// Plain text.
pub(super) fn text(status: StatusCode, text: impl Into<String>) -> Reply {
    with_type(status, "text/plain; charset=utf-8", text.into())
}

/// A JSON document.
pub(super) fn json(value: &impl Serialize) -> Reply {
    match serde_json::to_vec(value) {
        Ok(bytes) => with_type(StatusCode::OK, "application/json", bytes),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// Any content.
pub(super) fn with_type(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Reply {
    let body = Full::new(body.into()).map_err(|never| match never {}).boxed();
    let mut reply = Response::new(body);
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

/// A pod or container that cannot be served; the codes are upstream's.
pub(super) fn lookup_error(error: &LookupError) -> Reply {
    let status = match error {
        LookupError::PodNotFound { .. }
        | LookupError::ContainerNotFound { .. }
        | LookupError::NotRunning { .. } => StatusCode::NOT_FOUND,
        LookupError::NotStarted { .. } | LookupError::NoPrevious { .. } => StatusCode::BAD_REQUEST,
    };
    text(status, error.to_string())
}

/// A failed CRI call.
pub(super) fn runtime_error(error: &tonic::Status) -> Reply {
    let status = match error.code() {
        tonic::Code::NotFound => StatusCode::NOT_FOUND,
        tonic::Code::InvalidArgument => StatusCode::BAD_REQUEST,
        tonic::Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        tonic::Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    text(status, error.message())
}
