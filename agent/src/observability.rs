//! healthz and metrics on a loopback port of their own (10248 by default).
//!
//! Paths: `/healthz` (ok once the CRI answers), `/metrics` (process and pod counts), `/metrics/probes`. Read-only, no
//! credentials, bound to loopback by default.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::contracts::{PodLookup, RuntimeHealth};
use crate::probes::counters::ProbeCounters;

/// What is shown.
#[derive(Clone)]
pub struct Observed {
    /// CRI health.
    pub health: watch::Receiver<RuntimeHealth>,
    /// Pods.
    pub pods: Arc<dyn PodLookup>,
    /// Probe results.
    pub probes: Arc<ProbeCounters>,
}

/// Binds the port: an error names the address that is taken.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("healthz address {address} cannot be used"))
}

/// Serves until `cancel`.
pub async fn serve(
    listener: TcpListener,
    observed: Observed,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(|| async { "ok" }))
        .route("/metrics", get(metrics))
        .route(
            "/metrics/probes",
            get(|State(observed): State<Observed>| async move { observed.probes.render() }),
        )
        .with_state(observed);
    info!(address = ?listener.local_addr().ok(), "healthz and metrics");
    axum::serve(listener, router)
        .with_graceful_shutdown(cancel.cancelled_owned())
        .await
        .context("healthz server ended")
}

async fn healthz(State(observed): State<Observed>) -> (StatusCode, String) {
    match &observed.health.borrow().runtime {
        Some(Ok(())) => (StatusCode::OK, "ok".to_owned()),
        Some(Err(problem)) => (StatusCode::INTERNAL_SERVER_ERROR, problem.clone()),
        None => (StatusCode::INTERNAL_SERVER_ERROR, "the container runtime has not answered yet".to_owned()),
    }
}

async fn metrics(State(observed): State<Observed>) -> String {
    let pods = observed.pods.pods();
    let running = pods
        .iter()
        .filter(|pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running"))
        .count();
    let containers: usize = pods
        .iter()
        .flat_map(|pod| pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten()))
        .filter(|status| status.state.as_ref().is_some_and(|state| state.running.is_some()))
        .count();
    let mut text = String::new();
    let mut gauge = |name: &str, help: &str, value: u64| {
        // Writing to a String cannot fail.
        write!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n").ok();
    };
    gauge("kubelet_running_pods", "Number of pods that are running.", running as u64);
    gauge("kubelet_running_containers", "Number of containers that are running.", containers as u64);
    gauge("kubelet_desired_pods", "Number of pods bound to this node.", pods.len() as u64);
    gauge("process_resident_memory_bytes", "Resident memory size in bytes.", resident_bytes().await);
    text
}

/// From /proc: pages of 4 KiB on every supported platform are not assumed, kB are given.
async fn resident_bytes() -> u64 {
    let status = tokio::fs::read_to_string("/proc/self/status").await.unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
