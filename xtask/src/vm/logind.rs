//! A shutdown of the guest through systemd-logind, as far as it goes while something else holds it back, too: the agent's
//! lock, the end of the pods in their order, refusals meanwhile, and the lock given back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::node;
use crate::cmd::Cmd;
use crate::conformance::node::api::Api;
use crate::conformance::node::live::{condition, summary};

const PODS: &str = "/api/v1/namespaces/default/pods";
/// Longest wait for one thing.
const LIMIT: Duration = Duration::from_secs(170);
const PAUSE: Duration = Duration::from_millis(500);
/// Ends some seconds after it is asked to, and tells when.
const SLOW: &str = "trap 'sleep 4; date +%s > /dev/termination-log; exit 0' TERM; while :; do sleep 1; done";

/// Fails where one of these was not seen.
pub(super) async fn check() -> Result<()> {
    let api = Api::open(&node::kubeconfig(), None).await?;
    ensure!(locks()?.contains("kubelet"), "the agent holds no lock of logind's: {}", locks()?);
    let allowed = logind_delay()?;
    ensure!(allowed >= 180, "logind waits {allowed} s only: the agent did not raise it");
    // A lock of our own keeps the machine up until the rest is seen. The guest ends itself then, and this with it.
    Cmd::new("systemd-run")
        .args(["--unit=node-holder", "--quiet", "systemd-inhibit", "--what=shutdown", "--mode=delay"])
        .args(["--who=test", "--why=test", "sleep", "600"])
        .output()?;
    until("our own lock", || Ok(locks()?.contains("test").then_some(()))).await?;
    for (name, class) in [("ordinary", ""), ("critical", "system-node-critical")] {
        api.post(PODS, &pod(name, class)).await?;
    }
    for name in ["ordinary", "critical"] {
        wait(&api, name, "ready", |pod| condition(pod, "Ready")["status"] == "True").await?;
    }
    Cmd::new("busctl")
        .args(["call", "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"])
        .args(["PowerOff", "b", "false"])
        .output()?;
    let mut ends = Vec::new();
    for name in ["ordinary", "critical"] {
        let ended = wait(&api, name, "ended", |pod| pod["status"]["phase"] == "Failed").await?;
        let status = &ended["status"];
        ensure!(
            status["reason"] == "Terminated",
            "pod {name}: the reason is {}, expected Terminated",
            status["reason"]
        );
        let at =
            status["containerStatuses"][0]["state"]["terminated"]["message"].as_str().unwrap_or_default();
        ends.push(
            at.trim().parse::<u64>().with_context(|| format!("{name} did not end by itself: {ended}"))?,
        );
    }
    ensure!(ends[0] < ends[1], "the critical pod ended at {}, the ordinary one at {}", ends[1], ends[0]);
    let node = api.get(&format!("/api/v1/nodes/{}", node::name())).await?;
    let ready = condition(&node, "Ready");
    ensure!(
        ready["status"] == "False" && ready["message"].as_str().unwrap_or_default().contains("shutting down"),
        "the node's Ready is {ready}"
    );
    api.post(PODS, &pod("late", "")).await?;
    let late = wait(&api, "late", "refused", |pod| pod["status"]["phase"] == "Failed").await?;
    ensure!(late["status"]["reason"] == "NodeShutdown", "the late pod: {}", summary(&late));
    until("the agent's lock given back", || Ok((!locks()?.contains("kubelet")).then_some(()))).await
}

/// A pod of the everyday image that ends slowly.
fn pod(name: &str, class: &str) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "nodeName": node::name(),
            "terminationGracePeriodSeconds": 50,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{
                "name": "main", "image": "busybox", "imagePullPolicy": "IfNotPresent",
                "command": ["/bin/sh", "-c", SLOW],
            }],
        },
    });
    if !class.is_empty() {
        pod["spec"]["priorityClassName"] = json!(class);
    }
    pod
}

/// Who holds the shutdown back.
fn locks() -> Result<String> {
    Cmd::new("busctl")
        .args(["call", "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"])
        .args(["ListInhibitors"])
        .output()
}

/// Seconds that logind waits at most.
fn logind_delay() -> Result<u64> {
    let text = Cmd::new("busctl")
        .args(["get-property", "org.freedesktop.login1", "/org/freedesktop/login1"])
        .args(["org.freedesktop.login1.Manager", "InhibitDelayMaxUSec"])
        .output()?;
    let micros = text.split_whitespace().last().and_then(|number| number.parse::<u64>().ok());
    Ok(micros.with_context(|| format!("logind's delay is {text:?}"))? / 1_000_000)
}

async fn wait(api: &Api, name: &str, what: &str, accept: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + LIMIT;
    loop {
        let pod = api.get(&format!("{PODS}/{name}")).await?;
        if accept(&pod) {
            return Ok(pod);
        }
        if Instant::now() > end {
            bail!("pod {name} is not {what} after {} s: {}", LIMIT.as_secs(), summary(&pod));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn until(what: &str, look: impl Fn() -> Result<Option<()>>) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while look()?.is_none() {
        ensure!(Instant::now() < end, "{what}: not after {} s", LIMIT.as_secs());
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}
