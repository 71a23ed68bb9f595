//! What the proxy counts, in Prometheus' text format on kube-proxy's :10249.
//!
//! Names of kube-proxy where it has them; per service and endpoint our own. The task answers each scrape itself, so
//! figures are those of the maps at that moment.

use std::{fmt::Write, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use ebpf_common::ServiceStats;
use ebpf_loader::{DataPlane, ServiceKey};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;

use super::host_ports;

/// How long a scrape waits for the task.
const DEADLINE: Duration = Duration::from_secs(10);
/// Upper ends of the histograms' buckets, in seconds.
const BUCKETS: [f64; 14] =
    [0.000_1, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// A scrape that waits for its text.
pub(super) type Question = oneshot::Sender<String>;

/// What the task counts itself.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    /// Connected datagram sockets that were moved to a live endpoint.
    pub(super) healed: u64,
    programming: Histogram,
    sync: Histogram,
    last_sync: Option<jiff::Timestamp>,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    fn observe(&mut self, seconds: f64) {
        for (bucket, end) in self.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(seconds <= end);
        }
        self.count += 1;
        self.sum += seconds;
    }
}

/// One counter of a service: its name, what it means, and where it stands.
type ServiceMetric = (&'static str, &'static str, fn(&ServiceStats) -> u64);

/// Told of every service, used or not.
const ALWAYS: &str = "connections_total";

const SERVICE_METRICS: [ServiceMetric; 11] = [
    ("connections_total", "Connections and datagram exchanges sent to an endpoint.", |s| s.forwarded),
    ("refused_total", "Connections refused because the service had no endpoint.", |s| s.refused),
    (
        "affinity_hits_total",
        "Connections that session affinity sent to the endpoint of the one before.",
        |s| s.affinity_hits,
    ),
    (
        "healed_datagrams_total",
        "Datagrams sent to a live endpoint because the socket's former one was gone.",
        |s| s.healed,
    ),
    ("external_connections_total", "Connections from outside.", |s| s.external),
    (
        "external_found_again_total",
        "Connections from outside that were open and not known here any more.",
        |s| s.found_again,
    ),
    ("denied_packets_total", "Packets from outside the source ranges.", |s| s.denied),
    ("received_packets_total", "Packets from clients outside to endpoints.", |s| s.packets_in),
    ("received_bytes_total", "Bytes from clients outside to endpoints.", |s| s.bytes_in),
    ("sent_packets_total", "Packets from endpoints to clients outside.", |s| s.packets_out),
    ("sent_bytes_total", "Bytes from endpoints to clients outside.", |s| s.bytes_out),
];

impl Metrics {
    /// Notes one write of the maps, and when what it wrote had been changed.
    pub(super) fn synced(&mut self, took: Duration, triggers: &[jiff::Timestamp]) {
        let now = jiff::Timestamp::now();
        self.sync.observe(took.as_secs_f64());
        self.last_sync = Some(now);
        for trigger in triggers {
            self.programming.observe(now.duration_since(*trigger).as_secs_f64().max(0.0));
        }
    }

    /// All of it.
    pub(super) fn render(&self, plane: &DataPlane, services: &[ServiceKey]) -> String {
        let mut text = String::new();
        self.render_own(&mut text);
        render_usage(&mut text, plane);
        let stats: Vec<(String, ServiceStats)> = services
            .iter()
            .zip(plane.stats_of_all(services))
            .filter_map(|(key, stats)| Some((labels(key)?, stats?)))
            .collect();
        for (name, help, figure) in SERVICE_METRICS {
            head(&mut text, &format!("keelson_service_{name}"), "counter", help);
            // Of thousands of services few have all figures: a sample that is missing is 0.
            for (labels, stats) in stats.iter().filter(|(_, stats)| name == ALWAYS || figure(stats) > 0) {
                // Writing to a string cannot fail.
                writeln!(text, "keelson_service_{name}{{{labels}}} {}", figure(stats)).ok();
            }
        }
        let name = "keelson_service_endpoint_connections_total";
        head(&mut text, name, "counter", "Connections and datagram exchanges given to an endpoint.");
        for key in services {
            let Some(labels) = labels(key) else { continue };
            let used = plane.backend_connections(key).into_iter().filter(|(_, connections)| *connections > 0);
            for (address, connections) in used {
                writeln!(text, "{name}{{{labels},endpoint=\"{address}\"}} {connections}").ok();
            }
        }
        text
    }

    fn render_own(&self, text: &mut String) {
        let programming = "kubeproxy_network_programming_duration_seconds";
        let help = "Time from the change of a Service or pod to the written maps.";
        histogram(text, programming, help, &self.programming);
        let sync = "kubeproxy_sync_proxy_rules_duration_seconds";
        histogram(text, sync, "Time from the event read to the last write of the maps.", &self.sync);
        let last = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
        head(text, last, "gauge", "When the maps were last written.");
        let time = self.last_sync.map_or(0.0, |time| time.as_duration().as_secs_f64());
        writeln!(text, "{last} {time}").ok();
        let healed = "keelson_service_healed_sockets_total";
        head(text, healed, "counter", "Connected datagram sockets moved to a live endpoint.");
        writeln!(text, "{healed} {}", self.healed).ok();
    }
}

