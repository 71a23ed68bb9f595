//! Generates `src/gen` from k8s-openapi's schemas, and fails when what is checked in differs.
//!
//! `KEELSON_REGENERATE=1 cargo nextest run --cargo-profile release -p control-api generated` rewrites the files.

use std::{collections::BTreeMap, fs, path::PathBuf};

use control_api::kinds::RESOURCES;
use k8s_openapi::{
    api::{
        apps::v1 as apps, authentication::v1 as authentication, authorization::v1 as authorization,
        autoscaling::v1 as autoscaling, certificates::v1 as certificates, coordination::v1 as coordination,
        core::v1 as core, discovery::v1 as discovery, events::v1 as events, node::v1 as node,
        policy::v1 as policy, resource::v1 as resource, scheduling::v1 as scheduling, storage::v1 as storage,
    },
    apimachinery::pkg::apis::meta::v1 as meta,
};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use crate::{
    annotations::{ATOMIC_MAPS, ATOMIC_STRUCTS, FIELD_RULES},
    shapes,
};

const REF: &str = "#/definitions/";

/// Definitions by name, in OpenAPI v2's form, with the `x-kubernetes-` extensions.
pub(crate) type Definitions = BTreeMap<String, Value>;

#[test]
fn generated_files_are_current() {
    let definitions = definitions();
    for info in RESOURCES {
        assert!(
            definitions.contains_key(info.definition),
            "no schema for {}: add it to add_roots",
            info.plural
        );
    }
    let json = serde_json::to_vec(&definitions).unwrap();
    let shapes = shapes::render(&definitions);
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/gen");
    let (blob_path, shapes_path) = (folder.join("definitions.json.zlib"), folder.join("shapes.rs"));
    if std::env::var_os("KEELSON_REGENERATE").is_some() {
        fs::write(&blob_path, miniz_oxide::deflate::compress_to_vec_zlib(&json, 9)).unwrap();
        fs::write(&shapes_path, &shapes).unwrap();
    }
    let blob = miniz_oxide::inflate::decompress_to_vec_zlib(&fs::read(&blob_path).unwrap()).unwrap();
    // Compared as values: the order of keys depends on serde_json's features in this build.
    let same =
        serde_json::from_slice::<Value>(&blob).unwrap() == serde_json::from_slice::<Value>(&json).unwrap();
    assert!(same, "src/gen/definitions.json.zlib is stale: run this test with KEELSON_REGENERATE=1");
    let checked_in = fs::read_to_string(&shapes_path).unwrap();
    assert!(checked_in == shapes, "src/gen/shapes.rs is stale: run this test with KEELSON_REGENERATE=1");
}

fn definitions() -> Definitions {
    let mut generator = SchemaSettings::draft07().into_generator();
    add_roots(&mut generator);
    let mut definitions: Definitions = generator.take_definitions(true).into_iter().collect();
    for schema in definitions.values_mut() {
        normalise(schema);
    }
    for info in RESOURCES.iter().filter(|r| r.is_stored()) {
        definitions.insert(format!("{}List", info.definition), list_definition(info.definition, info.kind));
    }
    for (name, schema) in &mut definitions {
        annotate(name, schema);
    }
    add_kinds(&mut definitions);
    definitions
}

/// Every type whose schema is served: the kinds of the table, and what subresources and requests carry.
fn add_roots(generator: &mut SchemaGenerator) {
    fn add<T: JsonSchema>(generator: &mut SchemaGenerator) {
        drop(generator.subschema_for::<T>());
    }
    let roots: &[fn(&mut SchemaGenerator)] = &[
        add::<core::Binding>,
        add::<core::ConfigMap>,
        add::<core::Endpoints>,
        add::<core::Event>,
        add::<core::Namespace>,
        add::<core::Node>,
        add::<core::PersistentVolume>,
        add::<core::PersistentVolumeClaim>,
        add::<core::Pod>,
        add::<core::Secret>,
        add::<core::Service>,
        add::<core::ServiceAccount>,
        add::<apps::Deployment>,
        add::<apps::ReplicaSet>,
        add::<authentication::SelfSubjectReview>,
        add::<authentication::TokenRequest>,
        add::<authentication::TokenReview>,
        add::<authorization::LocalSubjectAccessReview>,
        add::<authorization::SelfSubjectAccessReview>,
        add::<authorization::SubjectAccessReview>,
        add::<autoscaling::Scale>,
        add::<certificates::CertificateSigningRequest>,
        add::<coordination::Lease>,
        add::<discovery::EndpointSlice>,
        add::<events::Event>,
        add::<node::RuntimeClass>,
        add::<policy::Eviction>,
        add::<resource::DeviceClass>,
        add::<resource::ResourceClaim>,
        add::<resource::ResourceClaimTemplate>,
        add::<resource::ResourceSlice>,
        add::<scheduling::PriorityClass>,
        add::<storage::CSIDriver>,
        add::<storage::CSINode>,
        add::<storage::CSIStorageCapacity>,
        add::<storage::StorageClass>,
        add::<storage::VolumeAttachment>,
        add::<storage::VolumeAttributesClass>,
        add::<meta::DeleteOptions>,
        add::<meta::ListMeta>,
        add::<meta::Patch>,
        add::<meta::Status>,
        add::<meta::APIResourceList>,
    ];
    for root in roots {
        root(generator);
    }
}

