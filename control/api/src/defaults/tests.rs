//! Defaults as `kubectl get -o yaml` shows them on any cluster.

use serde_json::json;

use super::*;
use crate::kinds;

fn defaulted(api_version: &str, kind: &str, mut object: Value) -> Value {
    let info = kinds::by_kind(api_version, kind).unwrap();
    apply(info, &mut object);
    let once = object.clone();
    apply(info, &mut object);
    assert_eq!(object, once, "defaulting is idempotent");
    object
}

#[test]
fn a_tutorials_deployment() {
    let object = defaulted(
        "apps/v1",
        "Deployment",
        json!({"spec": {"selector": {}, "template": {"spec": {"containers": [
            {"name": "nginx", "image": "nginx", "ports": [{"containerPort": 80}], "resources": {"limits": {"cpu": "1"}}},
            {"name": "side", "image": "localhost:5000/side:1.2"},
        ]}}}}),
    );
    let spec = &object["spec"];
    assert_eq!(
        spec["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}})
    );
    assert_eq!((&spec["replicas"], &spec["revisionHistoryLimit"]), (&json!(1), &json!(10)));
    let containers = &spec["template"]["spec"]["containers"];
    assert_eq!(
        containers[0],
        json!({
            "name": "nginx", "image": "nginx", "imagePullPolicy": "Always",
            "ports": [{"containerPort": 80, "protocol": "TCP"}],
            "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}},
            "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
        })
    );
    assert_eq!(containers[1]["imagePullPolicy"], "IfNotPresent");
    let pod = &spec["template"]["spec"];
    assert_eq!(
        (&pod["restartPolicy"], &pod["dnsPolicy"], &pod["schedulerName"], &pod["securityContext"]),
        (&json!("Always"), &json!("ClusterFirst"), &json!("default-scheduler"), &json!({}))
    );
}

#[test]
fn probes_and_volumes() {
    let object = defaulted(
        "v1",
        "Pod",
        json!({"spec": {
            "containers": [{"name": "a", "image": "b@sha256:0", "livenessProbe": {"httpGet": {"port": 80}, "periodSeconds": 0}}],
            "volumes": [{"name": "e"}, {"name": "c", "configMap": {"name": "c"}}, {"name": "p", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}],
        }}),
    );
    assert_eq!(
        object["spec"]["containers"][0]["livenessProbe"],
        json!({"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1, "periodSeconds": 10,
            "successThreshold": 1, "failureThreshold": 3})
    );
    assert_eq!(
        object["spec"]["volumes"],
        json!([{"name": "e", "emptyDir": {}}, {"name": "c", "configMap": {"name": "c", "defaultMode": 420}},
            {"name": "p", "projected": {"defaultMode": 420, "sources": [{"serviceAccountToken": {"path": "t", "expirationSeconds": 3600}}]}}])
    );
}

#[test]
fn services_secrets_namespaces() {
    let service = defaulted(
        "v1",
        "Service",
        json!({"spec": {"type": "NodePort", "selector": {"a": "b"}, "ports": [{"port": 80}]}}),
    );
    assert_eq!(
        service["spec"],
        json!({"type": "NodePort", "selector": {"a": "b"}, "sessionAffinity": "None",
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}], "externalTrafficPolicy": "Cluster",
            "internalTrafficPolicy": "Cluster", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"})
    );
    let secret = defaulted("v1", "Secret", json!({"stringData": {"a": "b"}, "data": {"c": "ZA=="}}));
    assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "Yg==", "c": "ZA=="}}));
    let namespace = defaulted("v1", "Namespace", json!({"metadata": {"name": "n"}}));
    assert_eq!(
        namespace,
        json!({"metadata": {"name": "n", "labels": {"kubernetes.io/metadata.name": "n"}}, "spec": {"finalizers": ["kubernetes"]}})
    );
}

#[test]
fn pull_policy_follows_the_tag() {
    for (image, latest) in [
        ("nginx", true),
        ("nginx:latest", true),
        ("nginx:1.17", false),
        ("h:5000/nginx", true),
        ("x@sha256:ab", false),
    ] {
        assert_eq!(pod::has_latest_tag(image), latest, "{image}");
    }
}
