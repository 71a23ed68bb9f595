//! Errors as clients see them: an HTTP code and a `metav1.Status`.
//!
//! Input: what went wrong, in this crate's words. Output: upstream's reasons, codes, wording and details. Never logs
//! and never decides whether to retry.

use serde_json::{Map, Value, json};

use crate::kinds::ResourceInfo;

/// `metav1.StatusReason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// 400.
    BadRequest,
    /// 401.
    Unauthorized,
    /// 403.
    Forbidden,
    /// 404.
    NotFound,
    /// 405.
    MethodNotAllowed,
    /// 406.
    NotAcceptable,
    /// 409, the name is taken.
    AlreadyExists,
    /// 409, a precondition failed.
    Conflict,
    /// 410, the resourceVersion or continue token is too old.
    Expired,
    /// 410, gone for good.
    Gone,
    /// 413.
    RequestEntityTooLarge,
    /// 415.
    UnsupportedMediaType,
    /// 422.
    Invalid,
    /// 429.
    TooManyRequests,
    /// 500.
    InternalError,
    /// 503.
    ServiceUnavailable,
    /// 504, the request ran into its deadline.
    Timeout,
    /// 500, the server could not do it in time and the client should retry.
    ServerTimeout,
}

impl Reason {
    /// The name in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "BadRequest",
            Self::Unauthorized => "Unauthorized",
            Self::Forbidden => "Forbidden",
            Self::NotFound => "NotFound",
            Self::MethodNotAllowed => "MethodNotAllowed",
            Self::NotAcceptable => "NotAcceptable",
            Self::AlreadyExists => "AlreadyExists",
            Self::Conflict => "Conflict",
            Self::Expired => "Expired",
            Self::Gone => "Gone",
            Self::RequestEntityTooLarge => "RequestEntityTooLarge",
            Self::UnsupportedMediaType => "UnsupportedMediaType",
            Self::Invalid => "Invalid",
            Self::TooManyRequests => "TooManyRequests",
            Self::InternalError => "InternalError",
            Self::ServiceUnavailable => "ServiceUnavailable",
            Self::Timeout => "Timeout",
            Self::ServerTimeout => "ServerTimeout",
        }
    }

    /// The HTTP code.
    pub fn code(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::NotAcceptable => 406,
            Self::AlreadyExists | Self::Conflict => 409,
            Self::Expired | Self::Gone => 410,
            Self::RequestEntityTooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::Invalid => 422,
            Self::TooManyRequests => 429,
            Self::InternalError | Self::ServerTimeout => 500,
            Self::ServiceUnavailable => 503,
            Self::Timeout => 504,
        }
    }
}

/// One entry of `details.causes`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Machine-readable cause, for example `FieldValueInvalid`.
    pub reason: String,
    /// Text.
    pub message: String,
    /// Path of the field, or empty.
    pub field: String,
}

/// What an error is about: `details.name`, `group` and `kind`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The object's name.
    pub name: String,
    /// Its group.
    pub group: String,
    /// Its kind; a plural for most reasons, as upstream has it.
    pub kind: String,
}

/// A failed request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Why.
    pub reason: Reason,
    /// What the user reads.
    pub message: String,
    /// Which object it is about; boxed to keep errors small in results.
    pub subject: Option<Box<Subject>>,
    /// `details.causes`.
    pub causes: Vec<Cause>,
    /// `details.retryAfterSeconds`, 0 for none.
    pub retry_after_seconds: u32,
    /// `metadata.continue`, a token to go on with after an expired list.
    pub continue_token: String,
}

