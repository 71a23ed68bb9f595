//! Pods: phases, conditions, generations, deletion, deadlines.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same, skip};
use super::super::context::T;
use super::super::live::{condition, container};

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Pods";
    vec![
        case(group, "the phase goes from Pending over Running to Succeeded", phases),
        case(group, "a container that fails makes the phase Failed", fails),
        case(group, "addresses of pod and node, the start and the QoS class are told", facts),
        case(group, "all conditions of a running pod are True", conditions),
        case(group, "conditions of a completed pod say PodCompleted", completed),
        case(group, "ContainersReady names the containers that are not", not_ready),
        case(group, "a readiness gate holds Ready back until its condition is True", readiness_gate),
        case(group, "observedGeneration of status and conditions follows the generation", generation),
        case(group, "ten containers of a pod run beside each other", ten_containers),
        case(group, "labels and annotations change without a restart", labels_change),
        case(group, "another image restarts the container in place", image_change),
        case(group, "deletion sends SIGTERM and waits for the container", graceful),
        case(group, "what ignores SIGTERM is killed when the grace is over", killed),
        case(group, "a shorter grace in a second deletion counts", shortened),
        case(
            group,
            "deletion without grace removes the object at once, and the name can be used again",
            forced,
        ),
        case(group, "the grace of the deletion is in the object", grace_told),
        case(group, "a pod whose image never comes can be deleted", delete_pending),
        case(group, "a pod whose init container runs can be deleted", delete_in_init),
        case(group, "a finalizer keeps the object after the containers ended", finalizer),
        case(group, "a wrong uid as precondition refuses the deletion", precondition),
        case(group, "activeDeadlineSeconds ends the pod with reason DeadlineExceeded", deadline),
        case(group, "activeDeadlineSeconds can be set while it runs", deadline_later),
        case(group, "an eviction through the API deletes gracefully", evicted),
        case(group, "what a pod's spec says cannot change later", immutable),
    ]
}

async fn phases(t: T) -> Result<()> {
    let live = t.run(t.pod("sleep 1")).await?;
    live.phase("Succeeded").await?;
    let mut phases: Vec<String> =
        live.history().iter().filter_map(|pod| pod["status"]["phase"].as_str().map(str::to_owned)).collect();
    phases.dedup();
    same("the phases", phases, vec!["Pending", "Running", "Succeeded"])
}

async fn fails(t: T) -> Result<()> {
    let pod = t.run(t.pod("exit 1").beside("other", "true", json!({}))).await?.ended().await?;
    same("the phase", &pod["status"]["phase"], "Failed")?;
    same("the other's exit code", &container(&pod, "other")["state"]["terminated"]["exitCode"], 0)
}

async fn facts(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let pod = live.until("its address", |pod| pod["status"]["podIP"].is_string()).await?;
    let status = &pod["status"];
    same("podIPs", &status["podIPs"][0]["ip"], &status["podIP"])?;
    same("hostIPs", &status["hostIPs"][0]["ip"], &status["hostIP"])?;
    same("hostIP", &status["hostIP"], t.node_address()?.to_string().as_str())?;
    same("qosClass", &status["qosClass"], "BestEffort")?;
    ensure!(status["startTime"].is_string(), "no startTime: {status}");
    let main = container(&pod, "main");
    ensure!(main["containerID"].as_str().is_some_and(|id| id.contains("://")), "containerID: {main}");
    ensure!(main["imageID"].as_str().is_some_and(|id| !id.is_empty()), "imageID: {main}");
    same("started", &main["started"], true)?;
    same("restartCount", &main["restartCount"], 0)
}

async fn conditions(t: T) -> Result<()> {
    let pod = t.ready(t.idle()).await?.ready().await?;
    for kind in ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"] {
        let found = condition(&pod, kind);
        same(kind, &found["status"], "True")?;
        ensure!(found["lastTransitionTime"].is_string(), "{kind} has no time: {found}");
    }
    Ok(())
}

async fn completed(t: T) -> Result<()> {
    let live = t.run(t.pod("true")).await?;
    let pod = live
        .until("the sandbox stopped", |pod| {
            pod["status"]["phase"] == "Succeeded"
                && condition(pod, "PodReadyToStartContainers")["status"] == "False"
        })
        .await?;
    for (kind, status) in [("Initialized", "True"), ("Ready", "False"), ("ContainersReady", "False")] {
        let found = condition(&pod, kind);
        same(kind, &found["status"], status)?;
        same(&format!("{kind}'s reason"), &found["reason"], "PodCompleted")?;
    }
    Ok(())
}

