//! NFS volumes from a real server: mounted, found again, and given up when the server is gone.
//!
//! Needs root, and a machine on which an NFS server may be started and stopped: the guest of `vm-debian`.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

mod mounts;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use keelson_agent::contracts::{VolumeContext, VolumeManager};
use keelson_agent::host::volumes::Volumes;
use kube::Client;
use mounts::{Objects, RootDir, mounts_below};
use serde_json::{Value, json};

/// Far more than what does not wait for a server takes on an emulated processor, and less than NFS waits for one: for ever.
const SOON: Duration = Duration::from_secs(120);

/// The machine's NFS server with one directory, which is stopped and taken back when dropped.
struct Server {
    export: PathBuf,
}

impl Server {
    fn start() -> Self {
        // Not in memory: a tmpfs has no handles that outlive a restart.
        let export = PathBuf::from(format!("/srv/keelson-nfs-{}", std::process::id()));
        fs::create_dir_all(&export).unwrap();
        let line = format!("{} *(rw,no_root_squash,insecure,no_subtree_check)\n", export.display());
        fs::create_dir_all("/etc/exports.d").unwrap();
        fs::write(exports(), line).unwrap();
        let server = Self { export };
        run("systemctl", &["restart", "nfs-server"]);
        run("exportfs", &["-ra"]);
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        fs::remove_file(exports()).ok();
        fs::remove_dir_all(&self.export).ok();
        Command::new("systemctl").args(["stop", "nfs-server"]).status().ok();
    }
}

fn exports() -> PathBuf {
    PathBuf::from(format!("/etc/exports.d/keelson-{}.exports", std::process::id()))
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {told}", arguments.join(" "));
}

fn volumes(root: &RootDir) -> Volumes {
    let service = tower::service_fn(|_request: http::Request<kube::client::Body>| async {
        Err::<http::Response<kube::client::Body>, _>(io::Error::other("no API server in this test"))
    });
    let objects = Arc::new(Objects { has_secrets: false });
    Volumes::new(&root.path(), objects, Client::new(service, "default"))
}

async fn mount(volumes: &Volumes, uid: &str, source: Value) -> Result<PathBuf, String> {
    let mut volume = json!({"name": "v"});
    for (key, value) in source.as_object().unwrap() {
        volume[key] = value.clone();
    }
    let pod = mounts::pod(uid, json!({"volumes": [volume]}));
    let context = VolumeContext::default();
    let done = tokio::time::timeout(SOON, volumes.mount_all(&pod, &context)).await.expect("ends in time");
    done.map(|mounted| mounted.volumes["v"].path.clone()).map_err(|error| error.to_string())
}

/// Whether somebody who lists the directory is kept waiting.
fn is_silent(path: &Path) -> bool {
    let listed = Command::new("timeout").args(["-s", "KILL", "5", "ls"]).arg(path).output().unwrap();
    !listed.status.success()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_dies_holds_nobody_but_those_who_use_it() {
    if std::env::var("KEELSON_VM").as_deref() != Ok("debian") {
        eprintln!("skipped: starts and stops the machine's NFS server; run by `cargo xtask test vm-debian`");
        return;
    }
    let server = Server::start();
    fs::write(server.export.join("file"), "there").unwrap();
    let root = RootDir::new();
    let nfs = json!({"nfs": {"server": "127.0.0.1", "path": server.export}});
    let first = volumes(&root);
    let path = mount(&first, "user", nfs.clone()).await.unwrap();
    assert_eq!(path, root.path().join("pods/user/volumes/kubernetes.io~nfs/v"));
    assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "there");
    fs::write(path.join("written"), "by the pod").unwrap();
    assert_eq!(fs::read_to_string(server.export.join("written")).unwrap(), "by the pod");
    let read_only = json!({"nfs": {"server": "127.0.0.1", "path": server.export, "readOnly": true}});
    let other = mount(&first, "reader", read_only).await.unwrap();
    assert!(fs::write(other.join("denied"), "").is_err());
    first.teardown("reader").await.unwrap();
    assert!(!other.exists());

    // A new agent finds what is mounted.
    let second = volumes(&root);
    assert_eq!(mount(&second, "user", nfs.clone()).await.unwrap(), path);
    assert_eq!(mounts_below(&root.path()).len(), 1);

    run("systemctl", &["stop", "nfs-server"]);
    assert!(is_silent(&path), "nobody serves it");
    // The pod that has it is looked at again, another one gets what it wants, and one that wants the same is told why not.
    assert_eq!(mount(&second, "user", nfs.clone()).await.unwrap(), path);
    let (late, quick) =
        futures::join!(mount(&second, "late", nfs), mount(&second, "quick", json!({"emptyDir": {}})));
    assert!(quick.unwrap().is_dir());
    assert!(late.unwrap_err().starts_with("MountVolume.SetUp failed for volume \"v\" : mount failed"));
    for uid in ["late", "user", "quick"] {
        tokio::time::timeout(SOON, second.teardown(uid)).await.expect("ends in time").unwrap();
    }
    assert_eq!(mounts_below(&root.path()), Vec::<PathBuf>::new());
    assert!(second.on_disk().await.unwrap().is_empty());
    drop(server);
}
