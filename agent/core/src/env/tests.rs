//! Environments that users write, and what their processes see.

use serde_json::json;

use super::*;

fn build_for(container: &serde_json::Value, services: &serde_json::Value) -> Result<ProcessEnv, EnvError> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "containers": [container]}
    }))
    .expect("a pod");
    let container = pod.spec.as_ref().expect("spec").containers[0].clone();
    let services: Vec<Arc<Service>> = serde_json::from_value::<Vec<Service>>(services.clone())
        .expect("services")
        .into_iter()
        .map(Arc::new)
        .collect();
    let config: ConfigMap =
        serde_json::from_value(json!({"data": {"COLOR": "red", "SIZE": "big"}})).expect("a config map");
    let secret: Secret = serde_json::from_value(json!({"data": {"pw": "c2VjcmV0"}})).expect("a secret");
    build(EnvInput {
        pod: &pod,
        container: &container,
        services: &services,
        config_maps: &BTreeMap::from([("c".to_owned(), Arc::new(config))]),
        secrets: &BTreeMap::from([("s".to_owned(), Arc::new(secret))]),
        addresses: &fields::Addresses {
            pod: vec!["10.244.0.5".to_owned()],
            host: vec!["10.0.0.1".to_owned()],
        },
        allocatable: &serde_json::from_value(json!({"memory": "2Gi"})).expect("resources"),
    })
}

fn value<'a>(env: &'a ProcessEnv, name: &str) -> Option<&'a str> {
    env.variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

#[test]
fn sources_override_and_expand_in_order() {
    let env = build_for(
        &json!({"name": "a",
            "command": ["echo", "$(GREETING)", "$(NOPE)"],
            "envFrom": [{"configMapRef": {"name": "c"}, "prefix": "CFG_"}],
            "env": [
                {"name": "CFG_SIZE", "value": "small"},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                {"name": "PW", "valueFrom": {"secretKeyRef": {"name": "s", "key": "pw"}}},
                {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
                {"name": "MAYBE", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "k", "optional": true}}},
                {"name": "GREETING", "value": "$(CFG_COLOR) at $(IP) via $(WEB_SERVICE_HOST)"}
            ]}),
        &json!([{"metadata": {"name": "web", "namespace": "ns"},
                "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]}}]),
    )
    .expect("builds");
    assert_eq!(value(&env, "CFG_SIZE"), Some("small"));
    assert_eq!(value(&env, "LABEL"), Some("web"));
    assert_eq!(value(&env, "PW"), Some("secret"));
    assert_eq!(value(&env, "MEM"), Some("2048"));
    assert_eq!(value(&env, "MAYBE"), None);
    assert_eq!(env.command, ["echo", "red at 10.244.0.5 via 10.96.0.9", "$(NOPE)"]);
}

#[test]
fn missing_objects_are_named_as_upstream_does() {
    for (source, message) in [
        (json!({"configMapKeyRef": {"name": "none", "key": "k"}}), "configmap \"none\" not found"),
        (json!({"configMapKeyRef": {"name": "c", "key": "k"}}), "couldn't find key k in ConfigMap ns/c"),
        (json!({"secretKeyRef": {"name": "none", "key": "k"}}), "secret \"none\" not found"),
    ] {
        let error = build_for(&json!({"name": "a", "env": [{"name": "X", "valueFrom": source}]}), &json!([]))
            .expect_err("missing");
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn service_variables_of_the_namespace_and_of_the_api() {
    let env = build_for(
        &json!({"name": "a"}),
        &json!([
            {"metadata": {"name": "my-db", "namespace": "ns"}, "spec": {"clusterIP": "10.96.0.7",
             "ports": [{"name": "main-port", "port": 5432, "protocol": "TCP"}]}},
            {"metadata": {"name": "headless", "namespace": "ns"}, "spec": {"clusterIP": "None", "ports": [{"port": 1}]}},
            {"metadata": {"name": "other", "namespace": "other"}, "spec": {"clusterIP": "10.96.0.8", "ports": [{"port": 1}]}},
            {"metadata": {"name": "kubernetes", "namespace": "default"}, "spec": {"clusterIP": "10.96.0.1",
             "ports": [{"name": "https", "port": 443}]}}
        ]),
    )
    .expect("builds");
    assert_eq!(value(&env, "MY_DB_SERVICE_PORT_MAIN_PORT"), Some("5432"));
    assert_eq!(value(&env, "MY_DB_PORT_5432_TCP"), Some("tcp://10.96.0.7:5432"));
    assert_eq!(value(&env, "KUBERNETES_SERVICE_HOST"), Some("10.96.0.1"));
    assert_eq!(value(&env, "OTHER_SERVICE_HOST"), None);
    assert_eq!(value(&env, "HEADLESS_SERVICE_HOST"), None);
}