impl ApiError {
    /// An error with a reason and a text only.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            subject: None,
            causes: Vec::new(),
            retry_after_seconds: 0,
            continue_token: String::new(),
        }
    }

    fn about(reason: Reason, info: &ResourceInfo, name: &str, message: String) -> Self {
        let subject =
            Subject { name: name.to_owned(), group: info.group.to_owned(), kind: info.plural.to_owned() };
        Self { subject: Some(Box::new(subject)), ..Self::new(reason, message) }
    }

    /// `pods "x" not found`.
    pub fn not_found(info: &ResourceInfo, name: &str) -> Self {
        let message = format!("{} \"{name}\" not found", info.qualified_plural());
        Self::about(Reason::NotFound, info, name, message)
    }

    /// The answer for a path that nothing serves.
    pub fn unknown_path() -> Self {
        Self::new(Reason::NotFound, "the server could not find the requested resource")
    }

    /// `pods "x" already exists`.
    pub fn already_exists(info: &ResourceInfo, name: &str) -> Self {
        let message = format!("{} \"{name}\" already exists", info.qualified_plural());
        Self::about(Reason::AlreadyExists, info, name, message)
    }

    /// `Operation cannot be fulfilled on pods "x": why`.
    pub fn conflict(info: &ResourceInfo, name: &str, why: &str) -> Self {
        let plural = info.qualified_plural();
        let message = format!("Operation cannot be fulfilled on {plural} \"{name}\": {why}");
        Self::about(Reason::Conflict, info, name, message)
    }

    /// The resourceVersion of an update is not the stored one.
    pub fn stale(info: &ResourceInfo, name: &str) -> Self {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(info, name, why)
    }

    /// `pods "x" is forbidden: why`.
    pub fn forbidden(info: &ResourceInfo, name: &str, why: &str) -> Self {
        let plural = info.qualified_plural();
        let message = if name.is_empty() {
            format!("{plural} is forbidden: {why}")
        } else {
            format!("{plural} \"{name}\" is forbidden: {why}")
        };
        Self::about(Reason::Forbidden, info, name, message)
    }

    /// `Pod "x" is invalid: spec.foo: Required value`, with one cause per field.
    pub fn invalid(info: &ResourceInfo, name: &str, errors: &[FieldError]) -> Self {
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let text = match texts.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let message = format!("{} \"{name}\" is invalid: {text}", info.qualified_kind());
        let subject =
            Subject { name: name.to_owned(), group: info.group.to_owned(), kind: info.kind.to_owned() };
        Self {
            subject: Some(Box::new(subject)),
            causes: errors.iter().map(FieldError::cause).collect(),
            ..Self::new(Reason::Invalid, message)
        }
    }

    /// 400 with this text.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Reason::BadRequest, message)
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(Reason::Unauthorized, "Unauthorized")
    }

    /// 405 for a verb the resource does not have.
    pub fn method_not_allowed(info: &ResourceInfo, verb: &str) -> Self {
        let message = format!("{verb} is not supported on resources of kind \"{}\"", info.qualified_plural());
        Self::about(Reason::MethodNotAllowed, info, "", message)
    }

    /// 406, listing what is served.
    pub fn not_acceptable(accepted: &[&str]) -> Self {
        let list = accepted.join(", ");
        Self::new(Reason::NotAcceptable, format!("only the following media types are accepted: {list}"))
    }

    /// 415, listing what is understood.
    pub fn unsupported_media_type(accepted: &[&str]) -> Self {
        let list = accepted.join(", ");
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {list}"
        );
        Self::new(Reason::UnsupportedMediaType, message)
    }

    /// 410, the resourceVersion or continue token is older than what is kept.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(Reason::Expired, message)
    }

    /// 504 for a resourceVersion from the future.
    pub fn resource_version_too_large(asked: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {asked}, current: {current}");
        Self {
            causes: vec![Cause {
                reason: "ResourceVersionTooLarge".into(),
                message: "Too large resource version".into(),
                field: String::new(),
            }],
            retry_after_seconds: 1,
            ..Self::new(Reason::Timeout, message)
        }
    }

    /// 429 with a hint when to come again.
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        Self { retry_after_seconds, ..Self::new(Reason::TooManyRequests, message) }
    }

    /// 500; `detail` is shown to the client.
    pub fn internal(detail: impl std::fmt::Display) -> Self {
        Self::new(Reason::InternalError, format!("Internal error occurred: {detail}"))
    }

    /// The HTTP code.
    pub fn code(&self) -> u16 {
        self.reason.code()
    }

    /// The `metav1.Status` document.
    pub fn to_status(&self) -> Value {
        let mut details = Map::new();
        if let Some(subject) = &self.subject {
            let texts = [("name", &subject.name), ("group", &subject.group), ("kind", &subject.kind)];
            for (key, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
                details.insert(key.to_owned(), json!(text));
            }
        }
        if !self.causes.is_empty() {
            details.insert("causes".to_owned(), self.causes.iter().map(Cause::to_json).collect());
        }
        if self.retry_after_seconds > 0 {
            details.insert("retryAfterSeconds".to_owned(), json!(self.retry_after_seconds));
        }
        let mut metadata = Map::new();
        if !self.continue_token.is_empty() {
            metadata.insert("continue".to_owned(), json!(self.continue_token));
        }
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata,
            "status": "Failure",
            "message": self.message,
            "reason": self.reason.as_str(),
            "code": self.code(),
        });
        if !details.is_empty() {
            status["details"] = Value::Object(details);
        }
        status
    }
}

impl Cause {
    fn to_json(&self) -> Value {
        let mut out = Map::new();
        for (key, text) in [("reason", &self.reason), ("message", &self.message), ("field", &self.field)] {
            if !text.is_empty() {
                out.insert(key.to_owned(), json!(text));
            }
        }
        Value::Object(out)
    }
}

/// The `Status` of a successful deletion (or another request without an object to return).
pub fn success(info: &ResourceInfo, name: &str, uid: &str) -> Value {
    let mut details = json!({ "name": name, "kind": info.plural, "uid": uid });
    if !info.group.is_empty() {
        details["group"] = json!(info.group);
    }
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details })
}

/// What is wrong with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldErrorKind {
    /// `Required value`.
    Required,
    /// `Invalid value`.
    Invalid,
    /// `Unsupported value`.
    NotSupported,
    /// `Forbidden`.
    Forbidden,
    /// `Duplicate value`.
    Duplicate,
    /// `Too long`.
    TooLong,
    /// `Too many`.
    TooMany,
    /// `Not found`.
    NotFound,
}

