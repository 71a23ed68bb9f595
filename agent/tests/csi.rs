//! Volumes of a CSI driver of ours, over its sockets, with a real API server and its controllers: everything but mounts, which
//! `root_csi.rs` has. The agent's side has the rights of a node.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

mod csi_driver;
mod mounts;
mod plane;
mod plugin;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use csi_driver::{Fault, Shared};
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode, VolumeAttachment};
use keelson_agent::contracts::{
    MountedVolumes, ObjectSource, VolumeContext, VolumeError, VolumeManager as _, VolumeStep,
};
use keelson_agent::csi::wire::NodeCapability;
use keelson_agent::csi::{Csi, CsiSettings};
use keelson_agent::host::volumes::Volumes;
use keelson_agent::plugins::{self, Handlers};
use keelson_agent::sources::objects::Objects;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use plane::eventually;
use plane::node::{Bench, Wakes};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tonic::Code;

const DRIVER: &str = "test.csi.keelson";
const STAGES: &[NodeCapability] = &[
    NodeCapability::StageUnstageVolume,
    NodeCapability::ExpandVolume,
    NodeCapability::GetVolumeStats,
    NodeCapability::VolumeCondition,
];

/// One life of an agent.
struct Agent {
    csi: Csi,
    objects: Objects,
    volumes: Volumes,
    cancel: CancellationToken,
    woken: Wakes,
}

impl Bench {
    fn agent(&self) -> Agent {
        let settings = CsiSettings {
            call_deadline: Duration::from_secs(3),
            attach_patience: Duration::ZERO,
            ..CsiSettings::new(&self.root(), "a")
        };
        let objects = Objects::new(self.node.clone());
        let source: Arc<dyn ObjectSource> = Arc::new(objects.clone());
        let csi = Csi::new(settings, Arc::clone(&source), self.node.clone());
        let volumes = Volumes::new(&self.root(), source, self.node.clone()).with_csi(csi.clone());
        let cancel = CancellationToken::new();
        let handlers: Handlers = Arc::new(vec![Arc::new(csi.clone())]);
        tokio::spawn(plugins::run(plugins::directory(&self.root()), handlers, cancel.clone()));
        Agent { csi, objects, volumes, cancel, woken: Wakes::default() }
    }

    async fn put<K>(&self, api: Api<K>, object: Value) -> K
    where
        K: kube::Resource + Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
    {
        api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
    }

    /// A driver's object.
    async fn driver(&self, spec: Value) {
        let mut spec = spec;
        if spec.get("attachRequired").is_none() {
            spec["attachRequired"] = json!(false);
        }
        let api: Api<CSIDriver> = Api::all(self.plane.admin.clone());
        self.put(api, json!({"metadata": {"name": DRIVER}, "spec": spec})).await;
    }

    /// A volume `pv-<name>` with handle `<name>`, and a claim `<name>` that is bound to it.
    async fn claim(&self, name: &str, spec: Value) {
        let mut spec = spec;
        spec["capacity"] = json!({"storage": "1Gi"});
        spec["csi"]["driver"] = json!(DRIVER);
        spec["csi"]["volumeHandle"] = json!(name);
        spec["storageClassName"] = json!("manual");
        if spec.get("accessModes").is_none() {
            spec["accessModes"] = json!(["ReadWriteOnce"]);
        }
        let (modes, mode) = (spec["accessModes"].clone(), spec["volumeMode"].clone());
        let volumes: Api<PersistentVolume> = Api::all(self.plane.admin.clone());
        let volume = format!("pv-{name}");
        self.put(volumes, json!({"metadata": {"name": volume}, "spec": spec})).await;
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.plane.admin.clone(), "default");
        let claim = json!({
            "metadata": {"name": name},
            "spec": {"accessModes": modes, "volumeMode": mode, "volumeName": volume, "storageClassName": "manual",
                "resources": {"requests": {"storage": "1Gi"}}},
        });
        self.put(claims.clone(), claim).await;
        eventually("the claim is bound", || async {
            let claim = claims.get(name).await.unwrap();
            claim.status.and_then(|status| status.phase).as_deref() == Some("Bound")
        })
        .await;
    }

    /// A directory that nobody has anything in any more.
    fn is_empty(&self, path: &str) -> bool {
        files_below(&self.root().join(path)).is_empty()
    }
}

