//! The kubelet's own API, through the API server's proxy for nodes.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::super::super::case::{Case, case, holds, same};
use super::super::api::refusal;
use super::super::context::T;
use super::super::live::Live;

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Kubelet API";
    vec![
        case(group, "healthz answers ok", healthz),
        case(group, "configz is the configuration", configz),
        case(group, "pods lists the node's pods", pods),
        case(group, "runningpods lists what runs", running_pods),
        case(group, "stats/summary tells node, pods and containers", summary),
        case(group, "stats/summary counts memory, CPU and disks of a container", summary_of_container),
        case(group, "metrics are the kubelet's own", metrics),
        case(group, "metrics/resource counts CPU and memory of containers, pods and the node", resource),
        case(group, "metrics/cadvisor counts each container", cadvisor),
        case(group, "metrics/probes counts probes", probes),
        case(group, "containerLogs gives a container's log", logs),
        case(group, "the node may be named with its port", with_port),
        case(group, "a path that is none is not found", unknown),
    ]
}

/// The path of the kubelet's `path`.
pub(super) fn at(t: &T, path: &str) -> String {
    format!("/api/v1/nodes/{}/proxy/{path}", t.node())
}

/// The kubelet's configuration.
pub(super) async fn config(t: &T) -> Result<Value> {
    let mut answer = t.api().get(&at(t, "configz")).await.context("the kubelet's configuration")?;
    Ok(answer["kubeletconfig"].take())
}

async fn healthz(t: T) -> Result<()> {
    same("the answer", t.api().text(&at(&t, "healthz")).await?.as_str(), "ok")
}

async fn configz(t: T) -> Result<()> {
    let config = config(&t).await?;
    ensure!(config["maxPods"].as_u64().is_some_and(|pods| pods > 0), "maxPods is {}", config["maxPods"]);
    for field in ["containerRuntimeEndpoint", "cgroupDriver", "containerLogMaxSize"] {
        ensure!(config[field].as_str().is_some_and(|text| !text.is_empty()), "{field} is {}", config[field]);
    }
    Ok(())
}

fn holds_pod(list: &Value, live: &Live) -> Result<()> {
    let mut items = list["items"].as_array().into_iter().flatten();
    ensure!(items.any(|pod| pod["metadata"]["name"] == live.name && pod["metadata"]["namespace"] == live.namespace), "{} is not listed", live.name);
    Ok(())
}

async fn pods(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let list = t.api().get(&at(&t, "pods")).await?;
    same("the kind", &list["kind"], "PodList")?;
    holds_pod(&list, &live)
}

async fn running_pods(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    holds_pod(&t.api().get(&at(&t, "runningpods/")).await?, &live)
}

