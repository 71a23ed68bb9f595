//! The `scale` subresource of workloads: an `autoscaling/v1` Scale seen from the object, and written back.
//!
//! Input: a stored workload, or one and a Scale. Output: the Scale, or the workload with its replicas changed.

use serde_json::{Value, json};

use crate::{
    kinds::ResourceInfo,
    selector::LabelSelector,
    status::{ApiError, FieldError},
    value::{int, text},
};

/// The Scale of `object`.
pub fn read(info: &ResourceInfo, object: &Value) -> Result<Value, ApiError> {
    if info.subresource("scale").is_none() {
        return Err(ApiError::unknown_path());
    }
    let mut metadata = json!({});
    for key in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = object["metadata"].get(key) {
            metadata[key] = value.clone();
        }
    }
    let mut spec = json!({});
    if let Some(replicas) = int(object, "/spec/replicas").filter(|n| *n != 0) {
        spec["replicas"] = json!(replicas);
    }
    let mut status = json!({ "replicas": int(object, "/status/replicas").unwrap_or(0) });
    if let Some(selector) = object.pointer("/spec/selector") {
        status["selector"] = json!(LabelSelector::from_json(selector)?.to_string());
    }
    Ok(json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec, "status": status,
    }))
}

/// `object` with the replicas of `scale`; checks the Scale's name and resourceVersion.
pub fn write(info: &ResourceInfo, object: &Value, scale: &Value) -> Result<Value, ApiError> {
    let name = text(object, "/metadata/name");
    let asked = text(scale, "/metadata/name");
    if !asked.is_empty() && asked != name {
        let why = format!("the name of the object ({asked}) does not match the name on the URL ({name})");
        return Err(ApiError::bad_request(why));
    }
    let version = text(scale, "/metadata/resourceVersion");
    if !version.is_empty() && version != text(object, "/metadata/resourceVersion") {
        return Err(ApiError::stale(info, name));
    }
    let replicas = int(scale, "/spec/replicas").unwrap_or(0);
    if replicas < 0 {
        let error = FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
        return Err(ApiError::invalid(info, name, &[error]));
    }
    let mut out = object.clone();
    out["spec"]["replicas"] = json!(replicas);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;

    #[test]
    fn scale_shows_and_changes_replicas() {
        let info = kinds::find("apps", "v1", "deployments").unwrap();
        let object = json!({
            "metadata": {"name": "web", "namespace": "d", "resourceVersion": "5"},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}}},
            "status": {"replicas": 2},
        });
        let scale = read(info, &object).unwrap();
        assert_eq!(scale["spec"]["replicas"], 3);
        assert_eq!(scale["status"], json!({"replicas": 2, "selector": "app=web"}));
        let mut asked = scale.clone();
        asked["spec"]["replicas"] = json!(5);
        assert_eq!(write(info, &object, &asked).unwrap()["spec"]["replicas"], 5);
        asked["metadata"]["resourceVersion"] = json!("4");
        assert_eq!(write(info, &object, &asked).unwrap_err().code(), 409);
    }
}
