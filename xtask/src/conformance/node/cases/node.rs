//! The node's own object, its lease, and the events about pods.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same};
use super::super::board::Kind;
use super::super::context::T;
use super::super::live::condition;
use super::resources::{bytes, milli};

pub(super) fn cases() -> Vec<Case<T>> {
    let (node, lease, events) = ("Node", "NodeLease", "Events");
    vec![
        case(node, "its conditions are told, and good", conditions),
        case(node, "capacity and allocatable are told, the second not above the first", capacity),
        case(node, "its addresses and its name are told", addresses),
        case(node, "kernel, system, kubelet and runtime are told", info),
        case(node, "the port of the kubelet API is told", port),
        case(node, "its labels name system, architecture and host", labels),
        case(node, "images are told with their names and sizes", images),
        case(node, "runtime handlers are told", handlers),
        case(node, "it says that it declares what it can do", features),
        case(lease, "the lease names the node, and belongs to it", lease_owner),
        case(lease, "the lease is renewed before it ends", lease_renewed),
        case(events, "a pod's start is told: Pulled, Created, Started", start),
        case(events, "a pod's end is told: Killing", killing),
        case(events, "an event names its source, its node and its container", source),
        case(events, "equal events are counted", counted),
    ]
}

async fn fresh(t: &T) -> Result<Value> {
    t.api().get(&format!("/api/v1/nodes/{}", t.node())).await
}

async fn conditions(t: T) -> Result<()> {
    let node = fresh(&t).await?;
    for (kind, status, reason) in [
        ("Ready", "True", "KubeletReady"),
        ("MemoryPressure", "False", "KubeletHasSufficientMemory"),
        ("DiskPressure", "False", "KubeletHasNoDiskPressure"),
        ("PIDPressure", "False", "KubeletHasSufficientPID"),
    ] {
        let found = condition(&node, kind);
        same(kind, &found["status"], status)?;
        same(&format!("{kind}'s reason"), &found["reason"], reason)?;
        for time in ["lastHeartbeatTime", "lastTransitionTime"] {
            ensure!(found[time].is_string(), "{kind} has no {time}: {found}");
        }
    }
    Ok(())
}

async fn capacity(t: T) -> Result<()> {
    let node = fresh(&t).await?;
    let text = |list: &str, name: &str| node["status"][list][name].as_str().unwrap_or_default().to_owned();
    for name in ["cpu", "memory", "ephemeral-storage", "pods"] {
        let amount =
            |list: &str| if name == "cpu" { milli(&text(list, name)) } else { bytes(&text(list, name)) };
        let (capacity, allocatable) = (amount("capacity"), amount("allocatable"));
        ensure!(capacity > 0 && allocatable > 0, "{name}: capacity {capacity}, allocatable {allocatable}");
        ensure!(allocatable <= capacity, "{name}: allocatable {allocatable} above the capacity {capacity}");
    }
    Ok(())
}

async fn addresses(t: T) -> Result<()> {
    let node = fresh(&t).await?;
    t.node_address()?;
    let mut all = node["status"]["addresses"].as_array().into_iter().flatten();
    ensure!(all.any(|address| address["type"] == "Hostname"), "no Hostname: {}", node["status"]["addresses"]);
    Ok(())
}

async fn info(t: T) -> Result<()> {
    let node = fresh(&t).await?;
    let info = &node["status"]["nodeInfo"];
    for name in [
        "machineID",
        "bootID",
        "kernelVersion",
        "osImage",
        "containerRuntimeVersion",
        "kubeletVersion",
        "operatingSystem",
        "architecture",
    ] {
        ensure!(info[name].as_str().is_some_and(|text| !text.is_empty()), "no {name}: {info}");
    }
    same("operatingSystem", &info["operatingSystem"], "linux")?;
    holds("containerRuntimeVersion", info["containerRuntimeVersion"].as_str().unwrap_or_default(), "://")?;
    let kernel = t.output(t.pod("uname -r; cat /proc/sys/kernel/random/boot_id")).await?;
    let wanted =
        [&info["kernelVersion"], &info["bootID"]].map(|text| text.as_str().unwrap_or_default().to_owned());
    same("kernel and boot", kernel.lines().map(str::to_owned).collect::<Vec<_>>(), wanted.to_vec())
}

async fn port(t: T) -> Result<()> {
    let node = fresh(&t).await?;
    let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64();
    ensure!(port.is_some_and(|port| port > 0), "the port is {port:?}");
    Ok(())
}

async fn labels(t: T) -> Result<()> {
    same("kubernetes.io/os", t.node_label("kubernetes.io/os"), "linux")?;
    let architecture = &t.suite().node_object["status"]["nodeInfo"]["architecture"];
    same(
        "kubernetes.io/arch",
        t.node_label("kubernetes.io/arch"),
        architecture.as_str().unwrap_or_default(),
    )?;
    ensure!(!t.node_label("kubernetes.io/hostname").is_empty(), "no label kubernetes.io/hostname");
    Ok(())
}

