//! ResourceClaims that are made for pods, and when a claim's devices are free again.
//!
//! Input: a pod with the claims of its namespace, or a claim with what is known of its users. Output: claims to make from
//! templates, what the pod's status must say of them, and what of a claim is to be given back. Who gets which devices is the
//! scheduler's to say.
//!
//! <https://kubernetes.io/docs/concepts/scheduling-eviction/dynamic-resource-allocation/>

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{Pod, PodResourceClaim},
        resource::v1::{ResourceClaim, ResourceClaimConsumerReference as Consumer, ResourceClaimTemplate},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};

use crate::object::{
    annotation, has_finalizer, is_being_deleted, is_controlled_by, is_pod_terminal, name, namespace,
    pod_node, uid,
};

/// Keeps a claim that has devices.
pub const FINALIZER: &str = "resource.kubernetes.io/delete-protection";
/// On a claim that was made: the pod's name of it.
const POD_CLAIM: &str = "resource.kubernetes.io/pod-claim-name";
/// Who may use a claim at the same time, at most: a limit of the API.
const MOST_USERS: usize = 256;
/// Room of a name for what it is made of; a random part follows.
const LONGEST_BASE: usize = 57;

/// A claim that a pod lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lacking {
    /// The pod's name of it.
    pub pod_claim: String,
    /// Template to make it from.
    pub template: String,
    /// The claim that the pod's status names, though it is not there.
    pub lost: Option<String>,
}

/// What to do for a pod.
#[derive(Clone, Debug, Default)]
pub struct PodPlan {
    /// To make.
    pub lacking: Vec<Lacking>,
    /// Made before, and not in the pod's status: name of the claim by the pod's name of it.
    pub untold: BTreeMap<String, String>,
    /// To be reserved for the pod, which has a node that the scheduler did not choose.
    pub unreserved: Vec<Arc<ResourceClaim>>,
}

/// What to do with a claim. All false: nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClaimPlan {
    /// Its users from now on, where some are over.
    pub users: Option<Vec<Consumer>>,
    /// Its devices are free.
    pub deallocate: bool,
    /// Its finalizer is to go.
    pub unprotect: bool,
    /// It was made for a pod that is over.
    pub delete: bool,
}

/// Whether the pod names any claim.
pub fn names_claims(pod: &Pod) -> bool {
    wanted(pod).next().is_some()
}

fn wanted(pod: &Pod) -> impl Iterator<Item = &PodResourceClaim> {
    pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten())
}

/// Names of the pod's claims, as far as they are known.
pub fn claims_of(pod: &Pod) -> impl Iterator<Item = &str> {
    wanted(pod).filter_map(move |claim| match told(pod, claim) {
        Told::Name(name) => Some(name),
        Told::Nothing | Told::NotNeeded => None,
    })
}

/// What is known of a claim's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told<'a> {
    Nothing,
    NotNeeded,
    Name(&'a str),
}

fn told<'a>(pod: &'a Pod, claim: &'a PodResourceClaim) -> Told<'a> {
    if let Some(name) = &claim.resource_claim_name {
        return Told::Name(name);
    }
    let mut statuses = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    match statuses.find(|status| status.name == claim.name) {
        None => Told::Nothing,
        Some(status) => status.resource_claim_name.as_deref().map_or(Told::NotNeeded, Told::Name),
    }
}

/// True when the pod runs no container and will not: its claims are free.
pub fn is_over(pod: &Pod) -> bool {
    is_pod_terminal(pod) || (is_being_deleted(&pod.metadata) && pod_node(pod).is_none())
}

