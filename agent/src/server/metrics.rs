//! `/metrics/resource` (for metrics-server) and `/metrics`, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write;

use http::StatusCode;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use super::reply::{self, Reply};
use super::routes::Api;
use super::summary::{self, ContainerFigures};
use crate::host::stats::NodeFigures;

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Text in the making; one `# TYPE` line per metric, then its samples.
#[derive(Default)]
struct Exposition(String);

impl Exposition {
    fn metric(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = (String, f64)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
        for (labels, value) in samples {
            self.line(format_args!("{name}{labels} {value}"));
        }
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("writing to a string cannot fail");
    }

    fn reply(self) -> Reply {
        reply::with_type(StatusCode::OK, CONTENT_TYPE, self.0)
    }
}

/// Node, pod and container CPU and memory.
pub(super) async fn resource(api: &Api) -> Reply {
    let containers = summary::containers(api).await;
    let node = summary::node(api).await;
    let failed = containers.is_err() || node.is_err();
    let started = summary::start_times(&api.state.pods());
    resource_text(node.ok().as_ref(), &containers.unwrap_or_default(), &started, failed).reply()
}

fn resource_text(
    node: Option<&NodeFigures>,
    containers: &[ContainerFigures],
    started: &BTreeMap<(String, String), Timestamp>,
    failed: bool,
) -> Exposition {
    let mut text = Exposition::default();
    let cpu_help = "Cumulative cpu time consumed in core-seconds";
    let memory_help = "Current working set in bytes";
    let container_labels = |figures: &ContainerFigures| {
        format!(
            "{{container=\"{}\",namespace=\"{}\",pod=\"{}\"}}",
            figures.container, figures.namespace, figures.pod
        )
    };
    let sum_by_pod = |figure: fn(&ContainerFigures) -> Option<f64>| {
        let mut pods: BTreeMap<String, f64> = BTreeMap::new();
        for container in containers {
            let labels = format!("{{namespace=\"{}\",pod=\"{}\"}}", container.namespace, container.pod);
            *pods.entry(labels).or_default() += figure(container).unwrap_or_default();
        }
        pods
    };
    let by_container = |figure: fn(&ContainerFigures) -> Option<f64>| {
        containers.iter().filter_map(move |container| Some((container_labels(container), figure(container)?)))
    };
    let node_figure =
        |figure: fn(&NodeFigures) -> f64| node.map(|node| (String::new(), figure(node))).into_iter();
    text.metric("container_cpu_usage_seconds_total", "counter", cpu_help, by_container(cpu_seconds));
    text.metric("container_memory_working_set_bytes", "gauge", memory_help, by_container(working_set));
    let start_times = containers.iter().filter_map(|container| {
        let time = started.get(&(container.uid.clone(), container.container.clone()))?;
        Some((container_labels(container), time.as_duration().as_secs_f64()))
    });
    text.metric(
        "container_start_time_seconds",
        "gauge",
        "Start time of the container since unix epoch in seconds",
        start_times,
    );
    text.metric(
        "node_cpu_usage_seconds_total",
        "counter",
        cpu_help,
        node_figure(|node| node.cpu_used.as_secs_f64()),
    );
    text.metric(
        "node_memory_working_set_bytes",
        "gauge",
        memory_help,
        node_figure(|node| float(node.memory.working_set)),
    );
    text.metric("pod_cpu_usage_seconds_total", "counter", cpu_help, sum_by_pod(cpu_seconds));
    text.metric("pod_memory_working_set_bytes", "gauge", memory_help, sum_by_pod(working_set));
    swap(&mut text, node, by_container(swap_usage), sum_by_pod(swap_usage));
    let errors = [(String::new(), if failed { 1.0 } else { 0.0 })];
    text.metric(
        "resource_scrape_error",
        "gauge",
        "1 if there was an error while getting container metrics",
        errors,
    );
    text
}

/// Swap of containers, the node and pods, where any is told.
fn swap(
    text: &mut Exposition,
    node: Option<&NodeFigures>,
    containers: impl IntoIterator<Item = (String, f64)>,
    pods: BTreeMap<String, f64>,
) {
    let help = |what: &str| format!("Current amount of the {what} swap usage in bytes");
    text.metric("container_swap_usage_bytes", "gauge", &help("container"), containers);
    let used = node.map(|node| node.memory.swap.saturating_sub(node.memory.swap_free));
    let node = used.map(|used| (String::new(), float(used)));
    text.metric("node_swap_usage_bytes", "gauge", "Current swap usage of the node in bytes", node);
    text.metric("pod_swap_usage_bytes", "gauge", &help("pod"), pods);
}

/// The agent's own figures.
pub(super) fn own(api: &Api) -> Reply {
    let pods = api.state.pods();
    let is_running =
        |pod: &Pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
    let running_pods = pods.iter().filter(|pod| is_running(pod)).count();
    let running_containers: usize = pods.iter().map(|pod| count_running(pod)).sum();
    let mut text = Exposition::default();
    let sample = |count: usize| [(String::new(), float(count as u64))];
    let name = [(format!("{{node=\"{}\"}}", api.config.node_name), 1.0)];
    text.metric("kubelet_node_name", "gauge", "The node's name. The count is always 1.", name);
    text.metric(
        "kubelet_running_pods",
        "gauge",
        "Number of pods that have a running pod sandbox",
        sample(running_pods),
    );
    let help = "Number of containers currently running";
    let states = [("{container_state=\"running\"}".to_owned(), float(running_containers as u64))];
    text.metric("kubelet_running_containers", "gauge", help, states);
    text.metric("kubelet_desired_pods", "gauge", "Number of pods this node should run", sample(pods.len()));
    for (name, kind, help, samples) in api.config.pulls.families() {
        text.metric(name, kind, help, samples.into_iter().map(|(labels, count)| (labels, float(count))));
    }
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        let kilobytes: u64 = kilobytes.trim().trim_end_matches(" kB").parse().unwrap_or_default();
        let bytes = [(String::new(), float(kilobytes * 1024))];
        text.metric("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", bytes);
    }
    text.reply()
}

fn count_running(pod: &Pod) -> usize {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    statuses.filter(|status| status.state.as_ref().is_some_and(|state| state.running.is_some())).count()
}

fn cpu_seconds(container: &ContainerFigures) -> Option<f64> {
    container.cpu_nanos().map(|nanos| float(nanos) / 1e9)
}

fn swap_usage(container: &ContainerFigures) -> Option<f64> {
    let swap = container.stats.swap.as_ref()?;
    swap.swap_usage_bytes.as_ref().map(|bytes| float(bytes.value))
}

fn working_set(container: &ContainerFigures) -> Option<f64> {
    container.working_set().map(float)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "the format has floats only; 2^53 bytes or nanoseconds are enough"
)]
fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_scrape_still_tells_the_node() {
        let node = NodeFigures { cpu_used: std::time::Duration::from_millis(1500), ..NodeFigures::default() };
        let text = resource_text(Some(&node), &[], &BTreeMap::new(), true).0;
        assert!(
            text.contains("# TYPE node_cpu_usage_seconds_total counter\nnode_cpu_usage_seconds_total 1.5\n"),
            "{text}"
        );
        assert!(text.ends_with("resource_scrape_error 1\n"), "{text}");
        assert!(!text.contains("container_cpu"), "metrics without samples are left out");
    }
}
