//! Metadata and deletion, as a client would notice them.

use serde_json::json;

use super::*;
use crate::kinds;

const IDENTITY: NewIdentity<'static> =
    NewIdentity { uid: "u-1", now: "2026-01-02T03:04:05Z", name_suffix: "x7k2p" };

fn deployment() -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "d", "uid": "u-1", "creationTimestamp": "t", "generation": 1, "resourceVersion": "7"},
        "spec": {"replicas": 1}, "status": {"replicas": 1},
    })
}

#[test]
fn creation_fills_in_identity_and_drops_status() {
    let info = kinds::find("apps", "v1", "deployments").unwrap();
    let mut object = json!({"metadata": {"generateName": "web-"}, "spec": {}, "status": {"replicas": 9}});
    prepare_create(info, &mut object, Some("d"), &IDENTITY).unwrap();
    assert_eq!(
        object,
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "spec": {},
            "metadata": {"generateName": "web-", "name": "web-x7k2p", "namespace": "d", "uid": "u-1",
                "creationTimestamp": "2026-01-02T03:04:05Z", "generation": 1},
        })
    );
    let mut elsewhere = json!({"metadata": {"name": "a", "namespace": "other"}});
    assert_eq!(prepare_create(info, &mut elsewhere, Some("d"), &IDENTITY).unwrap_err().code(), 400);
}

#[test]
fn generation_follows_spec_only() {
    let info = kinds::find("apps", "v1", "deployments").unwrap();
    let old = deployment();
    let mut labels = old.clone();
    labels["metadata"]["labels"] = json!({"a": "b"});
    labels["status"] = json!({});
    prepare_update(info, UpdateTarget::Main, &mut labels, &old).unwrap();
    assert_eq!(labels["metadata"]["generation"], 1);
    assert_eq!(labels["status"]["replicas"], 1);
    let mut spec = old.clone();
    spec["spec"]["replicas"] = json!(2);
    spec["metadata"]["uid"] = json!("forged");
    prepare_update(info, UpdateTarget::Main, &mut spec, &old).unwrap();
    assert_eq!((spec["metadata"]["generation"].as_i64(), uid(&spec)), (Some(2), "u-1"));
    let mut status = old.clone();
    status["spec"]["replicas"] = json!(5);
    status["status"]["replicas"] = json!(4);
    prepare_update(info, UpdateTarget::Status, &mut status, &old).unwrap();
    assert_eq!((&status["spec"]["replicas"], &status["status"]["replicas"]), (&json!(1), &json!(4)));
    assert_eq!(status["metadata"]["generation"], 1);
}

#[test]
fn a_services_old_type_leaves_nothing_behind() {
    let info = kinds::find("", "v1", "services").unwrap();
    let old = json!({
        "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.9", "externalTrafficPolicy": "Cluster",
            "ports": [{"port": 80, "nodePort": 30000}]},
    });
    let mut new = old.clone();
    new["spec"]["type"] = json!("ClusterIP");
    prepare_update(info, UpdateTarget::Main, &mut new, &old).unwrap();
    assert_eq!(new["spec"], json!({"type": "ClusterIP", "clusterIP": "10.96.0.9", "ports": [{"port": 80}]}));
}

#[test]
fn stale_updates_are_refused() {
    let info = kinds::find("apps", "v1", "deployments").unwrap();
    let old = deployment();
    let mut new = old.clone();
    check_preconditions(info, &new, &old).unwrap();
    new["metadata"]["resourceVersion"] = json!("6");
    assert_eq!(check_preconditions(info, &new, &old).unwrap_err().reason, crate::status::Reason::Conflict);
}

#[test]
fn running_pods_get_their_grace_and_others_do_not() {
    let info = kinds::find("", "v1", "pods").unwrap();
    let mut pod =
        json!({"metadata": {"name": "p", "uid": "u"}, "spec": {"terminationGracePeriodSeconds": 30}});
    let now = "2026-01-02T03:04:05Z";
    let options = DeleteOptions::default();
    assert_eq!(delete(info, &pod, &options, now).unwrap(), Deletion::Remove);
    pod["spec"]["nodeName"] = json!("n");
    let Deletion::Update(marked) = delete(info, &pod, &options, now).unwrap() else { panic!("not marked") };
    assert_eq!(marked["metadata"]["deletionTimestamp"], "2026-01-02T03:04:35Z");
    assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
    assert!(!finished_deleting(info, &marked));
    assert_eq!(delete(info, &marked, &options, now).unwrap(), Deletion::Pending);
    let force = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
    assert_eq!(delete(info, &marked, &force, now).unwrap(), Deletion::Remove);
    let other = DeleteOptions { uid: Some("z".into()), ..DeleteOptions::default() };
    assert_eq!(delete(info, &marked, &other, now).unwrap_err().code(), 409);
}

#[test]
fn finalizers_and_policies_hold_an_object() {
    let info = kinds::find("apps", "v1", "deployments").unwrap();
    let options = DeleteOptions { propagation: Some(Propagation::Foreground), ..DeleteOptions::default() };
    let Deletion::Update(mut marked) = delete(info, &deployment(), &options, "2026-01-02T03:04:05Z").unwrap()
    else {
        panic!("not marked")
    };
    assert_eq!(marked["metadata"]["finalizers"], json!(["foregroundDeletion"]));
    assert!(deletion::waits_for_dependents(&marked));
    assert!(!finished_deleting(info, &marked));
    marked["metadata"]["finalizers"] = json!([]);
    assert!(finished_deleting(info, &marked));
    let namespace = json!({"metadata": {"name": "n"}, "spec": {"finalizers": ["kubernetes"]}, "status": {}});
    let info = kinds::find("", "v1", "namespaces").unwrap();
    let Deletion::Update(marked) =
        delete(info, &namespace, &DeleteOptions::default(), "2026-01-02T03:04:05Z").unwrap()
    else {
        panic!("not marked")
    };
    assert_eq!(marked["status"]["phase"], "Terminating");
    assert!(marked["metadata"].get("finalizers").is_none());
}
