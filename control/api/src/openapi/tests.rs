//! What kubectl looks for in the documents.

use prost::Message as _;
use serde_json::Value;

use super::*;

fn v3(path: &str) -> Value {
    serde_json::from_slice(&v3_group(path).unwrap()).unwrap()
}

#[test]
fn references_resolve_in_every_document() {
    let mut documents: Vec<Value> =
        group_versions().into_iter().map(|(group, version)| v3(&group_path(group, version))).collect();
    documents.push(v2_document());
    for document in documents {
        let mut open = vec![&document];
        while let Some(value) = open.pop() {
            match value {
                Value::Object(map) => {
                    if let Some(target) = map.get("$ref").and_then(Value::as_str) {
                        assert!(document.pointer(&target[1..]).is_some(), "{target}");
                    }
                    open.extend(map.values());
                }
                Value::Array(items) => open.extend(items),
                _ => {}
            }
        }
    }
}

#[test]
fn patches_take_field_validation() {
    let document = v3("apis/apps/v1");
    let patch = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
    assert_eq!(
        patch["x-kubernetes-group-version-kind"],
        json!({"group": "apps", "version": "v1", "kind": "Deployment"})
    );
    let names: Vec<&str> =
        patch["parameters"].as_array().unwrap().iter().filter_map(|p| p["name"].as_str()).collect();
    assert_eq!(names, ["dryRun", "fieldManager", "fieldValidation", "force"]);
    let strategic = "application/strategic-merge-patch+json";
    assert!(patch["requestBody"]["content"].get(strategic).is_some());
}

#[test]
fn merge_keys_and_kinds_are_told() {
    let document = v3("apis/apps/v1");
    let schemas = &document["components"]["schemas"];
    let containers = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
    assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
    assert_eq!(containers["items"], json!({"$ref": "#/components/schemas/io.k8s.api.core.v1.Container"}));
    let kind = &schemas["io.k8s.api.apps.v1.Deployment"]["x-kubernetes-group-version-kind"];
    assert_eq!(kind[0]["kind"], "Deployment");
    let quantity = &schemas["io.k8s.apimachinery.pkg.api.resource.Quantity"];
    assert_eq!(quantity["oneOf"], json!([{"type": "string"}, {"type": "number"}]));
    assert!(schemas.get("io.k8s.api.core.v1.Node").is_none(), "only what the group needs");
}

#[test]
fn the_index_names_every_group() {
    let index = v3_index();
    let url = index["paths"]["apis/apps/v1"]["serverRelativeURL"].as_str().unwrap();
    assert!(url.starts_with("/openapi/v3/apis/apps/v1?hash="), "{url}");
    assert!(index["paths"].get("api/v1").is_some());
    assert!(v3_group("apis/none/v1").is_none());
}

#[test]
fn protobuf_says_what_json_says() {
    let json: Value = serde_json::from_slice(&v2_json()).unwrap();
    let document = gnostic::Document::decode(v2_protobuf().as_slice()).unwrap();
    let definitions = document.definitions.unwrap().additional_properties;
    assert_eq!(definitions.len(), json["definitions"].as_object().unwrap().len());
    let pod_spec = definitions.iter().find(|d| d.name == "io.k8s.api.core.v1.PodSpec").unwrap();
    let properties = &pod_spec.value.as_ref().unwrap().properties.as_ref().unwrap().additional_properties;
    let containers = properties.iter().find(|p| p.name == "containers").unwrap().value.as_ref().unwrap();
    let merge_key =
        containers.vendor_extension.iter().find(|e| e.name == "x-kubernetes-patch-merge-key").unwrap();
    assert_eq!(merge_key.value.as_ref().unwrap().yaml, "\"name\"");
    assert_eq!(
        containers.items.as_ref().unwrap().schema[0].reference,
        "#/definitions/io.k8s.api.core.v1.Container"
    );
}
