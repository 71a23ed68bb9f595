//! Init containers and sidecars.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, same};
use super::super::context::{IDLE, T};
use super::super::live::{Live, condition, container};
use super::super::pod::Pod;

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "InitContainer";
    let sidecars = "Restartable Init Containers";
    vec![
        case(group, "init containers run one after the other before the others", in_order),
        case(group, "the others wait with PodInitializing", others_wait),
        case(group, "with restartPolicy Never an init container that fails fails the pod", fails_pod),
        case(group, "with restartPolicy Always an init container that fails is started again", retried),
        case(
            group,
            "with restartPolicy OnFailure init containers are retried until they succeed",
            on_failure,
        ),
        case(group, "Initialized is False until the last has ended", initialized),
        case(sidecars, "a sidecar runs beside the main containers and before them", beside),
        case(
            sidecars,
            "the next init container waits until a sidecar's startup probe succeeds",
            waits_for_started,
        ),
        case(sidecars, "a sidecar that ends is started again, whatever the pod's policy", sidecar_restarts),
        case(sidecars, "a sidecar does not keep the pod from ending", does_not_hold),
        case(sidecars, "sidecars end after the main containers, the last first", reverse_order),
        case(sidecars, "a sidecar's readiness counts for the pod", sidecar_readiness),
        case(sidecars, "a sidecar's preStop hook runs when the main containers have ended", sidecar_pre_stop),
    ]
}

fn shared(pod: Pod) -> Pod {
    pod.volume("shared", json!({"emptyDir": {}}))
}

fn mount() -> Value {
    json!({"volumeMounts": [{"name": "shared", "mountPath": "/v/shared"}]})
}

fn sidecar(more: Value) -> Value {
    let mut all = mount();
    all["restartPolicy"] = "Always".into();
    if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
        all.extend(more);
    }
    all
}

async fn in_order(t: T) -> Result<()> {
    let pod = shared(t.pod("echo main >> /v/shared/order; cat /v/shared/order"))
        .init("first", "sleep 1; echo first >> /v/shared/order", mount())
        .init("second", "echo second >> /v/shared/order", mount());
    let output = t.output(pod).await?;
    same("the order", output.as_str(), "first\nsecond\nmain\n")
}

async fn others_wait(t: T) -> Result<()> {
    let live = t.run(t.idle().init("first", IDLE, json!({})).init("second", "true", json!({}))).await?;
    let pod = live.until("init runs", |pod| container(pod, "first")["state"]["running"].is_object()).await?;
    for name in ["second", "main"] {
        same(name, &container(&pod, name)["state"]["waiting"]["reason"], "PodInitializing")?;
    }
    same("the phase", &pod["status"]["phase"], "Pending")
}

async fn fails_pod(t: T) -> Result<()> {
    let live =
        t.run(t.pod("true").init("first", "exit 1", json!({})).init("second", "true", json!({}))).await?;
    let pod = live.phase("Failed").await?;
    same("the exit code", &container(&pod, "first")["state"]["terminated"]["exitCode"], 1)?;
    let ran = |pod: &Value, name: &str| !container(pod, name)["state"]["waiting"].is_object();
    live.never("what comes after ran", |pod| {
        ["second", "main"].iter().any(|name| container(pod, name).is_object() && ran(pod, name))
    })?;
    same("Initialized", &condition(&pod, "Initialized")["status"], "False")?;
    same("the reason", &condition(&pod, "Initialized")["reason"], "ContainersNotInitialized")
}

