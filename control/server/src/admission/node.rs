//! NodeRestriction: a node's agent changes only its own Node, Lease, CSINode, slices of devices, and pods.

use control_api::{kinds::ResourceInfo, meta, status::ApiError};
use serde_json::Value;

use crate::auth::User;

/// Annotation of pods that mirror a node's static pods.
const MIRROR: &str = "/metadata/annotations/kubernetes.io~1config.mirror";

/// Whether the user may create this object.
pub(super) fn create(user: &User, info: &ResourceInfo, object: &Value) -> Result<(), ApiError> {
    let Some(node) = user.node() else { return Ok(()) };
    let name = meta::name(object);
    let refuse = |why: String| Err(ApiError::forbidden(info, name, &why));
    match (info.group, info.kind) {
        ("", "Node") | ("coordination.k8s.io", "Lease") | ("storage.k8s.io", "CSINode") if name != node => {
            refuse(format!("node \"{node}\" is not allowed to create this object"))
        }
        ("", "Pod") if object.pointer(MIRROR).is_none() => refuse(format!(
            "pod does not have \"kubernetes.io/config.mirror\" annotation, node \"{node}\" can only create mirror pods"
        )),
        ("resource.k8s.io", "ResourceSlice") if pod_node(object) != node => refuse(format!(
            "can only create a ResourceSlice with the same NodeName as the requesting node ({node})"
        )),
        ("", "Pod") if pod_node(object) != node => {
            refuse(format!("node \"{node}\" can only create pods with spec.nodeName set to itself"))
        }
        _ => Ok(()),
    }
}

/// Whether the user may change or delete this object.
pub(super) fn update(user: &User, info: &ResourceInfo, old: &Value) -> Result<(), ApiError> {
    let Some(node) = user.node() else { return Ok(()) };
    let foreign = match (info.group, info.kind) {
        ("", "Pod") | ("resource.k8s.io", "ResourceSlice") => pod_node(old) != node,
        ("", "Node") | ("coordination.k8s.io", "Lease") | ("storage.k8s.io", "CSINode") => {
            meta::name(old) != node
        }
        _ => false,
    };
    if !foreign {
        return Ok(());
    }
    let why = format!("node \"{node}\" is not allowed to modify an object of another node");
    Err(ApiError::forbidden(info, meta::name(old), &why))
}

/// `spec.nodeName`, of a pod or of a slice of devices.
fn pod_node(pod: &Value) -> &str {
    pod.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default()
}
