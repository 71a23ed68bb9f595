//! Scenarios of deletion: what the graph asks to look at, and what is decided.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};

use super::*;

fn kind(name: &str) -> Arc<TypeName> {
    Arc::new(TypeName { api_version: "v1".into(), kind: name.into() })
}

fn meta(uid: &str, owners: &[&str]) -> ObjectMeta {
    let owners = owners.iter().map(|owner| OwnerReference {
        api_version: "v1".into(),
        kind: "Owner".into(),
        name: (*owner).to_owned(),
        uid: (*owner).to_owned(),
        block_owner_deletion: Some(true),
        controller: None,
    });
    ObjectMeta {
        name: Some(uid.into()),
        uid: Some(uid.into()),
        namespace: Some("default".into()),
        owner_references: Some(owners.collect()),
        ..ObjectMeta::default()
    }
}

fn deleting(mut meta: ObjectMeta, finalizer: &str) -> ObjectMeta {
    meta.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
    meta.finalizers = Some(vec![finalizer.to_owned()]);
    meta
}

fn checked(work: &[Work]) -> Vec<String> {
    work.iter()
        .map(|work| match work {
            Work::Check(identity) => format!("check {}", identity.uid),
            Work::Orphan(identity) => format!("orphan {}", identity.uid),
        })
        .collect()
}

fn states(states: &[(&str, OwnerState)]) -> BTreeMap<String, OwnerState> {
    states.iter().map(|(uid, state)| ((*uid).to_owned(), *state)).collect()
}

#[test]
fn background_deletion_goes_down_the_tree() {
    let mut graph = Graph::default();
    assert!(graph.observe(&kind("Deployment"), &meta("d", &[])).is_empty());
    assert!(graph.observe(&kind("ReplicaSet"), &meta("rs", &["d"])).is_empty());
    assert!(graph.observe(&kind("Pod"), &meta("p", &["rs"])).is_empty());
    assert_eq!(checked(&graph.forget("d")), ["check rs"]);
    let decision = decide(&graph, &meta("rs", &["d"]), &states(&[("d", OwnerState::Absent)]));
    assert_eq!(decision, Decision::Delete { propagation: Propagation::Background, unblock_owners: false });
    assert_eq!(checked(&graph.forget("rs")), ["check p"]);
}

#[test]
fn an_owner_that_never_existed_is_looked_up() {
    let mut graph = Graph::default();
    let work = graph.observe(&kind("Pod"), &meta("p", &["ghost"]));
    assert_eq!(checked(&work), ["check ghost"]);
    assert!(!graph.is_observed("ghost"));
    assert_eq!(checked(&graph.forget("ghost")), ["check p"], "a live read did not find it");
    let late = graph.observe(&kind("Pod"), &meta("late", &["ghost"]));
    assert_eq!(checked(&late), ["check late"], "the absent owner is not looked up again for it");
    assert!(graph.needs_check("late"));
}

#[test]
fn an_unjudged_or_living_owner_keeps_the_dependent() {
    let graph = Graph::default();
    let dependent = meta("p", &["a", "b"]);
    assert_eq!(decide(&graph, &dependent, &BTreeMap::new()), Decision::Nothing);
    let one_left = states(&[("a", OwnerState::Absent), ("b", OwnerState::Solid)]);
    assert_eq!(decide(&graph, &dependent, &one_left), Decision::DropOwners(["a".to_owned()].into()));
}

#[test]
fn foreground_deletion_waits_for_blocking_dependents() {
    let mut graph = Graph::default();
    graph.observe(&kind("ReplicaSet"), &meta("rs", &[]));
    graph.observe(&kind("Pod"), &meta("p", &["rs"]));
    let owner = deleting(meta("rs", &[]), FOREGROUND);
    assert_eq!(checked(&graph.observe(&kind("ReplicaSet"), &owner)), ["check p", "check rs"]);
    assert!(matches!(decide(&graph, &owner, &BTreeMap::new()), Decision::CheckDependents(d) if d.len() == 1));
    let waits = states(&[("rs", OwnerState::WaitsForDependents)]);
    assert!(matches!(decide(&graph, &meta("p", &["rs"]), &waits), Decision::Delete { .. }));
    assert_eq!(checked(&graph.forget("p")), ["check rs"]);
    assert_eq!(decide(&graph, &owner, &BTreeMap::new()), Decision::RemoveForegroundFinalizer);
}

#[test]
fn a_circle_of_foreground_deletions_is_broken() {
    let mut graph = Graph::default();
    graph.observe(&kind("A"), &meta("a", &["b"]));
    graph.observe(&kind("B"), &deleting(meta("b", &["a"]), FOREGROUND));
    let decision = decide(&graph, &meta("a", &["b"]), &states(&[("b", OwnerState::WaitsForDependents)]));
    assert_eq!(decision, Decision::Delete { propagation: Propagation::Foreground, unblock_owners: true });
}

#[test]
fn orphaning_is_started_once() {
    let mut graph = Graph::default();
    graph.observe(&kind("ReplicaSet"), &meta("rs", &[]));
    graph.observe(&kind("Pod"), &meta("p", &["rs"]));
    let owner = deleting(meta("rs", &[]), ORPHAN);
    assert_eq!(checked(&graph.observe(&kind("ReplicaSet"), &owner)), ["orphan rs"]);
    assert!(graph.observe(&kind("ReplicaSet"), &owner).is_empty());
    assert_eq!(graph.dependents("rs").len(), 1);
    graph.observe(&kind("Pod"), &meta("p", &[]));
    assert!(graph.dependents("rs").is_empty());
}
