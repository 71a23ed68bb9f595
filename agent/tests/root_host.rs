//! Cgroups and volume mounts on the real kernel, below names of their own that are removed again.
//!
//! Needs root.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

mod mounts;

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;

use agent_core::cgroup_tree::{CgroupDriver, CgroupTree};
use agent_core::qos::PodCgroup;
use k8s_openapi::api::core::v1::Pod;
use keelson_agent::contracts::{CgroupManager, MountedVolumes, VolumeContext, VolumeManager};
use keelson_agent::host::cgroups::Cgroups;
use keelson_agent::host::volumes::Volumes;
use kube::Client;
use mounts::{Objects, RootDir, mounts_below};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde_json::json;

/// A `cgroupRoot` of this test alone; removed when dropped.
struct CgroupRoot(String);

impl CgroupRoot {
    fn new(test: &str) -> Self {
        Self(format!("/keelson-test-{test}-{}", std::process::id()))
    }

    /// Directories of `path` in every hierarchy that has it.
    fn dirs(path: &str) -> Vec<PathBuf> {
        let base = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(base).unwrap().map(|entry| entry.unwrap().path());
        let all = hierarchies.chain([base.to_owned()]);
        all.map(|dir| dir.join(path.trim_start_matches('/'))).filter(|dir| dir.is_dir()).collect()
    }
}

impl Drop for CgroupRoot {
    fn drop(&mut self) {
        for dir in Self::dirs(&self.0) {
            remove_tree(&dir);
        }
        assert!(Self::dirs(&self.0).is_empty() || std::thread::panicking());
    }
}

fn remove_tree(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_tree(&entry.path());
        }
    }
    if let Err(error) = fs::remove_dir(dir) {
        assert!(std::thread::panicking(), "{}: {error}", dir.display());
    }
}

/// A process that is killed when dropped.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }
}

fn read(dir: &Path, file: &str) -> Option<String> {
    fs::read_to_string(dir.join(file)).ok().map(|text| text.trim().to_owned())
}

#[tokio::test]
async fn pod_cgroups_are_limited_listed_and_removed_with_their_processes() {
    let root = CgroupRoot::new("pods");
    let cgroups = Cgroups::new(CgroupTree::new(&root.0, CgroupDriver::Cgroupfs));
    cgroups.ensure_root().await.unwrap();
    let mut pod = PodCgroup {
        path: format!("{}/kubepods/burstable/podu1", root.0),
        cpu_shares: 512,
        cpu_quota: Some((50_000, 100_000)),
        memory_max: Some(64 << 20),
        pids_max: Some(100),
    };
    cgroups.ensure_pod(&pod).await.unwrap();
    cgroups.ensure_pod(&pod).await.unwrap();
    let dirs = CgroupRoot::dirs(&pod.path);
    let value = |v1: &str, v2: &str| dirs.iter().find_map(|dir| read(dir, v1).or_else(|| read(dir, v2)));
    assert!(["64", "67108864"].contains(&value("memory.limit_in_bytes", "memory.max").unwrap().as_str()));
    assert_eq!(value("pids.max", "pids.max").unwrap(), "100");
    assert!(["512", "20"].contains(&value("cpu.shares", "cpu.weight").unwrap().as_str()));

    let found = cgroups.list_pods().await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].pod_uid.as_str(), &found[0].path), ("u1", &pod.path));

    pod.memory_max = None;
    cgroups.ensure_pod(&pod).await.unwrap();
    assert_ne!(value("memory.limit_in_bytes", "memory.max").unwrap(), "67108864");

    // One process in a container's cgroup below the pod's, in every hierarchy.
    let mut sleeper = Sleeper::start();
    for dir in &dirs {
        let container = dir.join("container");
        fs::create_dir(&container).unwrap();
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Some(inherited) = read(dir, file) {
                fs::write(container.join(file), inherited).unwrap();
            }
        }
        fs::write(container.join("cgroup.procs"), sleeper.0.id().to_string()).unwrap();
    }
    cgroups.remove_pod(&pod.path).await.unwrap();
    assert!(sleeper.has_ended());
    assert!(CgroupRoot::dirs(&pod.path).is_empty());
    assert!(cgroups.list_pods().await.unwrap().is_empty());
    cgroups.remove_pod(&pod.path).await.unwrap();
}