/// Decides for a pod; `get` finds a claim of its namespace by name, `all` gives all of them.
pub fn plan_pod(
    pod: &Pod,
    get: impl Fn(&str) -> Option<Arc<ResourceClaim>>,
    all: impl Fn() -> Vec<Arc<ResourceClaim>>,
) -> PodPlan {
    let mut plan = PodPlan::default();
    if is_being_deleted(&pod.metadata) || is_over(pod) {
        return plan;
    }
    for claim in wanted(pod) {
        let is_own = |found: &ResourceClaim| is_controlled_by(&found.metadata, uid(&pod.metadata));
        let named = match told(pod, claim) {
            Told::NotNeeded => continue,
            Told::Nothing => None,
            Told::Name(name) => Some(name),
        };
        let there = named.and_then(&get).filter(|found| claim.resource_claim_name.is_some() || is_own(found));
        if let Some(there) = there {
            let is_unreserved = pod_node(pod).is_some() && may_be_reserved(&there, uid(&pod.metadata));
            let is_news = plan.unreserved.iter().all(|other| other.metadata.name != there.metadata.name);
            if is_unreserved && is_news {
                plan.unreserved.push(there);
            }
            continue;
        }
        let Some(template) = &claim.resource_claim_template_name else { continue };
        let made = all().into_iter().find(|found| {
            is_own(found) && annotation(&found.metadata, POD_CLAIM) == Some(claim.name.as_str())
        });
        if let Some(made) = made {
            plan.untold.insert(claim.name.clone(), name(&made.metadata).to_owned());
        } else {
            plan.lacking.push(Lacking {
                pod_claim: claim.name.clone(),
                template: template.clone(),
                lost: named.map(str::to_owned),
            });
        }
    }
    plan
}

/// Whether the claim has devices that the pod may use and does not yet.
fn may_be_reserved(claim: &ResourceClaim, pod_uid: &str) -> bool {
    let Some(status) = &claim.status else { return false };
    let users = status.reserved_for.as_deref().unwrap_or_default();
    status.allocation.is_some()
        && users.len() < MOST_USERS
        && users.iter().all(|consumer| consumer.uid != pod_uid)
}

/// The claim's users and the pod.
pub fn users_with(claim: &ResourceClaim, pod: &Pod) -> Vec<Consumer> {
    let mut users = users(claim).to_vec();
    users.push(Consumer {
        api_group: None,
        name: name(&pod.metadata).to_owned(),
        resource: "pods".to_owned(),
        uid: uid(&pod.metadata).to_owned(),
    });
    users
}

/// Who uses the claim.
pub fn users(claim: &ResourceClaim) -> &[Consumer] {
    claim.status.as_ref().and_then(|status| status.reserved_for.as_deref()).unwrap_or_default()
}

/// True when the user is a pod.
pub fn is_pod(user: &Consumer) -> bool {
    user.resource == "pods" && user.api_group.as_deref().unwrap_or_default().is_empty()
}