/// A field and what is wrong with it; `Display` is upstream's text.
#[derive(Debug, Clone, PartialEq)]
pub struct FieldError {
    /// What is wrong.
    pub kind: FieldErrorKind,
    /// Path such as `spec.ports[0].nodePort`.
    pub field: String,
    /// The offending value, shown for the kinds that show one.
    pub value: Value,
    /// Text after the value, or empty.
    pub detail: String,
}

impl FieldError {
    /// `field: Required value: detail`.
    pub fn required(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::with(FieldErrorKind::Required, field, Value::Null, detail)
    }

    /// `field: Invalid value: value: detail`.
    pub fn invalid(field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::with(FieldErrorKind::Invalid, field, value.into(), detail)
    }

    /// `field: Unsupported value: "x": supported values: "a", "b"`.
    pub fn not_supported(field: impl Into<String>, value: impl Into<Value>, supported: &[&str]) -> Self {
        let quoted: Vec<String> = supported.iter().map(|s| format!("\"{s}\"")).collect();
        let detail = format!("supported values: {}", quoted.join(", "));
        Self::with(FieldErrorKind::NotSupported, field, value.into(), detail)
    }

    /// `field: Forbidden: detail`.
    pub fn forbidden(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::with(FieldErrorKind::Forbidden, field, Value::Null, detail)
    }

    /// `field: Duplicate value: value`.
    pub fn duplicate(field: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::with(FieldErrorKind::Duplicate, field, value.into(), "")
    }

    /// `field: Not found: value`.
    pub fn not_found(field: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::with(FieldErrorKind::NotFound, field, value.into(), "")
    }

    /// `field: Too long: may not be more than N bytes`.
    pub fn too_long(field: impl Into<String>, most: usize) -> Self {
        let detail = format!("may not be more than {most} bytes");
        Self::with(FieldErrorKind::TooLong, field, Value::Null, detail)
    }

    fn with(kind: FieldErrorKind, field: impl Into<String>, value: Value, detail: impl Into<String>) -> Self {
        Self { kind, field: field.into(), value, detail: detail.into() }
    }

    /// The text without the field's name, as a cause carries it.
    pub fn body(&self) -> String {
        let label = match self.kind {
            FieldErrorKind::Required => "Required value",
            FieldErrorKind::Invalid => "Invalid value",
            FieldErrorKind::NotSupported => "Unsupported value",
            FieldErrorKind::Forbidden => "Forbidden",
            FieldErrorKind::Duplicate => "Duplicate value",
            FieldErrorKind::TooLong => "Too long",
            FieldErrorKind::TooMany => "Too many",
            FieldErrorKind::NotFound => "Not found",
        };
        let mut text = label.to_owned();
        let shows_value = matches!(
            self.kind,
            FieldErrorKind::Invalid
                | FieldErrorKind::NotSupported
                | FieldErrorKind::Duplicate
                | FieldErrorKind::NotFound
        );
        if shows_value {
            text = format!("{text}: {}", self.value);
        }
        if !self.detail.is_empty() {
            text = format!("{text}: {}", self.detail);
        }
        text
    }

    fn cause(&self) -> Cause {
        let reason = match self.kind {
            FieldErrorKind::Required => "FieldValueRequired",
            FieldErrorKind::Invalid => "FieldValueInvalid",
            FieldErrorKind::NotSupported => "FieldValueNotSupported",
            FieldErrorKind::Forbidden => "FieldValueForbidden",
            FieldErrorKind::Duplicate => "FieldValueDuplicate",
            FieldErrorKind::TooLong => "FieldValueTooLong",
            FieldErrorKind::TooMany => "FieldValueTooMany",
            FieldErrorKind::NotFound => "FieldValueNotFound",
        };
        Cause { reason: reason.to_owned(), message: self.body(), field: self.field.clone() }
    }
}

impl std::fmt::Display for FieldError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.field, self.body())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;

    #[test]
    fn wording_is_upstreams() {
        let pods = kinds::find("", "v1", "pods").unwrap();
        let deployments = kinds::find("apps", "v1", "deployments").unwrap();
        assert_eq!(ApiError::not_found(pods, "x").message, "pods \"x\" not found");
        assert_eq!(
            ApiError::already_exists(deployments, "x").message,
            "deployments.apps \"x\" already exists"
        );
        assert_eq!(
            ApiError::stale(pods, "x").message,
            "Operation cannot be fulfilled on pods \"x\": the object has been modified; please apply your \
             changes to the latest version and try again"
        );
        let one = FieldError::invalid("spec.replicas", -1, "must be greater than or equal to 0");
        assert_eq!(
            ApiError::invalid(deployments, "x", std::slice::from_ref(&one)).message,
            "Deployment.apps \"x\" is invalid: spec.replicas: Invalid value: -1: must be greater than or equal \
             to 0"
        );
        let two = FieldError::not_supported("spec.type", "Foo", &["A", "B"]);
        let status = ApiError::invalid(pods, "x", &[one, two]).to_status();
        assert_eq!(status["code"], 422);
        assert_eq!(status["details"]["kind"], "Pod");
        assert_eq!(
            status["details"]["causes"][1]["message"],
            "Unsupported value: \"Foo\": supported values: \"A\", \"B\""
        );
    }
}
