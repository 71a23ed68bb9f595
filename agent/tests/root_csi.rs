//! A CSI driver of ours with real mounts: what pods see, what survives agents and drivers that are killed, and that nothing is
//! left. Needs root.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

mod csi_driver;
mod mounts;
mod plugin;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use csi_driver::{Fault, Shared};
use keelson_agent::contracts::{MountedVolumes, VolumeContext, VolumeError, VolumeManager as _};
use keelson_agent::csi::wire::NodeCapability;
use keelson_agent::csi::{Csi, CsiSettings};
use keelson_agent::host::volumes::Volumes;
use keelson_agent::plugins::{self, Handlers};
use kube::Client;
use mounts::{Objects, RootDir, is_mounted, mounts_below};
use nix::mount::{MntFlags, umount2};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const DRIVER: &str = "mount.csi.keelson";

/// Where the volume is staged.
fn staging(root: &RootDir) -> PathBuf {
    let directory = root.path().join("plugins/kubernetes.io/csi").join(DRIVER);
    let staged = fs::read_dir(directory).unwrap().next().unwrap().unwrap().path();
    staged.join("globalmount")
}

/// Where a pod has it.
fn target(root: &RootDir, uid: &str) -> PathBuf {
    root.path().join("pods").join(uid).join("volumes/kubernetes.io~csi/pv/mount")
}

/// An API server with one claim and its volume, a driver that needs no attaching, and a node that takes any change.
fn api() -> Client {
    let service = tower::service_fn(|request: http::Request<kube::client::Body>| async move {
        let path = request.uri().path().to_owned();
        let answer = match path.rsplit('/').next().unwrap_or_default() {
            "claim" => json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "metadata": {"name": "claim", "namespace": "ns", "uid": "claim-uid"},
                "spec": {"volumeName": "pv"}, "status": {"phase": "Bound"}}),
            "pv" => json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "pv"},
                "spec": {"claimRef": {"uid": "claim-uid"}, "accessModes": ["ReadWriteOnce"],
                    "csi": {"driver": DRIVER, "volumeHandle": "vol"}}}),
            "n" if path.contains("csinodes") => json!({"apiVersion": "storage.k8s.io/v1", "kind": "CSINode",
                "metadata": {"name": "n"}, "spec": {"drivers": []}}),
            "n" => json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n", "uid": "n"}}),
            DRIVER => {
                json!({"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": DRIVER},
                "spec": {"attachRequired": false, "fsGroupPolicy": "File",
                    "volumeLifecycleModes": ["Persistent", "Ephemeral"]}})
            }
            other => panic!("nobody has {other}"),
        };
        let body = kube::client::Body::from(answer.to_string().into_bytes());
        Ok::<_, std::io::Error>(http::Response::builder().status(200).body(body).unwrap())
    });
    Client::new(service, "default")
}

/// One life of an agent; `kill` ends it without a word.
struct Agent {
    volumes: Volumes,
    cancel: CancellationToken,
}

impl Agent {
    fn start(root: &Path) -> Self {
        let settings = CsiSettings { call_deadline: Duration::from_secs(20), ..CsiSettings::new(root, "n") };
        let objects = || Arc::new(Objects { has_secrets: false });
        let csi = Csi::new(settings, objects(), api());
        let volumes = Volumes::new(root, objects(), api()).with_csi(csi.clone());
        let cancel = CancellationToken::new();
        let handlers: Handlers = Arc::new(vec![Arc::new(csi)]);
        tokio::spawn(plugins::run(plugins::directory(root), handlers, cancel.clone()));
        Self { volumes, cancel }
    }

    fn kill(self) {
        self.cancel.cancel();
    }

    async fn mount(&self, uid: &str, volumes: Value) -> Result<MountedVolumes, VolumeError> {
        let pod = mounts::pod(uid, json!({"volumes": volumes, "securityContext": {"fsGroup": 4242}}));
        self.volumes.mount_all(&pod, &VolumeContext::default()).await
    }

