//! Watches: where they start, what they show, how they end.

use serde_json::{Value, json};

use crate::harness::Cluster;

const CONFIGMAPS: &str = "/api/v1/namespaces/default/configmaps";

fn named(name: &str, tier: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"tier": tier}}})
}

fn event(kind: &str, name: &str) -> (String, String) {
    (kind.to_owned(), name.to_owned())
}

#[tokio::test]
async fn a_watch_resumes_after_its_revision_even_across_a_restart() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let first = admin.create(CONFIGMAPS, &named("a", "x")).await;
    let from = first["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    admin.create(CONFIGMAPS, &named("b", "x")).await;
    admin.delete(&format!("{CONFIGMAPS}/a")).await;
    let cluster = cluster.restart().await;
    let admin = cluster.admin();
    let mut watch = admin.watch(&format!("{CONFIGMAPS}?watch=1&resourceVersion={from}")).await;
    assert_eq!(watch.next_name().await, event("ADDED", "b"));
    let (kind, gone) = watch.next().await.unwrap();
    assert_eq!((kind.as_str(), &gone["metadata"]["labels"]["tier"]), ("DELETED", &json!("x")));
    let deleted: u64 = gone["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    assert!(deleted > from.parse().unwrap());
    let third = admin.create(CONFIGMAPS, &named("c", "x")).await;
    assert_eq!(watch.next_name().await, event("ADDED", "c"));
    let third: u64 = third["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    assert!(third > deleted, "revisions never go back");
    cluster.stop().await;
    assert_eq!(watch.next().await, None, "a stopping server ends its watches");
}

#[tokio::test]
async fn leaving_a_selection_is_a_deletion() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let mut watch = admin.watch(&format!("{CONFIGMAPS}?watch=1&labelSelector=tier%3Dfront")).await;
    admin.create(CONFIGMAPS, &named("a", "back")).await;
    admin.create(CONFIGMAPS, &named("b", "front")).await;
    assert_eq!(watch.next_name().await, event("ADDED", "b"));
    let path = format!("{CONFIGMAPS}/a");
    admin.patch(&path, "merge", &named("a", "front")).await;
    assert_eq!(watch.next_name().await, event("ADDED", "a"));
    admin.patch(&path, "merge", &json!({"data": {"k": "v"}})).await;
    assert_eq!(watch.next_name().await, event("MODIFIED", "a"));
    let (_, left) = admin.patch(&path, "merge", &named("a", "back")).await;
    let (kind, last) = watch.next().await.unwrap();
    assert_eq!((kind.as_str(), &last["metadata"]["labels"]["tier"]), ("DELETED", &json!("front")));
    assert_eq!(last["metadata"]["resourceVersion"], left["metadata"]["resourceVersion"]);
    cluster.stop().await;
}

#[tokio::test]
async fn initial_events_end_with_a_bookmark() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(CONFIGMAPS, &named("a", "x")).await;
    let query = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut watch = admin.watch(&format!("{CONFIGMAPS}?{query}")).await;
    assert_eq!(watch.next_name().await, event("ADDED", "a"));
    let (kind, bookmark) = watch.next().await.unwrap();
    assert_eq!(kind, "BOOKMARK");
    assert_eq!(bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    admin.create(CONFIGMAPS, &named("b", "x")).await;
    assert_eq!(watch.next_name().await, event("ADDED", "b"));
    let (code, error) = admin.get(&format!("{CONFIGMAPS}?watch=1&sendInitialEvents=true")).await;
    assert_eq!((code, &error["reason"]), (422, &json!("Invalid")));
    cluster.stop().await;
}

#[tokio::test]
async fn too_old_and_too_new_revisions_are_told_apart() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(CONFIGMAPS, &named("a", "x")).await;
    cluster.store.compact(cluster.store.revision().await.unwrap()).await.unwrap();
    let cluster = cluster.restart().await;
    let admin = cluster.admin();
    let mut watch = admin.watch(&format!("{CONFIGMAPS}?watch=1&resourceVersion=2")).await;
    let (kind, status) = watch.next().await.unwrap();
    assert_eq!(
        (kind.as_str(), &status["code"], &status["reason"]),
        ("ERROR", &json!(410), &json!("Expired"))
    );
    assert_eq!(watch.next().await, None);
    let (code, status) = admin.get(&format!("{CONFIGMAPS}?resourceVersion=999999")).await;
    assert_eq!((code, &status["details"]["causes"][0]["reason"]), (504, &json!("ResourceVersionTooLarge")));
    cluster.stop().await;
}

#[tokio::test]
async fn a_watch_ends_at_its_timeout_with_a_bookmark() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let query = "watch=1&timeoutSeconds=1&allowWatchBookmarks=true&resourceVersion=1&fieldSelector=metadata.name%3Dnone";
    let mut watch = admin.watch(&format!("{CONFIGMAPS}?{query}")).await;
    let (kind, bookmark) = watch.next().await.unwrap();
    assert_eq!(kind, "BOOKMARK");
    assert_ne!(bookmark["metadata"]["resourceVersion"], "1", "it tells of progress");
    assert_eq!(watch.next().await, None);
    cluster.stop().await;
}

#[tokio::test]
async fn events_have_two_faces_and_one_store() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let mut watch = admin.watch("/api/v1/namespaces/default/events?watch=1").await;
    let new = json!({
        "metadata": {"name": "e1"}, "eventTime": "2026-01-01T00:00:00.000000Z", "action": "Test", "reason": "Testing",
        "reportingController": "test", "reportingInstance": "t", "type": "Normal", "note": "hello",
        "regarding": {"kind": "Pod", "namespace": "default", "name": "web"},
    });
    let (code, created) = admin.post("/apis/events.k8s.io/v1/namespaces/default/events", &new).await;
    assert_eq!((code, &created["note"]), (201, &json!("hello")), "{created}");
    let (_, seen) = watch.next().await.unwrap();
    assert_eq!((&seen["message"], &seen["involvedObject"]["name"]), (&json!("hello"), &json!("web")));
    let (_, list) =
        admin.get("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3Dweb").await;
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    cluster.stop().await;
}
