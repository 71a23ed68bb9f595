//! The agent: the real [`PodLoop`] of each pod, with what the worker of `agent/src/pods` puts around it. What is async there is
//! an event here: a look at the runtime takes a moment, a step ends when its answer arrives, one input is taken at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use agent_core::fate::Verdict;
use agent_core::model::{DesiredPod, Fate, RunState};
use agent_core::plan::{PlanSettings, PodAction, PodPlan};
use agent_core::pod_loop::{PodLoop, StepEnd};
use agent_core::probe::{ProbeKind, ProbeReport, ProbeState, wanted};
use agent_core::status::NodeIdentity;
use agent_core::status::sync::Written;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

/// Why a call failed.
#[derive(Debug, Clone)]
pub(crate) enum Trouble {
    /// Nobody answered; what was done nobody knows.
    Away,
    /// The answer was no.
    Refused(String),
}

impl Trouble {
    /// As the end of a step whose trouble the status tells.
    pub(crate) fn told_as(self, reason: &str) -> StepEnd {
        match self {
            Self::Away => StepEnd::Away,
            Self::Refused(message) => StepEnd::Refused { reason: reason.to_owned(), message },
        }
    }
}

/// How a task ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Step(StepEnd),
    Status(Written),
}

/// One agent, from its start to its death.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) generation: u64,
    pub(crate) loops: BTreeMap<u64, Loop>,
    pub(crate) synced: bool,
    /// What the last audit saw of each pod.
    pub(crate) seen: BTreeMap<String, BTreeMap<String, RunState>>,
}

/// A probe that runs.
#[derive(Debug)]
pub(crate) struct Probing {
    pub(crate) container_id: String,
    pub(crate) state: ProbeState,
}

/// A pod's loop, with its inputs, its tasks, and what the manager knows of it.
#[derive(Debug)]
pub(crate) struct Loop {
    pub(crate) id: u64,
    pub(crate) uid: String,
    /// The pod as the manager knows it.
    pub(crate) pod: Arc<Pod>,
    pub(crate) verdict: Option<Verdict>,
    /// What the manager told last, and whether that was taken.
    pub(crate) told: DesiredPod,
    pub(crate) told_news: bool,
    pub(crate) signalled: bool,
    pub(crate) outcomes: Vec<(u64, Outcome)>,
    pub(crate) reports: Vec<ProbeReport>,
    pub(crate) observing: bool,
    pub(crate) state: PodLoop,
    pub(crate) tasks: BTreeMap<u64, Option<PodAction>>,
    /// Tasks that are in a postStart hook.
    pub(crate) hooks: BTreeSet<u64>,
    pub(crate) probes: BTreeMap<(String, ProbeKind), Probing>,
    /// The timer that counts.
    pub(crate) timer: u64,
}

/// What a pass wants done.
#[derive(Debug)]
pub(crate) enum Wish {
    Act(PodAction),
    Write(Value),
}

impl Loop {
    pub(crate) fn new(id: u64, desired: DesiredPod) -> Self {
        let mut state = PodLoop::new(desired.clone(), PlanSettings::default());
        state.memory.services_synced = true;
        Self {
            id,
            uid: desired.uid().to_owned(),
            pod: Arc::clone(&desired.pod),
            verdict: None,
            told: desired,
            told_news: false,
            signalled: false,
            outcomes: Vec::new(),
            reports: Vec::new(),
            observing: false,
            state,
            tasks: BTreeMap::new(),
            hooks: BTreeSet::new(),
            probes: BTreeMap::new(),
            timer: 0,
        }
    }

    /// The manager says something else of it.
    pub(crate) fn tell(&mut self, desired: DesiredPod) {
        self.told = desired;
        self.told_news = true;
    }

    /// The manager knows that the API object is gone.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.told.fate, Fate::Terminate { gone: true, .. })
    }

    pub(crate) fn has_input(&self) -> bool {
        self.told_news || self.signalled || !self.outcomes.is_empty() || !self.reports.is_empty()
    }

    /// One plan and what follows from it: what to start, and whether another round is due.
    pub(crate) fn round(&mut self, now: Timestamp) -> (PodPlan, Vec<Wish>, bool) {
        let settings = PlanSettings::default();
        self.state.read_clock(now);
        self.state.apply_times(now);
        if self.state.desired.fate != Fate::Run {
            // Nobody waits for the hooks of a pod that ends.
            for task in std::mem::take(&mut self.hooks) {
                self.outcomes.push((task, Outcome::Step(StepEnd::Done)));
            }
        }
        let plan = self.state.plan(now, settings);
        if plan.done {
            return (plan, Vec::new(), false);
        }
        let mut wishes: Vec<Wish> =
            self.state.begin(&plan, now, settings).into_iter().map(Wish::Act).collect();
        let started = !wishes.is_empty();
        let node = NodeIdentity { host_ip: "10.0.0.1".to_owned(), runtime_name: "containerd".to_owned() };
        self.state.derive_status(&plan, &node, now);
        let (patch, news) = self.state.tell(&plan, now);
        wishes.extend(patch.map(Wish::Write));
        (plan, wishes, started || news)
    }

    pub(crate) fn take_told(&mut self) {
        self.told_news = false;
        let next = self.told.clone();
        for (task, action) in &self.tasks {
            let pointless = action.as_ref().is_some_and(|action| self.state.is_pointless(action, &next.fate));
            if pointless && self.outcomes.iter().all(|(other, _)| other != task) {
                self.outcomes.push((*task, Outcome::Step(StepEnd::CutShort)));
            }
        }
        self.state.take_desired(next, PlanSettings::default());
    }

    pub(crate) fn absorb(&mut self, task: u64, outcome: Outcome, now: Timestamp) {
        self.hooks.remove(&task);
        let Some(action) = self.tasks.remove(&task) else { return };
        match (action, outcome) {
            (Some(action), Outcome::Step(end)) => self.state.absorb(&action, end, now),
            (Some(action), Outcome::Status(_)) => self.state.absorb(&action, StepEnd::CutShort, now),
            (None, outcome) => {
                let written = match outcome {
                    Outcome::Status(written) => written,
                    Outcome::Step(_) => Written::Failed("the write ended unexpectedly".to_owned()),
                };
                self.state.sync.done(written, now);
            }
        }
    }

    /// Probes that should run now: container, instance, which.
    pub(crate) fn wanted_probes(&self) -> Vec<(String, String, ProbeKind)> {
        let mut probes = Vec::new();
        for (container, instance, results) in self.state.probed() {
            for (kind, _) in wanted(container, results.started, self.state.is_ending()) {
                probes.push((container.name.clone(), instance.id.clone(), kind));
            }
        }
        probes
    }
}
