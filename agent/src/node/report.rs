//! Writes the node's status when it changes, and every [`HEARTBEAT`] in any case.
//!
//! Looks anew every `nodeStatusUpdateFrequency`, and at once when the CRI's health or the object changes, so that
//! Ready follows the network without delay.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cri_shim_api::v1::{Image, ListImagesRequest};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeCondition, NodeStatus};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::{info, warn};

use super::conditions::conditions;
use super::machine::Machine;
use super::status::{self, Inputs};
use super::{RequestError, register, within};
use crate::config::AgentConfig;
use crate::contracts::NodeFacts;
use crate::events::EventType;
use crate::host::stats::{self, NodeFigures};

/// The status is written at least this often, unless the configuration says otherwise.
const HEARTBEAT: Duration = Duration::from_secs(300);
/// Deadline of listing images.
const IMAGES_DEADLINE: Duration = Duration::from_secs(5);

/// Registers, then reports for ever.
pub(super) async fn run(
    client: Client,
    config: Arc<AgentConfig>,
    machine: Machine,
    facts: NodeFacts,
) -> anyhow::Result<()> {
    let registered = register::register(&client, &config, &machine).await;
    facts.events.node(&registered, EventType::Normal, "Starting", "Starting kubelet.");
    let mut reporter = Reporter {
        api: Api::all(client),
        root_dir: config.keelson.root_dir.clone(),
        images: Vec::new(),
        node: Arc::new(registered),
        written_at: None,
        config,
        machine,
        facts,
    };
    let mut ticks = interval(reporter.config.node_status_update_frequency.0.max(Duration::from_secs(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // All arms are cancel-safe: ticks and watches lose nothing when dropped. A watch whose sender is gone (the
        // agent is stopping) would be ready for ever, so its error disables the arm.
        tokio::select! {
            _ = ticks.tick() => reporter.list_images().await,
            Ok(()) = reporter.facts.health.changed() => {}
            Ok(()) = reporter.facts.node.changed() => {}
            Ok(()) = reporter.facts.pressures.changed() => {}
            Ok(()) = reporter.facts.devices.changed() => {}
            Ok(()) = reporter.facts.volumes_in_use.changed() => {}
            Ok(()) = reporter.facts.going_down.changed() => {}
            else => return Ok(()),
        }
        if let Err(error) = reporter.pass().await {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            warn!(%error, cause, "node status not written");
        }
    }
}

/// A failed pass; the next one tries again.
#[derive(Debug, thiserror::Error)]
enum ReportError {
    #[error("cannot read the node's figures")]
    Figures(#[source] std::io::Error),
    #[error("cannot write the node's status")]
    Write(#[source] RequestError),
}

struct Reporter {
    api: Api<Node>,
    config: Arc<AgentConfig>,
    machine: Machine,
    facts: NodeFacts,
    root_dir: PathBuf,
    images: Vec<Image>,
    /// The newest object known, by watch or by answer.
    node: Arc<Node>,
    written_at: Option<Instant>,
}

impl Reporter {
    async fn pass(&mut self) -> Result<(), ReportError> {
        self.take_newer_object();
        let figures = self.figures().await.map_err(ReportError::Figures)?;
        let health = self.facts.health.borrow_and_update().clone();
        if health.runtime.is_none() {
            // Not asked yet: a restarted agent must not report a working node as broken.
            return Ok(());
        }
        let current = self.node.status.clone().unwrap_or_default();
        let before = current.conditions.clone().unwrap_or_default();
        let pressures = self.facts.pressures.borrow_and_update().clone();
        let going_down = *self.facts.going_down.borrow_and_update();
        let devices = self.facts.devices.borrow_and_update().clone();
        let volumes_in_use = self.facts.volumes_in_use.borrow_and_update().clone();
        let conditions = conditions(&pressures, (&health, going_down), &before, Timestamp::now());
        let desired = status::desired(Inputs {
            config: &self.config,
            machine: &self.machine,
            figures: &figures,
            devices: &devices,
            volumes_in_use: &volumes_in_use,
            health: &health,
            images: &self.images,
            conditions: conditions.clone(),
            current: Some(&current),
        });
        let heartbeat = self.config.node_status_report_frequency.map_or(HEARTBEAT, |frequency| frequency.0);
        let is_due = self.written_at.is_none_or(|written| written.elapsed() >= heartbeat);
        if !is_due && !status::differs(&desired, &current) {
            return Ok(());
        }
        self.write(&desired).await.map_err(ReportError::Write)?;
        self.tell_changes(&before, &conditions);
        Ok(())
    }

    async fn write(&mut self, desired: &NodeStatus) -> Result<(), RequestError> {
        let patch = Patch::Merge(json!({"status": without_gone(desired, self.node.status.as_ref())}));
        let name = &self.config.keelson.node_name;
        let node = within(self.api.patch_status(name, &PatchParams::default(), &patch)).await?;
        self.node = Arc::new(node);
        self.written_at = Some(Instant::now());
        Ok(())
    }

    /// The watch lags behind answers to our own writes; going back would write the same again.
    fn take_newer_object(&mut self) {
        let version = |node: &Node| node.metadata.resource_version.as_ref()?.parse::<u64>().ok();
        if let Some(watched) = self.facts.node.borrow_and_update().clone()
            && version(&watched) >= version(&self.node)
        {
            self.node = watched;
        }
    }

    async fn figures(&self) -> std::io::Result<NodeFigures> {
        let root_dir = self.root_dir.clone();
        tokio::task::spawn_blocking(move || stats::read(&root_dir)).await?
    }

    /// Keeps the last list when the runtime does not answer.
    async fn list_images(&mut self) {
        let mut images = self.facts.cri.images.clone();
        if let Ok(Ok(answer)) =
            timeout(IMAGES_DEADLINE, images.list_images(ListImagesRequest::default())).await
        {
            self.images = answer.into_inner().images;
        }
    }

    fn tell_changes(&self, before: &[NodeCondition], after: &[NodeCondition]) {
        for condition in after {
            let was = before.iter().find(|was| was.type_ == condition.type_).map(|was| was.status.as_str());
            if was == Some(condition.status.as_str()) {
                continue;
            }
            let reason = event_reason(condition);
            let message = condition.message.as_deref().unwrap_or_default();
            info!(condition = %condition.type_, status = %condition.status, %message, "node condition changed");
            let text = format!("Node {} status is now: {reason}", self.config.keelson.node_name);
            self.facts.events.node(&self.node, EventType::Normal, reason, text);
        }
    }
}

/// A merge leaves what it does not name: resources that are gone are named, with null.
fn without_gone(desired: &NodeStatus, current: Option<&NodeStatus>) -> Value {
    let mut status = json!(desired);
    for list in ["capacity", "allocatable"] {
        let known = json!(current)[list].as_object().cloned().unwrap_or_default();
        if let Some(wanted) = status[list].as_object_mut() {
            for name in known.into_iter().map(|(name, _)| name) {
                wanted.entry(name).or_insert(Value::Null);
            }
        }
    }
    status
}

/// The event's reason for a condition's new status, as upstream names it.
fn event_reason(condition: &NodeCondition) -> &'static str {
    match (condition.type_.as_str(), condition.status == "True") {
        ("Ready", true) => "NodeReady",
        ("Ready", false) => "NodeNotReady",
        ("MemoryPressure", true) => "NodeHasInsufficientMemory",
        ("MemoryPressure", false) => "NodeHasSufficientMemory",
        ("DiskPressure", true) => "NodeHasDiskPressure",
        ("DiskPressure", false) => "NodeHasNoDiskPressure",
        (_, true) => "NodeHasInsufficientPID",
        (_, false) => "NodeHasSufficientPID",
    }
}
