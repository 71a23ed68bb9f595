//! Deployments from creation to deletion.

use control_decide::object::{is_being_deleted, is_pod_ready};
use futures::StreamExt;
use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    core::v1::{Endpoints, Event, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use serde_json::json;

use crate::harness::{Cluster, deployment, eventually, rolled_out};

fn image(name: &str) -> serde_json::Value {
    json!({"spec": {"template": {"spec": {"containers": [
        {"name": "main", "image": name, "resources": {"requests": {"cpu": "10m"}}},
    ]}}}})
}

async fn create(cluster: &Cluster, replicas: i32) {
    let web = deployment(replicas, "nginx:1.17.9", "10m");
    let created = cluster.api::<Deployment>("default").create(&PostParams::default(), &web).await;
    created.expect("creates");
    rolled_out(cluster, replicas).await;
}

/// (image, replicas) of every ReplicaSet with pods.
async fn active_sets(cluster: &Cluster) -> Vec<(String, i32)> {
    let sets = cluster.list::<ReplicaSet>().await.into_iter().filter_map(|set| set.spec);
    let active = sets.filter(|spec| spec.replicas != Some(0));
    active
        .map(|spec| {
            let pod = spec.template.and_then(|template| template.spec).expect("has a template");
            (pod.containers[0].image.clone().unwrap_or_default(), spec.replicas.unwrap_or_default())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_update_never_drops_below_what_it_may() {
    let cluster = Cluster::with_node().await;
    create(&cluster, 4).await;
    let pods = cluster.api::<Pod>("default");
    let version = pods.list(&ListParams::default()).await.expect("lists").metadata.resource_version;
    let mut events =
        pods.watch(&WatchParams::default(), &version.unwrap_or_default()).await.expect("watches").boxed();
    let initial = cluster.list::<Pod>().await;
    cluster.patch::<Deployment>("web", image("nginx:1.17.10")).await;
    rolled_out(&cluster, 4).await;
    assert_eq!(active_sets(&cluster).await, [("nginx:1.17.10".to_owned(), 4)]);

    // Replays what happened: with 25 % of 4, three pods must be ready at every moment, and five may exist.
    let mut ready: std::collections::BTreeMap<_, _> =
        initial.into_iter().map(|pod| (pod.metadata.name.clone(), is_pod_ready(&pod))).collect();
    let mut seen = 0;
    while let Ok(Some(Ok(event))) =
        tokio::time::timeout(std::time::Duration::from_millis(300), events.next()).await
    {
        match event {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                let counts = is_pod_ready(&pod) && !is_being_deleted(&pod.metadata);
                ready.insert(pod.metadata.name.clone(), counts);
            }
            WatchEvent::Deleted(pod) => {
                ready.remove(&pod.metadata.name);
            }
            WatchEvent::Bookmark(_) | WatchEvent::Error(_) => {}
        }
        seen += 1;
        assert!(ready.values().filter(|ready| **ready).count() >= 3, "after {seen} events: {ready:?}");
    }
    assert!(seen >= 12, "four pods were replaced");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn undo_scale_and_delete_leave_what_they_should() {
    let cluster = Cluster::with_node().await;
    create(&cluster, 3).await;
    cluster.patch::<Deployment>("web", image("nginx:1.17.10")).await;
    rolled_out(&cluster, 3).await;
    // What `kubectl rollout undo` does.
    cluster.patch::<Deployment>("web", image("nginx:1.17.9")).await;
    rolled_out(&cluster, 3).await;
    cluster.patch::<Deployment>("web", json!({"spec": {"replicas": 5}})).await;
    rolled_out(&cluster, 5).await;
    assert_eq!(active_sets(&cluster).await, [("nginx:1.17.9".to_owned(), 5)]);
    let web = cluster.api::<Deployment>("default").get("web").await.expect("exists");
    let revision = web.metadata.annotations.unwrap_or_default().remove("deployment.kubernetes.io/revision");
    assert_eq!(revision.as_deref(), Some("3"));
    eventually("the event of the first scaling", || async {
        let messages: Vec<_> = cluster.list::<Event>().await.into_iter().filter_map(|e| e.message).collect();
        let told = messages.iter().any(|message| {
            message.starts_with("Scaled up replica set web-") && message.ends_with("from 0 to 3")
        });
        if told { Ok(()) } else { Err(format!("{messages:?}")) }
    })
    .await;
    let background = DeleteParams::background();
    cluster.api::<Deployment>("default").delete("web", &background).await.expect("deletes");
    eventually("ReplicaSets and pods to be collected", || async {
        let left = (cluster.list::<ReplicaSet>().await.len(), cluster.list::<Pod>().await.len());
        if left == (0, 0) { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn controllers_that_are_cut_off_go_on_where_they_were() {
    let mut cluster = Cluster::with_node().await;
    create(&cluster, 6).await;
    for round in 0..5_u64 {
        cluster.patch::<Deployment>("web", image(&format!("nginx:{round}"))).await;
        tokio::time::sleep(std::time::Duration::from_millis(7 * round)).await;
        cluster.stop_manager().await;
        cluster.start_manager();
    }
    rolled_out(&cluster, 6).await;
    assert_eq!(active_sets(&cluster).await, [("nginx:4".to_owned(), 6)]);
    eventually("old pods to be gone", || async {
        let pods = cluster.list::<Pod>().await.len();
        if pods == 6 { Ok(()) } else { Err(format!("{pods} pods")) }
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_follows_its_pods() {
    let cluster = Cluster::with_node().await;
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
    }))
    .expect("is a Service");
    cluster.api::<Service>("default").create(&PostParams::default(), &service).await.expect("creates");
    create(&cluster, 3).await;
    let ready = |count: usize| {
        let cluster = &cluster;
        eventually("the endpoints to follow", move || async move {
            let selected = ListParams::default().labels("kubernetes.io/service-name=web");
            let slices = cluster.api::<EndpointSlice>("default").list(&selected).await;
            let slices = slices.map_err(|error| error.to_string())?.items;
            let endpoints = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
            let ready = endpoints
                .filter(|endpoint| endpoint.conditions.as_ref().and_then(|c| c.ready) == Some(true))
                .count();
            let legacy = cluster.api::<Endpoints>("default").get("web").await.map_err(|e| e.to_string())?;
            let subsets = legacy.subsets.unwrap_or_default();
            let addresses: usize =
                subsets.iter().map(|subset| subset.addresses.as_ref().map_or(0, Vec::len)).sum();
            if (ready, addresses) == (count, count) {
                Ok(())
            } else {
                Err(format!("{ready} in slices, {addresses} in Endpoints"))
            }
        })
    };
    ready(3).await;
    cluster.patch::<Deployment>("web", json!({"spec": {"replicas": 1}})).await;
    ready(1).await;
    cluster.api::<Service>("default").delete("web", &DeleteParams::default()).await.expect("deletes");
    eventually("slices and Endpoints to go", || async {
        let selected = ListParams::default().labels("kubernetes.io/service-name=web");
        let slices = cluster.api::<EndpointSlice>("default").list(&selected).await;
        let slices = slices.map_err(|error| error.to_string())?.items.len();
        let legacy = cluster.api::<Endpoints>("default").get_opt("web").await.map_err(|e| e.to_string())?;
        if slices == 0 && legacy.is_none() { Ok(()) } else { Err(format!("{slices} slices, {legacy:?}")) }
    })
    .await;
    cluster.stop().await;
}
