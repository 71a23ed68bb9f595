//! Probes: readiness and liveness by exec and HTTP.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same};
use super::super::context::{IDLE, T};
use super::super::live::{condition, container};
use super::super::pod::Pod;

const GROUP: &str = "Probing container";

pub(super) fn cases() -> Vec<Case<T>> {
    vec![
        case(GROUP, "without probes a container is ready as soon as it runs", default_ready),
        case(GROUP, "readiness by exec follows the command's exit status, both ways", readiness_exec),
        case(GROUP, "a readiness probe that fails restarts nothing", readiness_no_restart),
        case(GROUP, "readiness does not begin before initialDelaySeconds", initial_delay),
        case(GROUP, "readiness needs successThreshold successes in a row", success_threshold),
        case(GROUP, "liveness by exec that succeeds restarts nothing", liveness_exec_fine),
        case(GROUP, "liveness by exec that fails restarts the container", liveness_exec),
        case(GROUP, "liveness waits for failureThreshold failures in a row", failure_threshold),
        case(GROUP, "the restart count grows with every failure of liveness", counts_grow),
        case(GROUP, "a command that takes longer than timeoutSeconds has failed", exec_timeout),
        case(GROUP, "a liveness probe's own grace is used when it kills", probe_grace),
        case(GROUP, "readiness by HTTP is reached with 200", http_ready),
        case(GROUP, "readiness by HTTP fails with 404 and tells the status code", http_not_found),
        case(GROUP, "liveness by HTTP that succeeds restarts nothing", http_liveness_fine),
        case(GROUP, "liveness by HTTP that fails with 500 restarts the container", http_liveness),
        case(GROUP, "an HTTP probe sends its headers, its host and a kubelet's user agent", http_headers),
        case(GROUP, "an HTTP probe follows a redirect on the same host", http_redirect),
        case(GROUP, "a redirect to another host counts as success, with a warning", http_redirect_away),
        case(GROUP, "a probe finds its port by name", named_port),
    ]
}

/// An HTTP server on port 8080: `/ok`, and `/cgi-bin/answer`, whose program `answer` is.
pub(super) fn server(t: &T, answer: &str) -> Pod {
    let script = format!(
        "mkdir -p /tmp/www/cgi-bin; echo fine > /tmp/www/ok; cd /tmp/www/cgi-bin; printf '#!/bin/sh\\n%s\\n' \"$ANSWER\" > answer; \
         chmod +x answer; httpd -p 8080 -h /tmp/www; {IDLE}"
    );
    t.pod(&script).env(json!([{"name": "ANSWER", "value": answer}]))
}

/// Prints a status, and counts how often it was asked.
const COUNT: &str = "echo >> /tmp/asked; printf 'Status: 200 OK\\r\\n\\r\\nfine'";

pub(super) fn exec_probe(script: &str) -> Value {
    json!({"exec": {"command": ["sh", "-c", script]}, "periodSeconds": 1})
}

fn http_probe(path: &str) -> Value {
    json!({"httpGet": {"path": path, "port": 8080}, "periodSeconds": 1})
}

async fn default_ready(t: T) -> Result<()> {
    let pod = t.ready(t.idle()).await?.ready().await?;
    same("ready", &container(&pod, "main")["ready"], true)
}

async fn readiness_exec(t: T) -> Result<()> {
    let live = t.run(t.idle().main(json!({"readinessProbe": exec_probe("test -e /tmp/ready")}))).await?;
    live.event("Unhealthy", "Readiness probe failed: ").await?;
    live.never("it was ready", |pod| condition(pod, "Ready")["status"] == "True")?;
    live.exec("touch /tmp/ready").await?;
    live.ready().await?;
    live.exec("rm /tmp/ready").await?;
    let pod = live.until("not ready again", |pod| condition(pod, "Ready")["status"] == "False").await?;
    same("ready of the container", &container(&pod, "main")["ready"], false)
}

async fn readiness_no_restart(t: T) -> Result<()> {
    let probe = exec_probe("echo >> /tmp/asked; exit 1");
    let live = t.run(t.idle().always().main(json!({"readinessProbe": probe}))).await?;
    live.until("it runs", |pod| container(pod, "main")["state"]["running"].is_object()).await?;
    live.exec_until("[ $(wc -l < /tmp/asked) -ge 5 ]").await?;
    let pod = live.history().pop().unwrap_or_default();
    same("restarts", &container(&pod, "main")["restartCount"], 0)?;
    live.never("it was ready", |pod| condition(pod, "Ready")["status"] == "True")
}

