//! What a person can see of the server while it works: spans and outcomes of requests, counters and times for Prometheus.
//!
//! [`rpc`] watches every gRPC call from outside the services, [`stage`] the parts of one (CNI, pulls, the pause process), and
//! [`containerd_call`] every call to containerd. [`serve`] hands the figures out. They are the process's own and so live in
//! one static place; nothing here decides anything. Labels come from fixed lists, so no client can make them grow.

pub mod rpc;
pub mod serve;

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tracing::Instrument;

/// From a list that is answered from memory to a pull: in seconds.
const BOUNDS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0];

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rpc {
    rpc: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RpcOutcome {
    rpc: &'static str,
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stage {
    stage: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    call: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

type Times<L> = Family<L, Histogram, fn() -> Histogram>;

/// Every figure there is.
struct Metrics {
    registry: Registry,
    rpcs: Family<RpcOutcome, Counter>,
    rpc_times: Times<Rpc>,
    rpcs_in_flight: Gauge,
    stage_times: Times<Stage>,
    stage_failures: Family<Stage, Counter>,
    call_times: Times<Call>,
    call_failures: Family<Call, Counter>,
    events_missed: Counter,
    sandboxes: Family<State, Gauge>,
    containers: Family<State, Gauge>,
    followers: Gauge,
    detachments_owed: Gauge,
    pulls: Gauge,
    pulled_bytes: Counter,
    ready: Gauge,
    process: serve::Process,
}

fn times<L: Clone + std::hash::Hash + Eq>() -> Times<L> {
    Family::new_with_constructor(|| Histogram::new(BOUNDS))
}

impl Metrics {
    fn new() -> Self {
        let mut this = Self {
            registry: Registry::with_prefix("keelson_cri"),
            rpcs: Family::default(),
            rpc_times: times(),
            rpcs_in_flight: Gauge::default(),
            stage_times: times(),
            stage_failures: Family::default(),
            call_times: times(),
            call_failures: Family::default(),
            events_missed: Counter::default(),
            sandboxes: Family::default(),
            containers: Family::default(),
            followers: Gauge::default(),
            detachments_owed: Gauge::default(),
            pulls: Gauge::default(),
            pulled_bytes: Counter::default(),
            ready: Gauge::default(),
            process: serve::Process::default(),
        };
        let registry = &mut this.registry;
        registry.register("rpc", "CRI requests answered, by gRPC code", this.rpcs.clone());
        registry.register(
            "rpc_duration_seconds",
            "Time from a CRI request to its answer",
            this.rpc_times.clone(),
        );
        registry.register("rpc_in_flight", "CRI requests under way", this.rpcs_in_flight.clone());
        registry.register(
            "stage_duration_seconds",
            "Time of the parts of requests",
            this.stage_times.clone(),
        );
        registry.register("stage_failures", "Parts of requests that failed", this.stage_failures.clone());
        registry.register(
            "containerd_call_duration_seconds",
            "Time of calls to containerd",
            this.call_times.clone(),
        );
        registry.register(
            "containerd_call_failures",
            "Calls to containerd that failed",
            this.call_failures.clone(),
        );
        registry.register(
            "events_missed",
            "Events that a slow follower did not get",
            this.events_missed.clone(),
        );
        registry.register("event_followers", "Clients that follow container events", this.followers.clone());
        registry.register(
            "detachments_owed",
            "Sandboxes that are gone and that the pod network could not detach yet",
            this.detachments_owed.clone(),
        );
        registry.register("image_pulls", "Images being pulled now", this.pulls.clone());
        registry.register(
            "image_pull_bytes",
            "Bytes of layers that came from registries",
            this.pulled_bytes.clone(),
        );
        registry.register("sandboxes", "Sandboxes, by state", this.sandboxes.clone());
        registry.register("containers", "Containers, by state", this.containers.clone());
        registry.register("ready", "1 when the runtime can run containers", this.ready.clone());
        this.process.register(registry);
        let build = Family::<Build, Gauge>::default();
        build.get_or_create(&Build { version: env!("CARGO_PKG_VERSION") }).set(1);
        registry.register("build_info", "What runs", build);
        this
    }
}

/// Does one part of a request, with its time and its failure counted under `name`.
pub async fn stage<T, E>(name: &'static str, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let begun = Instant::now();
    let result = work.instrument(tracing::debug_span!("stage", name)).await;
    let label = Stage { stage: name };
    METRICS.stage_times.get_or_create(&label).observe(begun.elapsed().as_secs_f64());
    if result.is_err() {
        METRICS.stage_failures.get_or_create(&label).inc();
    }
    tracing::debug!(
        stage = name,
        milliseconds = milliseconds(begun.elapsed()),
        failed = result.is_err(),
        "stage"
    );
    result
}

/// Counts one call to containerd that took `time`.
pub fn containerd_call(call: &'static str, time: Duration, failed: bool) {
    let label = Call { call };
    METRICS.call_times.get_or_create(&label).observe(time.as_secs_f64());
    if failed {
        METRICS.call_failures.get_or_create(&label).inc();
    }
}

/// Counts events that a follower was too slow for.
pub fn events_missed(count: u64) {
    METRICS.events_missed.inc_by(count);
}

/// Counts bytes of a layer that came from a registry.
pub fn pulled_bytes(count: u64) {
    METRICS.pulled_bytes.inc_by(count);
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stages_and_calls_are_counted_with_their_failures() {
        assert_eq!(stage("test_stage", async { Ok::<_, ()>(7) }).await, Ok(7));
        assert_eq!(stage("test_stage", async { Err::<(), _>(()) }).await, Err(()));
        containerd_call("Test.Call", Duration::from_millis(3), true);
        events_missed(2);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &METRICS.registry).unwrap();
        for line in [
            "keelson_cri_stage_duration_seconds_count{stage=\"test_stage\"} 2",
            "keelson_cri_stage_failures_total{stage=\"test_stage\"} 1",
            "keelson_cri_containerd_call_duration_seconds_bucket{le=\"0.005\",call=\"Test.Call\"} 1",
            "keelson_cri_containerd_call_failures_total{call=\"Test.Call\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }
}
