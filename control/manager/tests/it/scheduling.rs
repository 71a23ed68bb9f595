//! Pods and nodes: what fits is bound, what does not says why and is bound as soon as it does.

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Event, Node, Pod},
};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};

use crate::harness::{Cluster, deployment, eventually, rolled_out};

async fn bound(cluster: &Cluster) -> Vec<Pod> {
    let pods = cluster.list::<Pod>().await.into_iter();
    pods.filter(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_node_takes_no_more_until_something_goes() {
    let cluster = Cluster::with_node().await;
    let deployments = cluster.api::<Deployment>("default");
    deployments.create(&PostParams::default(), &deployment(4, "x", "900m")).await.expect("creates");
    eventually("two pods bound, two refused", || async {
        let pods = cluster.list::<Pod>().await;
        let refusals = pods.iter().filter(|pod| {
            let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
            conditions.into_iter().any(|condition| {
                condition.type_ == "PodScheduled"
                    && condition.reason.as_deref() == Some("Unschedulable")
                    && condition.message.as_deref() == Some("0/1 nodes are available: 1 Insufficient cpu.")
            })
        });
        let counts = (bound(&cluster).await.len(), refusals.count());
        if counts == (2, 2) { Ok(()) } else { Err(format!("{counts:?}")) }
    })
    .await;
    eventually("the event about it", || async {
        let reasons: Vec<_> = cluster.list::<Event>().await.into_iter().filter_map(|e| e.reason).collect();
        if reasons.iter().any(|reason| reason == "FailedScheduling") {
            Ok(())
        } else {
            Err(format!("{reasons:?}"))
        }
    })
    .await;
    deployments
        .patch(
            "web",
            &kube::api::PatchParams::default(),
            &kube::api::Patch::Merge(serde_json::json!({"spec": {"replicas": 3}})),
        )
        .await
        .expect("scales");
    let gone = bound(&cluster).await[0].metadata.name.clone().unwrap_or_default();
    cluster.api::<Pod>("default").delete(&gone, &DeleteParams::default()).await.expect("deletes");
    eventually("a waiting pod to take its place", || async {
        let names: Vec<_> = bound(&cluster).await.into_iter().filter_map(|pod| pod.metadata.name).collect();
        if names.len() == 2 && !names.contains(&gone) { Ok(()) } else { Err(format!("{names:?}")) }
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_get_their_range_and_lose_the_not_ready_taint() {
    let cluster = Cluster::with_node().await;
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    eventually("the node to be usable", || async {
        let node = nodes.get("fake").await.map_err(|error| error.to_string())?;
        let spec = node.spec.unwrap_or_default();
        let usable =
            spec.pod_cidr.as_deref() == Some("10.244.0.0/24") && spec.taints.unwrap_or_default().is_empty();
        if usable { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    let web = deployment(1, "x", "10m");
    cluster.api::<Deployment>("default").create(&PostParams::default(), &web).await.expect("creates");
    rolled_out(&cluster, 1).await;
    cluster.stop().await;
}
