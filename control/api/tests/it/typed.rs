//! What this crate makes of a manifest is what Kubernetes' own types read and write.

use control_api::{admit, defaults, kinds, meta, schema, validate};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Pod, Service},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// Defaults, completes and validates a manifest, then reads it as a type and writes it again.
#[track_caller]
fn check<T: DeserializeOwned + Serialize>(api_version: &str, kind: &str, mut object: Value) {
    let info = kinds::by_kind(api_version, kind).expect("a served kind");
    assert_eq!(schema::check(info, &object), schema::SchemaReport::default());
    schema::prune(info, &mut object);
    defaults::apply(info, &mut object);
    let identity = meta::NewIdentity { uid: "u", now: "2026-01-02T03:04:05Z", name_suffix: "abcde" };
    meta::prepare_create(info, &mut object, Some("default"), &identity).expect("completes");
    if kind == "Pod" {
        let account = json!({});
        let found = admit::Found { service_account: Some(&account), ..admit::Found::default() };
        admit::pod(&mut object, found, "abcde").expect("is admitted");
    }
    assert_eq!(validate::create(info, &object), []);
    let typed: T = serde_json::from_value(object.clone()).expect("reads as its type");
    let written = serde_json::to_value(typed).expect("writes");
    assert_eq!(written, object, "the typed form says the same");
    assert_eq!(schema::check(info, &written), schema::SchemaReport::default());
    assert_eq!(validate::update(info, &written, &object), []);
}

fn pod_spec() -> Value {
    json!({
        "containers": [{
            "name": "nginx", "image": "nginx:1.17.9", "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": 1, "memory": "64Mi"}, "requests": {"cpu": "0.5"}},
            "readinessProbe": {"httpGet": {"port": "http"}},
            "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
            "volumeMounts": [{"name": "work", "mountPath": "/work"}, {"name": "host", "mountPath": "/host", "readOnly": true}],
        }],
        "volumes": [{"name": "work", "emptyDir": {}}, {"name": "host", "hostPath": {"path": "/etc"}}],
        "nodeSelector": {"kubernetes.io/os": "linux"},
    })
}

#[test]
fn manifests_become_what_the_types_say() {
    check::<Pod>("v1", "Pod", json!({"metadata": {"name": "p"}, "spec": pod_spec()}));
    check::<Deployment>(
        "apps/v1",
        "Deployment",
        json!({"metadata": {"name": "web"}, "spec": {
            "replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": pod_spec()},
        }}),
    );
    check::<Service>(
        "v1",
        "Service",
        json!({"metadata": {"name": "web"}, "spec": {
            "type": "NodePort", "selector": {"app": "web"}, "ports": [{"port": 80, "nodePort": 30000}],
        }}),
    );
}
