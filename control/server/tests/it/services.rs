//! Cluster addresses and node ports.

use serde_json::{Value, json};

use crate::harness::Cluster;

const SERVICES: &str = "/api/v1/namespaces/default/services";

fn node_port(name: &str, port: u16) -> Value {
    json!({"metadata": {"name": name}, "spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]}})
}

#[tokio::test]
async fn a_node_port_belongs_to_one_service_until_it_is_deleted() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let first = admin.create(SERVICES, &node_port("first", 30000)).await;
    let address = first["spec"]["clusterIP"].as_str().unwrap();
    assert!(address.starts_with("10."), "{address}");
    let cluster = cluster.restart().await;
    let admin = cluster.admin();
    let (code, error) = admin.post(SERVICES, &node_port("second", 30000)).await;
    assert_eq!(code, 422);
    assert_eq!(
        error["message"],
        "Service \"second\" is invalid: spec.ports[0].nodePort: Invalid value: 30000: provided port is already allocated"
    );
    let (code, error) = admin.post(SERVICES, &node_port("second", 80)).await;
    assert_eq!(code, 422);
    assert!(
        error["message"].as_str().unwrap().contains("The range of valid ports is 30000-32767"),
        "{error}"
    );
    assert_eq!(admin.delete(&format!("{SERVICES}/first")).await.0, 200);
    assert_eq!(admin.post(SERVICES, &node_port("second", 30000)).await.0, 201);
    cluster.stop().await;
}

#[tokio::test]
async fn a_replaced_service_keeps_its_address_and_a_changed_type_frees_its_port() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let first = admin.create(SERVICES, &node_port("first", 30001)).await;
    let path = format!("{SERVICES}/first");
    let (code, second) =
        admin.put(&path, &json!({"metadata": {"name": "first"}, "spec": {"ports": [{"port": 80}]}})).await;
    assert_eq!(code, 200, "{second}");
    assert_eq!(second["spec"]["clusterIP"], first["spec"]["clusterIP"]);
    assert!(second["spec"]["ports"][0].get("nodePort").is_none());
    assert_eq!(admin.post(SERVICES, &node_port("other", 30001)).await.0, 201);
    cluster.stop().await;
}

#[tokio::test]
async fn the_kubernetes_service_points_to_this_server() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let (_, service) = admin.get(&format!("{SERVICES}/kubernetes")).await;
    assert_eq!(service["spec"]["clusterIP"], "10.96.0.1");
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
    let (_, slice) = admin.get(&format!("{slices}/kubernetes")).await;
    assert_eq!(slice["endpoints"][0]["addresses"], json!(["10.0.0.1"]));
    let (_, namespaces) = admin.get("/api/v1/namespaces").await;
    assert_eq!(namespaces["items"].as_array().unwrap().len(), 4);
    cluster.stop().await;
}
