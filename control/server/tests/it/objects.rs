//! Create, read, update, patch, delete: what clients rely on.

use serde_json::{Value, json};

use crate::harness::Cluster;

const CONFIGMAPS: &str = "/api/v1/namespaces/default/configmaps";

fn version(object: &Value) -> &str {
    object["metadata"]["resourceVersion"].as_str().unwrap()
}

#[tokio::test]
async fn writes_are_guarded_by_resource_versions() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let first = admin.create(CONFIGMAPS, &json!({"metadata": {"name": "a"}, "data": {"k": "1"}})).await;
    let (code, error) = admin.post(CONFIGMAPS, &json!({"metadata": {"name": "a"}})).await;
    assert_eq!((code, &error["message"]), (409, &json!("configmaps \"a\" already exists")));

    let mut second = first.clone();
    second["data"]["k"] = json!("2");
    let path = format!("{CONFIGMAPS}/a");
    let (code, stored) = admin.put(&path, &second).await;
    assert_eq!(code, 200);
    assert_ne!(version(&stored), version(&first));
    let (code, error) = admin.put(&path, &second).await;
    assert_eq!((code, &error["reason"]), (409, &json!("Conflict")));

    let (code, unchanged) = admin.put(&path, &stored).await;
    assert_eq!((code, version(&unchanged)), (200, version(&stored)), "a write that changes nothing is none");

    let mut blind = stored.clone();
    blind["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    blind["data"] = json!({"k": "3"});
    assert_eq!(admin.put(&path, &blind).await.0, 200, "without a version it overwrites");

    let (code, error) =
        admin.put(&format!("{CONFIGMAPS}/missing"), &json!({"metadata": {"name": "missing"}})).await;
    assert_eq!((code, &error["message"]), (404, &json!("configmaps \"missing\" not found")));
    let (code, error) = admin.delete(&format!("{path}?resourceVersionX=1")).await;
    assert_eq!((code, &error["status"]), (200, &json!("Success")));
    assert_eq!(admin.get(&path).await.0, 404);
    cluster.stop().await;
}

#[tokio::test]
async fn names_are_generated_namespaces_must_exist_and_dry_runs_leave_no_trace() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let made = admin.create(CONFIGMAPS, &json!({"metadata": {"generateName": "run-"}})).await;
    let name = made["metadata"]["name"].as_str().unwrap();
    assert!(name.starts_with("run-") && name.len() == 9, "{name}");
    let (code, error) =
        admin.post("/api/v1/namespaces/nowhere/configmaps", &json!({"metadata": {"name": "a"}})).await;
    assert_eq!((code, &error["message"]), (404, &json!("namespaces \"nowhere\" not found")));
    let (code, _) =
        admin.post(&format!("{CONFIGMAPS}?dryRun=All"), &json!({"metadata": {"name": "dry"}})).await;
    assert_eq!(code, 201);
    assert_eq!(admin.get(&format!("{CONFIGMAPS}/dry")).await.0, 404);
    cluster.stop().await;
}

#[tokio::test]
async fn unknown_fields_are_named_warned_of_or_ignored() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let object = json!({"metadata": {"name": "typo"}, "date": {"k": "v"}});
    let (code, error) = admin.post(&format!("{CONFIGMAPS}?fieldValidation=Strict"), &object).await;
    assert_eq!(code, 400);
    assert!(error["message"].as_str().unwrap().contains("unknown field \"date\""), "{error}");
    let headers = [("content-type", "application/json")];
    let body = object.to_string();
    let (status, headers, _) =
        admin.send(http::Method::POST, &format!("{CONFIGMAPS}?fieldValidation=Warn"), &headers, body).await;
    assert_eq!(status, 201);
    let warning = headers["warning"].to_str().unwrap();
    assert!(warning.starts_with("299 - \"") && warning.contains("unknown field"), "{warning}");
    assert!(admin.get(&format!("{CONFIGMAPS}/typo")).await.1.get("date").is_none());
    cluster.stop().await;
}

#[tokio::test]
async fn patches_of_all_three_kinds_and_subresources_keep_to_their_part() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let deployments = "/apis/apps/v1/namespaces/default/deployments";
    let template = json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web", "image": "nginx:1"}]}});
    let object = json!({
        "metadata": {"name": "web"},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "web"}}, "template": template},
        "status": {"replicas": 7},
    });
    let created = admin.create(deployments, &object).await;
    assert_eq!(created["metadata"]["generation"], 1);
    assert!(created["status"].get("replicas").is_none(), "status is not the creator's");
    let path = format!("{deployments}/web");
    let image =
        json!({"spec": {"template": {"spec": {"containers": [{"name": "web", "image": "nginx:2"}]}}}});
    let (code, patched) = admin.patch(&path, "strategic-merge", &image).await;
    assert_eq!(code, 200, "{patched}");
    let container = &patched["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(
        (&container["image"], &container["imagePullPolicy"]),
        (&json!("nginx:2"), &json!("IfNotPresent"))
    );
    assert_eq!(patched["metadata"]["generation"], 2);
    let (_, patched) =
        admin.patch(&path, "json", &json!([{"op": "replace", "path": "/spec/replicas", "value": 3}])).await;
    assert_eq!(patched["spec"]["replicas"], 3);
    let status = json!({"status": {"replicas": 2}, "spec": {"replicas": 9}});
    let (code, patched) = admin.patch(&format!("{path}/status"), "merge", &status).await;
    assert_eq!(code, 200);
    assert_eq!((&patched["status"]["replicas"], &patched["spec"]["replicas"]), (&json!(2), &json!(3)));
    assert_eq!(patched["metadata"]["generation"], 3, "status does not count");
    let (code, scale) =
        admin.patch(&format!("{path}/scale"), "merge", &json!({"spec": {"replicas": 5}})).await;
    assert_eq!((code, &scale["kind"], &scale["spec"]["replicas"]), (200, &json!("Scale"), &json!(5)));
    let (code, _) = admin.patch(&path, "nothing", &json!({})).await;
    assert_eq!(code, 415);
    cluster.stop().await;
}

