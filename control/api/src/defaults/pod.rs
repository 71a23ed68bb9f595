//! Defaults of a pod's spec: containers, volumes, security context.

use serde_json::{Value, json};

use super::probe;
use crate::value::{ensure_map, flag, list_mut, map_mut, set_default, text};

/// Mode of files that volumes write, 0644.
const FILE_MODE: i64 = 0o644;

/// Fills in a pod's spec.
pub(super) fn spec(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    set_default(spec, "dnsPolicy", "ClusterFirst");
    set_default(spec, "restartPolicy", "Always");
    set_default(spec, "terminationGracePeriodSeconds", 30);
    set_default(spec, "schedulerName", "default-scheduler");
    set_default(spec, "enableServiceLinks", true);
    ensure_map(spec, "securityContext");
    service_account(spec);
    let host_network = flag(spec, "/hostNetwork");
    for key in ["initContainers", "containers", "ephemeralContainers"] {
        for item in list_mut(spec, key) {
            container(item, host_network);
        }
    }
    for volume in list_mut(spec, "volumes") {
        volume_source(volume);
    }
}

/// `serviceAccount` is the old name of `serviceAccountName`; both are always shown.
fn service_account(spec: &mut Value) {
    let name = [text(spec, "/serviceAccountName"), text(spec, "/serviceAccount")];
    let Some(name) = name.into_iter().find(|n| !n.is_empty()).map(str::to_owned) else { return };
    set_default(spec, "serviceAccountName", name.clone());
    set_default(spec, "serviceAccount", name);
}

fn container(container: &mut Value, host_network: bool) {
    let image = text(container, "/image");
    let policy = if has_latest_tag(image) { "Always" } else { "IfNotPresent" };
    set_default(container, "imagePullPolicy", policy);
    set_default(container, "terminationMessagePath", "/dev/termination-log");
    set_default(container, "terminationMessagePolicy", "File");
    ensure_map(container, "resources");
    if let Some(resources) = container.get_mut("resources") {
        requests_from_limits(resources);
    }
    for port in list_mut(container, "ports") {
        set_default(port, "protocol", "TCP");
        if host_network
            && let Some(number) = port.get("containerPort").cloned()
            && port.get("hostPort").is_none_or(|p| p == 0 || p.is_null())
        {
            port["hostPort"] = number;
        }
    }
    for variable in list_mut(container, "env") {
        if let Some(field) = variable.pointer_mut("/valueFrom/fieldRef") {
            set_default(field, "apiVersion", "v1");
        }
    }
    probe::all(container);
}

/// Whether an image reference's tag is `latest`, written or implied.
pub(crate) fn has_latest_tag(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

/// A limit without a request is the request too.
fn requests_from_limits(resources: &mut Value) {
    let Some(limits) = resources.get("limits").and_then(Value::as_object).cloned() else { return };
    let Some(requests) = ensure_map(resources, "requests") else { return };
    for (name, amount) in limits {
        requests.entry(name).or_insert(amount);
    }
    if requests.is_empty()
        && let Some(map) = resources.as_object_mut()
    {
        map.remove("requests");
    }
}

fn volume_source(volume: &mut Value) {
    let sources = [
        "hostPath",
        "emptyDir",
        "configMap",
        "secret",
        "projected",
        "downwardAPI",
        "persistentVolumeClaim",
        "csi",
        "nfs",
        "iscsi",
        "image",
        "ephemeral",
        "fc",
        "cephfs",
        "rbd",
        "glusterfs",
        "cinder",
        "azureFile",
        "azureDisk",
        "awsElasticBlockStore",
        "gcePersistentDisk",
        "gitRepo",
        "flexVolume",
        "flocker",
        "quobyte",
        "vsphereVolume",
        "photonPersistentDisk",
        "portworxVolume",
        "scaleIO",
        "storageos",
    ];
    if !sources.iter().any(|s| volume.get(s).is_some_and(|v| !v.is_null())) {
        ensure_map(volume, "emptyDir");
    }
    for key in ["configMap", "secret", "downwardAPI", "projected"] {
        if volume.get(key).is_some_and(Value::is_object) {
            set_default(&mut volume[key], "defaultMode", FILE_MODE);
        }
    }
    if let Some(path) = map_mut(volume, "hostPath") {
        path.entry("type").or_insert_with(|| json!(""));
    }
    if let Some(downward) = volume.get_mut("downwardAPI") {
        field_versions(downward);
    }
    if let Some(projected) = volume.get_mut("projected") {
        for source in list_mut(projected, "sources") {
            if let Some(downward) = source.get_mut("downwardAPI") {
                field_versions(downward);
            }
            if let Some(token) = source.get_mut("serviceAccountToken") {
                set_default(token, "expirationSeconds", 3600);
            }
        }
    }
}

fn field_versions(downward: &mut Value) {
    for item in list_mut(downward, "items") {
        if let Some(field) = item.get_mut("fieldRef") {
            set_default(field, "apiVersion", "v1");
        }
    }
}
