//! Upstream's defaults, one function per kind.
//!
//! Input: an object as a client (or a patch) left it. Output: the same object with every field filled in that
//! upstream's versioned defaulting fills in. Idempotent; never touches metadata's identity or status, never fails:
//! wrong types are left for [`crate::schema`] and [`crate::validate`].

mod pod;
mod probe;
mod storage;

use serde_json::{Map, Value, json};

use crate::{
    kinds::ResourceInfo,
    value::{ensure_map, list_mut, map_mut, set_default, text},
};

/// Fills in the defaults. Call on create, on update and after a patch, before [`crate::meta`].
pub fn apply(info: &ResourceInfo, object: &mut Value) {
    match (info.group, info.kind) {
        ("", "Pod") => {
            if let Some(spec) = object.get_mut("spec") {
                pod::spec(spec);
            }
        }
        ("", "Service") => service(object),
        ("", "Endpoints") => endpoints(object),
        ("", "Namespace") => namespace(object),
        ("", "Secret") => secret(object),
        ("", "Node") => node(object),
        ("apps", "Deployment") => deployment(object),
        ("apps", "ReplicaSet") => replica_set(object),
        ("discovery.k8s.io", "EndpointSlice") => endpoint_slice(object),
        ("", "PersistentVolume") => storage::volume(object),
        ("", "PersistentVolumeClaim") => storage::claim(object),
        ("storage.k8s.io", "StorageClass") => storage::class(object),
        ("storage.k8s.io", "CSIDriver") => storage::driver(object),
        ("scheduling.k8s.io", "PriorityClass") => {
            set_default(object, "preemptionPolicy", "PreemptLowerPriority");
        }
        ("resource.k8s.io", "ResourceClaim") => devices(object.get_mut("spec")),
        ("resource.k8s.io", "ResourceClaimTemplate") => {
            devices(object.get_mut("spec").and_then(|spec| spec.get_mut("spec")));
        }
        _ => {}
    }
}

/// Defaults of a pod template, shared by all workloads.
fn pod_template(owner_spec: &mut Value) {
    if let Some(spec) = owner_spec.get_mut("template").and_then(|t| t.get_mut("spec")) {
        pod::spec(spec);
    }
}

fn deployment(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").filter(|s| s.is_object()) else { return };
    set_default(spec, "replicas", 1);
    set_default(spec, "revisionHistoryLimit", 10);
    set_default(spec, "progressDeadlineSeconds", 600);
    if ensure_map(spec, "strategy").is_some() {
        let strategy = &mut spec["strategy"];
        set_default(strategy, "type", "RollingUpdate");
        if text(strategy, "/type") == "RollingUpdate" && ensure_map(strategy, "rollingUpdate").is_some() {
            set_default(&mut strategy["rollingUpdate"], "maxUnavailable", "25%");
            set_default(&mut strategy["rollingUpdate"], "maxSurge", "25%");
        }
    }
    pod_template(spec);
}

fn replica_set(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").filter(|s| s.is_object()) else { return };
    set_default(spec, "replicas", 1);
    pod_template(spec);
}