/// Turns schemars' forms into OpenAPI v2's: plain `$ref` beside a description, int-or-string as a format.
fn normalise(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if let Some(all) = map.remove("allOf") {
                let first = all[0].as_object().cloned().unwrap_or_default();
                map.extend(first);
            }
            if map.remove("x-kubernetes-int-or-string").is_some() {
                map.insert("type".into(), json!("string"));
                let is_quantity =
                    map.get("description").and_then(Value::as_str).is_some_and(|d| d.starts_with("Quantity"));
                if !is_quantity {
                    map.insert("format".into(), json!("int-or-string"));
                }
            }
            map.values_mut().for_each(normalise);
        }
        Value::Array(items) => items.iter_mut().for_each(normalise),
        _ => {}
    }
}

fn list_definition(item: &str, kind: &str) -> Value {
    json!({
        "description": format!("{kind}List is a list of {kind} objects."),
        "type": "object",
        "properties": {
            "apiVersion": { "type": "string", "description": "APIVersion defines the versioned schema of this representation of an object." },
            "kind": { "type": "string", "description": "Kind is a string value representing the REST resource this object represents." },
            "metadata": { "description": "Standard list metadata.", "$ref": format!("{REF}io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta") },
            "items": { "type": "array", "description": "The objects.", "items": { "$ref": format!("{REF}{item}") } },
        },
        "required": ["items"],
    })
}

/// Adds the merge rules to one definition.
fn annotate(name: &str, schema: &mut Value) {
    let short = name.rsplit('.').next().unwrap_or(name);
    if ATOMIC_STRUCTS.contains(&short) {
        schema["x-kubernetes-map-type"] = json!("atomic");
    }
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else { return };
    for (field, property) in properties {
        let path = format!("{short}.{field}");
        let rule = FIELD_RULES.iter().find(|r| r.field == path);
        let Some(property) = property.as_object_mut() else { continue };
        if ATOMIC_MAPS.contains(&path.as_str()) {
            property.insert("x-kubernetes-map-type".into(), json!("atomic"));
        }
        if let Some(rule) = rule {
            add_text(property, "x-kubernetes-patch-strategy", rule.patch_strategy);
            add_text(property, "x-kubernetes-patch-merge-key", rule.patch_merge_key);
            add_text(property, "x-kubernetes-list-type", rule.list_type);
            if !rule.list_map_keys.is_empty() {
                property.insert("x-kubernetes-list-map-keys".into(), json!(rule.list_map_keys));
            }
        } else if property.get("type") == Some(&json!("array")) && field != "items" {
            property.insert("x-kubernetes-list-type".into(), json!("atomic"));
        }
    }
}

fn add_text(property: &mut Map<String, Value>, key: &str, text: &str) {
    if !text.is_empty() {
        property.insert(key.to_owned(), json!(text));
    }
}

/// Says which definition is which kind.
fn add_kinds(definitions: &mut Definitions) {
    let gvk =
        |group: &str, version: &str, kind: &str| json!({ "group": group, "version": version, "kind": kind });
    let mut all_versions: Vec<(&str, &str)> = Vec::new();
    let mut kinds: Vec<(String, Vec<Value>)> = Vec::new();
    for info in RESOURCES {
        kinds.push((info.definition.to_owned(), vec![gvk(info.group, info.version, info.kind)]));
        if info.is_stored() {
            let list = vec![gvk(info.group, info.version, info.list_kind)];
            kinds.push((format!("{}List", info.definition), list));
        }
        if !all_versions.contains(&(info.group, info.version)) {
            all_versions.push((info.group, info.version));
        }
    }
    let others = [
        ("io.k8s.api.authentication.v1.TokenRequest", "authentication.k8s.io", "TokenRequest"),
        ("io.k8s.api.autoscaling.v1.Scale", "autoscaling", "Scale"),
        ("io.k8s.api.policy.v1.Eviction", "policy", "Eviction"),
        ("io.k8s.apimachinery.pkg.apis.meta.v1.Status", "", "Status"),
        ("io.k8s.apimachinery.pkg.apis.meta.v1.APIResourceList", "", "APIResourceList"),
    ];
    kinds.extend(others.map(|(name, group, kind)| (name.to_owned(), vec![gvk(group, "v1", kind)])));
    let everywhere = all_versions.iter().map(|(group, version)| gvk(group, version, "DeleteOptions"));
    kinds.push(("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions".to_owned(), everywhere.collect()));
    for (name, kinds) in kinds {
        if let Some(schema) = definitions.get_mut(&name) {
            schema["x-kubernetes-group-version-kind"] = Value::Array(kinds);
        }
    }
}
