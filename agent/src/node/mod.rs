//! This node towards the API server: registration, status, lease, and the CNI configuration for its podCIDR.
//!
//! Inputs: the machine ([`machine`]), its figures, the CRI's health, the node object as watched ([`NodeFacts`]).
//! Outputs: the Node and its status, a Lease, one file. Three independent loops; none waits for another. Nothing here
//! touches pods.
//!
//! Reading order: [`machine`] → [`conditions`] and [`status`] (pure) → [`register`] → [`report`], [`lease`], [`cni`].

mod cni;
mod conditions;
mod lease;
mod machine;
mod register;
mod report;
mod status;

pub(crate) use machine::huge_pages;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::config::AgentConfig;
use crate::contracts::{NodeFacts, RuntimeHealth};
use crate::host::stats;

/// Version that nodes report.
pub const KUBELET_VERSION: &str = "v1.36.0+keelson";
/// Deadline of one request to the API server.
const DEADLINE: Duration = Duration::from_secs(10);
/// Pause after a failed request, doubled up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(7);

/// Registers the node and keeps it reported until `cancel`. Unreachable API servers are waited for.
pub async fn run(
    client: Client,
    config: Arc<AgentConfig>,
    facts: NodeFacts,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let machine = tokio::task::spawn_blocking(machine::Machine::read)
        .await?
        .context("cannot read what this machine is")?;
    let report = report::run(client.clone(), Arc::clone(&config), machine, facts.clone());
    let lease = lease::run(client, Arc::clone(&config), facts.node.clone());
    let cni = cni::run(
        config.keelson.cni.clone(),
        facts.node.clone(),
        facts.overlay.clone(),
        Arc::clone(&facts.recheck),
    );
    tokio::select! {
        // Each loop only ends by being dropped; what it wrote is complete at every await point.
        () = cancel.cancelled() => Ok(()),
        outcome = async { tokio::try_join!(report, lease, cni) } => outcome.map(|_| ()),
    }
}

/// The node of an agent without an API server: says in `node` what it would have registered, so that admission, allocatable
/// and the CNI configuration (for `podCIDR`) are as with one.
pub async fn run_alone(
    config: Arc<AgentConfig>,
    (health, recheck): (watch::Receiver<RuntimeHealth>, Arc<Notify>),
    node: watch::Sender<Option<Arc<Node>>>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let machine = tokio::task::spawn_blocking(machine::Machine::read)
        .await?
        .context("cannot read what this machine is")?;
    let root_dir = config.keelson.root_dir.clone();
    let figures = tokio::task::spawn_blocking(move || stats::read(&root_dir)).await??;
    let mut known = register::node(&config, register::labels(&config, &machine));
    let ranges: Vec<String> =
        config.pod_cidr.split(',').filter(|range| !range.is_empty()).map(str::to_owned).collect();
    if let Some(spec) = known.spec.as_mut() {
        spec.pod_cidr = ranges.first().cloned();
        spec.pod_cidrs = Some(ranges);
    }
    known.status = Some(status::desired(status::Inputs {
        config: &config,
        machine: &machine,
        figures: &figures,
        devices: &BTreeMap::new(),
        volumes_in_use: &BTreeSet::new(),
        health: &health.borrow(),
        images: &[],
        conditions: Vec::new(),
        current: None,
    }));
    node.send_replace(Some(Arc::new(known)));
    let cni = cni::run(config.keelson.cni.clone(), node.subscribe(), None, recheck);
    tokio::select! {
        // What the loop wrote is complete at every await point.
        () = cancel.cancelled() => Ok(()),
        outcome = cni => outcome,
    }
}

/// A request's answer, or why there is none, within [`DEADLINE`].
async fn within<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, RequestError> {
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(answer) => answer.map_err(RequestError::from),
        Err(_elapsed) => Err(RequestError::Deadline),
    }
}

/// A failed request to the API server.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    /// It said no, or could not be reached.
    #[error("request to the API server failed")]
    Api(#[source] Box<kube::Error>),
    /// It did not answer.
    #[error("no answer from the API server within {} s", DEADLINE.as_secs())]
    Deadline,
}

impl From<kube::Error> for RequestError {
    fn from(error: kube::Error) -> Self {
        Self::Api(Box::new(error))
    }
}

impl RequestError {
    /// HTTP status of an answer that says no.
    fn code(&self) -> Option<u16> {
        match self {
            Self::Api(error) => match error.as_ref() {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Self::Deadline => None,
        }
    }
}

/// Growing pauses between attempts.
struct Pause(Duration);

impl Pause {
    fn new() -> Self {
        Self(FIRST_PAUSE)
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
    }
}
