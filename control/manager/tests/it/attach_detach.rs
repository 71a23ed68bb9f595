//! Volumes of drivers follow their pods from node to node. The test plays kubelet and external-attacher.

use k8s_openapi::api::{
    core::v1::{Event, Node, PersistentVolume, PersistentVolumeClaim, Pod},
    storage::v1::{CSIDriver, VolumeAttachment},
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::harness::{Cluster, eventually};

const UNIQUE: &str = "kubernetes.io/csi/d.example^h-1";

struct Bench {
    cluster: Cluster,
    attachments: Api<VolumeAttachment>,
    nodes: Api<Node>,
    pods: Api<Pod>,
}

impl Bench {
    /// Two nodes, and a claim that has a volume of a driver.
    async fn start() -> Self {
        let cluster = Cluster::start().await;
        let client = cluster.client.clone();
        let bench = Bench {
            attachments: Api::all(client.clone()),
            nodes: Api::all(client.clone()),
            pods: cluster.api::<Pod>("default"),
            cluster,
        };
        for name in ["a", "b"] {
            let node = made(json!({"metadata": {"name": name,
                "annotations": {"volumes.kubernetes.io/controller-managed-attach-detach": "true"}}}));
            bench.nodes.create(&PostParams::default(), &node).await.expect("registers");
            bench.node_says(name, &[]).await;
        }
        let volumes: Api<PersistentVolume> = Api::all(client);
        let volume = made(json!({"metadata": {"name": "pv"}, "spec": {"capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"], "csi": {"driver": "d.example", "volumeHandle": "h-1"}}}));
        volumes.create(&PostParams::default(), &volume).await.expect("creates");
        let claim = made(json!({"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"],
            "volumeName": "pv", "resources": {"requests": {"storage": "1Gi"}}}}));
        let claims = bench.cluster.api::<PersistentVolumeClaim>("default");
        claims.create(&PostParams::default(), &claim).await.expect("creates");
        bench
    }

    async fn node_says(&self, name: &str, in_use: &[&str]) {
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let ready = json!({"type": "Ready", "status": "True", "lastHeartbeatTime": now});
        let status = json!({"status": {"volumesInUse": in_use, "conditions": [ready]}});
        self.nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.expect("reports");
    }

    async fn add_pod(&self, name: &str, node: &str) {
        let pod: Pod = made(json!({"metadata": {"name": name}, "spec": {"nodeName": node,
            "containers": [{"name": "c", "image": "i"}],
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}}));
        eventually("the namespace takes the pod", || async {
            self.pods.create(&PostParams::default(), &pod).await.map_err(|error| error.to_string())
        })
        .await;
    }

    async fn remove_pod(&self, name: &str) {
        let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.pods.delete(name, &at_once).await.expect("deletes");
    }

    /// The only attachment, once it is the one to this node.
    async fn attached_to(&self, node: &str) -> VolumeAttachment {
        eventually("the attachment", || async {
            let all =
                self.attachments.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
            let nodes: Vec<_> = all.items.iter().map(|one| one.spec.node_name.clone()).collect();
            if nodes == [node] { Ok(all.items[0].clone()) } else { Err(format!("{nodes:?}")) }
        })
        .await
    }

    async fn attacher_says(&self, attachment: &VolumeAttachment, status: Value) {
        let name = attachment.metadata.name.as_deref().expect("has a name");
        let patch = json!({"status": status});
        let said = self.attachments.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        said.expect("says");
    }

    async fn node_has(&self, node: &str, wanted: &[&str]) {
        eventually("what the node's status says is attached", || async {
            let node = self.nodes.get(node).await.map_err(|error| error.to_string())?;
            let attached = node.status.and_then(|status| status.volumes_attached).unwrap_or_default();
            let names: Vec<_> = attached.iter().map(|volume| volume.name.as_str()).collect();
            if names == wanted { Ok(()) } else { Err(format!("{names:?}")) }
        })
        .await;
    }

    async fn pod_is_told(&self, pod: &str, reason: &str, message: &str) {
        let events = self.cluster.api::<Event>("default");
        eventually("the event", || async {
            let all = events.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
            let told = all.items.iter().filter(|event| event.involved_object.name.as_deref() == Some(pod));
            let told: Vec<_> =
                told.map(|event| (event.reason.as_deref(), event.message.as_deref())).collect();
            if told.contains(&(Some(reason), Some(message))) { Ok(()) } else { Err(format!("{told:?}")) }
        })
        .await;
    }
}

