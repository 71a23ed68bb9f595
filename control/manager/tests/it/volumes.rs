//! Claims get volumes, and keep them while they are used.

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use serde_json::json;

use crate::harness::{Cluster, eventually};

fn phase(object: Option<&str>) -> &str {
    object.unwrap_or_default()
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
