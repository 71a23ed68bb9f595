//! Built-in admission: what upstream's default-on plugins add to new objects.
//!
//! Input: a defaulted pod or node about to be created, and the objects the plugins would look up. Output: the object
//! with service account, tolerations, priority (pods) or the not-ready taint (nodes). Looks nothing up itself.

mod classes;

use serde_json::{Value, json};

use crate::{
    kinds,
    quantity::Quantity,
    status::ApiError,
    value::{ensure_map, list, list_mut, set_default, text},
};

/// Where the token of the pod's ServiceAccount is mounted.
const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Lifetime of the projected token: an hour and a little, as upstream, so that it can be told from user-made ones.
const TOKEN_SECONDS: i64 = 3607;

/// The ServiceAccount a pod asks for.
pub fn service_account_name(pod: &Value) -> &str {
    match text(pod, "/spec/serviceAccountName") {
        "" => "default",
        name => name,
    }
}

/// The priority classes that exist everywhere: name, value, and what it is for.
pub const SYSTEM_PRIORITIES: [(&str, i64, &str); 2] = [
    (
        "system-cluster-critical",
        2_000_000_000,
        "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
    ),
    (
        "system-node-critical",
        2_000_001_000,
        "Used for system critical pods that must not be moved from their current node.",
    ),
];

/// What admission looked up for a new pod.
#[derive(Debug, Clone, Copy, Default)]
pub struct Found<'a> {
    /// The object of [`service_account_name`] in the pod's namespace; pods from another source (static pods' mirrors) pass
    /// without one.
    pub service_account: Option<&'a Value>,
    /// The PriorityClass that the pod names, or the one for pods that name none.
    pub priority_class: Option<&'a Value>,
    /// The RuntimeClass that the pod names.
    pub runtime_class: Option<&'a Value>,
}

/// What admission adds to a new pod. `volume_suffix` is five characters of [`crate::meta::NAME_ALPHABET`].
pub fn pod(pod: &mut Value, found: Found<'_>, volume_suffix: &str) -> Result<(), ApiError> {
    let is_mirror = pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some();
    if !is_mirror {
        add_service_account(pod, found.service_account, volume_suffix)?;
    }
    if !pod["spec"].is_object() {
        return Ok(());
    }
    classes::add_priority(pod, found.priority_class)?;
    classes::add_runtime_class(pod, found.runtime_class)?;
    add_tolerations(&mut pod["spec"]);
    Ok(())
}

/// A pod's quality-of-service class, from its requests and limits of CPU and memory.
pub fn qos_class(pod: &Value) -> &'static str {
    let amount = |container: &Value, kind: &str, name: &str| {
        let found = container.pointer(&format!("/resources/{kind}/{name}")).and_then(Value::as_str);
        found.and_then(|text| Quantity::parse(text).ok()).filter(|q| !q.is_zero())
    };
    let (mut any, mut all_limited, mut equal) = (false, true, true);
    for container in list(pod, "/spec/containers").iter().chain(list(pod, "/spec/initContainers")) {
        for name in ["cpu", "memory"] {
            let (request, limit) = (amount(container, "requests", name), amount(container, "limits", name));
            any |= request.is_some() || limit.is_some();
            all_limited &= limit.is_some();
            equal &= request.is_none() || request == limit;
        }
    }
    match (any, all_limited && equal) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// What admission adds to a new node: it takes no pods before its first Ready status.
pub fn node(node: &mut Value) {
    const NOT_READY: &str = "node.kubernetes.io/not-ready";
    if list(node, "/spec/taints").iter().any(|t| t["key"] == NOT_READY && t["effect"] == "NoSchedule") {
        return;
    }
    let Some(spec) = ensure_map(node, "spec") else { return };
    let taints = spec.entry("taints").or_insert_with(|| json!([]));
    if let Some(taints) = taints.as_array_mut() {
        taints.push(json!({ "key": NOT_READY, "effect": "NoSchedule" }));
    }
}