async fn initial_delay(t: T) -> Result<()> {
    let mut probe = exec_probe("date +%s >> /tmp/asked");
    probe["initialDelaySeconds"] = 4.into();
    let script = format!("date +%s > /tmp/begun; {IDLE}");
    let live = t.ready(t.pod(&script).main(json!({"readinessProbe": probe}))).await?;
    // Of the container's own clock, in whole seconds.
    live.exec("[ $(($(head -1 /tmp/asked) - $(cat /tmp/begun))) -ge 3 ]").await.map(drop)
}

async fn success_threshold(t: T) -> Result<()> {
    let mut probe = exec_probe("echo >> /tmp/asked");
    probe["successThreshold"] = 3.into();
    let live = t.ready(t.idle().main(json!({"readinessProbe": probe}))).await?;
    live.exec("[ $(wc -l < /tmp/asked) -ge 3 ]").await.map(drop)
}

async fn liveness_exec_fine(t: T) -> Result<()> {
    let live =
        t.ready(t.idle().always().main(json!({"livenessProbe": exec_probe("echo >> /tmp/asked")}))).await?;
    live.exec_until("[ $(wc -l < /tmp/asked) -ge 5 ]").await?;
    let pod = live.history().pop().unwrap_or_default();
    same("restarts", &container(&pod, "main")["restartCount"], 0)
}

async fn liveness_exec(t: T) -> Result<()> {
    let mut probe = exec_probe("test -e /tmp/alive");
    probe["failureThreshold"] = 1.into();
    probe["initialDelaySeconds"] = 1.into();
    let pod = t.pod(&format!("touch /tmp/alive; {IDLE}")).always().main(json!({"livenessProbe": probe}));
    let live = t.ready(pod).await?;
    live.exec("rm /tmp/alive").await?;
    let main = live.restarted("main", 1).await?;
    ensure!(main["lastState"]["terminated"].is_object(), "no last state: {main}");
    live.event("Unhealthy", "Liveness probe failed: ").await?;
    live.event("Killing", "Container main failed liveness probe, will be restarted").await?;
    live.ready().await.map(drop)
}

async fn failure_threshold(t: T) -> Result<()> {
    let mut probe = exec_probe("echo >> /v/kept/asked; exit 1");
    probe["failureThreshold"] = 3.into();
    // Written down when the container is asked to end.
    let script = "trap 'cp /v/kept/asked /v/kept/then; exit 0' TERM; test -e /v/kept/then && exec sleep 3600; sleep 3600 & wait";
    let pod = t.pod(script).always().volume("kept", json!({"emptyDir": {}}));
    let live = t.run(pod.main(json!({"livenessProbe": probe}))).await?;
    live.restarted("main", 1).await?;
    live.until("it runs", |pod| container(pod, "main")["state"]["running"].is_object()).await?;
    live.exec("[ $(wc -l < /v/kept/then) -ge 3 ]").await.map(drop)
}

async fn counts_grow(t: T) -> Result<()> {
    let mut probe = exec_probe("exit 1");
    probe["failureThreshold"] = 1.into();
    let live = t.run(t.idle().always().main(json!({"livenessProbe": probe}))).await?;
    live.restarted("main", 2).await?;
    let counts: Vec<u64> =
        live.history().iter().filter_map(|pod| container(pod, "main")["restartCount"].as_u64()).collect();
    ensure!(counts.is_sorted(), "restart counts went backwards: {counts:?}");
    Ok(())
}

async fn exec_timeout(t: T) -> Result<()> {
    let mut probe = exec_probe("sleep 20");
    probe["timeoutSeconds"] = 1.into();
    let live = t.run(t.idle().main(json!({"readinessProbe": probe}))).await?;
    let event = live.event("Unhealthy", "Readiness probe ").await?;
    holds("the message", event["message"].as_str().unwrap_or_default(), "timed out")?;
    live.never("it was ready", |pod| condition(pod, "Ready")["status"] == "True")
}

