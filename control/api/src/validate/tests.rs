//! What users meet when a manifest is wrong, kind by kind, word by word.

#![allow(clippy::needless_pass_by_value, reason = "test tables pass literals")]

use serde_json::{Value, json};

use super::*;
use crate::{defaults, kinds};

fn texts(errors: &[FieldError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

#[track_caller]
fn check(api_version: &str, kind: &str, mut object: Value, expected: &[&str]) {
    let info = kinds::by_kind(api_version, kind).unwrap();
    defaults::apply(info, &mut object);
    assert_eq!(texts(&create(info, &object)), expected);
}

fn meta() -> Value {
    json!({"name": "web", "namespace": "default"})
}

fn deployment() -> Value {
    json!({
        "metadata": meta(),
        "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "nginx", "image": "nginx", "ports": [{"containerPort": 80}]}]},
            },
        },
    })
}

#[track_caller]
fn check_container(container: Value, expected: &[&str]) {
    let mut full = json!({"name": "a", "image": "b"});
    full.as_object_mut().unwrap().extend(container.as_object().unwrap().clone());
    check("v1", "Pod", json!({"metadata": meta(), "spec": {"containers": [full]}}), expected);
}

#[test]
fn good_objects_pass() {
    check("apps/v1", "Deployment", deployment(), &[]);
    check(
        "v1",
        "Service",
        json!({"metadata": meta(), "spec": {"type": "NodePort", "selector": {"app": "web"}, "ports": [{"port": 80, "nodePort": 30000}]}}),
        &[],
    );
    check("v1", "Namespace", json!({"metadata": {"name": "n"}}), &[]);
    check("v1", "ConfigMap", json!({"metadata": meta(), "data": {"a.b": "c"}}), &[]);
}

