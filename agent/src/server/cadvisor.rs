//! `/metrics/cadvisor`: the containers' figures under the names that dashboards know.
//!
//! They come from the runtime ready-made (`ListPodSandboxMetrics`); here they only become text. Added is what nobody but
//! the node knows: its CPUs, its memory, its version. Nothing is read while nobody asks.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

use cri_shim_api::v1;
use http::StatusCode;

use super::metrics::CONTENT_TYPE;
use super::reply::{self, Reply};
use super::routes::Api;
use super::summary;
use crate::host::stats::NodeFigures;
use crate::node::KUBELET_VERSION;

/// Deadline of the runtime's answers.
const DEADLINE: Duration = Duration::from_secs(10);
/// Bytes of a line, to ask for memory once.
const USUAL_LINE: usize = 448;

/// Answers the request.
pub(super) async fn answer(api: &Api) -> Reply {
    let asked = async { tokio::join!(runtime_metrics(api), summary::node(api)) };
    let (runtime, node) = match tokio::time::timeout(DEADLINE, asked).await {
        Ok(answers) => answers,
        Err(_elapsed) => {
            return reply::text(StatusCode::GATEWAY_TIMEOUT, "the container runtime gave no metrics in time");
        }
    };
    let failed = runtime.is_err();
    let (descriptors, pods) = runtime.unwrap_or_default();
    reply::with_type(StatusCode::OK, CONTENT_TYPE, render(&descriptors, &pods, node.ok().as_ref(), failed))
}

type RuntimeMetrics = (Vec<v1::MetricDescriptor>, Vec<v1::PodSandboxMetrics>);

async fn runtime_metrics(api: &Api) -> Result<RuntimeMetrics, tonic::Status> {
    let (mut first, mut second) = (api.runtime.clone(), api.runtime.clone());
    let (descriptors, metrics) = tokio::try_join!(
        first.list_metric_descriptors(v1::ListMetricDescriptorsRequest {}),
        second.list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest {}),
    )?;
    Ok((descriptors.into_inner().descriptors, metrics.into_inner().pod_metrics))
}

/// Samples of one name stand together below its description, as the format wants it.
fn render(
    descriptors: &[v1::MetricDescriptor],
    pods: &[v1::PodSandboxMetrics],
    node: Option<&NodeFigures>,
    failed: bool,
) -> String {
    type Samples<'a> = (&'a v1::MetricDescriptor, Vec<&'a v1::Metric>);
    // Without a description nobody knows what the labels are.
    let mut by_name: HashMap<&str, Samples<'_>> =
        descriptors.iter().map(|one| (one.name.as_str(), (one, Vec::new()))).collect();
    let mut count = 0;
    for pod in pods {
        let of_containers = pod.container_metrics.iter().flat_map(|container| &container.metrics);
        for metric in pod.metrics.iter().chain(of_containers) {
            if let Some((_, samples)) = by_name.get_mut(metric.name.as_str()) {
                samples.push(metric);
                count += 1;
            }
        }
    }
    let mut all: Vec<Samples<'_>> =
        by_name.into_values().filter(|(_, samples)| !samples.is_empty()).collect();
    all.sort_unstable_by_key(|(descriptor, _)| descriptor.name.as_str());
    let mut text = String::with_capacity(count * USUAL_LINE);
    for (descriptor, metrics) in all {
        let name = &descriptor.name;
        let is_counter =
            metrics.first().is_some_and(|metric| metric.metric_type == v1::MetricType::Counter as i32);
        describe(&mut text, name, &descriptor.help, if is_counter { "counter" } else { "gauge" });
        for metric in metrics {
            let labels = descriptor
                .label_keys
                .iter()
                .map(String::as_str)
                .zip(metric.label_values.iter().map(String::as_str));
            let value = metric.value.map_or(0, |value| value.value);
            sample(&mut text, name, labels, value, metric.timestamp);
        }
    }
    if let Some(node) = node {
        of_node(&mut text, node);
    }
    describe(
        &mut text,
        "container_scrape_error",
        "1 if there was an error while getting container metrics, 0 otherwise",
        "gauge",
    );
    sample(&mut text, "container_scrape_error", std::iter::empty(), u64::from(failed), 0);
    text
}

