//! The agent: manager and pod loops as `agent/src/pods` has them, around the real decisions. What is async there is an event
//! here: a look at the runtime takes a moment, a step ends when its answer arrives, one input is taken at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use agent_core::model::{
    ContainerMemory, DesiredPod, Fate, ImageState, ObservedPod, PodMemory, ProbeFailure, RunState,
    StartFailure, Step, StepKey, containers, find_container,
};
use agent_core::plan::{PlanInput, PlanSettings, PodAction, PodPlan, active_deadline, is_finished, plan};
use agent_core::probe::{ProbeKind, ProbeState};
use agent_core::resize::Applied;
use agent_core::status::sync::{StatusSync, Written};
use agent_core::status::{NodeIdentity, StatusInput, derive};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::Value;

const FIRST_HOLD: SignedDuration = SignedDuration::from_millis(250);
const LONGEST_HOLD: SignedDuration = SignedDuration::from_secs(10);
const MOUNT_RETRY: SignedDuration = SignedDuration::from_secs(1);
const SANDBOX_RETRY: SignedDuration = SignedDuration::from_secs(2);
const OBSERVE_RETRY: SignedDuration = SignedDuration::from_millis(500);
const SET_BACK: SignedDuration = SignedDuration::from_secs(1);

/// Why a call to the runtime failed.
#[derive(Debug, Clone)]
pub(crate) enum Trouble {
    /// It could not be reached; what it did nobody knows.
    Away,
    /// It said no.
    Refused(String),
}

/// How a step ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Plain(Result<(), Trouble>),
    Volumes(Result<(), Trouble>),
    Sandbox(Result<(), Trouble>),
    Image(Result<(), Trouble>),
    Started(Result<(), (&'static str, Trouble)>),
    Status(Written),
    /// It was cut short.
    Aborted,
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

/// A probe's verdict on its way to the loop.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) container: String,
    pub(crate) container_id: String,
    pub(crate) kind: ProbeKind,
    pub(crate) healthy: bool,
    pub(crate) grace: Option<i64>,
}

/// The node's word against a pod.
#[derive(Debug, Clone)]
pub(crate) struct Verdict {
    pub(crate) reason: String,
    pub(crate) grace: Option<i64>,
}

/// A pod's loop, with what the manager knows of it.
#[derive(Debug)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a fact by itself, as in the worker that this stands for"
)]
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
    pub(crate) reports: Vec<Report>,
    pub(crate) observing: bool,
    pub(crate) stale: bool,
    pub(crate) desired: DesiredPod,
    pub(crate) observed: ObservedPod,
    pub(crate) memory: PodMemory,
    pub(crate) status: PodStatus,
    pub(crate) sync: StatusSync,
    pub(crate) tasks: BTreeMap<u64, Option<PodAction>>,
    /// Tasks that are in a postStart hook.
    pub(crate) hooks: BTreeSet<u64>,
    pub(crate) probes: BTreeMap<(String, ProbeKind), Probing>,
    holds: BTreeMap<StepKey, (u32, Timestamp)>,
    mount_failures: u32,
    pub(crate) observe_retry_at: Option<Timestamp>,
    wake_at: Option<Timestamp>,
    clock_read: Timestamp,
    /// The timer that counts.
    pub(crate) timer: u64,
}

/// What a pass wants done.
#[derive(Debug)]
pub(crate) enum Wish {
    Act(PodAction),
    Write(Value),
}

/// What the API object asks for.
pub(crate) fn fate_of(pod: &Pod, verdict: Option<&Verdict>) -> Fate {
    if pod.metadata.deletion_timestamp.is_some() {
        let own = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
        let grace = pod.metadata.deletion_grace_period_seconds.or(own).unwrap_or(30);
        return Fate::Terminate { grace, gone: false };
    }
    match verdict {
        Some(Verdict { reason, grace }) => {
            Fate::Fail { reason: reason.clone(), message: reason.clone(), grace: *grace }
        }
        None => Fate::Run,
    }
}

/// The API object is gone.
pub(crate) fn fate_of_gone(pod: &Pod) -> Fate {
    match fate_of(pod, None) {
        Fate::Terminate { grace, .. } => Fate::Terminate { grace: grace.min(1), gone: true },
        _ => Fate::Terminate { grace: 1, gone: true },
    }
}