/// What stats/summary says about a pod, once it does.
pub(super) async fn of_pod(t: &T, live: &Live) -> Result<Value> {
    let end = tokio::time::Instant::now() + t.suite().limit;
    loop {
        let summary = t.api().get(&at(t, "stats/summary")).await?;
        let mut pods = summary["pods"].as_array().into_iter().flatten();
        // A stock kubelet looks every ten seconds or so.
        let measured = |pod: &&Value| {
            pod["podRef"]["uid"] == live.uid.as_str()
                && pod["containers"][0]["memory"]["workingSetBytes"].is_u64()
        };
        if let Some(pod) = pods.find(measured) {
            return Ok(pod.clone());
        }
        ensure!(tokio::time::Instant::now() < end, "{} is not in the summary: {summary}", live.name);
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}

async fn summary(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let pod = of_pod(&t, &live).await?;
    same("the pod's name", &pod["podRef"]["name"], live.name.as_str())?;
    same("the container", &pod["containers"][0]["name"], "main")?;
    let summary = t.api().get(&at(&t, "stats/summary")).await?;
    let node = &summary["node"];
    same("the node", &node["nodeName"], t.node())?;
    for (part, field) in [
        ("cpu", "usageCoreNanoSeconds"),
        ("memory", "workingSetBytes"),
        ("memory", "availableBytes"),
        ("fs", "availableBytes"),
        ("fs", "inodesFree"),
        ("rlimit", "maxpid"),
    ] {
        ensure!(
            node[part][field].as_u64().is_some_and(|amount| amount > 0),
            "node.{part}.{field} is {}",
            node[part][field]
        );
    }
    Ok(())
}

async fn summary_of_container(t: T) -> Result<()> {
    let pod = t.pod("head -c 3000000 /dev/urandom > /dev/shm/x; trap 'exit 0' TERM; sleep 3600 & wait");
    let live = t.ready(pod).await?;
    live.exec_until("[ $(wc -c < /dev/shm/x) -ge 3000000 ]").await?;
    let pod = of_pod(&t, &live).await?;
    let main = &pod["containers"][0];
    for (part, field) in [
        ("cpu", "usageCoreNanoSeconds"),
        ("memory", "workingSetBytes"),
        ("memory", "usageBytes"),
        ("rootfs", "capacityBytes"),
        ("logs", "capacityBytes"),
    ] {
        ensure!(
            main[part][field].as_u64().is_some_and(|amount| amount > 0),
            "{part}.{field} is {}",
            main[part][field]
        );
    }
    for field in ["rxBytes", "txBytes"] {
        ensure!(pod["network"][field].is_u64(), "network.{field} is {}", pod["network"][field]);
    }
    Ok(())
}

async fn metrics(t: T) -> Result<()> {
    let text = t.api().text(&at(&t, "metrics")).await?;
    holds("the metrics", &text, "# TYPE kubelet_running_pods gauge")
}

/// The value of a series that has all of these labels.
fn value(text: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let wanted: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
    let mut lines =
        text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    let line = lines.find(|line| wanted.iter().all(|label| line.contains(label.as_str())))?;
    let rest = line.rsplit_once('}').map_or(line, |(_, rest)| rest);
    rest.split_whitespace().find_map(|word| word.parse().ok())
}

/// Asks until the series is there: a stock kubelet looks every ten seconds or so.
async fn series(t: &T, path: &str, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    let end = tokio::time::Instant::now() + t.suite().limit;
    loop {
        let text = t.api().text(&at(t, path)).await?;
        if let Some(value) = value(&text, name, labels) {
            return Ok(value);
        }
        ensure!(tokio::time::Instant::now() < end, "no {name} with {labels:?} in {path}");
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}

async fn resource(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let (pod, main) = ([("pod", live.name.as_str())], [("pod", live.name.as_str()), ("container", "main")]);
    for (name, labels) in [
        ("container_memory_working_set_bytes", &main[..]),
        ("container_start_time_seconds", &main),
        ("pod_memory_working_set_bytes", &pod),
        ("node_memory_working_set_bytes", &[]),
        ("node_cpu_usage_seconds_total", &[]),
    ] {
        let found = series(&t, "metrics/resource", name, labels).await?;
        ensure!(found > 0.0, "{name} is {found}");
    }
    for (name, labels) in
        [("container_cpu_usage_seconds_total", &main[..]), ("pod_cpu_usage_seconds_total", &pod)]
    {
        series(&t, "metrics/resource", name, labels).await?;
    }
    same("errors", series(&t, "metrics/resource", "resource_scrape_error", &[]).await?, 0.0)
}

async fn cadvisor(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let labels = [("pod", live.name.as_str()), ("namespace", live.namespace.as_str()), ("container", "main")];
    for name in [
        "container_memory_working_set_bytes",
        "container_cpu_usage_seconds_total",
        "container_memory_usage_bytes",
    ] {
        let found = series(&t, "metrics/cadvisor", name, &labels).await?;
        ensure!(found >= 0.0, "{name} is {found}");
    }
    Ok(())
}

async fn probes(t: T) -> Result<()> {
    let probe = serde_json::json!({"readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1}});
    let live = t.ready(t.idle().main(probe)).await?;
    let labels = [
        ("pod", live.name.as_str()),
        ("namespace", live.namespace.as_str()),
        ("probe_type", "Readiness"),
        ("result", "successful"),
    ];
    let found = series(&t, "metrics/probes", "prober_probe_total", &labels).await?;
    ensure!(found >= 1.0, "prober_probe_total is {found}");
    Ok(())
}

async fn logs(t: T) -> Result<()> {
    let live = t.run(t.pod("echo one; echo two")).await?;
    live.phase("Succeeded").await?;
    let path = at(&t, &format!("containerLogs/{}/{}/main?tailLines=1", live.namespace, live.name));
    same("the log", t.api().text(&path).await?.as_str(), "two\n")
}

async fn with_port(t: T) -> Result<()> {
    let port = &t.suite().node_object["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"];
    let path = format!("/api/v1/nodes/{}:{port}/proxy/healthz", t.node());
    same("the answer", t.api().text(&path).await?.as_str(), "ok")
}

async fn unknown(t: T) -> Result<()> {
    let refused = refusal("the path", t.api().text(&at(&t, "no/such/path")).await)?;
    same("the code", refused.code, 404)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_series_is_found_by_its_labels() {
        let text = "# TYPE a gauge\na{x=\"1\",y=\"2\"} 3.5 1700000000\nab 9\na{x=\"2\"} 4\n";
        assert_eq!(super::value(text, "a", &[("y", "2")]), Some(3.5));
        assert_eq!(super::value(text, "a", &[("x", "2")]), Some(4.0));
        assert_eq!(super::value(text, "ab", &[]), Some(9.0));
        assert_eq!(super::value(text, "a", &[("x", "9")]), None);
    }
}
