//! What is special about pods: admission, binding, graceful deletion, eviction, streams.

use serde_json::{Value, json};

use crate::harness::{Client, Cluster};

const PODS: &str = "/api/v1/namespaces/default/pods";

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "main", "image": "busybox"}]}})
}

async fn bind(admin: &Client, name: &str, node: &str) -> (u16, Value) {
    let binding = json!({"metadata": {"name": name}, "target": {"kind": "Node", "name": node}});
    admin.post(&format!("{PODS}/{name}/binding"), &binding).await
}

#[tokio::test]
async fn a_new_pod_gets_its_account_token_and_tolerations() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let made = admin.create(PODS, &pod("web")).await;
    assert_eq!(made["spec"]["serviceAccountName"], "default");
    let mount = &made["spec"]["containers"][0]["volumeMounts"][0];
    assert_eq!(mount["mountPath"], "/var/run/secrets/kubernetes.io/serviceaccount");
    assert_eq!(mount["name"], made["spec"]["volumes"][0]["name"]);
    assert_eq!(made["spec"]["tolerations"].as_array().unwrap().len(), 2);
    assert_eq!(made["status"]["phase"], "Pending");
    let mut stranger = pod("stranger");
    stranger["spec"]["serviceAccountName"] = json!("nobody");
    let (code, error) = admin.post(PODS, &stranger).await;
    assert_eq!(code, 403);
    assert!(error["message"].as_str().unwrap().contains("serviceaccount \"nobody\" not found"), "{error}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_pod_is_bound_once() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(PODS, &pod("web")).await;
    assert_eq!(bind(&admin, "web", "a").await.0, 201);
    let (code, error) = bind(&admin, "web", "b").await;
    assert_eq!(code, 409);
    assert!(error["message"].as_str().unwrap().contains("already assigned to node \"a\""), "{error}");
    let (_, bound) = admin.get(&format!("{PODS}/web")).await;
    assert_eq!(bound["spec"]["nodeName"], "a");
    assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
    cluster.stop().await;
}

#[tokio::test]
async fn a_running_pod_goes_when_its_node_says_so() {
    let cluster = Cluster::start().await;
    let (admin, node) = (cluster.admin(), cluster.node("a"));
    admin.create(PODS, &pod("web")).await;
    bind(&admin, "web", "a").await;
    let path = format!("{PODS}/web");
    let (code, waiting) = admin.delete(&format!("{path}?gracePeriodSeconds=20")).await;
    assert_eq!((code, &waiting["metadata"]["deletionGracePeriodSeconds"]), (200, &json!(20)));
    let (_, waiting) = admin.delete(&format!("{path}?gracePeriodSeconds=5")).await;
    assert_eq!(waiting["metadata"]["deletionGracePeriodSeconds"], 5, "it may be shortened");
    assert_eq!(node.delete(&format!("{path}?gracePeriodSeconds=0")).await.0, 200);
    assert_eq!(admin.get(&path).await.0, 404);
    admin.create(PODS, &pod("idle")).await;
    assert_eq!(admin.delete(&format!("{PODS}/idle")).await.0, 200);
    assert_eq!(admin.get(&format!("{PODS}/idle")).await.0, 404, "a pod without a node needs no grace");
    cluster.stop().await;
}

#[tokio::test]
async fn streams_without_a_kubelet_are_errors_that_say_why() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(PODS, &pod("web")).await;
    let (code, error) = admin.get(&format!("{PODS}/web/log")).await;
    assert_eq!((code, &error["message"]), (400, &json!("pod web does not have a host assigned")));
    bind(&admin, "web", "a").await;
    let (code, _) = admin.get(&format!("{PODS}/web/log")).await;
    assert_eq!(code, 404, "the node does not exist");
    let node = json!({"metadata": {"name": "a"}, "status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 1}}}});
    admin.create("/api/v1/nodes", &node).await;
    admin.patch("/api/v1/nodes/a/status", "merge", &node).await;
    let (code, error) = admin.get(&format!("{PODS}/web/log")).await;
    assert_eq!(code, 503);
    assert!(error["message"].as_str().unwrap().contains("kubelet of node \"a\" at 127.0.0.1:1"), "{error}");
    let (code, error) = admin.get(&format!("{PODS}/web/log?container=x")).await;
    assert_eq!((code, &error["message"]), (400, &json!("container x is not valid for pod web")));
    let (code, _) = admin.post(&format!("{PODS}/web/exec?command=sh"), &json!({})).await;
    assert_eq!(code, 400, "exec needs an upgrade");
    cluster.stop().await;
}

#[tokio::test]
async fn eviction_is_a_deletion() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(PODS, &pod("web")).await;
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "web"}});
    assert_eq!(admin.post(&format!("{PODS}/web/eviction"), &eviction).await.0, 201);
    assert_eq!(admin.get(&format!("{PODS}/web")).await.0, 404);
    cluster.stop().await;
}