async fn not_ready(t: T) -> Result<()> {
    let probe = json!({"readinessProbe": {"exec": {"command": ["false"]}, "periodSeconds": 1}});
    let live = t.run(t.idle().beside("slow", "sleep 3600", probe)).await?;
    let pod = live.until("running", |pod| container(pod, "slow")["state"]["running"].is_object()).await?;
    for kind in ["Ready", "ContainersReady"] {
        let found = condition(&pod, kind);
        same(kind, &found["status"], "False")?;
        same("the reason", &found["reason"], "ContainersNotReady")?;
        let pod = live.until("only slow is not ready", |pod| {
            condition(pod, kind)["message"] == "containers with unready status: [slow]"
        });
        pod.await?;
    }
    Ok(())
}

async fn readiness_gate(t: T) -> Result<()> {
    let live =
        t.run(t.idle().spec(json!({"readinessGates": [{"conditionType": "example.com/gate"}]}))).await?;
    let pod = live
        .until("its containers ready", |pod| condition(pod, "ContainersReady")["status"] == "True")
        .await?;
    same("Ready", &condition(&pod, "Ready")["status"], "False")?;
    same("the reason", &condition(&pod, "Ready")["reason"], "ReadinessGatesNotReady")?;
    let status =
        |word: &str| json!({"status": {"conditions": [{"type": "example.com/gate", "status": word}]}});
    t.api().patch(&format!("{}/status", live.path()), &status("True")).await?;
    live.ready().await?;
    t.api().patch(&format!("{}/status", live.path()), &status("False")).await?;
    live.until("not ready again", |pod| condition(pod, "Ready")["status"] == "False").await.map(drop)
}

async fn generation(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let first = live.history().pop().unwrap_or_default();
    same("metadata.generation of a new pod", &first["metadata"]["generation"], 1)?;
    let followed = |wanted: u64| {
        move |pod: &Value| {
            pod["status"]["observedGeneration"] == wanted
                && condition(pod, "Ready")["observedGeneration"] == wanted
        }
    };
    live.until("observedGeneration 1", followed(1)).await?;
    let changed = live.patch(json!({"spec": {"activeDeadlineSeconds": 3600}})).await?;
    same("metadata.generation after a change", &changed["metadata"]["generation"], 2)?;
    live.until("observedGeneration 2", followed(2)).await?;
    let labelled = live.patch(json!({"metadata": {"labels": {"a": "b"}}})).await?;
    same("metadata.generation after a label", &labelled["metadata"]["generation"], 2)
}

async fn ten_containers(t: T) -> Result<()> {
    let mut pod = t.idle();
    for number in 2..=10 {
        pod = pod.beside(&format!("c{number}"), "trap 'exit 0' TERM; sleep 3600 & wait", json!({}));
    }
    let ready = t.ready(pod).await?.ready().await?;
    same("statuses", ready["status"]["containerStatuses"].as_array().map(Vec::len), Some(10))
}

async fn labels_change(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let before = container(&live.ready().await?, "main")["containerID"].clone();
    live.patch(json!({"metadata": {"labels": {"color": "blue"}, "annotations": {"note": "x"}}})).await?;
    let pod = live.until("the label", |pod| pod["metadata"]["labels"]["color"] == "blue").await?;
    same("the container", &container(&pod, "main")["containerID"], &before)?;
    same("restarts", &container(&pod, "main")["restartCount"], 0)
}

async fn image_change(t: T) -> Result<()> {
    let image = t.suite().image.clone();
    let last = image.rsplit('/').next().unwrap_or(&image);
    if last.contains([':', '@']) {
        return skip(format!("{image} has a tag, so that another name of it cannot be told"));
    }
    let live = t.ready(t.idle().always()).await?;
    let other = format!("{image}:latest");
    live.patch(json!({"spec": {"containers": [{"name": "main", "image": other}]}})).await?;
    live.event("Killing", "Container main definition changed, will be restarted").await?;
    let main = live.restarted("main", 1).await?;
    ensure!(main["lastState"]["terminated"].is_object(), "no last state: {main}");
    live.ready().await.map(drop)
}

async fn graceful(t: T) -> Result<()> {
    let live = t
        .ready(
            t.pod("trap 'echo asked; sleep 1; echo done; exit 0' TERM; echo up; sleep 3600 & wait")
                .spec(json!({"terminationGracePeriodSeconds": 60})),
        )
        .await?;
    let mut log = live.follow("container=main").await?;
    log.until("up\n").await?;
    live.delete(60).await?;
    same("the log", log.rest().await?.as_str(), "up\nasked\ndone\n")?;
    live.gone().await?;
    let last = live.history().pop().unwrap_or_default();
    same("the exit code", &container(&last, "main")["state"]["terminated"]["exitCode"], 0)
}

