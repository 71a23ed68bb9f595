//! Patches as kubectl sends them, and properties that any document must satisfy.

#![allow(clippy::needless_pass_by_value, reason = "test tables pass literals")]

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::kinds;

#[track_caller]
fn check(kind: (&str, &str), current: Value, patch: Value, expected: Value) {
    let info = kinds::by_kind(kind.0, kind.1).unwrap();
    assert_eq!(strategic_merge(info, &current, &patch).unwrap(), expected);
}

const POD: (&str, &str) = ("v1", "Pod");
const DEPLOYMENT: (&str, &str) = ("apps/v1", "Deployment");

#[test]
fn containers_merge_by_name() {
    check(
        POD,
        json!({"spec": {"containers": [{"name": "a", "image": "x", "args": ["1"]}, {"name": "b", "image": "y"}]}}),
        json!({"spec": {"containers": [{"name": "b", "image": "z"}, {"name": "c"}]}}),
        json!({"spec": {"containers": [{"name": "a", "image": "x", "args": ["1"]}, {"name": "b", "image": "z"}, {"name": "c"}]}}),
    );
    check(
        POD,
        json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}], "tolerations": [{"key": "k"}]}}),
        json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}], "tolerations": []}}),
        json!({"spec": {"containers": [{"name": "b"}], "tolerations": []}}),
    );
}

#[test]
fn element_order_follows_the_patch() {
    check(
        POD,
        json!({"spec": {"containers": [{"name": "a"}, {"name": "server"}, {"name": "b"}]}}),
        json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}], "containers": [{"name": "a", "image": "i"}]}}),
        json!({"spec": {"containers": [{"name": "server"}, {"name": "b"}, {"name": "a", "image": "i"}]}}),
    );
    check(
        POD,
        json!({"metadata": {"finalizers": ["x", "y", "z"]}}),
        json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["y"], "$setElementOrder/finalizers": ["z", "x"]}}),
        json!({"metadata": {"finalizers": ["z", "x"]}}),
    );
}

#[test]
fn directives_replace_and_retain() {
    check(
        DEPLOYMENT,
        json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
        json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
        json!({"spec": {"strategy": {"type": "Recreate"}}}),
    );
    check(
        POD,
        json!({"metadata": {"labels": {"a": "1", "b": "2"}, "annotations": {"x": "y"}}}),
        json!({"metadata": {"labels": {"$patch": "replace", "c": "3"}, "annotations": {"x": null}}}),
        json!({"metadata": {"labels": {"c": "3"}, "annotations": {}}}),
    );
    check(
        POD,
        json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}),
        json!({"spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}]}}),
        json!({"spec": {"volumes": [{"name": "v", "hostPath": {"path": "/x"}}]}}),
    );
}

#[test]
fn services_merge_ports_by_number() {
    check(
        ("v1", "Service"),
        json!({"spec": {"ports": [{"port": 80, "nodePort": 30000}], "selector": {"a": "b"}}}),
        json!({"spec": {"ports": [{"port": 80, "name": "http"}], "selector": {"c": "d"}}}),
        json!({"spec": {"ports": [{"port": 80, "nodePort": 30000, "name": "http"}], "selector": {"a": "b", "c": "d"}}}),
    );
}

#[test]
fn bad_patches_are_client_errors() {
    let info = kinds::by_kind("v1", "Pod").unwrap();
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}]}});
    let no_key = json!({"spec": {"containers": [{"image": "x"}]}});
    assert_eq!(strategic_merge(info, &pod, &no_key).unwrap_err().code(), 400);
    assert_eq!(strategic_merge(info, &pod, &json!([])).unwrap_err().code(), 400);
    assert_eq!(json_patch(info, &pod, &json!({"op": "add"})).unwrap_err().code(), 400);
    let failing = json!([{"op": "test", "path": "/metadata/name", "value": "q"}]);
    assert_eq!(json_patch(info, &pod, &failing).unwrap_err().code(), 422);
    let fine = json!([{"op": "replace", "path": "/metadata/name", "value": "q"}]);
    assert_eq!(json_patch(info, &pod, &fine).unwrap()["metadata"]["name"], "q");
    let merged = merge_patch(info, &pod, &json!({"spec": {"containers": null, "nodeName": "n"}})).unwrap();
    assert_eq!(merged["spec"], json!({"nodeName": "n"}));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0..3_i64).prop_map(Value::from),
        "[ab]".prop_map(Value::from),
        prop_oneof![Just("replace"), Just("delete"), Just("merge")].prop_map(Value::from),
    ];
    let key = prop_oneof![
        Just("spec"),
        Just("metadata"),
        Just("containers"),
        Just("name"),
        Just("finalizers"),
        Just("volumes"),
        Just("$patch"),
        Just("$retainKeys"),
        Just("$setElementOrder/containers"),
        Just("$deleteFromPrimitiveList/finalizers"),
    ];
    leaf.prop_recursive(5, 40, 4, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..5)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

fn pod() -> impl Strategy<Value = Value> {
    let names = proptest::collection::btree_set("[a-d]", 0..4);
    (names, "[x-z]").prop_map(|(names, image)| {
        let containers: Vec<Value> = names.iter().map(|n| json!({"name": n, "image": image})).collect();
        json!({"spec": {"containers": containers}})
    })
}

proptest! {
    #[test]
    fn never_panics(current in any_json(), patch in any_json()) {
        let info = kinds::by_kind("v1", "Pod").unwrap();
        for apply in [strategic_merge, merge_patch, json_patch] {
            let _ignored = apply(info, &current, &patch);
        }
    }

    #[test]
    fn merging_twice_is_merging_once(current in pod(), patch in pod()) {
        let info = kinds::by_kind("v1", "Pod").unwrap();
        let once = strategic_merge(info, &current, &patch).unwrap();
        prop_assert_eq!(&strategic_merge(info, &once, &patch).unwrap(), &once);
        prop_assert_eq!(strategic_merge(info, &current, &json!({})).unwrap(), current);
    }
}