/// The 403 for a pod that may not be created.
fn refused(pod: &Value, why: &str) -> ApiError {
    let pods = kinds::find("", "v1", "pods");
    let shown = match text(pod, "/metadata/name") {
        "" => text(pod, "/metadata/generateName"),
        name => name,
    };
    pods.map_or_else(ApiError::unknown_path, |info| ApiError::forbidden(info, shown, why))
}

/// Adds the finalizer that keeps a claim or volume while it is in use.
pub fn protect(object: &mut Value, finalizer: &str) {
    let Some(metadata) = ensure_map(object, "metadata") else { return };
    let finalizers = metadata.entry("finalizers").or_insert_with(|| json!([]));
    if let Some(finalizers) = finalizers.as_array_mut()
        && !finalizers.iter().any(|held| held == finalizer)
    {
        finalizers.push(finalizer.into());
    }
}

fn add_service_account(
    pod: &mut Value,
    account: Option<&Value>,
    volume_suffix: &str,
) -> Result<(), ApiError> {
    let name = service_account_name(pod).to_owned();
    let Some(account) = account else {
        let namespace = text(pod, "/metadata/namespace");
        let why = format!(
            "error looking up service account {namespace}/{name}: serviceaccount \"{name}\" not found"
        );
        return Err(refused(pod, &why));
    };
    let Some(spec) = pod.get_mut("spec").filter(|s| s.is_object()) else { return Ok(()) };
    set_default(spec, "serviceAccountName", name.clone());
    set_default(spec, "serviceAccount", name);
    let secrets = list(account, "/imagePullSecrets");
    if !secrets.is_empty() && list(spec, "/imagePullSecrets").is_empty() {
        spec["imagePullSecrets"] = secrets.to_vec().into();
    }
    let wants = |object: &Value, pointer: &str| object.pointer(pointer).and_then(Value::as_bool);
    let automount = wants(spec, "/automountServiceAccountToken")
        .or_else(|| wants(account, "/automountServiceAccountToken"))
        .unwrap_or(true);
    if automount {
        add_token_volume(spec, volume_suffix);
    }
    Ok(())
}

/// Mounts the token where a container has nothing of its own mounted there.
fn add_token_volume(spec: &mut Value, suffix: &str) {
    let existing =
        list(spec, "/volumes").iter().map(|v| text(v, "/name")).find(|n| n.starts_with("kube-api-access-"));
    let volume = existing.map_or_else(|| format!("kube-api-access-{suffix}"), str::to_owned);
    let mut used = false;
    for key in ["initContainers", "containers"] {
        for container in list_mut(spec, key) {
            if list(container, "/volumeMounts").iter().any(|m| m["mountPath"] == TOKEN_PATH) {
                continue;
            }
            let Some(map) = container.as_object_mut() else { continue };
            let mounts = map.entry("volumeMounts").or_insert_with(|| json!([]));
            if let Some(mounts) = mounts.as_array_mut() {
                mounts.push(json!({ "name": volume, "readOnly": true, "mountPath": TOKEN_PATH }));
                used = true;
            }
        }
    }
    let missing = !list(spec, "/volumes").iter().any(|v| v["name"] == volume.as_str());
    if used
        && missing
        && let Some(map) = spec.as_object_mut()
        && let Some(volumes) = map.entry("volumes").or_insert_with(|| json!([])).as_array_mut()
    {
        volumes.push(token_volume(&volume));
    }
}

fn token_volume(name: &str) -> Value {
    json!({
        "name": name,
        "projected": {
            "defaultMode": 0o644,
            "sources": [
                { "serviceAccountToken": { "expirationSeconds": TOKEN_SECONDS, "path": "token" } },
                { "configMap": {
                    "name": "kube-root-ca.crt",
                    "items": [{ "key": "ca.crt", "path": "ca.crt" }],
                } },
                { "downwardAPI": { "items": [{
                    "path": "namespace",
                    "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" },
                }] } },
            ],
        },
    })
}