fn service(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").filter(|s| s.is_object()) else { return };
    set_default(spec, "sessionAffinity", "None");
    set_default(spec, "type", "ClusterIP");
    let kind = text(spec, "/type").to_owned();
    if text(spec, "/sessionAffinity") == "ClientIP" && ensure_map(spec, "sessionAffinityConfig").is_some() {
        let config = &mut spec["sessionAffinityConfig"];
        if ensure_map(config, "clientIP").is_some() {
            set_default(&mut config["clientIP"], "timeoutSeconds", 10_800);
        }
    } else if let Some(map) = spec.as_object_mut() {
        map.remove("sessionAffinityConfig");
    }
    for port in list_mut(spec, "ports") {
        set_default(port, "protocol", "TCP");
        let number = port.get("port").cloned().unwrap_or(Value::Null);
        let unset = port.get("targetPort").is_none_or(|t| t.is_null() || t == 0 || t == "");
        if unset
            && kind != "ExternalName"
            && let Some(map) = port.as_object_mut()
        {
            map.insert("targetPort".to_owned(), number);
        }
    }
    let external = matches!(kind.as_str(), "NodePort" | "LoadBalancer");
    if external {
        set_default(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        set_default(spec, "allocateLoadBalancerNodePorts", true);
    }
    if kind != "ExternalName" {
        set_default(spec, "internalTrafficPolicy", "Cluster");
        service_families(spec);
    }
}

/// IPv4 single stack, unless the client or an address says otherwise.
fn service_families(spec: &mut Value) {
    set_default(spec, "ipFamilyPolicy", "SingleStack");
    let address = text(spec, "/clusterIP").to_owned();
    let family = if address.contains(':') { "IPv6" } else { "IPv4" };
    let unset = spec.get("ipFamilies").and_then(Value::as_array).is_none_or(Vec::is_empty);
    if unset && let Some(map) = spec.as_object_mut() {
        map.insert("ipFamilies".to_owned(), json!([family]));
    }
    let unset = spec.get("clusterIPs").and_then(Value::as_array).is_none_or(Vec::is_empty);
    if unset
        && !address.is_empty()
        && let Some(map) = spec.as_object_mut()
    {
        map.insert("clusterIPs".to_owned(), json!([address]));
    }
}

fn endpoints(object: &mut Value) {
    for subset in list_mut(object, "subsets") {
        for port in list_mut(subset, "ports") {
            set_default(port, "protocol", "TCP");
        }
    }
}

fn endpoint_slice(object: &mut Value) {
    for port in list_mut(object, "ports") {
        if let Some(map) = port.as_object_mut() {
            map.entry("name").or_insert_with(|| json!(""));
        }
        set_default(port, "protocol", "TCP");
    }
}

fn namespace(object: &mut Value) {
    let name = text(object, "/metadata/name").to_owned();
    if let Some(metadata) = object.get_mut("metadata")
        && !name.is_empty()
        && let Some(labels) = ensure_map(metadata, "labels")
    {
        labels.insert("kubernetes.io/metadata.name".to_owned(), name.into());
    }
    if let Some(spec) = ensure_map(object, "spec") {
        spec.entry("finalizers").or_insert_with(|| json!(["kubernetes"]));
    }
}

fn secret(object: &mut Value) {
    set_default(object, "type", "Opaque");
    let Some(map) = object.as_object_mut() else { return };
    let Some(Value::Object(plain)) = map.remove("stringData") else { return };
    let data = map.entry("data").or_insert_with(|| Value::Object(Map::new()));
    if data.is_null() {
        *data = Value::Object(Map::new());
    }
    let Some(data) = data.as_object_mut() else { return };
    for (key, value) in plain {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        if let Some(value) = value.as_str() {
            data.insert(key, STANDARD.encode(value).into());
        }
    }
}

/// Requests for devices ask for one each, unless they say otherwise.
fn devices(claim_spec: Option<&mut Value>) {
    let Some(devices) = claim_spec.and_then(|spec| spec.get_mut("devices")) else { return };
    for request in list_mut(devices, "requests") {
        request.get_mut("exactly").into_iter().for_each(device_count);
        list_mut(request, "firstAvailable").iter_mut().for_each(device_count);
    }
}

fn device_count(request: &mut Value) {
    set_default(request, "allocationMode", "ExactCount");
    if text(request, "/allocationMode") == "ExactCount" {
        set_default(request, "count", 1);
    }
}

fn node(object: &mut Value) {
    if let Some(capacity) = object.pointer("/status/capacity").cloned()
        && let Some(status) = map_mut(object, "status")
    {
        status.entry("allocatable").or_insert(capacity);
    }
}

#[cfg(test)]
mod tests;