fn objects() -> Arc<Objects> {
    Arc::new(Objects { has_secrets: true })
}

/// An API server that answers token requests only.
fn token_server() -> Client {
    let service = tower::service_fn(|request: http::Request<kube::client::Body>| async move {
        assert_eq!(request.uri().path(), "/api/v1/namespaces/ns/serviceaccounts/robot/token");
        let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
        let answer = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"audiences": []}, "status": {"token": "to.k.en", "expirationTimestamp": expires},
        });
        let body = kube::client::Body::from(answer.to_string().into_bytes());
        Ok::<_, io::Error>(http::Response::builder().status(201).body(body).unwrap())
    });
    Client::new(service, "default")
}

async fn mount(volumes: &Volumes) -> MountedVolumes {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "ns", "uid": "u1", "labels": {"app": "web"}},
        "spec": {
            "serviceAccountName": "robot",
            "securityContext": {"fsGroup": 4242, "runAsUser": 4000},
            "containers": [{"name": "c"}],
            "volumes": [
                {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "disk", "emptyDir": {}},
                {"name": "secret", "secret": {"secretName": "s"}},
                {"name": "access", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
                    {"configMap": {"name": "kube-root-ca.crt", "optional": true}},
                    {"downwardAPI": {"items": [
                        {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}},
                        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
                    ]}},
                ]}},
            ],
        },
    }))
    .unwrap();
    volumes.mount_all(&pod, &VolumeContext::default()).await.unwrap()
}

fn is_tmpfs(path: &Path) -> bool {
    statfs(path).unwrap().filesystem_type() == TMPFS_MAGIC
}

fn owner_and_mode(path: &Path) -> (u32, u32, u32) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.uid(), metadata.gid(), metadata.permissions().mode() & 0o7777)
}

#[tokio::test]
async fn volumes_are_mounted_owned_and_torn_down() {
    let dir = RootDir::new();
    let volumes = Volumes::new(&dir.path(), objects(), token_server());
    let mounted = mount(&volumes).await;
    let path = |name: &str| mounted.volumes[name].path.clone();

    assert!(is_tmpfs(&path("memory")) && is_tmpfs(&path("secret")) && is_tmpfs(&path("access")));
    let too_much = fs::write(path("memory").join("big"), vec![0; 2 << 20]).unwrap_err();
    assert_eq!(too_much.kind(), io::ErrorKind::StorageFull);
    fs::remove_file(path("memory").join("big")).unwrap();
    assert_eq!(owner_and_mode(&path("disk")).1, 4242);
    assert_eq!(owner_and_mode(&path("disk")).2 & 0o2770, 0o2770);

    let secret = path("secret").join("password");
    assert_eq!(fs::read_to_string(&secret).unwrap(), "s3cret");
    assert_eq!(owner_and_mode(&secret), (0, 4242, 0o644));
    let token = path("access").join("token");
    assert_eq!(fs::read_to_string(&token).unwrap(), "to.k.en");
    assert_eq!(owner_and_mode(&token), (4000, 4242, 0o640));
    assert_eq!(fs::read_to_string(path("access").join("namespace")).unwrap(), "ns");
    assert_eq!(fs::read_to_string(path("access").join("labels")).unwrap(), "app=\"web\"");
    let lifetime = mounted.refresh_at.unwrap().duration_since(jiff::Timestamp::now());
    assert!((2700..=2880).contains(&lifetime.as_secs()), "{lifetime}");

    // Again, as after a restart: nothing is mounted twice and the content stays.
    fs::write(path("memory").join("kept"), "x").unwrap();
    let count = mounts_below(&dir.path()).len();
    let restarted = Volumes::new(&dir.path(), objects(), token_server());
    mount(&restarted).await;
    assert_eq!((mounts_below(&dir.path()).len(), count), (3, 3));
    assert!(path("memory").join("kept").exists());

    restarted.teardown("u1").await.unwrap();
    assert_eq!(mounts_below(&dir.path()), Vec::<PathBuf>::new());
    assert!(restarted.on_disk().await.unwrap().is_empty());
}