async fn retried(t: T) -> Result<()> {
    let live = t.run(t.idle().always().init("first", "exit 1", json!({}))).await?;
    let first = live.restarted("first", 1).await?;
    same("the last exit code", &first["lastState"]["terminated"]["exitCode"], 1)?;
    live.waiting("first", "CrashLoopBackOff").await?;
    live.never("main ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

async fn on_failure(t: T) -> Result<()> {
    let script = "test -e /v/shared/again && exit 0; touch /v/shared/again; exit 1";
    let pod =
        shared(t.pod("true")).spec(json!({"restartPolicy": "OnFailure"})).init("first", script, mount());
    let pod = t.run(pod).await?.phase("Succeeded").await?;
    same("restarts", &container(&pod, "first")["restartCount"], 1)
}

async fn initialized(t: T) -> Result<()> {
    let script = "until test -e /v/shared/go; do sleep 0.1; done";
    let live = t.run(shared(t.idle()).init("first", script, mount())).await?;
    let pod = live.until("init runs", |pod| container(pod, "first")["state"]["running"].is_object()).await?;
    same("Initialized", &condition(&pod, "Initialized")["status"], "False")?;
    same(
        "the message",
        &condition(&pod, "Initialized")["message"],
        "containers with incomplete status: [first]",
    )?;
    live.exec_in("first", "touch /v/shared/go").await?;
    let pod = live.ready().await?;
    same("Initialized", &condition(&pod, "Initialized")["status"], "True")?;
    same("ready of the init container", &container(&pod, "first")["ready"], true)
}

async fn beside(t: T) -> Result<()> {
    let side = "echo up > /v/shared/side; trap 'exit 0' TERM; sleep 3600 & wait";
    let main = "cat /v/shared/side; trap 'exit 0' TERM; sleep 3600 & wait";
    let probe =
        json!({"startupProbe": {"exec": {"command": ["test", "-e", "/v/shared/side"]}, "periodSeconds": 1}});
    let live = t.ready(shared(t.pod(main)).init("side", side, sidecar(probe))).await?;
    let pod = live.ready().await?;
    ensure!(container(&pod, "side")["state"]["running"].is_object(), "the sidecar does not run: {pod}");
    same("started", &container(&pod, "side")["started"], true)?;
    same("the log", live.says("up\n").await?.as_str(), "up\n")
}

async fn waits_for_started(t: T) -> Result<()> {
    let probe = json!({"startupProbe": {"exec": {"command": ["test", "-e", "/v/shared/go"]}, "periodSeconds": 1, "failureThreshold": 600}});
    let pod = shared(t.idle()).init("side", IDLE, sidecar(probe)).init("next", "true", json!({}));
    let live = t.run(pod).await?;
    let pod =
        live.until("the sidecar runs", |pod| container(pod, "side")["state"]["running"].is_object()).await?;
    same("started", &container(&pod, "side")["started"], false)?;
    same("the next", &container(&pod, "next")["state"]["waiting"]["reason"], "PodInitializing")?;
    live.exec_in("side", "touch /v/shared/go").await?;
    live.ready().await.map(drop)
}

async fn sidecar_restarts(t: T) -> Result<()> {
    let live = t.run(shared(t.idle()).init("side", "sleep 2", sidecar(json!({})))).await?;
    live.restarted("side", 1).await?;
    live.phase("Running").await.map(drop)
}

async fn does_not_hold(t: T) -> Result<()> {
    let live = t.run(shared(t.pod("true")).init("side", IDLE, sidecar(json!({})))).await?;
    let pod = live.phase("Succeeded").await?;
    ensure!(container(&pod, "side")["state"]["terminated"].is_object(), "the sidecar goes on: {pod}");
    Ok(())
}

/// When a container's log says that it was asked to end.
async fn asked_at(live: &Live, name: &str) -> Result<String> {
    let log = live.log(&format!("container={name}&timestamps=true")).await?;
    let line = log.lines().find(|line| line.ends_with(" asked")).map(str::to_owned);
    ensure!(line.is_some(), "{name} was not asked to end: {log:?}");
    Ok(line.unwrap_or_default())
}

async fn reverse_order(t: T) -> Result<()> {
    let side = "trap 'echo asked; exit 0' TERM; touch /v/shared/$0; sleep 3600 & wait";
    let started = |name: &str| {
        let file = format!("/v/shared/{name}");
        sidecar(json!({"command": ["/bin/sh", "-c", side, name],
            "startupProbe": {"exec": {"command": ["test", "-e", file]}, "periodSeconds": 1}}))
    };
    let pod = shared(t.pod("echo asked")).spec(json!({"terminationGracePeriodSeconds": 30}));
    let pod = pod.init("one", "", started("one")).init("two", "", started("two"));
    let live = t.run(pod).await?;
    live.phase("Succeeded").await?;
    let (main, one, two) =
        (asked_at(&live, "main").await?, asked_at(&live, "one").await?, asked_at(&live, "two").await?);
    ensure!(main < two && two < one, "main {main:?}, two {two:?}, one {one:?}");
    Ok(())
}

async fn sidecar_readiness(t: T) -> Result<()> {
    let probe =
        json!({"readinessProbe": {"exec": {"command": ["test", "-e", "/v/shared/go"]}, "periodSeconds": 1}});
    let live = t.run(shared(t.idle()).init("side", IDLE, sidecar(probe))).await?;
    let pod = live.until("main runs", |pod| container(pod, "main")["state"]["running"].is_object()).await?;
    same("Ready", &condition(&pod, "Ready")["status"], "False")?;
    live.exec("touch /v/shared/go").await?;
    live.ready().await.map(drop)
}

async fn sidecar_pre_stop(t: T) -> Result<()> {
    let hook =
        json!({"lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", "echo hook > /proc/1/fd/1"]}}}});
    let side = "trap 'echo asked; exit 0' TERM; touch /v/shared/up; sleep 3600 & wait";
    let mut more = sidecar(hook);
    more["startupProbe"] = json!({"exec": {"command": ["test", "-e", "/v/shared/up"]}, "periodSeconds": 1});
    let pod =
        shared(t.pod("true")).spec(json!({"terminationGracePeriodSeconds": 30})).init("side", side, more);
    let live = t.run(pod).await?;
    live.phase("Succeeded").await?;
    same("the sidecar's log", live.log("container=side").await?.as_str(), "hook\nasked\n")
}
