//! Claims get volumes, and keep them while they are used.

use k8s_openapi::api::core::v1::{Event, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::json;

use crate::harness::{Cluster, eventually};

fn phase(object: Option<&str>) -> &str {
    object.unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ephemeral_volume_gets_a_claim_that_goes_with_its_pod() {
    let cluster = Cluster::start().await;
    let (pods, claims) = (cluster.api::<Pod>("default"), cluster.api::<PersistentVolumeClaim>("default"));
    let template = json!({"metadata": {"labels": {"for": "scratch"}}, "spec": {"accessModes": ["ReadWriteOnce"],
        "storageClassName": "none", "resources": {"requests": {"storage": "1Gi"}}}});
    let pod = |name: &str| -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {"containers": [{"name": "c", "image": "i"}], "nodeName": "nowhere",
                "volumes": [{"name": "scratch", "ephemeral": {"volumeClaimTemplate": template}}]},
        }))
        .expect("is a pod")
    };
    // Somebody else's claim has the name that a pod needs.
    let foreign: PersistentVolumeClaim = serde_json::from_value(json!({
        "metadata": {"name": "late-scratch"}, "spec": template["spec"],
    }))
    .expect("is a claim");
    claims.create(&PostParams::default(), &foreign).await.expect("creates");
    for name in ["web", "late"] {
        eventually("the namespace takes the pod", || async {
            pods.create(&PostParams::default(), &pod(name)).await.map_err(|error| error.to_string())
        })
        .await;
    }
    let claim = eventually("the claim", || async {
        let claim = claims.get_opt("web-scratch").await.map_err(|error| error.to_string())?;
        claim.ok_or_else(|| "not there".to_owned())
    })
    .await;
    let owner = claim.metadata.owner_references.expect("has an owner").remove(0);
    let web = pods.get("web").await.expect("is there");
    assert_eq!((owner.controller, Some(owner.uid)), (Some(true), web.metadata.uid));
    assert_eq!(claim.metadata.labels.expect("of the template")["for"], "scratch");
    let events = cluster.api::<Event>("default");
    eventually("the other pod is told", || async {
        let all = events.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
        let told = all.items.iter().filter_map(|event| event.message.as_deref());
        let is_told = told.into_iter().any(|text| {
            text == "ephemeral volume scratch: PVC default/late-scratch was not created for pod default/late (pod is not owner)"
        });
        if is_told { Ok(()) } else { Err(format!("{:?}", all.items.len())) }
    })
    .await;
    let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    pods.delete("web", &at_once).await.expect("deletes");
    eventually("the claim to be gone", || async {
        match claims.get_opt("web-scratch").await.map_err(|error| error.to_string())? {
            None => Ok(()),
            Some(claim) => Err(format!("{claim:?}")),
        }
    })
    .await;
    assert!(claims.get("late-scratch").await.is_ok(), "is nobody's but its maker's");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_bound_to_a_volume_that_outlives_it() {
    let cluster = Cluster::start().await;
    let volumes: Api<PersistentVolume> = Api::all(cluster.client.clone());
    let claims = cluster.api::<PersistentVolumeClaim>("default");
    let claim: PersistentVolumeClaim = serde_json::from_value(json!({
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }))
    .expect("is a claim");
    claims.create(&PostParams::default(), &claim).await.expect("creates");
    let claim_in = |wanted: &'static str| {
        let claims = claims.clone();
        async move {
            eventually("the claim's phase", || async {
                let claim = claims.get("data").await.map_err(|error| error.to_string())?;
                let found =
                    phase(claim.status.as_ref().and_then(|status| status.phase.as_deref())).to_owned();
                if found == wanted { Ok(claim) } else { Err(found) }
            })
            .await
        }
    };
    claim_in("Pending").await;
    for (name, size) in [("small", "500Mi"), ("big", "10Gi"), ("right", "1Gi")] {
        let volume: PersistentVolume = serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/tmp/x"}},
        }))
        .expect("is a volume");
        volumes.create(&PostParams::default(), &volume).await.expect("creates");
    }
    let bound = claim_in("Bound").await;
    // Whichever came first of those that fit.
    let name = bound.spec.and_then(|spec| spec.volume_name).expect("has a volume");
    assert_ne!(name, "small");
    let volume_in = |name: String, wanted: &'static str| {
        let volumes = volumes.clone();
        async move {
            eventually("the volume's phase", || async {
                let volume = volumes.get(&name).await.map_err(|error| error.to_string())?;
                let found = phase(volume.status.as_ref().and_then(|status| status.phase.as_deref()));
                if found == wanted { Ok(()) } else { Err(found.to_owned()) }
            })
            .await;
        }
    };
    volume_in(name.clone(), "Bound").await;
    volume_in("small".to_owned(), "Available").await;
    volumes.delete(&name, &DeleteParams::default()).await.expect("asks for deletion");
    let volume = volumes.get(&name).await.expect("is kept while a claim has it");
    assert!(volume.metadata.deletion_timestamp.is_some());
    claims.delete("data", &DeleteParams::default()).await.expect("deletes");
    eventually("claim and volume to be gone", || async {
        let claim = claims.get_opt("data").await.map_err(|error| error.to_string())?;
        let volume = volumes.get_opt(&name).await.map_err(|error| error.to_string())?;
        match (claim, volume) {
            (None, None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    cluster.stop().await;
}
