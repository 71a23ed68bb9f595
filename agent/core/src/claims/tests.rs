//! Which claims a pod needs, and which devices its containers get.

use serde_json::{Value, json};

use super::*;

fn pod(uid: &str, claims: &Value, statuses: &Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": uid, "namespace": "ns", "uid": uid},
        "spec": {"containers": [
            {"name": "all", "resources": {"claims": [{"name": "gpu"}]}},
            {"name": "one", "resources": {"claims": [{"name": "gpu", "request": "a"}]}},
            {"name": "none"},
        ], "resourceClaims": claims},
        "status": {"resourceClaimStatuses": statuses},
    }))
    .unwrap()
}

fn named_pod(uid: &str) -> Pod {
    pod(uid, &json!([{"name": "gpu", "resourceClaimName": "shared"}]), &json!([]))
}

fn claim(name: &str, uid: &str, users: &[&str], drivers: &[&str]) -> ResourceClaim {
    let users: Vec<Value> =
        users.iter().map(|uid| json!({"resource": "pods", "name": uid, "uid": uid})).collect();
    let results: Vec<Value> = drivers
        .iter()
        .map(|driver| json!({"driver": driver, "pool": "p", "device": "d", "request": "a"}))
        .collect();
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "ns", "uid": uid},
        "spec": {}, "status": {"allocation": {"devices": {"results": results}}, "reservedFor": users},
    }))
    .unwrap()
}

fn device(requests: &[&str], ids: &[&str]) -> Device {
    let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
    Device {
        requests: owned(requests),
        pool: "p".to_owned(),
        device: "d".to_owned(),
        cdi_ids: owned(ids),
        share_id: None,
    }
}

fn key() -> ClaimKey {
    ("ns".to_owned(), "shared".to_owned())
}

fn keys() -> BTreeSet<ClaimKey> {
    BTreeSet::from([key()])
}

fn usable(pod: &Pod, claim: &ResourceClaim) -> Result<Usable, ClaimError> {
    check(pod, &named(pod)?[0], claim)
}

fn container<'a>(pod: &'a Pod, name: &str) -> &'a Container {
    pod.spec.as_ref().unwrap().containers.iter().find(|container| container.name == name).unwrap()
}

#[test]
fn names_come_from_the_spec_or_from_what_was_made_of_a_template() {
    let template = json!([{"name": "gpu", "resourceClaimTemplateName": "t"}]);
    let waiting = pod("p", &template, &json!([]));
    assert!(has_any(&waiting));
    assert_eq!(named(&waiting).unwrap_err().to_string(), "pod \"ns/p\": ResourceClaim not created yet");
    let made = pod("p", &template, &json!([{"name": "gpu", "resourceClaimName": "p-gpu-x"}]));
    assert_eq!(named(&made).unwrap(), [Named { name: "p-gpu-x".to_owned(), must_own: true }]);
    let needless = pod("p", &template, &json!([{"name": "gpu"}]));
    assert_eq!(named(&needless).unwrap(), []);
    let twice =
        json!([{"name": "gpu", "resourceClaimName": "c"}, {"name": "other", "resourceClaimName": "c"}]);
    assert_eq!(named(&pod("p", &twice, &json!([]))).unwrap().len(), 1);
    let nothing = pod("p", &json!([{"name": "gpu"}]), &json!([]));
    assert_eq!(
        named(&nothing).unwrap_err().to_string(),
        "pod \"ns/p\", spec.resourceClaim \"gpu\": none of the supported fields are set"
    );
    assert!(!has_any(&pod("p", &json!([]), &json!([]))));
}

#[test]
fn a_claim_must_be_the_pods_reserved_and_allocated() {
    let template = json!([{"name": "gpu", "resourceClaimTemplateName": "t"}]);
    let own = pod("p", &template, &json!([{"name": "gpu", "resourceClaimName": "p-gpu-x"}]));
    let mut made = claim("p-gpu-x", "c", &["p"], &["d1", "d2", "d1"]);
    assert_eq!(
        usable(&own, &made).unwrap_err().to_string(),
        "ResourceClaim ns/p-gpu-x was not created for pod ns/p (pod is not owner)"
    );
    made.metadata.owner_references = serde_json::from_value(
        json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "p", "controller": true}]),
    )
    .unwrap();
    let found = usable(&own, &made).unwrap();
    assert_eq!(found.drivers.iter().collect::<Vec<_>>(), ["d1", "d2"]);
    let other = claim("shared", "c", &["q"], &["d1"]);
    assert_eq!(
        usable(&named_pod("p"), &other).unwrap_err().to_string(),
        "pod p (p) is not allowed to use ResourceClaim shared (c)"
    );
    let mut bare = claim("shared", "c", &["p"], &[]);
    assert!(usable(&named_pod("p"), &bare).unwrap().drivers.is_empty(), "allocated without devices");
    bare.status.as_mut().unwrap().allocation = None;
    assert_eq!(
        usable(&named_pod("p"), &bare).unwrap_err().to_string(),
        "ResourceClaim shared: not allocated"
    );
}

