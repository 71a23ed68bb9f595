//! Certificate requests: who asked is what the server saw, not what the request says; and nobody becomes master by one.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use control_api::{kinds::ResourceInfo, meta, status::ApiError};
use serde_json::{Map, Value, json};
use x509_parser::{
    certification_request::X509CertificationRequest, pem::parse_x509_pem, prelude::FromDer as _,
};

use crate::{
    api::write::now,
    auth::{MASTERS, User},
};

/// Who asks becomes part of a new request.
pub(super) fn create(user: &User, info: &ResourceInfo, request: &mut Value) -> Result<(), ApiError> {
    let signer = request.pointer("/spec/signerName").and_then(Value::as_str).unwrap_or_default();
    if signer == "kubernetes.io/kube-apiserver-client" && organizations(request).iter().any(|o| o == MASTERS)
    {
        let why = format!("use of {signer} signer with {MASTERS} group is not allowed");
        return Err(ApiError::forbidden(info, meta::name(request), &why));
    }
    let Some(spec) = request.get_mut("spec").and_then(Value::as_object_mut) else { return Ok(()) };
    spec.insert("username".to_owned(), json!(user.name));
    spec.insert("groups".to_owned(), json!(user.groups));
    let extra: Map<String, Value> =
        user.extra.iter().map(|(key, value)| (key.clone(), json!([value]))).collect();
    for (field, value) in [("uid", json!(user.uid)), ("extra", Value::Object(extra))] {
        let is_empty = value == "" || value.as_object().is_some_and(Map::is_empty);
        if is_empty {
            spec.remove(field);
        } else {
            spec.insert(field.to_owned(), value);
        }
    }
    Ok(())
}

/// Conditions that come without times get the present one.
pub(super) fn date_conditions(request: &mut Value) {
    let conditions = request.pointer_mut("/status/conditions").and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten() {
        let Some(condition) = condition.as_object_mut() else { continue };
        for field in ["lastUpdateTime", "lastTransitionTime"] {
            if condition.get(field).is_none_or(Value::is_null) {
                condition.insert(field.to_owned(), json!(now()));
            }
        }
    }
}

/// The groups that the certificate would make its holder part of.
fn organizations(request: &Value) -> Vec<String> {
    let text = request.pointer("/spec/request").and_then(Value::as_str).unwrap_or_default();
    let Ok(pem) = STANDARD.decode(text) else { return Vec::new() };
    let Ok((_, pem)) = parse_x509_pem(&pem) else { return Vec::new() };
    let Ok((_, parsed)) = X509CertificationRequest::from_der(&pem.contents) else { return Vec::new() };
    let subject = &parsed.certification_request_info.subject;
    subject.iter_organization().filter_map(|group| group.as_str().ok()).map(str::to_owned).collect()
}
