//! Namespaces and owners: what comes with a namespace, and what goes with an owner.

use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    core::v1::{ConfigMap, Namespace, Pod, ServiceAccount},
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::json;

use crate::harness::{Cluster, deployment, eventually, rolled_out};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_comes_furnished_and_goes_with_all_it_holds() {
    let cluster = Cluster::with_node().await;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let team: Namespace =
        serde_json::from_value(json!({"metadata": {"name": "team"}})).expect("is a Namespace");
    namespaces.create(&PostParams::default(), &team).await.expect("creates");
    let accounts = cluster.api::<ServiceAccount>("team");
    let maps = cluster.api::<ConfigMap>("team");
    let furnished = || async {
        let account = accounts.get_opt("default").await.map_err(|error| error.to_string())?;
        let map = maps.get_opt("kube-root-ca.crt").await.map_err(|error| error.to_string())?;
        let pem = map.and_then(|map| map.data).and_then(|mut data| data.remove("ca.crt"));
        match (account, pem) {
            (Some(_), Some(pem)) if pem.starts_with("-----BEGIN CERTIFICATE") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    };
    eventually("default account and CA", furnished).await;
    accounts.delete("default", &DeleteParams::default()).await.expect("deletes");
    maps.delete("kube-root-ca.crt", &DeleteParams::default()).await.expect("deletes");
    eventually("both to be restored", furnished).await;

    let web = deployment(2, "x", "10m");
    cluster.api::<Deployment>("team").create(&PostParams::default(), &web).await.expect("creates");
    eventually("its pods", || async {
        let pods = cluster.api::<Pod>("team").list(&ListParams::default()).await;
        let pods = pods.map_err(|error| error.to_string())?.items.len();
        if pods == 2 { Ok(()) } else { Err(format!("{pods}")) }
    })
    .await;
    namespaces.delete("team", &DeleteParams::default()).await.expect("deletes");
    eventually("the namespace to be gone", || async {
        match namespaces.get_opt("team").await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreground_deletion_takes_dependents_first_and_orphaning_keeps_them() {
    let cluster = Cluster::with_node().await;
    let deployments = cluster.api::<Deployment>("default");
    let create = || async {
        deployments.create(&PostParams::default(), &deployment(2, "x", "10m")).await.expect("creates");
        rolled_out(&cluster, 2).await;
    };
    let gone = || async {
        eventually("the Deployment to be gone", || async {
            match deployments.get_opt("web").await {
                Ok(None) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    };
    create().await;
    deployments.delete("web", &DeleteParams::foreground()).await.expect("deletes");
    gone().await;
    assert!(cluster.list::<ReplicaSet>().await.is_empty(), "dependents go first");

    create().await;
    deployments.delete("web", &DeleteParams::orphan()).await.expect("deletes");
    gone().await;
    let sets = cluster.list::<ReplicaSet>().await;
    assert_eq!(sets.len(), 1, "kept");
    assert_eq!(sets[0].metadata.owner_references.as_ref().map_or(0, Vec::len), 0, "and free");

    create().await;
    let adopted = cluster.list::<ReplicaSet>().await;
    assert_eq!(adopted.len(), 1, "adopted, not made anew");
    assert_eq!(adopted[0].metadata.uid, sets[0].metadata.uid);
    cluster.stop().await;
}
