//! Bodies: reading a bounded request body, and making responses.

use std::convert::Infallible;

use bytes::Bytes;
use control_api::status::ApiError;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use serde_json::Value;

/// The largest request body, as upstream.
pub(crate) const MAX_BODY: usize = 3 << 20;

/// What can end a response body early.
pub(crate) type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// The body of every response.
pub(crate) type Body = UnsyncBoxBody<Bytes, BodyError>;
/// A response of this server.
pub(crate) type Reply = Response<Body>;

/// Read the whole request body.
pub(crate) async fn read(body: Incoming) -> Result<Bytes, ApiError> {
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::new(
            control_api::status::Reason::RequestEntityTooLarge,
            format!("Request entity too large: limit is {MAX_BODY}"),
        )),
        Err(error) => Err(ApiError::bad_request(format!("the request body could not be read: {error}"))),
    }
}

/// A body of known bytes.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// A body that is made while it is sent.
pub(crate) fn stream(chunks: impl futures::Stream<Item = Bytes> + Send + 'static) -> Body {
    use futures::StreamExt as _;
    StreamBody::new(chunks.map(|chunk| Ok::<_, BodyError>(Frame::data(chunk)))).boxed_unsync()
}

/// A response with a media type.
pub(crate) fn reply(status: StatusCode, media_type: &'static str, body: Body) -> Reply {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// Encoded JSON.
pub(crate) fn json_bytes(status: StatusCode, json: impl Into<Bytes>) -> Reply {
    reply(status, "application/json", full(json))
}

/// A JSON document.
pub(crate) fn json(status: StatusCode, value: &Value) -> Reply {
    json_bytes(status, value.to_string())
}

/// Plain text.
pub(crate) fn text(status: StatusCode, text: impl Into<String>) -> Reply {
    reply(status, "text/plain; charset=utf-8", full(text.into()))
}

/// The `Status` of an error.
pub(crate) fn error(error: &ApiError) -> Reply {
    let status = StatusCode::from_u16(error.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(status, &error.to_status());
    if error.retry_after_seconds > 0 {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(error.retry_after_seconds));
    }
    response
}
