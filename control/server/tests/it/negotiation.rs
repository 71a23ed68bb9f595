//! Forms of answers and bodies, discovery, limits.

use http::Method;
use serde_json::json;

use crate::harness::Cluster;

const CONFIGMAPS: &str = "/api/v1/namespaces/default/configmaps";
const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

#[tokio::test]
async fn tables_and_metadata_on_request() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(CONFIGMAPS, &json!({"metadata": {"name": "a"}, "data": {"k": "v"}})).await;
    let (_, table) = admin.get_as(CONFIGMAPS, TABLE).await;
    assert_eq!((&table["kind"], &table["rows"][0]["cells"][0]), (&json!("Table"), &json!("a")));
    assert!(table["metadata"]["resourceVersion"].is_string());
    let accept = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
    let (_, list) = admin.get_as(CONFIGMAPS, accept).await;
    assert_eq!(
        (&list["kind"], &list["items"][0]["kind"]),
        (&json!("PartialObjectMetadataList"), &json!("PartialObjectMetadata"))
    );
    assert!(list["items"][0].get("data").is_none());
    let (code, error) = admin.get_as(CONFIGMAPS, "application/vnd.kubernetes.protobuf").await;
    assert_eq!((code, &error["reason"]), (406, &json!("NotAcceptable")));
    cluster.stop().await;
}

#[tokio::test]
async fn bodies_in_yaml_and_protobuf_but_not_in_anything_else_or_too_large() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let send = |media_type: &'static str, body: Vec<u8>| {
        let admin = admin.clone();
        async move { admin.send(Method::POST, CONFIGMAPS, &[("content-type", media_type)], body).await.0.as_u16() }
    };
    assert_eq!(send("application/yaml", b"metadata: {name: y}\ndata: {k: v}\n".to_vec()).await, 201);
    // k8s\0, Unknown{typeMeta{v1, ConfigMap}, raw: ConfigMap{metadata{name: p}}}
    let body = b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12\x05\x0a\x03\x0a\x01p".to_vec();
    assert_eq!(send("application/vnd.kubernetes.protobuf", body).await, 201);
    assert_eq!(admin.get(&format!("{CONFIGMAPS}/p")).await.0, 200);
    assert_eq!(send("application/xml", b"<a/>".to_vec()).await, 415);
    assert_eq!(send("application/json", b"{".to_vec()).await, 400);
    assert_eq!(send("application/json", vec![b' '; 4 << 20]).await, 413);
    cluster.stop().await;
}

#[tokio::test]
async fn discovery_has_both_forms_and_an_etag() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
    let (_, aggregated) = admin.get_as("/apis", accept).await;
    assert_eq!(aggregated["kind"], "APIGroupDiscoveryList");
    assert_eq!(admin.get("/apis").await.1["kind"], "APIGroupList");
    let (_, headers, _) = admin.send(Method::GET, "/apis", &[], "").await;
    let tag = headers["etag"].to_str().unwrap();
    let (status, ..) = admin.send(Method::GET, "/apis", &[("if-none-match", tag)], "").await;
    assert_eq!(status, 304);
    assert_eq!(admin.get("/apis/nothing.example/v1").await.0, 404);
    assert_eq!(admin.get("/openid/v1/jwks").await.1["keys"][0]["kty"], "EC");
    let (_, metrics) = admin.get("/metrics").await;
    assert!(metrics.as_str().unwrap().contains("apiserver_request_total{verb=\"get\""));
    cluster.stop().await;
}