fn render_usage(text: &mut String, plane: &DataPlane) {
    let usage = plane.usage();
    let capacity = usage.capacity;
    let figures = [
        ("services", usage.services as u64, capacity.services),
        ("frontends", u64::from(usage.frontends), capacity.frontends),
        ("backends", u64::from(usage.backends), capacity.backends),
        ("extent_words", u64::from(usage.extent_words), capacity.extent_words),
        ("flows", u64::from(usage.flows.entries), usage.flows.capacity),
    ];
    head(text, "keelson_service_map_entries", "gauge", "Entries of a map in use.");
    for (map, used, _) in figures {
        writeln!(text, "keelson_service_map_entries{{map=\"{map}\"}} {used}").ok();
    }
    head(text, "keelson_service_map_capacity", "gauge", "Entries that a map has room for before it grows.");
    for (map, _, capacity) in figures {
        writeln!(text, "keelson_service_map_capacity{{map=\"{map}\"}} {capacity}").ok();
    }
    head(
        text,
        "keelson_service_outside_devices",
        "gauge",
        "Network devices that clients outside are served through.",
    );
    for (side, count) in [("outer", usage.outer_devices), ("inner", usage.inner_devices)] {
        writeln!(text, "keelson_service_outside_devices{{side=\"{side}\"}} {count}").ok();
    }
    head(
        text,
        "keelson_service_shortcut_pods",
        "gauge",
        "Pods of this node that hand their packets straight to each other.",
    );
    writeln!(text, "keelson_service_shortcut_pods {}", usage.shortcuts).ok();
    head(
        text,
        "keelson_service_routed_pod_addresses",
        "gauge",
        "Addresses of pods of this node that exchange packets with other nodes without bridge and stack.",
    );
    writeln!(text, "keelson_service_routed_pod_addresses {}", usage.far_pods).ok();
    head(text, "keelson_service_refused", "gauge", "Services that are not or only partly programmed.");
    writeln!(text, "keelson_service_refused {}", usage.refused).ok();
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n").ok();
}

fn histogram(text: &mut String, name: &str, help: &str, values: &Histogram) {
    head(text, name, "histogram", help);
    for (end, count) in BUCKETS.iter().zip(values.buckets) {
        writeln!(text, "{name}_bucket{{le=\"{end}\"}} {count}").ok();
    }
    writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {}", values.count).ok();
    writeln!(text, "{name}_sum {}\n{name}_count {}", values.sum, values.count).ok();
}

/// The parts of `namespace/name:port/protocol/family`; a host port has its owner for a name, and no namespace.
fn labels(key: &ServiceKey) -> Option<String> {
    if host_ports::is_host_port(key) {
        let owner = host_ports::owner_of(key)?;
        let mut parts = key.0.rsplit('/');
        let (family, port, protocol) = (parts.next()?, parts.next()?, parts.next()?);
        return Some(format!(
            "namespace=\"\",service=\"hostport/{owner}\",port=\"{port}\",protocol=\"{protocol}\",family=\"{family}\""
        ));
    }
    let (namespace, rest) = key.0.split_once('/')?;
    let (name, rest) = rest.split_once(':')?;
    let mut parts = rest.split('/');
    let (port, protocol, family) = (parts.next()?, parts.next()?, parts.next()?);
    Some(format!(
        "namespace=\"{namespace}\",service=\"{name}\",port=\"{port}\",protocol=\"{protocol}\",family=\"{family}\""
    ))
}

/// Serves `/metrics` until `cancel`.
pub(super) async fn serve(listener: TcpListener, asker: mpsc::Sender<Question>, cancel: CancellationToken) {
    let router = Router::new().route("/metrics", get(scrape)).with_state(asker);
    let served = axum::serve(listener, router).with_graceful_shutdown(cancel.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::warn!(%error, "the metrics server ended");
    }
}

async fn scrape(State(asker): State<mpsc::Sender<Question>>) -> impl IntoResponse {
    let (question, answer) = oneshot::channel();
    let text = async {
        asker.send(question).await.ok()?;
        answer.await.ok()
    };
    let (status, kind, text) = if let Ok(Some(text)) = tokio::time::timeout(DEADLINE, text).await {
        (StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
    } else {
        let text = "the proxy does not answer".to_owned();
        (StatusCode::SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", text)
    };
    (status, [(CONTENT_TYPE, kind)], text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_becomes_labels_and_nothing_else_does() {
        let labels_of = |text: &str| labels(&ServiceKey(text.into()));
        assert_eq!(
            labels_of("default/web:80/TCP/IPv4").unwrap(),
            "namespace=\"default\",service=\"web\",port=\"80\",protocol=\"TCP\",family=\"IPv4\""
        );
        assert_eq!(
            labels_of("hostport/net,a,eth0.json/TCP/8080/IPv4").unwrap(),
            "namespace=\"\",service=\"hostport/net,a,eth0.json\",port=\"8080\",protocol=\"TCP\",family=\"IPv4\""
        );
        assert_eq!(labels_of("unclaimed-3"), None);
    }

    #[test]
    fn a_histogram_counts_up_to_each_end() {
        let mut metrics = Metrics::default();
        let ago = jiff::Timestamp::now() - jiff::SignedDuration::from_millis(300);
        metrics.synced(Duration::from_micros(50), &[ago]);
        let mut text = String::new();
        metrics.render_own(&mut text);
        let has = |line: &str| assert!(text.contains(line), "{line} is not in:\n{text}");
        has("kubeproxy_network_programming_duration_seconds_bucket{le=\"0.25\"} 0\n");
        has("kubeproxy_network_programming_duration_seconds_bucket{le=\"0.5\"} 1\n");
        has("kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.0001\"} 1\n");
        has("kubeproxy_sync_proxy_rules_duration_seconds_count 1\n");
    }
}