    /// Waits until the pod is gone.
    async fn tear_down(&self, uid: &str) {
        let begin = Instant::now();
        while let Err(error) = self.volumes.teardown(uid).await {
            assert!(begin.elapsed() < Duration::from_secs(60), "{error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn claim(read_only: bool) -> Value {
    json!([{"name": "v", "persistentVolumeClaim": {"claimName": "claim", "readOnly": read_only}}])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_share_a_volume_that_outlives_agents_and_drivers() {
    let root = RootDir::new();
    let shared = Shared::new(DRIVER, true, &[NodeCapability::StageUnstageVolume]);
    let process = shared.start(&root.path());
    let agent = Agent::start(&root.path());
    shared.told(1).await;
    let path = agent.mount("u1", claim(false)).await.unwrap().volumes["v"].path.clone();
    assert!(path == target(&root, "u1") && is_mounted(&path) && is_mounted(&staging(&root)));
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.gid(), metadata.permissions().mode() & 0o2070), (4242, 0o2070), "the pod's group");
    fs::write(path.join("file"), "of the first").unwrap();
    let second = agent.mount("u2", claim(true)).await.unwrap().volumes["v"].path.clone();
    assert_eq!(fs::read_to_string(second.join("file")).unwrap(), "of the first");
    let refused = fs::write(second.join("file"), "no").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    shared.take_calls();

    // Both are killed. A new agent has the volumes without a driver, and cannot take them away without one.
    drop(process);
    agent.kill();
    let agent = Agent::start(&root.path());
    assert_eq!(agent.mount("u1", claim(false)).await.unwrap().volumes["v"].path, path);
    assert!(agent.volumes.teardown("u1").await.is_err());
    assert!(is_mounted(&path));
    let _process = shared.start(&root.path());
    agent.tear_down("u1").await;
    assert!(!path.exists() && is_mounted(&staging(&root)), "the second pod has it still");
    agent.tear_down("u2").await;
    assert_eq!(shared.take_calls(), ["unpublish vol", "unpublish vol", "unstage vol"]);
    assert_eq!(mounts_below(&root.path()), Vec::<PathBuf>::new());
    assert!(!root.path().join("pods/u2").exists());
    agent.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_kill_in_the_middle_leaves_is_undone() {
    let root = RootDir::new();
    let shared = Shared::new(DRIVER, true, &[NodeCapability::StageUnstageVolume]);
    let process = shared.start(&root.path());
    let agent = Agent::start(&root.path());
    shared.told(1).await;
    // Killed while the driver stages: the pod goes without ever having had it.
    shared.fault("stage", "vol", Some(Fault::Hang));
    {
        let mounting = agent.mount("u1", claim(false));
        tokio::select! {
            ended = mounting => panic!("{ended:?}"),
            () = shared.called("stage vol") => {}
        }
    }
    agent.kill();
    drop(process);
    shared.fault("stage", "vol", None);
    let process = shared.start(&root.path());
    let agent = Agent::start(&root.path());
    agent.tear_down("u1").await;
    let calls = shared.take_calls();
    assert_eq!(calls[calls.len() - 2..], ["unpublish vol", "unstage vol"]);

    // Killed while the driver publishes: the next agent goes on with it.
    shared.fault("publish", "vol", Some(Fault::Hang));
    {
        let mounting = agent.mount("u2", claim(false));
        tokio::select! {
            ended = mounting => panic!("{ended:?}"),
            () = shared.called("publish vol") => {}
        }
    }
    agent.kill();
    shared.fault("publish", "vol", None);
    let agent = Agent::start(&root.path());
    let begin = Instant::now();
    while let Err(error) = agent.mount("u2", claim(false)).await {
        assert!(begin.elapsed() < Duration::from_secs(60), "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(is_mounted(&target(&root, "u2")));
    // The pod's directory is lost: what is staged is nobody's, and goes when the driver comes next.
    agent.kill();
    umount2(&target(&root, "u2"), MntFlags::empty()).unwrap();
    fs::remove_dir_all(root.path().join("pods/u2")).unwrap();
    process.end();
    let _process = shared.start(&root.path());
    let agent = Agent::start(&root.path());
    shared.called("unstage vol").await;
    let begin = Instant::now();
    while !mounts_below(&root.path()).is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    agent.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inline_volume_goes_with_its_pod() {
    let root = RootDir::new();
    let shared = Shared::new(DRIVER, true, &[]);
    let _process = shared.start(&root.path());
    let agent = Agent::start(&root.path());
    shared.told(1).await;
    let inline = json!([{"name": "pv", "csi": {"driver": DRIVER}}]);
    let path = agent.mount("u1", inline).await.unwrap().volumes["pv"].path.clone();
    assert!(is_mounted(&path) && path == target(&root, "u1"));
    fs::write(path.join("file"), "x").unwrap();
    agent.tear_down("u1").await;
    assert!(mounts_below(&root.path()).is_empty() && !path.exists());
    let calls = shared.take_calls();
    assert!(calls.iter().all(|call| !call.contains("stage")), "{calls:?}");
    agent.kill();
}