/// Pods stay 300 s on a node that is not ready or not reachable, unless they say otherwise.
fn add_tolerations(spec: &mut Value) {
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = list(spec, "/tolerations").iter().any(|t| {
            let (own_key, effect) = (text(t, "/key"), text(t, "/effect"));
            (own_key == key || (own_key.is_empty() && text(t, "/operator") == "Exists"))
                && (effect == "NoExecute" || effect.is_empty())
        });
        let Some(map) = spec.as_object_mut().filter(|_| !tolerated) else { continue };
        let tolerations = map.entry("tolerations").or_insert_with(|| json!([]));
        if let Some(tolerations) = tolerations.as_array_mut() {
            tolerations.push(json!({
                "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300,
            }));
        }
    }
}

/// Whether a namespace takes new objects; the 403 that says why not.
pub fn namespace_open(
    info: &kinds::ResourceInfo,
    namespace: &Value,
    object_name: &str,
) -> Result<(), ApiError> {
    let deleting = !text(namespace, "/metadata/deletionTimestamp").is_empty();
    if !deleting && text(namespace, "/status/phase") != "Terminating" {
        return Ok(());
    }
    let name = text(namespace, "/metadata/name");
    let why = format!("unable to create new content in namespace {name} because it is being terminated");
    let mut error = ApiError::forbidden(info, object_name, &why);
    error.causes.push(crate::status::Cause {
        reason: "NamespaceTerminating".to_owned(),
        message: format!("namespace {name} is being terminated"),
        field: "metadata.namespace".to_owned(),
    });
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_get_token_tolerations_and_priority() {
        let mut object =
            json!({"metadata": {"name": "p", "namespace": "d"}, "spec": {"containers": [{"name": "a"}]}});
        let account = json!({"imagePullSecrets": [{"name": "s"}]});
        let found = Found { service_account: Some(&account), ..Found::default() };
        pod(&mut object, found, "abcde").unwrap();
        let spec = &object["spec"];
        assert_eq!((&spec["serviceAccountName"], &spec["priority"]), (&json!("default"), &json!(0)));
        assert_eq!(spec["imagePullSecrets"], json!([{"name": "s"}]));
        assert_eq!(
            spec["containers"][0]["volumeMounts"],
            json!([{"name": "kube-api-access-abcde", "readOnly": true, "mountPath": TOKEN_PATH}])
        );
        assert_eq!(
            spec["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"]["expirationSeconds"],
            3607
        );
        assert_eq!(spec["tolerations"].as_array().unwrap().len(), 2);
        let before = object.clone();
        pod(&mut object, found, "zzzzz").unwrap();
        assert_eq!(object, before);
        let error = pod(&mut object, Found::default(), "x").unwrap_err();
        assert_eq!(error.code(), 403);
        assert!(error.message.ends_with("serviceaccount \"default\" not found"), "{error}");
    }

    #[test]
    fn quality_of_service_follows_resources() {
        let class =
            |resources: Value| qos_class(&json!({"spec": {"containers": [{"resources": resources}]}}));
        assert_eq!(class(json!({})), "BestEffort");
        assert_eq!(class(json!({"requests": {"cpu": "1"}})), "Burstable");
        let full = json!({"cpu": "1", "memory": "1Gi"});
        assert_eq!(class(json!({"requests": full, "limits": full})), "Guaranteed");
        assert_eq!(class(json!({"requests": {"cpu": "500m"}, "limits": full})), "Burstable");
    }

    #[test]
    fn new_nodes_are_tainted_once() {
        let mut object = json!({"metadata": {"name": "n"}});
        node(&mut object);
        node(&mut object);
        assert_eq!(
            object["spec"]["taints"],
            json!([{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}])
        );
    }
}
