//! Probes: one task per probe of a running container; thresholds are decided by [`agent_core::probe`].
//!
//! Inputs: the pod's spec and which instances run. Outputs: verdict changes to the pod's loop, Unhealthy events, and
//! counters. A check that cannot be made (runtime away) is no result. Tasks end with their container.

pub mod check;
pub mod counters;
mod grpc;
mod http;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use agent_core::probe::{ProbeKind, ProbeReport, ProbeSettings, ProbeState, ProbeStep, wanted};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use check::{CheckTarget, Checked};
use counters::{ProbeCounters, Tally};

use crate::events::{EventRecorder, EventType};
use crate::runtime::cri::Cri;

/// What probes of every pod share.
#[derive(Clone)]
pub struct Prober {
    /// For exec probes.
    pub cri: Cri,
    /// For Unhealthy events.
    pub events: EventRecorder,
    /// For metrics.
    pub counters: Arc<ProbeCounters>,
    /// When the agent started: containers older than that are probed with jitter.
    pub agent_started: Timestamp,
}

/// A running instance to probe.
#[derive(Debug, Clone)]
pub struct ProbeTarget<'a> {
    /// The pod.
    pub pod: &'a Arc<Pod>,
    /// The container.
    pub container: &'a Container,
    /// Instance.
    pub container_id: &'a str,
    /// When it started.
    pub started_at: Timestamp,
    /// Address to connect to.
    pub address: Option<IpAddr>,
    /// Its startup probe has succeeded.
    pub started: bool,
    /// Last known readiness, from before a restart of the agent.
    pub ready: bool,
    /// Liveness and startup are not asked any more (the pod is being deleted).
    pub ending: bool,
}

/// The probe tasks of one pod.
pub struct ProbeSet {
    prober: Prober,
    reports: mpsc::Sender<ProbeReport>,
    tasks: BTreeMap<(String, ProbeKind), (String, AbortHandle)>,
}

impl ProbeSet {
    /// No tasks yet; verdicts go to `reports`.
    pub fn new(prober: Prober, reports: mpsc::Sender<ProbeReport>) -> Self {
        Self { prober, reports, tasks: BTreeMap::new() }
    }

    /// Makes the tasks those that `targets` need: starts missing ones, ends others.
    pub fn sync(&mut self, targets: &[ProbeTarget<'_>]) {
        let mut asked = BTreeMap::new();
        for target in targets {
            for (kind, probe) in wanted(target.container, target.started, target.ending) {
                asked.insert((target.container.name.clone(), kind), (target, probe));
            }
        }
        self.tasks.retain(|key, (container_id, task)| {
            let keep = asked.get(key).is_some_and(|(target, _)| target.container_id == container_id);
            if !keep {
                task.abort();
            }
            keep
        });
        for (key, (target, probe)) in asked {
            if !self.tasks.contains_key(&key) {
                let task = self.start(key.1, target, probe);
                self.tasks.insert(key, (target.container_id.to_owned(), task));
            }
        }
    }

    fn start(&self, kind: ProbeKind, target: &ProbeTarget<'_>, probe: &Probe) -> AbortHandle {
        let settings = ProbeSettings::of(probe);
        let before_agent = target.started_at < self.prober.agent_started;
        let state = match kind {
            ProbeKind::Readiness if before_agent => ProbeState::resumed(kind, settings, target.ready),
            _ => ProbeState::new(kind, settings, probe.exec.is_none()),
        };
        let task = ProbeTask {
            prober: self.prober.clone(),
            reports: self.reports.clone(),
            kind,
            settings,
            state,
            tally: self.prober.counters.tally(target.pod, &target.container.name, kind),
            pod: Arc::clone(target.pod),
            probe: probe.clone(),
            target: CheckTarget {
                container: target.container.clone(),
                container_id: target.container_id.to_owned(),
                address: target.address,
            },
        };
        let first = first_check(&settings, target, before_agent);
        tokio::spawn(task.run(first)).abort_handle()
    }
}

impl Drop for ProbeSet {
    fn drop(&mut self) {
        self.tasks.values().for_each(|(_, task)| task.abort());
    }
}

/// The initial delay counts from the container's start. After a restart of the agent the probes of all containers
/// would fire at once: they are spread over their period by the container's id.
fn first_check(settings: &ProbeSettings, target: &ProbeTarget<'_>, before_agent: bool) -> Duration {
    let running_for = Timestamp::now().duration_since(target.started_at);
    let delay = settings.initial_delay.saturating_sub(Duration::try_from(running_for).unwrap_or_default());
    if !before_agent || !delay.is_zero() {
        return delay;
    }
    let spread = agent_core::hash::fnv1a(target.container_id.as_bytes()) % 1000;
    settings.period.saturating_mul(spread) / 1000
}

struct ProbeTask {
    prober: Prober,
    reports: mpsc::Sender<ProbeReport>,
    kind: ProbeKind,
    settings: ProbeSettings,
    state: ProbeState,
    tally: Tally,
    pod: Arc<Pod>,
    probe: Probe,
    target: CheckTarget,
}

impl ProbeTask {
    async fn run(mut self, first: Duration) {
        tokio::time::sleep(first).await;
        loop {
            let began = Instant::now();
            let checked =
                check::check_probe(&self.prober.cri, &self.probe, &self.target, self.settings.timeout).await;
            self.tally.count(&checked, began.elapsed());
            let step = match &checked {
                Checked::Success(_) | Checked::Warning(_) => self.state.on_result(true),
                Checked::Failure(_) => self.state.on_result(false),
                Checked::Unknown(_) => {
                    ProbeStep { verdict: None, report: true, next: Some(self.settings.period) }
                }
            };
            self.report_event(&checked, step);
            if let Some(healthy) = step.verdict {
                let report = ProbeReport {
                    container: self.target.container.name.clone(),
                    container_id: self.target.container_id.clone(),
                    kind: self.kind,
                    healthy,
                    grace: self.probe.termination_grace_period_seconds,
                };
                if self.reports.send(report).await.is_err() {
                    return;
                }
            }
            let Some(pause) = step.next else { return };
            tokio::time::sleep_until(began + pause).await;
        }
    }

    fn report_event(&self, checked: &Checked, step: ProbeStep) {
        let title = self.kind.title();
        let (reason, message) = match checked {
            Checked::Failure(output) if step.report => {
                ("Unhealthy", format!("{title} probe failed: {output}"))
            }
            Checked::Unknown(error) => {
                ("Unhealthy", format!("{title} probe errored and resulted in unknown state: {error}"))
            }
            Checked::Warning(output) => ("ProbeWarning", format!("{title} probe warning: {output}")),
            Checked::Failure(_) | Checked::Success(_) => return,
        };
        let name = self.target.container.name.as_str();
        self.prober.events.pod(&self.pod, Some(name), EventType::Warning, reason, message);
    }
}