#[tokio::test]
async fn ephemeral_containers_are_added_and_never_changed() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(PODS, &pod("web")).await;
    let path = format!("{PODS}/web/ephemeralcontainers");
    // As `kubectl debug` does it: the whole pod comes along, and nothing else of it changes.
    let debugger =
        json!({"name": "debugger", "image": "busybox", "stdin": true, "targetContainerName": "main"});
    let patch = json!({"spec": {"ephemeralContainers": [debugger], "containers": [{"name": "main", "image": "other"}]}});
    let (code, patched) = admin.patch(&path, "strategic-merge", &patch).await;
    assert_eq!(code, 200, "{patched}");
    let made = &patched["spec"]["ephemeralContainers"][0];
    assert_eq!((&made["name"], &made["imagePullPolicy"]), (&json!("debugger"), &json!("Always")));
    assert_eq!(patched["spec"]["containers"][0]["image"], "busybox");
    assert_eq!(patched["metadata"]["generation"], 2);
    for (change, why) in [
        (
            json!([{"name": "debugger", "image": "changed"}]),
            "existing ephemeral containers \"debugger\" may not be changed",
        ),
        (
            json!([{"$patch": "delete", "name": "debugger"}]),
            "existing ephemeral containers \"debugger\" may not be removed",
        ),
        (json!([{"name": "main", "image": "i"}]), "Duplicate value: \"main\""),
        (
            json!([{"name": "d", "image": "i", "targetContainerName": "none"}]),
            "targetContainerName: Not found: \"none\"",
        ),
        (
            json!([{"name": "d", "image": "i", "ports": [{"containerPort": 1}]}]),
            "cannot be set for an Ephemeral Container",
        ),
    ] {
        let patch = json!({"spec": {"ephemeralContainers": change}});
        let (code, error) = admin.patch(&path, "strategic-merge", &patch).await;
        assert_eq!(code, 422, "{error}");
        assert!(error["message"].as_str().unwrap().contains(why), "{error}");
    }
    let mut ready = pod("born");
    ready["spec"]["ephemeralContainers"] = json!([{"name": "d", "image": "i"}]);
    let (code, error) = admin.post(PODS, &ready).await;
    assert_eq!(code, 422, "{error}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_resize_changes_resources_and_nothing_else() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let mut wanted = pod("web");
    wanted["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "100m", "memory": "64Mi"}});
    admin.create(PODS, &wanted).await;
    let path = format!("{PODS}/web/resize");
    let container = |resources: Value| json!({"spec": {"containers": [{"name": "main", "image": "other", "resources": resources}]}});
    let (code, resized) =
        admin.patch(&path, "strategic-merge", &container(json!({"requests": {"cpu": "200m"}}))).await;
    assert_eq!(code, 200, "{resized}");
    let main = &resized["spec"]["containers"][0];
    assert_eq!(main["resources"]["requests"], json!({"cpu": "200m", "memory": "64Mi"}));
    assert_eq!(main["image"], "busybox");
    for (resources, why) in [
        (json!({"requests": {"cpu": null}}), "requests cannot be removed"),
        (json!({"requests": {"ephemeral-storage": "1Gi"}}), "only cpu and memory resources are mutable"),
        (
            json!({"requests": {"cpu": "200m", "memory": "64Mi"}, "limits": {"cpu": "200m", "memory": "64Mi"}}),
            "Pod QOS Class may not change as a result of resizing",
        ),
    ] {
        let (code, error) = admin.patch(&path, "strategic-merge", &container(resources)).await;
        assert_eq!(code, 422, "{error}");
        assert!(error["message"].as_str().unwrap().contains(why), "{error}");
    }
    let elsewhere = container(json!({"requests": {"cpu": "300m"}}));
    let (code, error) = admin.patch(&format!("{PODS}/web"), "strategic-merge", &elsewhere).await;
    assert_eq!(code, 422, "resources change through /resize only: {error}");
    cluster.stop().await;
}

#[tokio::test]
async fn containers_may_have_restart_rules() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let with = |rules: Value| {
        let mut pod = pod("web");
        pod["spec"]["containers"][0]["restartPolicyRules"] = rules;
        pod
    };
    let rule = json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]);
    let (code, error) = admin.post(PODS, &with(rule.clone())).await;
    assert_eq!(code, 422, "rules need the container's own policy: {error}");
    let mut good = with(rule);
    good["spec"]["containers"][0]["restartPolicy"] = json!("Never");
    admin.create(PODS, &good).await;
    let mut bad = with(json!([{"action": "Explode", "exitCodes": {"operator": "Maybe"}}]));
    bad["spec"]["containers"][0]["restartPolicy"] = json!("Never");
    let (code, error) = admin.post(PODS, &bad).await;
    assert_eq!(code, 422);
    let text = error["message"].as_str().unwrap();
    assert!(text.contains("restartPolicyRules[0].action") && text.contains("exitCodes.operator"), "{error}");
    cluster.stop().await;
}
