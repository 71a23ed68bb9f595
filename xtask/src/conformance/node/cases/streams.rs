//! exec, attach and port-forward through the API.

use anyhow::{Result, ensure};
use serde_json::json;

use super::super::super::case::{Case, case, holds, same};
use super::super::super::stream::port::Forwarder;
use super::super::api::{encode, refusal};
use super::super::context::{IDLE, T};
use super::super::live::Live;

pub(super) fn cases() -> Vec<Case<T>> {
    let (exec, attach, forward) = ("Kubectl exec", "Kubectl attach", "Kubectl port-forward");
    vec![
        case(exec, "standard output and standard error come apart", apart),
        case(exec, "the exit code is told", exit_code),
        case(exec, "standard input reaches the command, with its end", stdin),
        case(exec, "a terminal has the size that it is told", terminal),
        case(exec, "a command that is not there is told", no_command),
        case(exec, "much output comes whole", much),
        case(exec, "the command has the container's environment, user and directory", surroundings),
        case(exec, "a container that the pod does not have is refused", no_container),
        case(exec, "a pod that has ended is refused", ended),
        case(exec, "a command ends with its container", ends_with_container),
        case(attach, "the container's output is seen", output),
        case(attach, "the container's input can be written", input),
        case(forward, "bytes go there and back", forward_bytes),
        case(forward, "a port that nobody listens to is told", forward_refused),
    ]
}

async fn apart(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let done = live.exec_in("main", "echo out; echo err >&2").await?;
    same("standard output", done.text().as_str(), "out\n")?;
    same("standard error", String::from_utf8_lossy(&done.stderr).into_owned().as_str(), "err\n")?;
    same("the status", &done.status["status"], "Success")
}

async fn exit_code(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let done = live.exec_in("main", "exit 42").await?;
    same("the exit code", done.exit_code(), Some(42))?;
    same("the reason", &done.status["reason"], "NonZeroExitCode")?;
    same("the message", &done.status["message"], "command terminated with non-zero exit code: exit status 42")
        .or_else(|_| {
            holds("the message", done.status["message"].as_str().unwrap_or_default(), "exit code 42")
        })
}

async fn stdin(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let mut session = live.session("exec", "container=main&stdin=true&stdout=true&command=cat").await?;
    session.send(b"there and ").await?;
    session.read_until("there and ").await?;
    session.send(b"back").await?;
    session.close_stdin().await?;
    let done = session.finish().await?;
    same("the rest", done.text().as_str(), "back")?;
    same("the exit code", done.exit_code(), Some(0))
}

async fn terminal(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let script =
        encode("until [ \"$(stty size)\" = '33 111' ]; do sleep 0.1; done; stty size; test -t 0 && tty");
    let query =
        format!("container=main&stdin=true&stdout=true&tty=true&command=sh&command=-c&command={script}");
    let mut session = live.session("exec", &query).await?;
    session.resize(111, 33).await?;
    let done = session.finish().await?;
    holds("the output", &done.text(), "33 111\r\n/dev/pts/")
}

async fn no_command(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let session = live.session("exec", "container=main&stdout=true&stderr=true&command=%2Fno%2Fsuch").await;
    let words = match session {
        Ok(session) => {
            let done = session.finish().await?;
            ensure!(done.exit_code() != Some(0), "it succeeded");
            format!("{} {}", done.status, String::from_utf8_lossy(&done.stderr))
        }
        Err(error) => format!("{error:#}"),
    };
    holds("what is told", &words, "/no/such")
}

async fn much(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let done = live.exec_in("main", "head -c 5000000 /dev/zero").await?;
    same("bytes", done.stdout.len(), 5_000_000)?;
    same("the exit code", done.exit_code(), Some(0))
}

async fn surroundings(t: T) -> Result<()> {
    let pod = t.idle().env(json!([{"name": "A", "value": "own"}]));
    let pod = pod.main(json!({"workingDir": "/var/log", "securityContext": {"runAsUser": 1001}}));
    let live = t.ready(pod).await?;
    same("the output", live.exec("echo $A $(id -u) $(pwd)").await?.as_str(), "own 1001 /var/log")
}

async fn no_container(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let refused = refusal(
        "the session",
        live.session("exec", "container=none&stdout=true&command=true").await.map(drop),
    )?;
    same("the code", refused.code, 400)?;
    same("the message", refused.message, format!("container none is not valid for pod {}", live.name))
}

async fn ended(t: T) -> Result<()> {
    let live = t.run(t.pod("true")).await?;
    live.phase("Succeeded").await?;
    let refused = refusal(
        "the session",
        live.session("exec", "container=main&stdout=true&command=true").await.map(drop),
    )?;
    ensure!(refused.code >= 400, "{refused}");
    holds("the message", &refused.message, "completed pod")
}

async fn ends_with_container(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let mut session = live
        .session("exec", "container=main&stdout=true&command=sh&command=-c&command=echo%20up%3Bsleep%203600")
        .await?;
    session.read_until("up").await?;
    live.delete(1).await?;
    let done = tokio::time::timeout(t.suite().limit, session.finish()).await;
    ensure!(done??.exit_code() != Some(0), "the command succeeded");
    live.gone().await
}

async fn output(t: T) -> Result<()> {
    let script = format!("while test ! -e /tmp/stop; do echo tick; sleep 0.2; done; {IDLE}");
    let live = t.ready(t.pod(&script)).await?;
    let mut session = live.session("attach", "container=main&stdout=true&stderr=true").await?;
    session.read_until("tick\n").await.map(drop)
}

async fn input(t: T) -> Result<()> {
    let live = t
        .ready(t.pod("read line; echo \"got $line\"").main(json!({"stdin": true, "stdinOnce": true})))
        .await?;
    let mut session = live.session("attach", "container=main&stdin=true&stdout=true").await?;
    session.send(b"a line\n").await?;
    session.read_until("got a line\n").await?;
    live.phase("Succeeded").await.map(drop)
}

/// A session as kubectl opens it: SPDY inside a WebSocket.
async fn forwarder(t: &T, live: &Live) -> Result<Forwarder> {
    let socket =
        t.api().socket(&format!("{}/portforward", live.path()), "SPDY/3.1+portforward.k8s.io").await?;
    Ok(Forwarder::over(socket))
}

async fn forward_bytes(t: T) -> Result<()> {
    let script =
        format!("mkdir /tmp/www; echo inside > /tmp/www/name; httpd -p 127.0.0.1:8080 -h /tmp/www; {IDLE}");
    let probe = json!({"readinessProbe": {"exec": {"command": ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8080/name"]}, "periodSeconds": 1}});
    let live = t.ready(t.pod(&script).main(probe)).await?;
    let mut forwarder = forwarder(&t, &live).await?;
    for _ in 0..2 {
        let connection = forwarder.open(8080).await?;
        forwarder.send(connection, b"GET /name HTTP/1.0\r\n\r\n", false).await?;
        let (answer, error) = forwarder.exchange(connection).await?;
        same("the error", error.as_str(), "")?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        ensure!(answer.starts_with("HTTP/1.") && answer.ends_with("inside\n"), "{answer:?}");
    }
    Ok(())
}

async fn forward_refused(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let mut forwarder = forwarder(&t, &live).await?;
    let connection = forwarder.open(8089).await?;
    let (_, error) = forwarder.exchange(connection).await?;
    holds("the error", &error, "8089")
}