async fn probe_grace(t: T) -> Result<()> {
    let mut probe = exec_probe("exit 1");
    probe["failureThreshold"] = 1.into();
    probe["terminationGracePeriodSeconds"] = 1.into();
    let pod = t.pod("trap '' TERM; while true; do sleep 1; done").always();
    // With the pod's own grace this would take longer than a case may.
    let pod = pod.spec(json!({"terminationGracePeriodSeconds": 600})).main(json!({"livenessProbe": probe}));
    let live = t.run(pod).await?;
    let main = live.restarted("main", 1).await?;
    same("the exit code", &main["lastState"]["terminated"]["exitCode"], 137)?;
    live.delete(1).await?;
    live.gone().await
}

async fn http_ready(t: T) -> Result<()> {
    let live =
        t.ready(server(&t, COUNT).main(json!({"readinessProbe": http_probe("/cgi-bin/answer")}))).await?;
    live.exec("test -s /tmp/asked").await.map(drop)
}

async fn http_not_found(t: T) -> Result<()> {
    let live = t.run(server(&t, COUNT).main(json!({"readinessProbe": http_probe("/none")}))).await?;
    live.event("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 404").await?;
    live.never("it was ready", |pod| condition(pod, "Ready")["status"] == "True")
}

async fn http_liveness_fine(t: T) -> Result<()> {
    let mut probe = http_probe("/cgi-bin/answer");
    probe["initialDelaySeconds"] = 1.into();
    let live = t.ready(server(&t, COUNT).always().main(json!({"livenessProbe": probe}))).await?;
    live.exec_until("[ $(wc -l < /tmp/asked) -ge 5 ]").await?;
    let pod = live.history().pop().unwrap_or_default();
    same("restarts", &container(&pod, "main")["restartCount"], 0)
}

async fn http_liveness(t: T) -> Result<()> {
    let answer = "printf 'Status: 500 Broken\\r\\n\\r\\nbroken'";
    let probe = http_probe("/cgi-bin/answer");
    let live = t.run(server(&t, answer).always().main(json!({"livenessProbe": probe}))).await?;
    live.restarted("main", 1).await?;
    live.event("Unhealthy", "Liveness probe failed: HTTP probe failed with statuscode: 500").await.map(drop)
}

async fn http_headers(t: T) -> Result<()> {
    let answer = "env > /tmp/env; printf 'Status: 200 OK\\r\\n\\r\\n'";
    let headers = json!([{"name": "X-Case", "value": "a case"}, {"name": "Host", "value": "example.com"}]);
    let probe = json!({"httpGet": {"path": "/cgi-bin/answer?a=b", "port": 8080, "httpHeaders": headers}, "periodSeconds": 1});
    let live = t.ready(server(&t, answer).main(json!({"readinessProbe": probe}))).await?;
    let env = live.exec("cat /tmp/env").await?;
    holds("the program's environment", &env, "HTTP_USER_AGENT=kube-probe/")?;
    holds("the program's environment", &env, "HTTP_HOST=example.com")?;
    holds("the program's environment", &env, "HTTP_X_CASE=a case")?;
    holds("the program's environment", &env, "QUERY_STRING=a=b")
}

async fn http_redirect(t: T) -> Result<()> {
    let answer = "echo >> /tmp/asked; printf 'Status: 302 Found\\r\\nLocation: /ok\\r\\n\\r\\n'";
    let live =
        t.ready(server(&t, answer).main(json!({"readinessProbe": http_probe("/cgi-bin/answer")}))).await?;
    live.exec("test -s /tmp/asked && rm /tmp/www/ok").await?;
    // What the redirect leads to is asked too.
    live.event("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 404").await.map(drop)
}

async fn http_redirect_away(t: T) -> Result<()> {
    let answer = "printf 'Status: 302 Found\\r\\nLocation: http://redirected.invalid/\\r\\n\\r\\n'";
    let live =
        t.ready(server(&t, answer).main(json!({"readinessProbe": http_probe("/cgi-bin/answer")}))).await?;
    live.event("ProbeWarning", "Readiness probe warning: ").await.map(drop)
}

async fn named_port(t: T) -> Result<()> {
    let main = json!({"ports": [{"name": "web", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/ok", "port": "web"}, "periodSeconds": 1}});
    t.ready(server(&t, COUNT).main(main)).await.map(drop)
}
