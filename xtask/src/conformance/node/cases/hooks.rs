//! Lifecycle hooks.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, same, skip};
use super::super::context::{IDLE, T};
use super::super::live::{Live, condition, container};
use super::probes::server;

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Container Lifecycle Hook";
    vec![
        case(group, "postStart by exec runs in the container, and before it is ready", post_start_exec),
        case(group, "postStart by HTTP asks the server that it names", post_start_http),
        case(group, "postStart by sleep holds the container back", post_start_sleep),
        case(
            group,
            "a postStart hook that fails ends the container, which is started again",
            post_start_fails,
        ),
        case(group, "preStop by exec runs before SIGTERM", pre_stop_exec),
        case(group, "preStop by HTTP asks the server that it names", pre_stop_http),
        case(group, "preStop by sleep delays SIGTERM", pre_stop_sleep),
        case(group, "a preStop hook does not last longer than the grace", pre_stop_cut),
        case(group, "preStop by sleep of zero seconds is nothing", pre_stop_zero),
        case(group, "a preStop hook that fails is told, and the container ends all the same", pre_stop_fails),
        case(group, "preStop runs when liveness kills", pre_stop_liveness),
        case(group, "a stop signal of the container's own is sent", stop_signal),
    ]
}

fn hook(when: &str, what: Value) -> Value {
    json!({"lifecycle": {when: what}})
}

fn exec(script: &str) -> Value {
    json!({"exec": {"command": ["sh", "-c", script]}})
}

/// Ends at SIGTERM and tells it; says "up" when it listens to it.
const TELLING: &str = "trap 'echo asked; exit 0' TERM; echo up; sleep 3600 & wait";

async fn post_start_exec(t: T) -> Result<()> {
    let live = t.ready(t.idle().main(hook("postStart", exec("sleep 2; hostname > /tmp/done")))).await?;
    same("what the hook wrote", live.exec("cat /tmp/done").await?, live.name.clone())
}

async fn post_start_http(t: T) -> Result<()> {
    let asked =
        t.ready(server(&t, "echo $QUERY_STRING > /tmp/asked; printf 'Status: 200 OK\\r\\n\\r\\n'")).await?;
    asked.exec_until("wget -q -O /dev/null http://127.0.0.1:8080/ok").await?;
    let get =
        json!({"httpGet": {"host": asked.address().await?, "port": 8080, "path": "/cgi-bin/answer?started"}});
    t.ready(t.idle().main(hook("postStart", get))).await?;
    same("what was asked", asked.exec("cat /tmp/asked").await?.as_str(), "started")
}

async fn post_start_sleep(t: T) -> Result<()> {
    let begun = Instant::now();
    t.ready(t.idle().main(hook("postStart", json!({"sleep": {"seconds": 3}})))).await?;
    ensure!(begun.elapsed() >= Duration::from_secs(3), "ready after {:?}", begun.elapsed());
    Ok(())
}

async fn post_start_fails(t: T) -> Result<()> {
    let live = t.run(t.idle().always().main(hook("postStart", exec("exit 1")))).await?;
    live.event("FailedPostStartHook", "PostStartHook failed").await?;
    live.restarted("main", 1).await?;
    live.never("it was ready", |pod| condition(pod, "Ready")["status"] == "True")
}

/// Deletes the pod with this grace; what `main` says until it ends.
async fn last_words(live: &Live, grace: u64) -> Result<String> {
    let mut log = live.follow("container=main").await?;
    log.until("up\n").await?;
    live.delete(grace).await?;
    let log = log.rest().await?;
    live.gone().await?;
    Ok(log)
}

async fn pre_stop_exec(t: T) -> Result<()> {
    let pod = t.pod(TELLING).main(hook("preStop", exec("sleep 1; echo hook > /proc/1/fd/1")));
    let live = t.ready(pod).await?;
    same("the log", last_words(&live, 30).await?.as_str(), "up\nhook\nasked\n")
}

async fn pre_stop_http(t: T) -> Result<()> {
    let asked =
        t.ready(server(&t, "echo $QUERY_STRING > /tmp/asked; printf 'Status: 200 OK\\r\\n\\r\\n'")).await?;
    asked.exec_until("wget -q -O /dev/null http://127.0.0.1:8080/ok").await?;
    let get =
        json!({"httpGet": {"host": asked.address().await?, "port": 8080, "path": "/cgi-bin/answer?ends"}});
    let live = t.ready(t.idle().main(hook("preStop", get))).await?;
    live.delete(30).await?;
    live.gone().await?;
    same("what was asked", asked.exec("cat /tmp/asked").await?.as_str(), "ends")
}

async fn pre_stop_sleep(t: T) -> Result<()> {
    let live = t.ready(t.pod(TELLING).main(hook("preStop", json!({"sleep": {"seconds": 3}})))).await?;
    let begun = Instant::now();
    same("the log", last_words(&live, 30).await?.as_str(), "up\nasked\n")?;
    ensure!(begun.elapsed() >= Duration::from_secs(3), "gone after {:?}", begun.elapsed());
    Ok(())
}

async fn pre_stop_cut(t: T) -> Result<()> {
    let live = t.ready(t.pod(TELLING).main(hook("preStop", exec("sleep 3000")))).await?;
    last_words(&live, 3).await.map(drop)
}

async fn pre_stop_zero(t: T) -> Result<()> {
    let made = t.run(t.pod(TELLING).main(hook("preStop", json!({"sleep": {"seconds": 0}})))).await?;
    made.ready().await?;
    same("the log", last_words(&made, 30).await?.as_str(), "up\nasked\n")
}

async fn pre_stop_fails(t: T) -> Result<()> {
    let live = t.ready(t.pod(TELLING).main(hook("preStop", exec("exit 3")))).await?;
    same("the log", last_words(&live, 30).await?.as_str(), "up\nasked\n")?;
    live.event("FailedPreStopHook", "PreStopHook failed").await.map(drop)
}

async fn pre_stop_liveness(t: T) -> Result<()> {
    let mut main = hook("preStop", exec("touch /v/kept/hook"));
    main["livenessProbe"] = json!({"exec": {"command": ["test", "-e", "/v/kept/hook"]}, "periodSeconds": 1, "failureThreshold": 1});
    let live = t.run(t.pod(IDLE).always().volume("kept", json!({"emptyDir": {}})).main(main)).await?;
    live.restarted("main", 1).await?;
    live.until("it runs", |pod| container(pod, "main")["state"]["running"].is_object()).await?;
    live.exec("test -e /v/kept/hook").await.map(drop)
}

async fn stop_signal(t: T) -> Result<()> {
    let script = "trap 'echo user; exit 0' USR1; trap 'echo asked; exit 0' TERM; echo up; sleep 3600 & wait";
    let pod = t
        .pod(script)
        .spec(json!({"os": {"name": "linux"}}))
        .main(json!({"lifecycle": {"stopSignal": "SIGUSR1"}}));
    let live = t.run(pod).await?;
    let made = live.ready().await?;
    if made["spec"]["containers"][0]["lifecycle"]["stopSignal"].is_null() {
        return skip("the cluster does not know lifecycle.stopSignal");
    }
    same("the log", last_words(&live, 30).await?.as_str(), "up\nuser\n")
}