async fn killed(t: T) -> Result<()> {
    let live = t.ready(t.pod("trap '' TERM; echo up; while true; do sleep 1; done")).await?;
    live.says("up\n").await?;
    let begun = std::time::Instant::now();
    live.delete(2).await?;
    live.gone().await?;
    ensure!(begun.elapsed() >= Duration::from_secs(2), "the grace was not waited for: {:?}", begun.elapsed());
    let last = live.history().pop().unwrap_or_default();
    same("the exit code", &container(&last, "main")["state"]["terminated"]["exitCode"], 137)
}

async fn shortened(t: T) -> Result<()> {
    let live = t.ready(t.pod("trap '' TERM; echo up; while true; do sleep 1; done")).await?;
    live.says("up\n").await?;
    live.delete(600).await?;
    live.until("the deletion", |pod| pod["metadata"]["deletionGracePeriodSeconds"] == 600).await?;
    live.delete(1).await?;
    live.gone().await
}

async fn forced(t: T) -> Result<()> {
    let first = t.ready(t.idle().named("same")).await?;
    first.delete(0).await?;
    let second = t.ready(t.idle().named("same")).await?;
    ensure!(first.uid != second.uid, "the object was not removed");
    let own = second.exec("hostname").await?;
    same("the hostname", own.as_str(), "same")
}

async fn grace_told(t: T) -> Result<()> {
    let live = t.ready(t.idle().spec(json!({"terminationGracePeriodSeconds": 25}))).await?;
    t.api().delete(&live.path(), &json!({})).await?;
    live.gone().await?;
    let told: Vec<Value> = live
        .history()
        .iter()
        .filter(|pod| pod["metadata"]["deletionTimestamp"].is_string())
        .map(|pod| pod["metadata"]["deletionGracePeriodSeconds"].clone())
        .collect();
    same("the first grace", told.first(), Some(&json!(25)))
}

async fn delete_pending(t: T) -> Result<()> {
    let live = t.run(t.idle().main(json!({"image": "127.0.0.1:1/none:v1"}))).await?;
    live.until("waiting", |pod| container(pod, "main")["state"]["waiting"].is_object()).await?;
    live.delete(30).await?;
    live.gone().await
}

async fn delete_in_init(t: T) -> Result<()> {
    let live = t.run(t.idle().init("first", "trap 'exit 0' TERM; sleep 3600 & wait", json!({}))).await?;
    live.until("init runs", |pod| container(pod, "first")["state"]["running"].is_object()).await?;
    live.delete(30).await?;
    live.gone().await?;
    live.never("main was started", |pod| container(pod, "main")["state"]["running"].is_object())
}

async fn finalizer(t: T) -> Result<()> {
    let live = t.ready(t.idle().metadata(json!({"finalizers": ["example.com/keep"]}))).await?;
    live.delete(1).await?;
    let pod = live.until("its end", |pod| container(pod, "main")["state"]["terminated"].is_object()).await?;
    ensure!(pod["metadata"]["deletionTimestamp"].is_string(), "it is not being deleted");
    t.api().merge(&live.path(), &json!({"metadata": {"finalizers": null}})).await?;
    live.gone().await
}

async fn precondition(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let options = json!({"preconditions": {"uid": "00000000-0000-0000-0000-000000000000"}});
    let refused = super::super::api::refusal("the deletion", t.api().delete(&live.path(), &options).await)?;
    same("the code", refused.code, 409)?;
    holds("the message", &refused.message, "UID in precondition")
}

async fn deadline(t: T) -> Result<()> {
    let live = t.run(t.idle().always().spec(json!({"activeDeadlineSeconds": 2}))).await?;
    let pod = live.failed("DeadlineExceeded").await?;
    let message = "Pod was active on the node longer than the specified deadline";
    same("the message", &pod["status"]["message"], message)?;
    live.event("DeadlineExceeded", message).await?;
    live.until("its containers ended", |pod| container(pod, "main")["state"]["terminated"].is_object())
        .await
        .map(drop)
}

async fn deadline_later(t: T) -> Result<()> {
    let live = t.ready(t.idle().always()).await?;
    live.patch(json!({"spec": {"activeDeadlineSeconds": 1}})).await?;
    live.failed("DeadlineExceeded").await.map(drop)
}

async fn evicted(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": {"name": live.name, "namespace": live.namespace}, "deleteOptions": {"gracePeriodSeconds": 5}});
    t.api().post(&format!("{}/eviction", live.path()), &eviction).await?;
    live.gone().await?;
    let last = live.history().pop().unwrap_or_default();
    same("the exit code", &container(&last, "main")["state"]["terminated"]["exitCode"], 0)
}

async fn immutable(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let change = json!({"spec": {"containers": [{"name": "main", "command": ["true"]}]}});
    let refused = super::super::api::refusal("another command", live.patch(change).await)?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "pod updates may not change fields other than")
}