/// The claim of the pod that `template` describes.
pub fn claim_from(pod: &Pod, pod_claim: &str, template: &ResourceClaimTemplate) -> ResourceClaim {
    let metadata = template.spec.metadata.clone().unwrap_or_default();
    let mut annotations = metadata.annotations.unwrap_or_default();
    annotations.insert(POD_CLAIM.to_owned(), pod_claim.to_owned());
    ResourceClaim {
        metadata: ObjectMeta {
            generate_name: Some(base_of_name(name(&pod.metadata), pod_claim)),
            namespace: Some(namespace(&pod.metadata).to_owned()),
            labels: metadata.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Pod".to_owned(),
                name: name(&pod.metadata).to_owned(),
                uid: uid(&pod.metadata).to_owned(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..ObjectMeta::default()
        },
        spec: template.spec.spec.clone(),
        status: None,
    }
}

/// `<pod>-<claim>-`; of long names a part of both. Names are ASCII.
fn base_of_name(pod: &str, claim: &str) -> String {
    let whole = format!("{pod}-{claim}-");
    if whole.len() <= LONGEST_BASE {
        return whole;
    }
    let part = |text: &str| text.chars().take(text.len() * LONGEST_BASE / whole.len()).collect::<String>();
    format!("{}-{}", part(pod), part(claim))
}

/// Decides for a claim; `is_gone` tells of a user that is a pod whether it is over, `owner` is the pod of the name that the
/// claim was made for.
pub fn plan_claim(
    claim: &ResourceClaim,
    is_gone: impl Fn(&Consumer) -> bool,
    owner: Option<&Pod>,
) -> ClaimPlan {
    let known = users(claim);
    let left: Vec<Consumer> = known.iter().filter(|user| !(is_pod(user) && is_gone(user))).cloned().collect();
    let (changed, unused) = (left.len() < known.len(), left.is_empty());
    let deleting = is_being_deleted(&claim.metadata);
    // A claim that nobody uses yet may be about to be used.
    let is_free = unused && (changed || deleting);
    let made_for = claim
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true) && owner.kind == "Pod" && owner.api_version == "v1");
    let owner_over = made_for
        .zip(owner)
        .is_some_and(|(made_for, owner)| made_for.uid != uid(&owner.metadata) || is_over(owner));
    ClaimPlan {
        users: changed.then_some(left),
        deallocate: is_free && claim.status.as_ref().is_some_and(|status| status.allocation.is_some()),
        unprotect: is_free && has_finalizer(&claim.metadata, FINALIZER),
        delete: unused && owner_over && !deleting,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(uid: &str, extra: &Value) -> Pod {
        let mut pod = json!({"metadata": {"name": "web", "namespace": "ns", "uid": uid},
            "spec": {"containers": [], "resourceClaims": [
                {"name": "own", "resourceClaimTemplateName": "t"}, {"name": "shared", "resourceClaimName": "c"}]}});
        for (key, value) in extra.as_object().into_iter().flatten() {
            pod[key] = value.clone();
        }
        serde_json::from_value(pod).unwrap()
    }

    fn told_pod(claim: &str) -> Pod {
        pod(
            "u",
            &json!({"status": {"phase": "Pending",
            "resourceClaimStatuses": [{"name": "own", "resourceClaimName": claim}]}}),
        )
    }

    fn claim(name: &str, extra: &Value) -> Arc<ResourceClaim> {
        let mut claim = json!({"metadata": {"name": name, "namespace": "ns", "uid": name}, "spec": {}});
        for (key, value) in extra.as_object().into_iter().flatten() {
            claim[key] = value.clone();
        }
        Arc::new(serde_json::from_value(claim).unwrap())
    }

    fn made(name: &str, owner: &str, status: &Value) -> Arc<ResourceClaim> {
        claim(
            name,
            &json!({"status": status, "metadata": {"name": name, "namespace": "ns", "uid": name,
            "finalizers": [FINALIZER], "annotations": {POD_CLAIM: "own"}, "ownerReferences": [
                {"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": owner, "controller": true}]}}),
        )
    }

    fn plan(pod: &Pod, claims: &[Arc<ResourceClaim>]) -> PodPlan {
        let get = |wanted: &str| claims.iter().find(|claim| name(&claim.metadata) == wanted).cloned();
        plan_pod(pod, get, || claims.to_vec())
    }

    #[test]
    fn a_claim_is_made_once_and_told() {
        let new = pod("u", &json!({}));
        assert!(names_claims(&new));
        let lacking = |lost: Option<&str>| Lacking {
            pod_claim: "own".into(),
            template: "t".into(),
            lost: lost.map(str::to_owned),
        };
        assert_eq!(plan(&new, &[]).lacking, [lacking(None)]);
        // Made, and then the controller died.
        let orphan = plan(&new, &[made("web-own-x", "u", &json!({}))]);
        assert!(orphan.lacking.is_empty());
        assert_eq!(orphan.untold["own"], "web-own-x");
        // Of a pod of the same name, which is no more.
        assert_eq!(plan(&new, &[made("web-own-x", "old", &json!({}))]).lacking.len(), 1);

        let told = told_pod("web-own-x");
        assert_eq!(claims_of(&told).collect::<Vec<_>>(), ["web-own-x", "c"]);
        let done = plan(&told, &[made("web-own-x", "u", &json!({}))]);
        assert!(done.lacking.is_empty() && done.untold.is_empty());
        assert_eq!(plan(&told, &[]).lacking, [lacking(Some("web-own-x"))]);
        let needless = pod("u", &json!({"status": {"resourceClaimStatuses": [{"name": "own"}]}}));
        assert!(plan(&needless, &[]).lacking.is_empty());
        let over = pod("u", &json!({"status": {"phase": "Succeeded"}}));
        assert!(plan(&over, &[]).lacking.is_empty());
    }

    #[test]
    fn a_pod_with_a_node_of_its_own_gets_its_claims_reserved() {
        let allocated = claim("c", &json!({"status": {"allocation": {}}}));
        let mut pod = told_pod("web-own-x");
        let own = made("web-own-x", "u", &json!({}));
        assert!(
            plan(&pod, &[Arc::clone(&own), Arc::clone(&allocated)]).unreserved.is_empty(),
            "the scheduler's"
        );
        pod.spec.as_mut().unwrap().node_name = Some("n".into());
        let plan_now = plan(&pod, &[Arc::clone(&own), allocated]);
        assert_eq!(name(&plan_now.unreserved[0].metadata), "c");
        assert_eq!(plan_now.unreserved.len(), 1, "the other has no devices");
        let users = users_with(&plan_now.unreserved[0], &pod);
        assert_eq!((users[0].resource.as_str(), users[0].uid.as_str()), ("pods", "u"));
        let reserved = claim("c", &json!({"status": {"allocation": {}, "reservedFor": users}}));
        assert!(plan(&pod, &[own, reserved]).unreserved.is_empty());
    }

    #[test]
    fn claims_are_named_after_pod_and_claim() {
        let template: ResourceClaimTemplate = serde_json::from_value(json!({
            "metadata": {"name": "t"},
            "spec": {"metadata": {"labels": {"a": "b"}, "annotations": {"c": "d"}},
                "spec": {"devices": {"requests": [{"name": "r", "exactly": {"deviceClassName": "x"}}]}}}}))
        .unwrap();
        let made = claim_from(&pod("u", &json!({})), "own", &template);
        assert_eq!(made.metadata.generate_name.as_deref(), Some("web-own-"));
        assert_eq!(made.metadata.annotations.as_ref().unwrap()[POD_CLAIM], "own");
        assert_eq!(made.metadata.annotations.unwrap()["c"], "d");
        assert_eq!(made.metadata.labels.unwrap()["a"], "b");
        assert_eq!(made.spec, template.spec.spec);
        let owner = &made.metadata.owner_references.unwrap()[0];
        assert_eq!((owner.uid.as_str(), owner.block_owner_deletion), ("u", Some(true)));
        let long = base_of_name(&"p".repeat(60), &"c".repeat(60));
        assert!(long.len() <= LONGEST_BASE && long.contains("p-c"), "{long}");
    }

    #[test]
    fn devices_are_free_when_the_last_user_is_over() {
        let users = json!([{"resource": "pods", "name": "a", "uid": "a"}, {"resource": "pods", "name": "b", "uid": "b"}]);
        let status = json!({"allocation": {}, "reservedFor": users});
        let used = made("c", "u", &status);
        assert_eq!(plan_claim(&used, |_| false, None), ClaimPlan::default());
        let one_left = plan_claim(&used, |user| user.uid == "a", None);
        assert_eq!(one_left.users.as_ref().map(Vec::len), Some(1));
        assert!(!one_left.deallocate && !one_left.unprotect);
        let free = plan_claim(&used, |_| true, None);
        assert_eq!(free.users, Some(Vec::new()));
        assert!(free.deallocate && free.unprotect && !free.delete);
        // Allocated and not used yet: somebody is about to.
        let fresh = made("c", "u", &json!({"allocation": {}}));
        assert_eq!(plan_claim(&fresh, |_| true, None), ClaimPlan::default());
        let others =
            json!({"reservedFor": [{"apiGroup": "x", "resource": "things", "name": "a", "uid": "a"}]});
        assert_eq!(plan_claim(&made("c", "u", &others), |_| true, None), ClaimPlan::default());
    }

    #[test]
    fn a_made_claim_goes_with_its_pod() {
        let unused = made("c", "u", &json!({}));
        assert!(!plan_claim(&unused, |_| true, None).delete, "the garbage collector's");
        assert!(!plan_claim(&unused, |_| true, Some(&pod("u", &json!({})))).delete);
        let over = pod("u", &json!({"status": {"phase": "Failed"}}));
        assert!(plan_claim(&unused, |_| true, Some(&over)).delete);
        assert!(plan_claim(&unused, |_| true, Some(&pod("next", &json!({})))).delete);
        let mut deleted = (*made("c", "u", &json!({"allocation": {}}))).clone();
        deleted.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        let plan = plan_claim(&deleted, |_| true, None);
        assert!(plan.deallocate && plan.unprotect && plan.users.is_none());
    }
}