#[tokio::test]
async fn finalizers_hold_an_object_and_propagation_adds_them() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let held = json!({"metadata": {"name": "held", "finalizers": ["example.com/wait"]}});
    admin.create(CONFIGMAPS, &held).await;
    let path = format!("{CONFIGMAPS}/held");
    let (code, waiting) = admin.delete(&path).await;
    assert_eq!(code, 200);
    assert!(waiting["metadata"]["deletionTimestamp"].is_string());
    let mut watch = admin.watch(&format!("{CONFIGMAPS}?watch=1&fieldSelector=metadata.name=held")).await;
    assert_eq!(watch.next_name().await.0, "ADDED");
    let (code, _) = admin.patch(&path, "merge", &json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(code, 200);
    assert_eq!(watch.next_name().await, ("DELETED".to_owned(), "held".to_owned()));
    assert_eq!(admin.get(&path).await.0, 404);

    admin.create(CONFIGMAPS, &json!({"metadata": {"name": "owner"}})).await;
    let path = format!("{CONFIGMAPS}/owner");
    let (_, waiting) = admin.delete(&format!("{path}?propagationPolicy=Foreground")).await;
    assert_eq!(waiting["metadata"]["finalizers"], json!(["foregroundDeletion"]));
    cluster.stop().await;
}

#[tokio::test]
async fn long_lists_come_in_consistent_pages() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    for name in ["a", "b", "c", "d", "e"] {
        admin.create(CONFIGMAPS, &json!({"metadata": {"name": name, "labels": {"page": "yes"}}})).await;
    }
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap().iter();
        items.map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let (_, page) = admin.get(&format!("{CONFIGMAPS}?limit=2")).await;
    assert_eq!(
        (names(&page), &page["metadata"]["remainingItemCount"]),
        (vec!["a".into(), "b".into()], &json!(3))
    );
    // Changes after the first page are not seen by the later ones.
    admin.delete(&format!("{CONFIGMAPS}/d")).await;
    admin.create(CONFIGMAPS, &json!({"metadata": {"name": "bb", "labels": {"page": "yes"}}})).await;
    let mut seen = names(&page);
    let mut token = page["metadata"]["continue"].as_str().unwrap().to_owned();
    let listed = version(&page).to_owned();
    while !token.is_empty() {
        let (code, page) =
            admin.get(&format!("{CONFIGMAPS}?limit=2&labelSelector=page%3Dyes&continue={token}")).await;
        assert_eq!((code, version(&page)), (200, listed.as_str()));
        seen.extend(names(&page));
        token = page["metadata"]["continue"].as_str().unwrap_or_default().to_owned();
    }
    assert_eq!(seen, ["a", "b", "c", "d", "e"]);

    let (_, page) = admin.get(&format!("{CONFIGMAPS}?limit=2")).await;
    let token = page["metadata"]["continue"].as_str().unwrap();
    admin.create(CONFIGMAPS, &json!({"metadata": {"name": "z"}})).await;
    cluster.store.compact(cluster.store.revision().await.unwrap()).await.unwrap();
    let (code, expired) = admin.get(&format!("{CONFIGMAPS}?limit=2&continue={token}")).await;
    assert_eq!((code, &expired["reason"]), (410, &json!("Expired")));
    let token = expired["metadata"]["continue"].as_str().unwrap();
    let (_, rest) = admin.get(&format!("{CONFIGMAPS}?continue={token}")).await;
    assert_eq!(names(&rest), ["bb", "c", "e", "z"], "it goes on in the newest state");
    cluster.stop().await;
}

#[tokio::test]
async fn declared_fields_have_owners_and_conflicts_name_them() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let apply = |manager: &'static str, value: &'static str| {
        let admin = admin.clone();
        async move {
            let path = format!("{CONFIGMAPS}/applied?fieldManager={manager}");
            let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "applied"}, "data": {"k": value}});
            let headers = [("content-type", "application/apply-patch+yaml")];
            admin.send(http::Method::PATCH, &path, &headers, object.to_string()).await.0.as_u16()
        }
    };
    assert_eq!(apply("one", "1").await, 201, "what is not there is created");
    assert_eq!(apply("one", "2").await, 200);
    assert_eq!(apply("two", "3").await, 409, "the field belongs to the first manager");
    let (_, object) = admin.get(&format!("{CONFIGMAPS}/applied")).await;
    assert_eq!(object["data"]["k"], "2");
    assert_eq!(object["metadata"]["managedFields"][0]["manager"], "one");
    let path = format!("{CONFIGMAPS}/applied?fieldManager=three");
    admin.patch(&path, "merge", &json!({"data": {"k": "4"}})).await;
    assert_eq!(apply("one", "5").await, 409, "an ordinary write takes the field over");
    cluster.stop().await;
}
