//! Pods get the claims of their templates, and give their devices back.

use k8s_openapi::api::{
    core::v1::{Event, Pod},
    resource::v1::{ResourceClaim, ResourceClaimTemplate},
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::harness::{Cluster, eventually};

const FINALIZER: &str = "resource.kubernetes.io/delete-protection";

async fn pod(cluster: &Cluster, name: &str, claims: Value) -> Pod {
    let pods = cluster.api::<Pod>("default");
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {
        "containers": [{"name": "c", "image": "i"}], "nodeName": "nowhere", "resourceClaims": claims}}))
    .expect("is a pod");
    eventually("the namespace takes the pod", || async {
        pods.create(&PostParams::default(), &pod).await.map_err(|error| error.to_string())
    })
    .await
}

async fn patch(claims: &Api<ResourceClaim>, name: &str, status: Value) {
    let patch = Patch::Merge(json!({ "status": status }));
    claims.patch_status(name, &PatchParams::default(), &patch).await.expect("patches");
}

async fn when(
    what: &str,
    claims: &Api<ResourceClaim>,
    name: &str,
    holds: impl Fn(&ResourceClaim) -> bool,
) -> ResourceClaim {
    eventually(what, || async {
        let claim = claims.get(name).await.map_err(|error| error.to_string())?;
        if holds(&claim) { Ok(claim) } else { Err(format!("{claim:?}")) }
    })
    .await
}

fn users(claim: &ResourceClaim) -> usize {
    claim.status.as_ref().and_then(|status| status.reserved_for.as_ref()).map_or(0, Vec::len)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_template_becomes_its_claim() {
    let cluster = Cluster::start().await;
    let (pods, claims) = (cluster.api::<Pod>("default"), cluster.api::<ResourceClaim>("default"));
    let two = json!([{"name": "gpu", "resourceClaimTemplateName": "t"},
        {"name": "late", "resourceClaimTemplateName": "missing"}]);
    let templates = cluster.api::<ResourceClaimTemplate>("default");
    let template = |name: &str| -> ResourceClaimTemplate {
        serde_json::from_value(
            json!({"metadata": {"name": name}, "spec": {"metadata": {"labels": {"of": name}},
            "spec": {"devices": {"requests": [{"name": "r", "exactly": {"deviceClassName": "gpu"}}]}}}}),
        )
        .expect("is a template")
    };
    templates.create(&PostParams::default(), &template("t")).await.expect("creates");
    let web = pod(&cluster, "web", two).await;
    let told = |wanted: &'static str| {
        let pods = pods.clone();
        async move {
            eventually("the pod is told its claim", || async {
                let pod = pods.get("web").await.map_err(|error| error.to_string())?;
                let mut statuses = pod.status.iter().flat_map(|s| s.resource_claim_statuses.iter().flatten());
                let status = statuses.find(|status| status.name == wanted);
                status.and_then(|status| status.resource_claim_name.clone()).ok_or_else(|| format!("{pod:?}"))
            })
            .await
        }
    };
    let name = told("gpu").await;
    let claim = claims.get(&name).await.expect("is there");
    assert!(name.starts_with("web-gpu-"), "{name}");
    assert_eq!(claim.metadata.labels.as_ref().expect("of the template")["of"], "t");
    let owner = &claim.metadata.owner_references.as_ref().expect("has an owner")[0];
    assert_eq!((Some(&owner.uid), owner.controller), (web.metadata.uid.as_ref(), Some(true)));
    let events = cluster.api::<Event>("default");
    eventually("the pod is told what is missing", || async {
        let all = events.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
        let told = all.items.iter().any(|event| {
            event.reason.as_deref() == Some("FailedResourceClaimCreation")
                && event.message.as_deref().is_some_and(|text| text.starts_with("PodResourceClaim late: "))
        });
        if told { Ok(()) } else { Err(format!("{:?}", all.items.len())) }
    })
    .await;
    templates.create(&PostParams::default(), &template("missing")).await.expect("creates");
    let late = told("late").await;
    let owned = claims.list(&ListParams::default()).await.expect("lists").items;
    assert_eq!(owned.len(), 2, "each was made once: {owned:?}");
    // One that somebody deletes is made again.
    claims.delete(&late, &DeleteParams::default()).await.expect("deletes");
    eventually("another claim", || async {
        let again = told("late").await;
        if again == late { Err(again) } else { Ok(()) }
    })
    .await;
    let ended = Patch::Merge(json!({"status": {"phase": "Failed"}}));
    pods.patch_status("web", &PatchParams::default(), &ended).await.expect("patches");
    eventually("the claims are gone", || async {
        let left = claims.list(&ListParams::default()).await.map_err(|error| error.to_string())?.items;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_are_free_when_the_last_pod_is_over() {
    let cluster = Cluster::start().await;
    let (pods, claims) = (cluster.api::<Pod>("default"), cluster.api::<ResourceClaim>("default"));
    let claim: ResourceClaim =
        serde_json::from_value(json!({"metadata": {"name": "c", "finalizers": [FINALIZER]},
        "spec": {"devices": {"requests": [{"name": "r", "exactly": {"deviceClassName": "gpu"}}]}}}))
        .expect("is a claim");
    claims.create(&PostParams::default(), &claim).await.expect("creates");
    let by_name = json!([{"name": "gpu", "resourceClaimName": "c"}]);
    let first = pod(&cluster, "first", by_name.clone()).await;
    pod(&cluster, "second", by_name).await;
    let result = json!([{"request": "r", "driver": "d.example.com", "pool": "p", "device": "d"}]);
    let user = json!([{"resource": "pods", "name": "first", "uid": first.metadata.uid}]);
    patch(&claims, "c", json!({"allocation": {"devices": {"results": result}}, "reservedFor": user})).await;
    // The other pod has a node that no scheduler chose for it.
    when("both pods use it", &claims, "c", |claim| users(claim) == 2).await;
    let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    pods.delete("first", &at_once).await.expect("deletes");
    let one_left = when("one pod uses it", &claims, "c", |claim| users(claim) == 1).await;
    assert!(one_left.status.expect("has one").allocation.is_some());
    let ended = Patch::Merge(json!({"status": {"phase": "Succeeded"}}));
    pods.patch_status("second", &PatchParams::default(), &ended).await.expect("patches");
    let free = when("it is free", &claims, "c", |claim| {
        claim.status.as_ref().is_none_or(|status| status.allocation.is_none())
            && claim.metadata.finalizers.as_ref().is_none_or(Vec::is_empty)
    })
    .await;
    assert_eq!(users(&free), 0);
    cluster.stop().await;
}