/// Chooses one of two by the clock.
fn at_odd_second(now: Timestamp) -> bool {
    now.as_second() % 2 != 0
}

impl Loop {
    pub(crate) fn new(id: u64, desired: DesiredPod) -> Self {
        let status = desired.pod.status.clone().unwrap_or_default();
        let mut memory = PodMemory { services_synced: true, ..PodMemory::default() };
        memory.recall(&status, PlanSettings::default().max_restart_delay);
        Self {
            id,
            uid: desired.uid().to_owned(),
            pod: Arc::clone(&desired.pod),
            verdict: None,
            told: desired.clone(),
            told_news: false,
            signalled: false,
            outcomes: Vec::new(),
            reports: Vec::new(),
            observing: false,
            stale: true,
            sync: StatusSync::new(&desired.pod),
            desired,
            observed: ObservedPod::default(),
            memory,
            status,
            tasks: BTreeMap::new(),
            hooks: BTreeSet::new(),
            probes: BTreeMap::new(),
            holds: BTreeMap::new(),
            mount_failures: 0,
            observe_retry_at: None,
            wake_at: None,
            clock_read: Timestamp::MIN,
            timer: 0,
        }
    }

    /// The manager says something else of it.
    pub(crate) fn tell(&mut self, desired: DesiredPod) {
        self.told = desired;
        self.told_news = true;
    }

    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.told.fate, Fate::Terminate { gone: true, .. })
    }

    pub(crate) fn has_input(&self) -> bool {
        self.told_news || self.signalled || !self.outcomes.is_empty() || !self.reports.is_empty()
    }

    /// One plan and what follows from it: what to start, and whether another round is due.
    pub(crate) fn round(&mut self, now: Timestamp) -> (PodPlan, Vec<Wish>, bool) {
        self.read_clock(now);
        self.apply_times(now);
        let input = PlanInput {
            desired: &self.desired,
            observed: &self.observed,
            memory: &self.memory,
            now,
            settings: PlanSettings::default(),
        };
        let (plan, over) = (plan(input), is_finished(input));
        self.memory.over |= over;
        self.wake_at = plan.wake_at;
        let mut wishes = Vec::new();
        if plan.done {
            return (plan, wishes, false);
        }
        for action in &plan.actions {
            if let Some((_, until)) = self.holds.get(&action.key()).filter(|(_, until)| *until > now) {
                self.wake_at = Some(self.wake_at.map_or(*until, |at| at.min(*until)));
                continue;
            }
            self.memory.dispatched(action, now, PlanSettings::default());
            if let PodAction::StartContainer { container, attempt, .. } = action {
                let applied = find_container(self.desired.spec(), container);
                let applied = applied.map(|container| Applied::of(&container, *attempt));
                self.memory.containers.entry(container.clone()).or_default().applied = applied;
            }
            wishes.push(Wish::Act(action.clone()));
        }
        let started = !wishes.is_empty();
        let told = self.report(&plan, now, &mut wishes);
        (plan, wishes, started || told)
    }

    fn read_clock(&mut self, now: Timestamp) {
        if self.clock_read.duration_since(now) > SET_BACK {
            self.memory.clock_went_back(now);
            self.holds.clear();
            self.sync.retry_now();
        }
        self.clock_read = now;
    }

    fn apply_times(&mut self, now: Timestamp) {
        let started = self.status.start_time.as_ref().map(|time| time.0);
        let over = active_deadline(&self.desired, started).is_some_and(|deadline| deadline <= now);
        if over && self.desired.fate == Fate::Run {
            let reason = "DeadlineExceeded".to_owned();
            self.desired.fate = Fate::Fail { message: reason.clone(), reason, grace: None };
        }
        if self.desired.fate != Fate::Run {
            for task in std::mem::take(&mut self.hooks) {
                self.outcomes.push((task, Outcome::Started(Ok(()))));
            }
        }
    }

    fn report(&mut self, plan: &PodPlan, now: Timestamp, wishes: &mut Vec<Wish>) -> bool {
        let ending = matches!(self.desired.fate, Fate::Terminate { .. });
        if !self.memory.status_written {
            let node = NodeIdentity { host_ip: "10.0.0.1".to_owned(), runtime_name: "containerd".to_owned() };
            self.status = derive(StatusInput {
                desired: &self.desired,
                observed: &self.observed,
                memory: &self.memory,
                plan,
                previous: &self.status,
                node: &node,
                now,
            });
        }
        if matches!(self.desired.fate, Fate::Terminate { gone: true, .. }) {
            return false;
        }
        if let Some(patch) = self.sync.next(&self.uid, &self.status, now) {
            wishes.push(Wish::Write(patch));
        }
        let last_word = ending && plan.finished && self.sync.in_sync(&self.uid, &self.status);
        let news = last_word && !self.memory.status_written;
        self.memory.status_written |= last_word;
        news
    }

    /// When the loop looks again though nothing happened.
    pub(crate) fn next_wake(&self) -> Option<Timestamp> {
        if self.observe_retry_at.is_some() {
            return self.observe_retry_at;
        }
        let started = self.status.start_time.as_ref().map(|time| time.0);
        let deadline = active_deadline(&self.desired, started).filter(|_| self.desired.fate == Fate::Run);
        [self.wake_at, self.sync.retry_at(self.clock_read), deadline].into_iter().flatten().min()
    }

    pub(crate) fn look_failed(&mut self, now: Timestamp) {
        self.observe_retry_at = Some(now + OBSERVE_RETRY);
    }

    pub(crate) fn take_told(&mut self) {
        self.told_news = false;
        let next = self.told.clone();
        let spec_changed = next.pod.spec != self.desired.pod.spec;
        self.sync.learn(&next.pod);
        self.cut_short(&next.fate);
        let fate = self.desired.fate.followed_by(next.fate.clone());
        self.desired = DesiredPod { fate, ..next };
        if spec_changed {
            for memory in self.memory.containers.values_mut() {
                memory.image = ImageState::Unknown;
                memory.start_failure = None;
            }
            if self.memory.volumes == Step::Done {
                self.memory.volumes = Step::Todo;
            }
        }
    }

    fn cut_short(&mut self, next: &Fate) {
        let Fate::Terminate { grace: new_grace, .. } = next else { return };
        let is_ending = matches!(self.desired.fate, Fate::Terminate { .. });
        for (task, action) in &self.tasks {
            let pointless = match action {
                Some(PodAction::EnsureImage { .. } | PodAction::MountVolumes) => !is_ending,
                Some(PodAction::KillContainer { grace, .. }) => grace > new_grace,
                _ => false,
            };
            if pointless && self.outcomes.iter().all(|(other, _)| other != task) {
                self.outcomes.push((*task, Outcome::Aborted));
            }
        }
    }

    pub(crate) fn absorb(&mut self, task: u64, outcome: Outcome, now: Timestamp) {
        self.hooks.remove(&task);
        let Some(action) = self.tasks.remove(&task) else { return };
        let Some(action) = action else {
            let written = match outcome {
                Outcome::Status(written) => written,
                _ => Written::Failed("the write ended unexpectedly".to_owned()),
            };
            self.sync.done(written, now);
            return;
        };
        self.memory.finished(&action);
        match outcome {
            Outcome::Plain(Ok(())) => {
                self.stale = true;
                self.step_done(&action);
            }
            Outcome::Volumes(Ok(())) => {
                self.mount_failures = 0;
                self.memory.volumes = Step::Done;
            }
            Outcome::Volumes(Err(_)) => {
                let pause = MOUNT_RETRY.saturating_mul(1 << self.mount_failures.min(4));
                self.mount_failures += 1;
                self.memory.volumes = Step::Failed { retry_at: now + pause };
            }
            Outcome::Sandbox(result) => {
                self.stale = true;
                match result {
                    Ok(()) => self.memory.sandbox = Step::Done,
                    Err(Trouble::Away) => self.hold(&action, now),
                    Err(Trouble::Refused(_)) => {
                        self.memory.sandbox = Step::Failed { retry_at: now + SANDBOX_RETRY };
                    }
                }
            }
            Outcome::Image(result) => self.absorb_image(&action, result, now),
            Outcome::Started(result) => self.absorb_start(&action, result, now),
            Outcome::Plain(Err(_)) | Outcome::Status(_) | Outcome::Aborted => {
                self.stale = true;
                self.hold(&action, now);
            }
        }
    }

    fn step_done(&mut self, action: &PodAction) {
        self.holds.remove(&action.key());
        match action {
            PodAction::EnsureCgroup => self.memory.cgroup = Step::Done,
            PodAction::StopSandbox { id } => {
                self.memory.stopped_sandboxes.insert(id.clone());
            }
            PodAction::RemoveSandbox { id } => {
                self.memory.stopped_sandboxes.remove(id);
            }
            PodAction::TearDownVolumes => self.memory.released.volumes = true,
            PodAction::RemoveCgroup => self.memory.released.cgroup = true,
            PodAction::DeleteFromApi => self.memory.released.api = true,
            _ => {}
        }
    }

    fn hold(&mut self, action: &PodAction, now: Timestamp) {
        let failures = self.holds.get(&action.key()).map_or(0, |(failures, _)| *failures);
        let pause = FIRST_HOLD.saturating_mul(1 << failures.min(6)).min(LONGEST_HOLD);
        self.holds.insert(action.key(), (failures + 1, now + pause));
    }

    fn container(&mut self, name: &str) -> &mut ContainerMemory {
        self.memory.containers.entry(name.to_owned()).or_default()
    }

    fn absorb_image(&mut self, action: &PodAction, result: Result<(), Trouble>, now: Timestamp) {
        let PodAction::EnsureImage { container } = action else { return };
        let entry = self.container(container);
        match result {
            Ok(()) => {
                entry.image = ImageState::Present { image_ref: "sha256:1".to_owned() };
                entry.pull_backoff = agent_core::backoff::BackOff::default();
            }
            Err(Trouble::Away) => self.hold(action, now),
            Err(Trouble::Refused(message)) => {
                entry.pull_backoff.advance(now, now, agent_core::backoff::MAX);
                let reason = if at_odd_second(now) { "ErrImagePull" } else { "ErrImageNeverPull" };
                entry.image = ImageState::Failed { reason: reason.to_owned(), message, at: now };
            }
        }
    }

    fn absorb_start(
        &mut self,
        action: &PodAction,
        result: Result<(), (&'static str, Trouble)>,
        now: Timestamp,
    ) {
        self.stale = true;
        let PodAction::StartContainer { container, .. } = action else { return };
        let entry = self.container(container);
        entry.image = ImageState::Unknown;
        match result {
            Ok(()) => {}
            Err((_, Trouble::Away)) => self.hold(action, now),
            Err((reason, Trouble::Refused(message))) => {
                entry.start_failure = Some(StartFailure { reason: reason.to_owned(), message, at: now });
            }
        }
    }

    pub(crate) fn absorb_probe(&mut self, report: &Report) {
        let instance = self.observed.instances(&report.container).next();
        let Some(instance) = instance.filter(|instance| instance.id == report.container_id) else { return };
        let entry = self.memory.containers.entry(report.container.clone()).or_default();
        entry.probes = entry.probes_of(instance);
        match (report.kind, report.healthy) {
            (ProbeKind::Readiness, ready) => entry.probes.ready = ready,
            (ProbeKind::Startup, true) => entry.probes.started = true,
            (ProbeKind::Liveness, true) => {}
            (kind, false) => {
                entry.probes.failed = Some(ProbeFailure { probe: kind.word(), grace: report.grace });
            }
        }
    }

    /// Probes that should run now: container, instance, which.
    pub(crate) fn wanted_probes(&self) -> Vec<(String, String, ProbeKind)> {
        let ending = matches!(self.desired.fate, Fate::Terminate { .. });
        let mut wanted = Vec::new();
        for entry in containers(self.desired.spec()) {
            let name = &entry.container.name;
            let running = self.observed.newest(name, &self.memory).filter(|instance| {
                instance.state == RunState::Running && !self.memory.starting.contains_key(name)
            });
            let Some(instance) = running else { continue };
            let results = self.memory.container(name).probes_of(instance);
            if results.failed.is_some() {
                continue;
            }
            let mut want = |kind| wanted.push((name.clone(), instance.id.clone(), kind));
            if entry.container.startup_probe.is_some() && !results.started {
                if !ending {
                    want(ProbeKind::Startup);
                }
                continue;
            }
            if entry.container.liveness_probe.is_some() && !ending {
                want(ProbeKind::Liveness);
            }
            if entry.container.readiness_probe.is_some() {
                want(ProbeKind::Readiness);
            }
        }
        wanted
    }
}
