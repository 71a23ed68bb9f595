//! Who may do what, and service account tokens.

use serde_json::json;

use crate::harness::Cluster;

#[tokio::test]
async fn strangers_are_refused_and_health_is_public() {
    let cluster = Cluster::start().await;
    let nobody = cluster.nobody();
    assert_eq!(nobody.get("/api/v1/pods").await.0, 401);
    assert_eq!(nobody.get("/apis").await.0, 401);
    assert_eq!(nobody.get("/livez").await, (200, json!("ok")));
    assert_eq!(nobody.get("/version").await.1["minor"], "36");
    assert_eq!(cluster.bearer("nonsense").get("/api/v1/pods").await.0, 401);
    let user = cluster.client("jane", "developers");
    let (code, error) = user.get("/api/v1/namespaces/default/pods").await;
    assert_eq!(code, 403);
    assert_eq!(
        error["message"],
        "pods is forbidden: User \"jane\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    assert_eq!(user.get("/apis").await.0, 200);
    cluster.stop().await;
}

#[tokio::test]
async fn a_node_keeps_to_its_own_objects() {
    let cluster = Cluster::start().await;
    let (admin, node) = (cluster.admin(), cluster.node("a"));
    assert_eq!(node.post("/api/v1/nodes", &json!({"metadata": {"name": "a"}})).await.0, 201);
    assert_eq!(node.post("/api/v1/nodes", &json!({"metadata": {"name": "b"}})).await.0, 403);
    admin.create("/api/v1/nodes", &json!({"metadata": {"name": "b"}})).await;
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    assert_eq!(node.patch("/api/v1/nodes/a/status", "strategic-merge", &ready).await.0, 200);
    assert_eq!(node.patch("/api/v1/nodes/b/status", "strategic-merge", &ready).await.0, 403);
    let pods = "/api/v1/namespaces/default/pods";
    let pod = json!({"metadata": {"name": "web"}, "spec": {"nodeName": "b", "containers": [{"name": "c", "image": "i"}]}});
    admin.create(pods, &pod).await;
    let running = json!({"status": {"phase": "Running"}});
    assert_eq!(
        node.patch(&format!("{pods}/web/status"), "merge", &running).await.0,
        403,
        "another node's pod"
    );
    assert_eq!(node.get(&format!("{pods}?fieldSelector=spec.nodeName%3Da")).await.0, 200);
    assert_eq!(node.delete("/apis/apps/v1/namespaces/default/deployments/x").await.0, 403);
    let lease = json!({"metadata": {"name": "a"}, "spec": {"holderIdentity": "a"}});
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    assert_eq!(node.post(leases, &lease).await.0, 201);
    cluster.stop().await;
}

#[tokio::test]
async fn tokens_live_as_long_as_what_they_are_bound_to() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let pods = "/api/v1/namespaces/default/pods";
    let pod = json!({"metadata": {"name": "web"}, "spec": {"nodeName": "a", "containers": [{"name": "c", "image": "i"}]}});
    let pod = admin.create(pods, &pod).await;
    let request = json!({"spec": {"expirationSeconds": 3607, "boundObjectRef":
        {"kind": "Pod", "apiVersion": "v1", "name": "web", "uid": pod["metadata"]["uid"]}}});
    let tokens = "/api/v1/namespaces/default/serviceaccounts/default/token";
    assert_eq!(cluster.node("b").post(tokens, &request).await.0, 403, "only the pod's own node may ask");
    let (code, made) = cluster.node("a").post(tokens, &request).await;
    assert_eq!(code, 201, "{made}");
    let token = made["status"]["token"].as_str().unwrap();
    let review = json!({"spec": {"token": token}});
    let (_, reviewed) = admin.post("/apis/authentication.k8s.io/v1/tokenreviews", &review).await;
    assert_eq!(reviewed["status"]["user"]["username"], "system:serviceaccount:default:default");
    let account = cluster.bearer(token);
    let (_, own) = account.post("/apis/authentication.k8s.io/v1/selfsubjectreviews", &json!({})).await;
    assert_eq!(own["status"]["userInfo"]["extra"]["authentication.kubernetes.io/pod-name"], json!(["web"]));
    assert_eq!(account.get(pods).await.0, 403);
    let question =
        json!({"spec": {"resourceAttributes": {"verb": "list", "resource": "pods", "namespace": "default"}}});
    let (code, answer) =
        account.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &question).await;
    assert_eq!((code, &answer["status"]["allowed"]), (201, &json!(false)));
    admin.delete(&format!("{pods}/web?gracePeriodSeconds=0")).await;
    assert_eq!(account.get("/apis").await.0, 401, "the pod is gone, and its token with it");
    let (_, reviewed) = admin.post("/apis/authentication.k8s.io/v1/tokenreviews", &review).await;
    assert_eq!(reviewed["status"]["authenticated"], false);
    cluster.stop().await;
}
