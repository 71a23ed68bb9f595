//! `pods/binding`: the scheduler's decision. `pods/eviction`: a deletion that asks first.

use control_api::{kinds, meta, status::ApiError, validate};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    api::{
        Api,
        dispatch::ResourceRequest,
        options::{self, WriteOptions},
        write::{ObjectRef, Part, Write, decode_any, now},
    },
    http::{
        body::{self, Reply},
        negotiate,
    },
};

/// Bind a pod to a node. Serves `pods/NAME/binding` and `bindings`.
pub(super) async fn bind(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let ResourceRequest { target, query, user, http } = request;
    let pods = kinds::find("", "v1", "pods").ok_or_else(ApiError::unknown_path)?;
    let mut write = Write::new(&user, WriteOptions::parse(&query, http.headers())?);
    let format = negotiate::body_format(http.headers())?;
    let (binding, _) = decode_any(&body::read(http.into_body()).await?, format)?;
    let in_body = meta::name(&binding).to_owned();
    let name = target.name.as_deref().unwrap_or(&in_body);
    let errors = validate::binding(&binding);
    if !errors.is_empty() {
        return Err(ApiError::invalid(target.info, name, &errors));
    }
    let node = binding.pointer("/target/name").and_then(Value::as_str).unwrap_or_default();
    let named = ObjectRef { info: pods, namespace: target.namespace.as_deref(), name };
    let time = now();
    api.update(named, Part::Whole, &mut write, |pod, _| bound(pod, &binding, node, &time)).await?;
    let done =
        json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201 });
    Ok(body::json(StatusCode::CREATED, &done))
}

fn bound(pod: &Value, binding: &Value, node: &str, time: &str) -> Result<Value, ApiError> {
    let pods = kinds::find("", "v1", "pods").ok_or_else(ApiError::unknown_path)?;
    let name = meta::name(pod);
    let uid = meta::uid(binding);
    if !uid.is_empty() && uid != meta::uid(pod) {
        let why = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            meta::uid(pod)
        );
        return Err(ApiError::conflict(pods, name, &why));
    }
    if meta::is_deleting(pod) {
        return Err(ApiError::conflict(
            pods,
            name,
            &format!("pod {name} is being deleted, cannot be assigned to a host"),
        ));
    }
    let assigned = pod.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default();
    if !assigned.is_empty() {
        let why = format!("pod {name} is already assigned to node \"{assigned}\"");
        return Err(ApiError::conflict(pods, name, &why));
    }
    let mut pod = pod.clone();
    pod["spec"]["nodeName"] = json!(node);
    for (key, value) in
        binding.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten()
    {
        pod["metadata"]["annotations"][key] = value.clone();
    }
    mark_scheduled(&mut pod, time);
    Ok(pod)
}

/// Say in the status that the pod has a node.
fn mark_scheduled(pod: &mut Value, time: &str) {
    let condition = json!({ "type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": time });
    if !pod["status"]["conditions"].is_array() {
        pod["status"]["conditions"] = json!([]);
    }
    if let Some(conditions) = pod["status"]["conditions"].as_array_mut() {
        match conditions.iter_mut().find(|condition| condition["type"] == "PodScheduled") {
            Some(known) if known["status"] == "True" => {}
            Some(known) => *known = condition,
            None => conditions.push(condition),
        }
    }
}

/// Evict a pod: a deletion with the options in the body. There are no disruption budgets that could refuse it.
pub(super) async fn evict(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let ResourceRequest { target, query, user, http } = request;
    let format = negotiate::body_format(http.headers())?;
    let (eviction, _) = decode_any(&body::read(http.into_body()).await?, format)?;
    let empty = json!({});
    let options = options::delete_options(eviction.get("deleteOptions").unwrap_or(&empty), &query)?;
    let name = target.name.as_deref().unwrap_or_default();
    let named = ObjectRef { info: target.info, namespace: target.namespace.as_deref(), name };
    api.delete(named, &user, &options).await?;
    let done =
        json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201 });
    Ok(body::json(StatusCode::CREATED, &done))
}