fn of_node(text: &mut String, node: &NodeFigures) {
    describe(text, "cadvisor_version_info", "Versions of the node, always 1", "gauge");
    sample(text, "cadvisor_version_info", [("kubeletVersion", KUBELET_VERSION)].into_iter(), 1, 0);
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    for (name, help, value) in [
        ("machine_cpu_cores", "Number of logical CPU cores.", cpus),
        ("machine_memory_bytes", "Amount of memory installed on the machine.", node.memory.total),
    ] {
        describe(text, name, help, "gauge");
        sample(text, name, std::iter::empty(), value, 0);
    }
}

fn describe(text: &mut String, name: &str, help: &str, kind: &str) {
    let help = help.replace('\\', "\\\\").replace('\n', "\\n");
    // Writing to a String cannot fail.
    write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n").ok();
}

/// The timestamp counts nanoseconds; 0 says that the figure is of this moment.
fn sample<'a>(
    text: &mut String,
    name: &str,
    labels: impl Iterator<Item = (&'a str, &'a str)>,
    value: u64,
    timestamp: i64,
) {
    text.push_str(name);
    let mut opened = false;
    for (key, value) in labels {
        text.push(if opened { ',' } else { '{' });
        text.push_str(key);
        text.push_str("=\"");
        push_escaped(text, value);
        text.push('"');
        opened = true;
    }
    if opened {
        text.push('}');
    }
    if timestamp > 0 {
        writeln!(text, " {value} {}", timestamp / 1_000_000).ok();
    } else {
        writeln!(text, " {value}").ok();
    }
}

/// Hardly any value has something to escape, and there are tens of thousands of them.
fn push_escaped(text: &mut String, value: &str) {
    let mut rest = value;
    while let Some(at) = rest.find(['\\', '"', '\n']) {
        text.push_str(&rest[..at]);
        text.push_str(match rest.as_bytes()[at] {
            b'\n' => "\\n",
            b'"' => "\\\"",
            _ => "\\\\",
        });
        rest = &rest[at + 1..];
    }
    text.push_str(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(name: &str, labels: &[&str], value: u64) -> v1::Metric {
        v1::Metric {
            name: name.to_owned(),
            metric_type: v1::MetricType::Counter as i32,
            label_values: labels.iter().map(|label| (*label).to_owned()).collect(),
            value: Some(v1::UInt64Value { value }),
            ..v1::Metric::default()
        }
    }

    #[test]
    fn samples_of_one_name_stand_together_and_labels_are_escaped() {
        let descriptors = [v1::MetricDescriptor {
            name: "container_cpu_usage_seconds_total".to_owned(),
            help: "CPU time\nused.".to_owned(),
            label_keys: vec!["pod".to_owned(), "container".to_owned()],
        }];
        let pod = |pod: &str, value| v1::PodSandboxMetrics {
            container_metrics: vec![v1::ContainerMetrics {
                metrics: vec![
                    metric("container_cpu_usage_seconds_total", &[pod, "a\"b"], value),
                    metric("unknown", &[], 1),
                ],
                ..v1::ContainerMetrics::default()
            }],
            ..v1::PodSandboxMetrics::default()
        };
        let text = render(&descriptors, &[pod("p", 1), pod("q", 2)], None, false);
        assert_eq!(
            text,
            "# HELP container_cpu_usage_seconds_total CPU time\\nused.\n\
             # TYPE container_cpu_usage_seconds_total counter\n\
             container_cpu_usage_seconds_total{pod=\"p\",container=\"a\\\"b\"} 1\n\
             container_cpu_usage_seconds_total{pod=\"q\",container=\"a\\\"b\"} 2\n\
             # HELP container_scrape_error 1 if there was an error while getting container metrics, 0 otherwise\n\
             # TYPE container_scrape_error gauge\ncontainer_scrape_error 0\n"
        );
    }

    #[test]
    fn the_node_is_told_even_when_the_runtime_says_nothing() {
        let text = render(&[], &[], Some(&NodeFigures::default()), true);
        assert!(
            text.contains("machine_memory_bytes 0\n") && text.ends_with("container_scrape_error 1\n"),
            "{text}"
        );
    }
}
