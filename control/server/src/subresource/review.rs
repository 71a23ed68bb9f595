//! Questions about users: TokenReview, SubjectAccessReview and its relatives, SelfSubjectReview.

use control_api::status::ApiError;
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::token::token_user;
use crate::{
    api::{Api, dispatch::ResourceRequest, write::decode_any},
    auth::{
        AUTHENTICATED, User,
        authz::{self, Action},
        tokens::ISSUER,
    },
    http::{
        body::{self, Reply},
        negotiate,
    },
};

/// Answer a review.
pub(super) async fn serve(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let ResourceRequest { target, user, http, .. } = request;
    let format = negotiate::body_format(http.headers())?;
    let (mut review, _) = decode_any(&body::read(http.into_body()).await?, format)?;
    if !review.is_object() {
        return Err(ApiError::bad_request("the body is not an object"));
    }
    review["kind"] = json!(target.info.kind);
    review["apiVersion"] = json!(target.info.api_version());
    if !review["metadata"].is_object() {
        review["metadata"] = json!({});
    }
    review["status"] = match target.info.kind {
        "TokenReview" => token_review(api, &review),
        "SelfSubjectReview" => json!({ "userInfo": user_info(&user) }),
        "SelfSubjectAccessReview" => access(&user, &review)?,
        "SelfSubjectRulesReview" => rules(&user),
        "SubjectAccessReview" => access(&subject(&review)?, &review)?,
        "LocalSubjectAccessReview" => {
            let asked = text(&review, "/spec/resourceAttributes/namespace");
            let namespace = target.namespace.as_deref().unwrap_or_default();
            if asked != namespace {
                return Err(ApiError::bad_request(
                    "spec.resourceAttributes.namespace must match metadata.namespace",
                ));
            }
            access(&subject(&review)?, &review)?
        }
        _ => return Err(ApiError::unknown_path()),
    };
    Ok(body::json(StatusCode::CREATED, &review))
}

fn token_review(api: &Api, review: &Value) -> Value {
    let asked: Vec<&str> = review
        .pointer("/spec/audiences")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let audiences = if asked.is_empty() { vec![ISSUER] } else { asked };
    match token_user(api, text(review, "/spec/token"), &audiences) {
        Some((user, matched)) => {
            json!({ "authenticated": true, "user": user_info(&user), "audiences": matched })
        }
        None => json!({ "authenticated": false, "error": "[invalid bearer token]", "user": {} }),
    }
}

fn user_info(user: &User) -> Value {
    let mut info = json!({ "username": user.name, "groups": user.groups });
    if !user.uid.is_empty() {
        info["uid"] = json!(user.uid);
    }
    if !user.extra.is_empty() {
        let extra: Map<String, Value> =
            user.extra.iter().map(|(key, value)| (key.clone(), json!([value]))).collect();
        info["extra"] = Value::Object(extra);
    }
    info
}

/// The user that a SubjectAccessReview asks about.
fn subject(review: &Value) -> Result<User, ApiError> {
    let groups = review.pointer("/spec/groups").and_then(Value::as_array).into_iter().flatten();
    let mut groups: Vec<String> = groups.filter_map(Value::as_str).map(str::to_owned).collect();
    let name = text(review, "/spec/user").to_owned();
    if name.is_empty() && groups.is_empty() {
        return Err(ApiError::bad_request(
            "spec.user: Invalid value: \"\": at least one of user or group must be specified",
        ));
    }
    if !name.is_empty() {
        groups.push(AUTHENTICATED.to_owned());
    }
    Ok(User { name, uid: text(review, "/spec/uid").to_owned(), groups, extra: Vec::new() })
}

fn access(user: &User, review: &Value) -> Result<Value, ApiError> {
    let resource = &review["spec"]["resourceAttributes"];
    let path = &review["spec"]["nonResourceAttributes"];
    let allowed = if resource.is_object() {
        let plural = match text(resource, "/subresource") {
            "" => text(resource, "/resource").to_owned(),
            sub => format!("{}/{sub}", text(resource, "/resource")),
        };
        authz::allowed(
            user,
            Action::Resource {
                verb: text(resource, "/verb"),
                group: text(resource, "/group"),
                resource: &plural,
                namespace: text(resource, "/namespace"),
                name: text(resource, "/name"),
            },
        )
    } else if path.is_object() {
        authz::allowed(user, Action::Path { verb: text(path, "/verb"), path: text(path, "/path") })
    } else {
        return Err(ApiError::bad_request(
            "spec: exactly one of nonResourceAttributes or resourceAttributes must be specified",
        ));
    };
    Ok(if allowed { json!({ "allowed": true }) } else { json!({ "allowed": false }) })
}

/// What the user may do, as far as rules can say it.
fn rules(user: &User) -> Value {
    let all = user.is_in(crate::auth::MASTERS);
    let own = json!({
        "verbs": ["create"],
        "apiGroups": ["authorization.k8s.io", "authentication.k8s.io"],
        "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews"],
    });
    let everything = json!({ "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"] });
    json!({
        "resourceRules": if all { json!([everything, own]) } else { json!([own]) },
        "nonResourceRules": if all { json!([{ "verbs": ["*"], "nonResourceURLs": ["*"] }]) } else { json!([]) },
        "incomplete": !all,
    })
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}