#[test]
fn a_shared_claim_is_prepared_once_and_undone_with_its_last_pod() {
    let (one, two) = (named_pod("one"), named_pod("two"));
    let claim = claim("shared", "c", &["one", "two"], &["d1", "d2"]);
    let mut ledger = Ledger::default();
    assert!(ledger.reserve("one", &[usable(&one, &claim).unwrap()]).unwrap());
    assert_eq!(ledger.to_prepare(&keys()).len(), 2);
    ledger.prepared(&key(), "d1", vec![device(&["a"], &["v/c=1"])]);
    assert_eq!(ledger.to_prepare(&keys()).into_keys().collect::<Vec<_>>(), ["d2"]);
    ledger.prepared(&key(), "d2", vec![]);
    assert!(ledger.reserve("two", &[usable(&two, &claim).unwrap()]).unwrap());
    assert!(!ledger.reserve("two", &[usable(&two, &claim).unwrap()]).unwrap(), "no news");
    assert!(ledger.to_prepare(&keys()).is_empty());

    assert!(ledger.leave_shared("one") && !ledger.holds("one"));
    assert!(ledger.to_unprepare("one").is_empty());
    assert_eq!(ledger.to_unprepare("two").len(), 2);
    ledger.unprepared(&key(), "d1");
    assert!(!ledger.forget_undone("two") && ledger.holds("two"));
    assert_eq!(ledger.to_unprepare("two").into_keys().collect::<Vec<_>>(), ["d2"]);
    ledger.unprepared(&key(), "d2");
    assert!(ledger.forget_undone("two"));
    assert_eq!(ledger, Ledger::default());
}

#[test]
fn another_claim_of_the_same_name_waits_for_the_old_one() {
    let mut ledger = Ledger::default();
    let (old, new) = (claim("shared", "c1", &["p"], &["d"]), claim("shared", "c2", &["q"], &["d"]));
    ledger.reserve("p", &[usable(&named_pod("p"), &old).unwrap()]).unwrap();
    let before = ledger.clone();
    let refused = ledger.reserve("q", &[usable(&named_pod("q"), &new).unwrap()]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "old ResourceClaim with same name shared and different UID c1 still exists (previous pod force-deleted?!)"
    );
    assert_eq!(ledger, before);
}

#[test]
fn containers_get_the_devices_of_their_requests() {
    let pod = named_pod("p");
    let mut ledger = Ledger::default();
    let shared = claim("shared", "c", &["p"], &["d"]);
    let ids = |ledger: &Ledger, name: &str| ledger.cdi_ids(&pod, container(&pod, name));
    assert_eq!(
        ids(&ledger, "all").unwrap_err().to_string(),
        "unable to get information for ResourceClaim shared"
    );
    assert_eq!(ids(&ledger, "none").unwrap(), [""; 0]);
    ledger.reserve("p", &[usable(&pod, &shared).unwrap()]).unwrap();
    assert!(ids(&ledger, "one").is_err(), "its driver has not answered");
    let devices = vec![
        device(&["a/small"], &["v/c=1", "v/c=2"]),
        device(&["b"], &["v/c=3"]),
        device(&[], &["v/c=1", "v/c=4"]),
    ];
    ledger.prepared(&key(), "d", devices);
    assert_eq!(ids(&ledger, "all").unwrap(), ["v/c=1", "v/c=2", "v/c=3", "v/c=4"]);
    assert_eq!(ids(&ledger, "one").unwrap(), ["v/c=1", "v/c=2", "v/c=4"]);
    let held = ledger.of_container(&pod, container(&pod, "one"));
    assert_eq!((held[0].claim, held[0].devices.len(), held[0].devices[0].0), ("shared", 2, "d"));
    assert!(ledger.of_container(&pod, container(&pod, "none")).is_empty());
}

#[test]
fn what_is_kept_suffices_for_containers_but_drivers_are_asked_again() {
    let pod = named_pod("p");
    let mut ledger = Ledger::default();
    ledger.reserve("p", &[usable(&pod, &claim("shared", "c", &["p"], &["d"])).unwrap()]).unwrap();
    ledger.prepared(&key(), "d", vec![device(&[], &["v/c=1"])]);
    let text = serde_json::to_string(ledger.claims().next().unwrap().1).unwrap();
    let kept: Claim = serde_json::from_str(&text).unwrap();
    let next = Ledger::restored([(key(), kept)]);
    assert_eq!(next.cdi_ids(&pod, container(&pod, "all")).unwrap(), ["v/c=1"]);
    assert_eq!(next.to_prepare(&keys()).len(), 1);
    assert_eq!(next.pods(), BTreeMap::from([("p".to_owned(), "ns".to_owned())]));
}

#[test]
fn extended_resources_may_be_backed_by_a_claim() {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "p"},
        "spec": {"containers": [
            {"name": "with", "resources": {"requests": {"example.com/gpu": "1"}}}, {"name": "without"}]},
        "status": {"extendedResourceClaimStatus": {"resourceClaimName": "shared", "requestMappings": [
            {"containerName": "with", "resourceName": "example.com/gpu", "requestName": "a"},
            {"containerName": "without", "resourceName": "example.com/gpu", "requestName": "a"}]}},
    }))
    .unwrap();
    assert!(has_any(&pod));
    let mut ledger = Ledger::default();
    ledger.reserve("p", &[usable(&pod, &claim("shared", "c", &["p"], &["d"])).unwrap()]).unwrap();
    ledger.prepared(&key(), "d", vec![device(&["a"], &["v/c=1"])]);
    assert_eq!(ledger.cdi_ids(&pod, container(&pod, "with")).unwrap(), ["v/c=1"]);
    assert_eq!(ledger.cdi_ids(&pod, container(&pod, "without")).unwrap(), [""; 0]);
}
