//! Ephemeral containers.

use anyhow::{Result, ensure};
use serde_json::json;

use super::super::super::case::{Case, case, holds, same};
use super::super::api::refusal;
use super::super::context::{IDLE, T};
use super::super::live::{Live, container};

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Ephemeral Containers";
    vec![
        case(group, "one that is added to a running pod runs, and its log can be read", runs),
        case(group, "it sees the processes of the container it is for", target),
        case(group, "it is not started again when it ends", not_restarted),
        case(group, "commands can be run in it", exec),
        case(group, "the pod's readiness and its other containers are left alone", leaves_others),
        case(group, "it cannot be changed or taken away", cannot_go),
        case(group, "a new pod cannot have one", not_at_first),
    ]
}

async fn add(t: &T, live: &Live, name: &str, script: &str, target: Option<&str>) -> Result<()> {
    let mut debugger = json!({"name": name, "image": t.suite().image, "imagePullPolicy": "IfNotPresent",
        "command": ["/bin/sh", "-c", script]});
    if let Some(target) = target {
        debugger["targetContainerName"] = target.into();
    }
    let patch = json!({"spec": {"ephemeralContainers": [debugger]}});
    t.api().patch(&format!("{}/ephemeralcontainers", live.path()), &patch).await.map(drop)
}

async fn runs(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    add(&t, &live, "debugger", "echo looked", None).await?;
    let state = live.terminated("debugger").await?;
    same("the exit code", &state["exitCode"], 0)?;
    same("the log", live.log("container=debugger").await?.as_str(), "looked\n")
}

async fn target(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    add(&t, &live, "debugger", "cat /proc/1/cmdline | tr '\\0' ' '", Some("main")).await?;
    live.terminated("debugger").await?;
    holds("the first process", &live.log("container=debugger").await?, IDLE)
}

async fn not_restarted(t: T) -> Result<()> {
    let live = t.ready(t.idle().always()).await?;
    add(&t, &live, "debugger", "exit 7", None).await?;
    let state = live.terminated("debugger").await?;
    same("the exit code", &state["exitCode"], 7)?;
    // Another one is seen to run after it: the pod was looked at again.
    add(&t, &live, "second", "true", None).await?;
    live.terminated("second").await?;
    let pod = live.history().pop().unwrap_or_default();
    same("restarts", &container(&pod, "debugger")["restartCount"], 0)?;
    ensure!(container(&pod, "debugger")["state"]["terminated"].is_object(), "it was started again: {pod}");
    Ok(())
}

async fn exec(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    add(&t, &live, "debugger", IDLE, None).await?;
    live.until("it runs", |pod| container(pod, "debugger")["state"]["running"].is_object()).await?;
    same("the output", live.exec_in("debugger", "echo inside").await?.text().as_str(), "inside\n")
}

async fn leaves_others(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let before = container(&live.ready().await?, "main")["containerID"].clone();
    add(&t, &live, "debugger", "exit 1", None).await?;
    live.terminated("debugger").await?;
    let pod = live.ready().await?;
    same("the container", &container(&pod, "main")["containerID"], &before)?;
    same("the phase", &pod["status"]["phase"], "Running")
}

async fn cannot_go(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    add(&t, &live, "debugger", "true", None).await?;
    let path = format!("{}/ephemeralcontainers", live.path());
    let gone = t.api().merge(&path, &json!({"spec": {"ephemeralContainers": []}})).await;
    let refused = refusal("taking it away", gone)?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "ephemeralContainers")
}

async fn not_at_first(t: T) -> Result<()> {
    let one = json!([{"name": "debugger", "image": t.suite().image, "terminationMessagePolicy": "File"}]);
    let refused = t.refused(t.idle().spec(json!({"ephemeralContainers": one}))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "spec.ephemeralContainers")
}