async fn images(t: T) -> Result<()> {
    t.output(t.pod("true")).await?;
    let last = t.suite().image.rsplit('/').next().unwrap_or_default().to_owned();
    let name = last.split(['@', ':']).next().unwrap_or_default().to_owned();
    let path = format!("/api/v1/nodes/{}", t.node());
    // The node tells its images now and then, not at once.
    let told = poll(&t, Duration::from_secs(5), &path, |node| {
        let mut all = node["status"]["images"].as_array().into_iter().flatten();
        let named = |image: &&Value| {
            image["names"].as_array().is_some_and(|names| {
                names.iter().any(|known| known.as_str().is_some_and(|known| known.contains(&name)))
            })
        };
        all.find(named).cloned()
    });
    let image = told.await.context("the everyday image is not among the node's")?;
    ensure!(image["sizeBytes"].as_u64().is_some_and(|size| size > 0), "no size: {image}");
    Ok(())
}

/// Asks for an object every `pause` until `look` finds something in it: nodes and leases are not on the board.
async fn poll<V>(t: &T, pause: Duration, path: &str, look: impl Fn(&Value) -> Option<V>) -> Result<V> {
    let end = tokio::time::Instant::now() + t.suite().limit;
    loop {
        let object = t.api().get(path).await?;
        if let Some(found) = look(&object) {
            return Ok(found);
        }
        ensure!(tokio::time::Instant::now() < end, "not within {} s", t.suite().limit.as_secs());
        tokio::time::sleep(pause).await;
    }
}

async fn handlers(t: T) -> Result<()> {
    let node = fresh(&t).await?;
    let handlers = node["status"]["runtimeHandlers"].as_array().map(Vec::len);
    ensure!(handlers.is_some_and(|count| count > 0), "no runtimeHandlers");
    Ok(())
}

async fn features(t: T) -> Result<()> {
    let node = fresh(&t).await?;
    let told = &node["status"]["features"]["supplementalGroupsPolicy"];
    ensure!(told.is_boolean() || told.is_null(), "supplementalGroupsPolicy is {told}");
    ensure!(
        node["status"]["features"].is_object() || node["status"]["runtimeHandlers"].is_array(),
        "no features"
    );
    Ok(())
}

fn lease_path(t: &T) -> String {
    format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{}", t.node())
}

async fn lease_owner(t: T) -> Result<()> {
    let lease = t.api().get(&lease_path(&t)).await?;
    same("the holder", &lease["spec"]["holderIdentity"], t.node())?;
    let owner = &lease["metadata"]["ownerReferences"][0];
    same("the owner's kind", &owner["kind"], "Node")?;
    same("the owner", &owner["uid"], &t.suite().node_object["metadata"]["uid"])?;
    ensure!(lease["spec"]["leaseDurationSeconds"].as_u64().is_some_and(|seconds| seconds > 0), "no duration");
    Ok(())
}

async fn lease_renewed(t: T) -> Result<()> {
    let first = t.api().get(&lease_path(&t)).await?["spec"]["renewTime"].clone();
    ensure!(first.is_string(), "no renewTime");
    poll(&t, Duration::from_secs(1), &lease_path(&t), |lease| {
        (lease["spec"]["renewTime"] != first).then_some(())
    })
    .await
}

async fn start(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    live.event("Pulled", &format!("Container image \"{}\"", t.suite().image)).await?;
    live.event("Created", "main").await?;
    live.event("Started", "main").await.map(drop)
}

async fn killing(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    live.delete(5).await?;
    live.event("Killing", "Stopping container main").await.map(drop)
}

async fn source(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let event = live.event("Started", "main").await?;
    let about = &event["involvedObject"];
    same("the kind", &about["kind"], "Pod")?;
    same("the name", &about["name"], live.name.as_str())?;
    same("the field", &about["fieldPath"], "spec.containers{main}")?;
    same("the type", &event["type"], "Normal")?;
    same("the source", &event["source"]["component"], "kubelet")?;
    same("the host", &event["source"]["host"], t.node())?;
    ensure!(event["firstTimestamp"].is_string() && event["lastTimestamp"].is_string(), "no times: {event}");
    Ok(())
}

async fn counted(t: T) -> Result<()> {
    let probe = json!({"readinessProbe": {"exec": {"command": ["false"]}, "periodSeconds": 1}});
    let live = t.run(t.idle().main(probe)).await?;
    live.event("Unhealthy", "Readiness probe failed").await?;
    let (suite, uid) = (t.suite(), live.uid.clone());
    let namespace = live.namespace.clone();
    let waited = suite.board.wait("an event with a count of two", suite.limit, |seen| {
        let of =
            |event: &&Value| event["involvedObject"]["uid"] == uid.as_str() && event["reason"] == "Unhealthy";
        let count = seen.all(Kind::Event, &namespace).find(of).map(|event| event["count"].clone());
        match count.as_ref().and_then(Value::as_u64) {
            Some(count) if count >= 2 => Ok(()),
            _ => Err(format!("{count:?}")),
        }
    });
    waited.await
}