#[test]
fn a_pods_security() {
    let pod = |spec: Value| {
        let mut full = json!({"containers": [{"name": "a", "image": "b"}]});
        full.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        json!({"metadata": meta(), "spec": full})
    };
    let sysctl = |name: &str| json!({"securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
    check("v1", "Pod", pod(sysctl("net/ipv4.conf.eth0-1/forwarding")), &[]);
    check("v1", "Pod", pod(sysctl("")), &["spec.securityContext.sysctls[0].name: Required value"]);
    for name in ["foo-", "bar..", "kernel.shm;x", "Kernel.x"] {
        let why = "must have at most 253 characters and consist of segments of lower case letters, digits, '-' and '_' \
                   between dots or slashes";
        let error = format!("spec.securityContext.sysctls[0].name: Invalid value: \"{name}\": {why}");
        check("v1", "Pod", pod(sysctl(name)), &[&error]);
    }
    let unmasked = json!([{"name": "a", "image": "b", "securityContext": {"procMount": "Unmasked"}}]);
    check("v1", "Pod", pod(json!({"hostUsers": false, "containers": unmasked})), &[]);
    check(
        "v1",
        "Pod",
        pod(json!({"containers": unmasked})),
        &[
            "spec.containers[0].securityContext.procMount: Invalid value: \"Unmasked\": `hostUsers` must be false to use \
           `Unmasked`",
        ],
    );
    check_container(
        json!({"securityContext": {"privileged": true, "allowPrivilegeEscalation": false}}),
        &[
            "spec.containers[0].securityContext: Invalid value: \"\": cannot set `allowPrivilegeEscalation` to false and \
           `privileged` to true",
        ],
    );
}

#[test]
fn what_a_pod_is_told_of_itself() {
    let field = |path: &str| json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": path}}}]});
    check_container(field("status.podIPs"), &[]);
    check_container(field("metadata.labels['a.b/c']"), &[]);
    check_container(
        field("spec.containers"),
        &[
            "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath: Invalid value: \"spec.containers\": error converting \
           fieldPath: field label not supported: spec.containers",
        ],
    );
    let volume = |source: Value| {
        let mut volume = json!({"name": "v"});
        volume.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
        let spec = json!({"volumes": [volume], "containers": [{"name": "a", "image": "b"}]});
        json!({"metadata": meta(), "spec": spec})
    };
    let item = json!({"path": "cpu", "resourceFieldRef": {"resource": "limits.cpu"}});
    check(
        "v1",
        "Pod",
        volume(json!({"downwardAPI": {"items": [item]}})),
        &["spec.volumes[0].downwardAPI.items[0].resourceFieldRef.containerName: Required value"],
    );
    let items = json!([{"key": "k", "path": "same"}]);
    let sources =
        json!([{"configMap": {"name": "a", "items": items}}, {"secret": {"name": "b", "items": items}}]);
    check(
        "v1",
        "Pod",
        volume(json!({"projected": {"sources": sources}})),
        &["spec.volumes[0].projected.sources[1]: Invalid value: \"same\": conflicting duplicate paths"],
    );
}

#[test]
fn names_and_labels() {
    check(
        "v1",
        "Service",
        json!({"metadata": {"name": "1web", "namespace": "d"}, "spec": {"ports": [{"port": 80}]}}),
        &[
            "metadata.name: Invalid value: \"1web\": a DNS-1035 label must consist of lower case alphanumeric \
           characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. \
           'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')",
        ],
    );
    let mut object = deployment();
    object["metadata"]["labels"] = json!({"a b": "c"});
    let info = kinds::by_kind("apps/v1", "Deployment").unwrap();
    let errors = texts(&create(info, &object));
    assert!(
        errors[0].starts_with("metadata.labels: Invalid value: \"a b\": name part must consist"),
        "{errors:?}"
    );
}

#[test]
fn limits_below_requests() {
    check_container(
        json!({"resources": {"requests": {"cpu": "200m"}, "limits": {"cpu": "100m"}}}),
        &[
            "spec.containers[0].resources.requests: Invalid value: \"200m\": must be less than or equal to cpu limit of \
           100m",
        ],
    );
    check_container(
        json!({"resources": {"limits": {"cpus": "1"}}}),
        &[
            "spec.containers[0].resources.limits[cpus]: Invalid value: \"cpus\": must be a standard resource for \
             containers",
            "spec.containers[0].resources.requests[cpus]: Invalid value: \"cpus\": must be a standard resource for \
             containers",
        ],
    );
}

#[test]
fn containers() {
    check_container(
        json!({"ports": [{"containerPort": 0}, {"containerPort": 70000, "name": "HTTP"}], "imagePullPolicy": "Sometimes"}),
        &[
            "spec.containers[0].imagePullPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \
             \"IfNotPresent\", \"Never\"",
            "spec.containers[0].ports[0].containerPort: Required value",
            "spec.containers[0].ports[1].name: Invalid value: \"HTTP\": must contain only alpha-numeric characters \
             (a-z, 0-9), and hyphens (-)",
            "spec.containers[0].ports[1].name: Invalid value: \"HTTP\": must contain at least one letter (a-z)",
            "spec.containers[0].ports[1].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
        ],
    );
    check_container(
        json!({"volumeMounts": [{"name": "v", "mountPath": "/x"}], "livenessProbe": {"successThreshold": 2}}),
        &[
            "spec.containers[0].volumeMounts[0].name: Not found: \"v\"",
            "spec.containers[0].livenessProbe: Required value: must specify a handler type",
            "spec.containers[0].livenessProbe.successThreshold: Invalid value: 2: must be 1",
        ],
    );
    check(
        "v1",
        "Pod",
        json!({"metadata": meta(), "spec": {"restartPolicy": "Often", "containers": [{"name": "a", "image": "i"}, {"name": "a"}]}}),
        &[
            "spec.containers[1].name: Duplicate value: \"a\"",
            "spec.containers[1].image: Required value",
            "spec.restartPolicy: Unsupported value: \"Often\": supported values: \"Always\", \"Never\", \"OnFailure\"",
        ],
    );
}

#[test]
fn workloads() {
    let mut object = deployment();
    object["spec"]["template"]["metadata"]["labels"] = json!({"app": "other"});
    object["spec"]["template"]["spec"]["restartPolicy"] = json!("Never");
    object["spec"]["replicas"] = json!(-1);
    check(
        "apps/v1",
        "Deployment",
        object,
        &[
            "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
            "spec.template.metadata.labels: Invalid value: {\"app\":\"other\"}: `selector` does not match template \
             `labels`",
            "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
        ],
    );
    let mut object = deployment();
    object["spec"]["strategy"] = json!({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}});
    check(
        "apps/v1",
        "Deployment",
        object,
        &[
            "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"0%\": may not be 0 when `maxSurge` is 0",
        ],
    );
    check(
        "apps/v1",
        "Deployment",
        json!({"metadata": meta(), "spec": {}}),
        &["spec.selector: Required value", "spec.template: Required value"],
    );
}

#[test]
fn selectors_are_immutable() {
    let info = kinds::by_kind("apps/v1", "Deployment").unwrap();
    let mut old = deployment();
    defaults::apply(info, &mut old);
    let mut new = old.clone();
    new["spec"]["selector"]["matchLabels"]["app"] = json!("x");
    new["spec"]["template"]["metadata"]["labels"]["app"] = json!("x");
    assert_eq!(
        texts(&update(info, &new, &old)),
        ["spec.selector: Invalid value: {\"matchLabels\":{\"app\":\"x\"}}: field is immutable"]
    );
}

#[test]
fn pods_change_images_only() {
    let info = kinds::by_kind("v1", "Pod").unwrap();
    let mut old = json!({"metadata": meta(), "spec": {"containers": [{"name": "a", "image": "b"}]}});
    defaults::apply(info, &mut old);
    let mut new = old.clone();
    new["spec"]["containers"][0]["image"] = json!("c");
    assert!(update(info, &new, &old).is_empty());
    new["spec"]["nodeName"] = json!("n");
    let errors = texts(&update(info, &new, &old));
    assert!(
        errors[0].starts_with("spec: Forbidden: pod updates may not change fields other than"),
        "{errors:?}"
    );
}

#[test]
fn services() {
    check(
        "v1",
        "Service",
        json!({"metadata": meta(), "spec": {"ports": [{"port": 80, "nodePort": 30000}, {"port": 80}]}}),
        &[
            "spec.ports[0].name: Required value",
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
            "spec.ports[1].name: Required value",
            "spec.ports[1]: Duplicate value: {\"port\":80,\"protocol\":\"TCP\"}",
        ],
    );
    let info = kinds::by_kind("v1", "Service").unwrap();
    let mut old = json!({"metadata": meta(), "spec": {"ports": [{"port": 80}], "clusterIP": "10.96.0.9"}});
    defaults::apply(info, &mut old);
    let mut new = old.clone();
    new["spec"]["clusterIP"] = json!("10.96.0.8");
    new["spec"]["clusterIPs"] = json!(["10.96.0.8"]);
    assert_eq!(
        texts(&update(info, &new, &old)),
        ["spec.clusterIPs[0]: Invalid value: [\"10.96.0.8\"]: may not change once set"]
    );
    check("v1", "Service", json!({"metadata": meta(), "spec": {}}), &["spec.ports: Required value"]);
}

#[test]
fn secrets_config_maps_slices() {
    check(
        "v1",
        "Secret",
        json!({"metadata": meta(), "type": "kubernetes.io/tls", "data": {"tls.crt": ""}}),
        &["data[tls.key]: Required value"],
    );
    check(
        "discovery.k8s.io/v1",
        "EndpointSlice",
        json!({"metadata": meta(), "addressType": "IPv4", "endpoints": [{"addresses": ["::1"]}], "ports": [{"port": 0}]}),
        &[
            "endpoints[0].addresses[0]: Invalid value: \"::1\": must be a valid IPv4 address",
            "ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
        ],
    );
}