impl Agent {
    /// Waits until the driver can be used.
    async fn mount(&self, pod: &Pod) -> Result<MountedVolumes, VolumeError> {
        self.woken.follow(&self.objects, pod);
        self.volumes.mount_all(pod, &VolumeContext::default()).await
    }
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(files_below(&entry.path()));
        } else if !std::os::unix::fs::FileTypeExt::is_socket(&kind) {
            found.push(entry.path());
        }
    }
    found
}

fn pod(uid: &str, spec: Value) -> Pod {
    let mut spec = spec;
    if spec.get("containers").is_none() {
        spec["containers"] = json!([{"name": "c", "image": "i"}]);
    }
    serde_json::from_value(
        json!({"metadata": {"name": uid, "namespace": "default", "uid": uid}, "spec": spec}),
    )
    .unwrap()
}

fn with_claim(uid: &str, claim: &str) -> Pod {
    pod(uid, json!({"volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]}))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drivers_register_leave_and_come_back() {
    let bench = Bench::start().await;
    let agent = bench.agent();
    tokio::spawn(agent.csi.clone().announce(agent.cancel.clone()));
    let csi_nodes: Api<CSINode> = Api::all(bench.node.clone());
    let nodes: Api<Node> = Api::all(bench.node.clone());
    eventually("there is a CSINode", || async { csi_nodes.get("a").await.is_ok() }).await;
    let shared = Shared::new(DRIVER, false, STAGES);
    let process = shared.start(&bench.root());
    assert!(shared.told(1).await.registered);
    let found = csi_nodes.get("a").await.unwrap();
    let driver = &found.spec.drivers[0];
    assert_eq!((driver.name.as_str(), driver.node_id.as_str()), (DRIVER, "node-id"));
    assert_eq!(driver.topology_keys.as_deref(), Some(&[format!("topology.{DRIVER}/zone")][..]));
    assert_eq!(driver.allocatable.as_ref().and_then(|allocatable| allocatable.count), Some(7));
    assert_eq!(found.metadata.owner_references.unwrap()[0].kind, "Node");
    let node = nodes.get("a").await.unwrap();
    assert_eq!(node.metadata.labels.unwrap()[&format!("topology.{DRIVER}/zone")], "z1");
    let ids = &node.metadata.annotations.unwrap()["csi.volume.kubernetes.io/nodeid"];
    assert_eq!(ids, &format!("{{\"{DRIVER}\":\"node-id\"}}"));

    process.end();
    eventually("the driver is gone", || async { csi_nodes.get("a").await.unwrap().spec.drivers.is_empty() })
        .await;
    // It comes back as another one; the agent that finds it there is another one too.
    *shared.node_id.lock().unwrap() = "other-id".to_owned();
    let process = shared.start(&bench.root());
    assert!(shared.told(2).await.registered);
    assert_eq!(csi_nodes.get("a").await.unwrap().spec.drivers[0].node_id, "other-id");
    agent.cancel.cancel();
    *shared.node_id.lock().unwrap() = "third-id".to_owned();
    let agent = bench.agent();
    assert!(shared.told(3).await.registered);
    assert_eq!(csi_nodes.get("a").await.unwrap().spec.drivers[0].node_id, "third-id");
    drop(process);
    bench.stop(&agent.cancel).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_staged_once_and_published_for_each_pod() {
    let bench = Bench::start().await;
    let agent = bench.agent();
    bench.driver(json!({"podInfoOnMount": true, "fsGroupPolicy": "File"})).await;
    let secrets: Api<Secret> = Api::namespaced(bench.plane.admin.clone(), "default");
    bench.put(secrets, json!({"metadata": {"name": "s"}, "stringData": {"key": "for-staging"}})).await;
    let csi = json!({"fsType": "ext4", "volumeAttributes": {"size": "large"},
        "nodeStageSecretRef": {"name": "s", "namespace": "default"}});
    bench.claim("one", json!({"csi": csi, "mountOptions": ["noatime"]})).await;

    // Without the driver the pod waits; it is woken when the driver comes.
    let first = with_claim("u1", "one");
    let error = agent.mount(&first).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "MountVolume.MountDevice failed for volume \"pv-one\" : kubernetes.io/csi: attacher.MountDevice failed to create newCsiDriverClient: driver name {DRIVER} not found in the list of registered CSI drivers"
        )
    );
    assert_eq!(error.step.reason(), "FailedMount");
    let before = agent.woken.count();
    let shared = Shared::new(DRIVER, false, STAGES);
    let process = shared.start(&bench.root());
    eventually("the pod is woken", || async { agent.woken.count() > before }).await;
    assert!(shared.told(1).await.registered);

    let mounted = agent.mount(&first).await.unwrap();
    let target = bench.root().join("pods/u1/volumes/kubernetes.io~csi/pv-one/mount");
    assert_eq!((&mounted.volumes["data"].path, mounted.volumes["data"].read_only), (&target, false));
    assert_eq!(shared.take_calls(), ["stage one", "publish one"]);
    let staged = shared.staged.lock().unwrap()[0].clone();
    assert_eq!(staged.secrets["key"], "for-staging");
    assert_eq!(staged.volume_context["size"], "large");
    let capability = staged.volume_capability.unwrap();
    let file_system = capability.mount.clone().unwrap();
    assert_eq!((file_system.fs_type.as_str(), file_system.mount_flags), ("ext4", vec!["noatime".to_owned()]));
    let published = shared.published.lock().unwrap()[0].clone();
    assert_eq!(published.staging_target_path, staged.staging_target_path);
    assert!(staged.staging_target_path.ends_with("/globalmount"));
    assert_eq!(published.volume_context["csi.storage.k8s.io/pod.uid"], "u1");
    assert_eq!(published.volume_context["csi.storage.k8s.io/ephemeral"], "false");
    let data = std::fs::read_to_string(target.with_file_name("vol_data.json")).unwrap();
    assert!(
        data.contains("\"specVolID\":\"pv-one\"") && data.contains("\"volumeLifecycleMode\":\"Persistent\"")
    );
    assert_eq!(agent.mount(&first).await.unwrap().volumes, mounted.volumes);
    assert_eq!(shared.take_calls(), [""; 0], "what is there is left alone");

    let spec =
        json!({"volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "one", "readOnly": true}}]});
    assert!(agent.mount(&pod("u2", spec)).await.unwrap().volumes["d"].read_only);
    assert_eq!(shared.take_calls(), ["publish one"]);
    assert!(shared.published.lock().unwrap()[1].readonly);
    let figures = agent.volumes.figures("u1").await;
    assert_eq!((figures[0].name.as_str(), figures[0].bytes), ("data", Some((1 << 20, (1 << 20) - 1, 1))));
    assert_eq!(figures[0].claim, Some(("default".to_owned(), "one".to_owned())));
    assert_eq!(figures[0].abnormal, Some((false, "a disk is broken".to_owned())));
    shared.take_calls();

    agent.volumes.teardown("u1").await.unwrap();
    assert_eq!(shared.take_calls(), ["unpublish one"], "another pod has it");
    // Gone for a while: the pod's directory stays until the driver has let go.
    let process = {
        process.end();
        eventually("the driver is away", || async { agent.volumes.teardown("u2").await.is_err() }).await;
        shared.start(&bench.root())
    };
    shared.told(2).await;
    agent.volumes.teardown("u2").await.unwrap();
    agent.volumes.teardown("u2").await.unwrap();
    assert_eq!(shared.take_calls(), ["unpublish one", "unstage one"]);
    assert!(bench.is_empty("pods") && bench.is_empty("plugins/kubernetes.io"));
    drop(process);
    bench.stop(&agent.cancel).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inline_volumes_get_tokens_and_are_published_again() {
    let bench = Bench::start().await;
    let shared = Shared::new(DRIVER, false, &[NodeCapability::VolumeMountGroup]);
    let _process = shared.start(&bench.root());
    let agent = bench.agent();
    assert!(shared.told(1).await.registered);
    let inline = json!({"serviceAccountName": "default", "automountServiceAccountToken": false, "securityContext": {"fsGroup": 4242},
        "volumes": [{"name": "v", "csi": {"driver": DRIVER, "readOnly": true, "volumeAttributes": {"a": "b"}}}]});
    let error = agent.mount(&pod("u1", inline.clone())).await.unwrap_err().to_string();
    assert!(
        error.ends_with(&format!(
            "volume mode \"Ephemeral\" not supported by driver {DRIVER} (no CSIDriver object)"
        )),
        "{error}"
    );
    bench
        .driver(
            json!({"volumeLifecycleModes": ["Ephemeral"], "podInfoOnMount": true, "requiresRepublish": true,
            "tokenRequests": [{"audience": "vault", "expirationSeconds": 3600}]}),
        )
        .await;
    // The token is bound to the pod, which therefore has to be there.
    let pods: Api<Pod> = Api::namespaced(bench.plane.admin.clone(), "default");
    let mut object = serde_json::to_value(pod("inline", inline)).unwrap();
    object["metadata"].as_object_mut().unwrap().remove("uid");
    object["spec"]["nodeName"] = json!("a");
    let pod = serde_json::from_value(object).unwrap();
    eventually("the pod is made", || async { pods.create(&PostParams::default(), &pod).await.is_ok() }).await;
    let pod = pods.get("inline").await.unwrap();
    let mounted = agent.mount(&pod).await.unwrap();
    assert!(mounted.refresh_at.is_some(), "it is published again");
    let request = shared.published.lock().unwrap()[0].clone();
    assert!(
        request.volume_id.starts_with("csi-") && request.readonly && request.staging_target_path.is_empty()
    );
    let tokens = &request.volume_context["csi.storage.k8s.io/serviceAccount.tokens"];
    let tokens: Value = serde_json::from_str(tokens).unwrap();
    assert!(tokens["vault"]["token"].as_str().is_some_and(|token| token.split('.').count() == 3), "{tokens}");
    assert!(tokens["vault"]["expirationTimestamp"].as_str().unwrap().ends_with('Z'));
    let capability = request.volume_capability.unwrap();
    assert_eq!(capability.mount.unwrap().volume_mount_group, "4242", "the driver has the group");
    assert_eq!(
        (
            request.volume_context["a"].as_str(),
            request.volume_context["csi.storage.k8s.io/ephemeral"].as_str()
        ),
        ("b", "true")
    );
    let uid = pod.metadata.uid.unwrap();
    agent.volumes.teardown(&uid).await.unwrap();
    assert!(bench.is_empty("pods"));
    bench.stop(&agent.cancel).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_fails_or_hangs_is_told_of_and_holds_up_nobody_else() {
    let bench = Bench::start().await;
    let shared = Shared::new(DRIVER, false, STAGES);
    let process = shared.start(&bench.root());
    let agent = bench.agent();
    bench.driver(json!({})).await;
    for name in ["stuck", "fine"] {
        bench.claim(name, json!({})).await;
    }
    assert!(shared.told(1).await.registered);
    shared.fault("stage", "stuck", Some(Fault::Code(Code::InvalidArgument)));
    let (stuck, fine) = (with_claim("u1", "stuck"), with_claim("u2", "fine"));
    let error = agent.mount(&stuck).await.unwrap_err();
    assert_eq!(error.step, VolumeStep::MountDevice);
    assert_eq!(error.message, "rpc error: code = InvalidArgument desc = stage does not work");
    assert!(bench.is_empty("plugins/kubernetes.io"), "the driver is through: nothing is left to undo");
    agent.volumes.teardown("u1").await.unwrap();
    assert_eq!(shared.take_calls(), ["stage stuck"]);

    shared.fault("stage", "stuck", Some(Fault::Hang));
    let (late, other) = tokio::join!(agent.mount(&stuck), async {
        shared.called("stage stuck").await;
        agent.mount(&fine).await
    });
    assert!(other.is_ok(), "{other:?}");
    assert!(late.unwrap_err().message.starts_with("rpc error: code = DeadlineExceeded"));
    shared.take_calls();
    // The driver is killed at it; what it may have done is undone when the pod goes.
    drop(process);
    shared.fault("stage", "stuck", None);
    let _process = shared.start(&bench.root());
    shared.told(2).await;
    eventually("the pod goes", || async { agent.volumes.teardown("u1").await.is_ok() }).await;
    let calls = shared.take_calls();
    assert_eq!(calls[calls.len() - 2..], ["unpublish stuck", "unstage stuck"]);
    agent.volumes.teardown("u2").await.unwrap();
    assert!(bench.is_empty("pods") && bench.is_empty("plugins/kubernetes.io"));
    bench.stop(&agent.cancel).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_is_waited_for_until_it_is_attached() {
    let bench = Bench::start().await;
    let shared = Shared::new(DRIVER, false, STAGES);
    let _process = shared.start(&bench.root());
    let agent = bench.agent();
    bench.driver(json!({"attachRequired": true})).await;
    bench.claim("disk", json!({})).await;
    assert!(shared.told(1).await.registered);
    let pod = with_claim("u1", "disk");
    let error = agent.mount(&pod).await.unwrap_err();
    assert_eq!(error.step.reason(), "FailedAttachVolume");
    assert_eq!(
        error.to_string(),
        format!(
            "AttachVolume.Attach failed for volume \"pv-disk\" : timed out waiting for external-attacher of {DRIVER} CSI driver to attach volume disk"
        )
    );
    assert!(agent.csi.in_use().borrow().contains(&format!("kubernetes.io/csi/{DRIVER}^disk")));
    assert_eq!(shared.take_calls(), [""; 0]);

    let attachments: Api<VolumeAttachment> = Api::all(bench.plane.admin.clone());
    // printf disktest.csi.keelsona | sha256sum
    let name = "csi-".to_owned() + &sha256("disktest.csi.keelsona");
    let before = agent.woken.count();
    let spec = json!({"attacher": DRIVER, "nodeName": "a", "source": {"persistentVolumeName": "pv-disk"}});
    bench.put(attachments.clone(), json!({"metadata": {"name": name}, "spec": spec})).await;
    eventually("the pod is woken", || async { agent.woken.count() > before }).await;
    let status = |status: Value| {
        let (attachments, name) = (attachments.clone(), name.clone());
        async move {
            let patch = Patch::Merge(json!({"status": status}));
            attachments.patch_status(&name, &PatchParams::default(), &patch).await.unwrap();
        }
    };
    status(json!({"attached": false, "attachError": {"message": "no such disk"}})).await;
    let error = agent.mount(&pod).await.unwrap_err();
    assert_eq!(error.to_string(), "AttachVolume.Attach failed for volume \"pv-disk\" : no such disk");
    status(json!({"attached": true, "attachError": null, "attachmentMetadata": {"device": "/dev/xyz"}}))
        .await;
    agent.mount(&pod).await.unwrap();
    assert_eq!(shared.staged.lock().unwrap()[0].publish_context["device"], "/dev/xyz");
    assert_eq!(shared.published.lock().unwrap()[0].publish_context["device"], "/dev/xyz");

    // Another agent knows from disk what must not be detached.
    agent.cancel.cancel();
    let agent = bench.agent();
    assert!(!agent.csi.in_use().borrow().is_empty());
    shared.told(2).await;
    agent.volumes.teardown("u1").await.unwrap();
    assert!(agent.csi.in_use().borrow().is_empty());
    bench.stop(&agent.cancel).await;
}

fn sha256(text: &str) -> String {
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(text.as_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_grow_and_devices_are_passed_on() {
    let bench = Bench::start().await;
    let shared = Shared::new(DRIVER, false, STAGES);
    let _process = shared.start(&bench.root());
    let agent = bench.agent();
    bench.driver(json!({})).await;
    bench.claim("disk", json!({})).await;
    bench.claim("raw", json!({"volumeMode": "Block"})).await;
    assert!(shared.told(1).await.registered);
    let pod_with_disk = with_claim("u1", "disk");
    agent.mount(&pod_with_disk).await.unwrap();

    // What a resizer does: the volume first, then the claim's condition.
    let volumes: Api<PersistentVolume> = Api::all(bench.plane.admin.clone());
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(bench.plane.admin.clone(), "default");
    let before = agent.woken.count();
    let larger = Patch::Merge(json!({"spec": {"capacity": {"storage": "2Gi"}}}));
    volumes.patch("pv-disk", &PatchParams::default(), &larger).await.unwrap();
    let pending = Patch::Merge(
        json!({"status": {"conditions": [{"type": "FileSystemResizePending", "status": "True"}]}}),
    );
    claims.patch_status("disk", &PatchParams::default(), &pending).await.unwrap();
    eventually("the pod is woken", || async { agent.woken.count() > before }).await;
    let mounted = agent.mount(&pod_with_disk).await.unwrap();
    assert_eq!(mounted.events[0].reason, "FileSystemResizeSuccessful");
    let request = shared.expanded.lock().unwrap()[0].clone();
    assert_eq!(request.capacity_range.unwrap().required_bytes, 2 << 30);
    assert!(request.volume_path.ends_with("/globalmount"));
    let status = claims.get("disk").await.unwrap().status.unwrap();
    assert_eq!(status.capacity.unwrap()["storage"].0, "2Gi");
    assert!(status.conditions.unwrap_or_default().is_empty());
    assert!(agent.mount(&pod_with_disk).await.unwrap().events.is_empty(), "once");

    let volume = json!([{"name": "d", "persistentVolumeClaim": {"claimName": "raw"}}]);
    let wrong = json!({"volumes": volume,
        "containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "d", "mountPath": "/d"}]}]});
    let error = agent.mount(&pod("u2", wrong)).await.unwrap_err().message;
    assert_eq!(error, "volume d has volumeMode Block, but is specified in volumeMounts");
    let right = json!({"volumes": volume,
        "containers": [{"name": "c", "image": "i", "volumeDevices": [{"name": "d", "devicePath": "/dev/x"}]}]});
    let device = agent.mount(&pod("u2", right)).await.unwrap().volumes["d"].path.clone();
    assert_eq!(std::fs::read_to_string(&device).unwrap(), "a device");
    let link = bench.root().join("pods/u2/volumeDevices/kubernetes.io~csi/pv-raw");
    assert_eq!(std::fs::read_link(link).unwrap(), device);
    assert!(shared.published.lock().unwrap()[1].volume_capability.as_ref().unwrap().block.is_some());
    for uid in ["u1", "u2"] {
        agent.volumes.teardown(uid).await.unwrap();
    }
    assert!(bench.is_empty("pods") && bench.is_empty("plugins/kubernetes.io"));
    bench.stop(&agent.cancel).await;
}