fn made<T: k8s_openapi::serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("is an object")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_follows_its_pods_when_its_node_has_let_go() {
    let mut bench = Bench::start().await;
    bench.add_pod("first", "a").await;
    let attachment = bench.attached_to("a").await;
    // printf 'h-1d.examplea' | sha256sum
    assert_eq!(
        attachment.metadata.name.as_deref(),
        Some("csi-923a38a37640e594330971fb66b464f58532eae39ae8bf7077d355ef83f44155")
    );
    assert_eq!(attachment.spec.attacher, "d.example");
    assert_eq!(attachment.spec.source.persistent_volume_name.as_deref(), Some("pv"));
    let problem = json!({"attached": false, "attachError": {"message": "no such disk"}});
    bench.attacher_says(&attachment, problem).await;
    let told = "AttachVolume.Attach failed for volume \"pv\" : no such disk";
    bench.pod_is_told("first", "FailedAttachVolume", told).await;
    bench.attacher_says(&attachment, json!({"attached": true, "attachError": null})).await;
    let told = "AttachVolume.Attach succeeded for volume \"pv\"";
    bench.pod_is_told("first", "SuccessfulAttachVolume", told).await;
    bench.node_has("a", &[UNIQUE]).await;
    bench.node_says("a", &[UNIQUE]).await;
    bench.add_pod("second", "b").await;
    let told = "Multi-Attach error for volume \"pv\" Volume is already used by pod(s) first";
    bench.pod_is_told("second", "FailedAttachVolume", told).await;
    // Who takes over in the middle knows as much.
    bench.cluster.stop_manager().await;
    bench.remove_pod("first").await;
    bench.cluster.start_manager();
    bench.pod_is_told(
        "second",
        "FailedAttachVolume",
        "Multi-Attach error for volume \"pv\" Volume is already exclusively attached to one node and can't be attached to another",
    )
    .await;
    bench.attached_to("a").await;
    bench.node_says("a", &[]).await;
    bench.attached_to("b").await;
    bench.node_has("a", &[]).await;
    bench.remove_pod("second").await;
    eventually("no attachment", || async {
        let all = bench.attachments.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
        if all.items.is_empty() { Ok(()) } else { Err(format!("{:?}", all.items)) }
    })
    .await;
    bench.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_may_do_without_and_a_node_that_is_off_lets_go() {
    let bench = Bench::start().await;
    let drivers: Api<CSIDriver> = Api::all(bench.cluster.client.clone());
    let driver = made(json!({"metadata": {"name": "d.example"}, "spec": {"attachRequired": false}}));
    drivers.create(&PostParams::default(), &driver).await.expect("creates");
    bench.add_pod("first", "a").await;
    let all = bench.attachments.list(&ListParams::default()).await.expect("lists");
    assert!(all.items.is_empty(), "{:?}", all.items);
    drivers.delete("d.example", &DeleteParams::default()).await.expect("deletes");
    bench.attached_to("a").await;
    bench.node_says("a", &[UNIQUE]).await;
    bench.remove_pod("first").await;
    bench.add_pod("second", "b").await;
    let told = "Multi-Attach error for volume \"pv\" Volume is already exclusively attached to one node and can't be attached to another";
    bench.pod_is_told("second", "FailedAttachVolume", told).await;
    let off = json!({"spec": {"taints": [
        {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}]}});
    bench.nodes.patch("a", &PatchParams::default(), &Patch::Merge(off)).await.expect("taints");
    bench.attached_to("b").await;
    bench.cluster.stop().await;
}
