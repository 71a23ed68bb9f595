//! Server-side apply as its documentation tells it.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::kinds;

const NOW: &str = "2026-01-02T03:04:05Z";

fn author(manager: &str) -> Author<'_> {
    Author { manager, subresource: "", now: NOW }
}

fn deployment(spec: &Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": {"app": "web"}}, "spec": spec})
}

fn info() -> &'static ResourceInfo {
    kinds::by_kind("apps/v1", "Deployment").unwrap()
}

fn containers(list: &Value) -> Value {
    json!({"template": {"spec": {"containers": list}}})
}

#[test]
fn creating_records_the_owner() {
    let declared =
        deployment(&containers(&json!([{"name": "a", "image": "x", "ports": [{"containerPort": 80}]}])));
    let object = apply(info(), None, &declared, &author("me"), false).unwrap();
    assert_eq!(object["spec"], declared["spec"]);
    assert_eq!(
        object["metadata"]["managedFields"],
        json!([{"manager": "me", "operation": "Apply", "apiVersion": "apps/v1", "time": NOW, "fieldsType": "FieldsV1",
            "fieldsV1": {"f:metadata": {"f:labels": {"f:app": {}}}, "f:spec": {"f:template": {"f:spec": {"f:containers": {
                "k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:image": {}, "f:ports": {
                    "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}}}}}}}])
    );
    let again = apply(info(), Some(&object), &declared, &author("me"), false).unwrap();
    assert_eq!(again, object);
}

#[test]
fn what_is_no_longer_declared_goes() {
    let first = deployment(
        &json!({"replicas": 3, "template": {"spec": {"containers": [{"name": "a", "image": "x"}, {"name": "b"}]}}}),
    );
    let live = apply(info(), None, &first, &author("me"), false).unwrap();
    let second = deployment(&containers(&json!([{"name": "a"}])));
    let object = apply(info(), Some(&live), &second, &author("me"), false).unwrap();
    assert_eq!(object["spec"], containers(&json!([{"name": "a"}])));
}

#[test]
fn other_managers_fields_conflict_and_can_be_forced() {
    let live = apply(info(), None, &deployment(&json!({"replicas": 3})), &author("me"), false).unwrap();
    let other = deployment(&json!({"replicas": 5}));
    let error = apply(info(), Some(&live), &other, &author("hpa"), false).unwrap_err();
    assert_eq!(error.code(), 409);
    assert_eq!(
        error.message,
        "Apply failed with 1 conflict: conflict with \"me\" using apps/v1: .spec.replicas"
    );
    assert_eq!(error.causes[0].reason, "FieldManagerConflict");
    let forced = apply(info(), Some(&live), &other, &author("hpa"), true).unwrap();
    assert_eq!(forced["spec"]["replicas"], 5);
    let left = apply(info(), Some(&forced), &deployment(&json!({})), &author("me"), false).unwrap();
    assert_eq!(left["spec"]["replicas"], 5, "no longer mine to remove");
    let same =
        apply(info(), Some(&live), &deployment(&json!({"replicas": 3})), &author("hpa"), false).unwrap();
    let left = apply(info(), Some(&same), &deployment(&json!({})), &author("me"), false).unwrap();
    assert_eq!(left["spec"]["replicas"], 3, "the other owner keeps it");
}

#[test]
fn ordinary_writes_take_over_what_they_change() {
    let live =
        apply(info(), None, &deployment(&json!({"replicas": 3, "paused": true})), &author("me"), false)
            .unwrap();
    let mut new = live.clone();
    new["spec"]["replicas"] = json!(4);
    track_update(info(), &live, &mut new, &author("scaler"));
    let error =
        apply(info(), Some(&new), &deployment(&json!({"replicas": 3, "paused": true})), &author("me"), false)
            .unwrap_err();
    assert_eq!(
        error.message,
        format!(
            "Apply failed with 1 conflict: conflict with \"scaler\" using apps/v1 at {NOW}: .spec.replicas"
        )
    );
    let mut untracked = deployment(&json!({"replicas": 1}));
    let old = untracked.clone();
    track_update(info(), &old, &mut untracked, &author("x"));
    assert_eq!(untracked, old);
}

#[test]
fn untracked_objects_belong_to_whoever_was_before() {
    let live = deployment(&json!({"replicas": 1, "paused": true}));
    let error =
        apply(info(), Some(&live), &deployment(&json!({"replicas": 2})), &author("me"), false).unwrap_err();
    assert!(error.message.contains("conflict with \"before-first-apply\""), "{error}");
    let object =
        apply(info(), Some(&live), &deployment(&json!({"replicas": 1})), &author("me"), false).unwrap();
    assert_eq!(object["spec"], live["spec"]);
    assert_eq!(object["metadata"]["managedFields"].as_array().unwrap().len(), 2);
}

proptest! {
    #[test]
    fn foreign_records_never_panic(keys in proptest::collection::vec("[fkv.:é]{0,3}[a-z{}\":1,]{0,8}", 1..4), replicas in 0..3) {
        let mut live = deployment(&json!({"replicas": 1}));
        let record = keys.iter().rev().fold(json!({}), |below, key| json!({ key.as_str(): below, "f:spec": {"f:replicas": {}} }));
        live["metadata"]["managedFields"] =
            json!([{"manager": "x", "operation": "Update", "fieldsV1": record}]);
        for force in [true, false] {
            let _ignored = apply(info(), Some(&live), &deployment(&json!({"replicas": replicas})), &author("me"), force);
        }
        let mut new = live.clone();
        new["spec"]["replicas"] = json!(replicas);
        track_update(info(), &live, &mut new, &author("y"));
    }
}
