//! What hangs holds up nobody else: a file system that stops to answer under the pods that use it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::super::super::case::{Case, case, skip};
use super::super::context::T;
use super::super::hanging::Hanging;
use super::super::live::{Live, condition};
use super::kubelet::{at, of_pod};

/// Far more than a pod needs on a busy machine, and less than the file system hangs: for ever.
const SOON: Duration = Duration::from_secs(60);
/// Threads of the node that may wait for one file system: some for each path that is asked about.
const WAITING: usize = 12;

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Stuck volumes";
    vec![
        // It looks at the node's threads.
        case(group, "a file system that hangs holds up only those who use it", volume).serial(),
        case(group, "an emptyDir under a file system that hangs does not stop figures", figures).serial(),
        case(group, "an exec probe that hangs holds up no other pod's", probe),
    ]
}

/// Mounts the file system; skips where that cannot be.
fn hanging(t: &T, point: &Path) -> Result<Hanging> {
    t.need_local()?;
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return skip("needs root and /dev/fuse");
    }
    Hanging::mount(point)
}

/// Waits for something that no watch tells.
async fn eventually(what: &str, holds: impl Fn() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !holds() {
        ensure!(begin.elapsed() < SOON, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Threads of the node's processes that wait in the kernel and cannot be interrupted.
fn waiting_threads() -> usize {
    let entries =
        |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let named = |process: &PathBuf| {
        let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        name.starts_with("keelson-agent") || name.starts_with("keelson-cri")
    };
    let threads = entries("/proc".into()).filter(named).flat_map(|process| entries(process.join("task")));
    let states = threads.filter_map(|thread| std::fs::read_to_string(thread.join("stat")).ok());
    states.filter(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))).count()
}

/// A pod's whole life, and what the kubelet tells meanwhile.
async fn all_else_goes_on(t: &T) -> Result<()> {
    let life = async {
        let check = json!({"exec": {"command": ["true"]}, "periodSeconds": 1});
        let live = t.ready(t.idle().main(json!({"readinessProbe": check, "livenessProbe": check}))).await?;
        super::same("what is said", live.exec("echo here").await?.as_str(), "here")?;
        let measured = of_pod(t, &live).await?;
        ensure!(measured["cpu"]["time"].is_string(), "{measured}");
        for path in ["pods", "runningpods/"] {
            let list = t.api().get(&at(t, path)).await?;
            let mut pods = list["items"].as_array().into_iter().flatten();
            ensure!(pods.any(|pod| pod["metadata"]["name"] == live.name.as_str()), "{path}: not listed");
        }
        let metrics = t.api().text(&at(t, "metrics/cadvisor")).await?;
        ensure!(metrics.contains(&live.namespace), "metrics/cadvisor does not tell of it");
        live.delete(1).await?;
        live.gone().await
    };
    let done = tokio::time::timeout(SOON, life).await;
    done.context("another pod's life takes too long")?.context("another pod")
}

/// Pods that use the file system in all the ways there are.
struct Users {
    /// Its process waits for it.
    reads: Live,
    /// Its probe does.
    probed: Live,
    /// Its container is to start again.
    restarts: Live,
    /// Comes too late.
    late: Live,
    /// Comes too late, and wants a part.
    part: Live,
    /// Comes too late, and its runtime alone looks at the file system.
    whole: Live,
}

async fn volume(t: T) -> Result<()> {
    let point = std::env::temp_dir().join(t.unique("keelson-hanging"));
    let served = hanging(&t, &point)?;
    let users = stop_under(&t, &served).await?;
    users.late.event("FailedMount", "does not answer").await?;
    users.part.event("Failed", "does not answer").await?;
    users.restarts.event("Failed", "answer of its file system").await?;
    let not_ready = |pod: &Value| condition(pod, "Ready")["status"] == "False";
    users.probed.until("a failed probe", not_ready).await?;
    all_else_goes_on(&t).await?;
    let waiting = waiting_threads();
    ensure!(waiting <= WAITING, "{waiting} threads of the node wait for the file system");
    // Whoever has nothing that waits goes at once.
    for live in [&users.late, &users.part, &users.restarts] {
        live.delete(1).await?;
        live.gone().await?;
    }
    users.whole.delete(1).await?;
    // The others cannot.
    for live in [&users.reads, &users.probed] {
        live.delete(1).await?;
        live.until("its deletion", |pod| pod["metadata"]["deletionTimestamp"].is_string()).await?;
    }
    all_else_goes_on(&t).await?;
    ensure!(waiting_threads() <= WAITING, "threads pile up");
    drop(served);
    users.reads.gone().await?;
    users.probed.gone().await?;
    users.whole.gone().await?;
    eventually("no thread waits", || waiting_threads() == 0).await?;
    ensure!(!point.exists(), "something is left");
    Ok(())
}

/// Has pods that run when the file system begins to hang, and such as come later.
async fn stop_under(t: &T, served: &Hanging) -> Result<Users> {
    let path = served.point().to_string_lossy().into_owned();
    let all = || json!({"hostPath": {"path": path}});
    let dir = || json!({"hostPath": {"path": format!("{path}/dir"), "type": "Directory"}});
    let script = "while cat /v/host/file >/dev/null; do sleep 0.1; done; exec sleep 3600";
    let probe =
        json!({"exec": {"command": ["cat", "/v/host/file"]}, "periodSeconds": 1, "failureThreshold": 1});
    let reads = t.ready(t.pod(script).volume("host", all())).await?;
    let probed = t.ready(t.idle().volume("host", all()).main(json!({"readinessProbe": probe}))).await?;
    let restarts = t.ready(t.idle().always().volume("host", dir())).await?;
    served.hang();
    eventually("somebody waits", || served.unanswered() >= 2).await?;
    restarts.end_main().await?;
    let late = t.run(t.idle().volume("host", dir())).await?;
    let mount = json!({"mountPath": "/v/host", "subPath": "dir"});
    let part = t.run(t.idle().volume_at("host", all(), mount)).await?;
    let whole = t.run(t.idle().volume("host", all())).await?;
    Ok(Users { reads, probed, restarts, late, part, whole })
}

async fn figures(t: T) -> Result<()> {
    let Some(data) = t.suite().manifests.as_ref().and_then(|manifests| manifests.parent()) else {
        return skip("this machine is not the node");
    };
    let scratch = json!({"emptyDir": {}});
    let live = t.ready(t.idle().volume("scratch", scratch.clone())).await?;
    let volume = data.join("kubelet/pods").join(&live.uid).join("volumes/kubernetes.io~empty-dir/scratch");
    if !volume.is_dir() {
        return skip(format!("the node has no {}", volume.display()));
    }
    // As a container can do it whose mounts the node sees.
    let (over, below) = (hanging(&t, &volume)?, hanging(&t, &volume.with_file_name("scratch-2"))?);
    over.hang();
    below.hang();
    let other = t.ready(t.idle().volume("scratch", scratch)).await?;
    let begin = Instant::now();
    loop {
        let told = of_pod(&t, &other).await?;
        let mut volumes = told["volume"].as_array().into_iter().flatten();
        if volumes.any(|volume| volume["name"] == "scratch" && volume["capacityBytes"].is_u64()) {
            break;
        }
        ensure!(begin.elapsed() < SOON, "the other pod's volume has no figures: {told}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    all_else_goes_on(&t).await?;
    // Its directory goes without the file systems being asked.
    live.delete(1).await?;
    live.gone().await?;
    eventually("no thread waits", || waiting_threads() == 0).await
}

async fn probe(t: T) -> Result<()> {
    let hangs = json!({"exec": {"command": ["sleep", "1000"]}, "periodSeconds": 1, "failureThreshold": 1});
    let stuck = t.run(t.idle().main(json!({"readinessProbe": hangs}))).await?;
    stuck.event("Unhealthy", "timed out").await?;
    all_else_goes_on(&t).await?;
    stuck.never("it was ready", |pod| condition(pod, "Ready")["status"] == "True")
}
