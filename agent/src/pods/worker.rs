//! One pod's loop: woken by a change, observes, plans, starts steps, reports.
//!
//! Inputs: the desired pod, signals, step outcomes, probe verdicts, time. Outputs: steps, status, events, a view for
//! lookups. What each input means is decided by [`PodLoop`]; this is its tasks and channels. The loop itself never waits for
//! anything but its inputs; it ends when nothing of the pod is left. At shutdown it just stops: the containers go on, and the
//! next agent picks them up.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use agent_core::model::{DesiredPod, Fate};
use agent_core::plan::{PlanSettings, PodAction, PodPlan, Waiting};
use agent_core::pod_loop::{DEADLINE_EXCEEDED, DEADLINE_MESSAGE, PodLoop};
use agent_core::probe::ProbeReport;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::clock::Clock;
use super::context::PodContext;
use super::directory::{PodView, Signals};
use super::steps::{self, Outcome, Step, StepInput};
use crate::contracts::HostPath;
use crate::events::EventType;
use crate::probes::ProbeSet;
use crate::runtime::observe::Observer;
use crate::runtime::security::ImageUser;
use crate::sources::objects::{Wake, keys_of};

/// Verdicts waiting for the loop; a probe task waits when it is full.
const PROBE_REPORTS: usize = 16;
/// A loop that plans more often than this within one pass has a bug: it stops until the next change.
const PASSES: usize = 16;

/// Inputs of a loop.
pub(super) struct WorkerInput {
    pub(super) context: Arc<PodContext>,
    pub(super) desired: watch::Receiver<DesiredPod>,
    pub(super) signals: watch::Sender<Signals>,
    pub(super) view: watch::Sender<PodView>,
    pub(super) cancel: CancellationToken,
}

/// State of one pod's loop. Owned by its task.
pub(super) struct Worker {
    pub(super) context: Arc<PodContext>,
    inbox: watch::Receiver<DesiredPod>,
    signals: watch::Receiver<Signals>,
    signal_sender: watch::Sender<Signals>,
    pub(super) view: watch::Sender<PodView>,
    cancel: CancellationToken,
    pub(super) state: PodLoop,
    observer: Observer,
    pub(super) waiting: BTreeMap<String, Waiting>,
    pub(super) volumes: Arc<HashMap<String, HostPath>>,
    pub(super) mount_problem: Option<String>,
    pub(super) image_users: Arc<HashMap<String, ImageUser>>,
    pub(super) probes: ProbeSet,
    reports: mpsc::Receiver<ProbeReport>,
    tasks: JoinSet<Outcome>,
    running: HashMap<tokio::task::Id, (Option<PodAction>, AbortHandle)>,
    ending: CancellationToken,
    seen_objects: u64,
}

/// Runs the loop to its end.
pub(super) async fn run(input: WorkerInput) {
    let mut worker = Worker::new(input);
    worker.register_objects();
    loop {
        if worker.pass().await {
            worker.clean_up().await;
            return;
        }
        if worker.wait().await {
            return;
        }
    }
}

impl Worker {
    fn new(input: WorkerInput) -> Self {
        let WorkerInput { context, mut desired, signals, view, cancel } = input;
        let now = desired.borrow_and_update().clone();
        let (report_sender, reports) = mpsc::channel(PROBE_REPORTS);
        let observer = Observer::new(now.uid(), context.pod_dir(now.uid()));
        let claims_held = context.claims.holds(now.uid());
        let mut state = PodLoop::new(now, context.plan_settings());
        state.memory.claims_held = claims_held;
        Self {
            probes: ProbeSet::new(context.prober.clone(), report_sender),
            signals: signals.subscribe(),
            signal_sender: signals,
            inbox: desired,
            context,
            view,
            cancel,
            state,
            observer,
            reports,
            waiting: BTreeMap::new(),
            volumes: Arc::default(),
            mount_problem: None,
            image_users: Arc::default(),
            tasks: JoinSet::new(),
            running: HashMap::new(),
            ending: CancellationToken::new(),
            seen_objects: 0,
        }
    }

    /// Observes if needed, plans until nothing new comes out, reports. True when the pod is gone.
    async fn pass(&mut self) -> bool {
        if self.state.stale && !self.observe().await {
            return false;
        }
        // Static pods do not wait for the API.
        let synced = *self.context.services.synced.borrow() || self.state.desired.is_static();
        self.state.memory.services_synced = synced;
        let settings = self.context.plan_settings();
        for _ in 0..PASSES {
            let now = self.read_clock();
            self.apply_times(now);
            let plan = self.state.plan(now, settings);
            if plan.done {
                return true;
            }
            let started = self.dispatch(&plan, now, settings);
            let told = self.report(&plan, now);
            if !started && !told {
                return false;
            }
        }
        warn!(pod = %self.state.desired.described(), "the plan does not settle");
        false
    }

    fn read_clock(&mut self) -> Timestamp {
        let now = self.context.clock.now();
        if let Some(before) = self.state.read_clock(now) {
            info!(pod = %self.state.desired.described(), from = %before, to = %now, "the clock was set back");
        }
        now
    }

    async fn observe(&mut self) -> bool {
        match self.observer.observe(&self.context.cri).await {
            Ok(observed) => {
                self.state.saw(observed);
                true
            }
            Err(error) => {
                debug!(pod = %self.state.desired.described(), call = error.call, %error, "cannot read the CRI");
                self.state.look_failed(self.context.clock.now());
                false
            }
        }
    }

    fn apply_times(&mut self, now: Timestamp) {
        if self.state.apply_times(now) {
            self.event(None, EventType::Normal, DEADLINE_EXCEEDED, DEADLINE_MESSAGE);
        }
        if self.state.desired.fate != Fate::Run {
            self.ending.cancel();
        }
    }

    /// Starts the plan's steps.
    fn dispatch(&mut self, plan: &PodPlan, now: Timestamp, settings: PlanSettings) -> bool {
        let begun = self.state.begin(plan, now, settings);
        let started = !begun.is_empty();
        for action in begun {
            debug!(pod = %self.state.desired.described(), ?action, "step");
            self.spawn(Step::Action(action));
        }
        started
    }

    /// Runs a step as a task.
    pub(super) fn spawn(&mut self, step: Step) {
        let action = match &step {
            Step::Action(action) => Some(action.clone()),
            Step::WriteStatus(_) => None,
        };
        let task = self.tasks.spawn(steps::run(self.step_input(), step));
        self.running.insert(task.id(), (action, task));
    }

    fn step_input(&self) -> StepInput {
        let sandbox = self.state.observed.sandboxes.first();
        StepInput {
            context: Arc::clone(&self.context),
            pod: Arc::clone(&self.state.desired.pod),
            volumes: Arc::clone(&self.volumes),
            image_users: Arc::clone(&self.image_users),
            pod_ips: self.pod_ips(),
            sandbox_attempt: sandbox.map_or(0, |sandbox| sandbox.attempt),
            ending: self.ending.clone(),
        }
    }

    /// Addresses of the current sandbox; the node's in the host network.
    pub(super) fn pod_ips(&self) -> Vec<String> {
        if self.state.desired.spec().host_network.unwrap_or(false) {
            return vec![self.context.config.keelson.node_ip.to_string()];
        }
        let sandbox = self.state.observed.sandboxes.first();
        sandbox.map(|sandbox| sandbox.ips.clone()).unwrap_or_default()
    }

    /// Waits for the next input and takes it in. True at shutdown.
    async fn wait(&mut self) -> bool {
        let timer = sleep_until(Arc::clone(&self.context.clock), self.state.next_wake());
        // Each arm is cancel-safe: watches and channels keep what was not taken, join_next leaves unfinished tasks in
        // the set, and a dropped timer is set again.
        tokio::select! {
            () = self.cancel.cancelled() => return true,
            changed = self.inbox.changed() => match changed {
                Ok(()) => self.take_desired(),
                // The manager is gone: the agent is shutting down.
                Err(_closed) => return true,
            },
            changed = self.signals.changed() => {
                if changed.is_ok() {
                    self.take_signals();
                }
            }
            Some(joined) = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => self.take_outcome(joined),
            Some(report) = self.reports.recv() => self.absorb_probe(&report),
            () = timer => self.state.timer(self.context.clock.now()),
        }
        false
    }

    fn take_desired(&mut self) {
        let next = self.inbox.borrow_and_update().clone();
        for (action, task) in self.running.values() {
            if action.as_ref().is_some_and(|action| self.state.is_pointless(action, &next.fate)) {
                task.abort();
            }
        }
        let spec_changed = self.state.take_desired(next, self.context.plan_settings());
        if spec_changed {
            self.register_objects();
        }
    }

    fn take_signals(&mut self) {
        let signals = *self.signals.borrow_and_update();
        self.state.take_signal(signals.objects != self.seen_objects);
        self.seen_objects = signals.objects;
    }

    fn take_outcome(&mut self, joined: Result<(tokio::task::Id, Outcome), tokio::task::JoinError>) {
        let (id, outcome) = match joined {
            Ok((id, outcome)) => (id, Some(outcome)),
            Err(error) => {
                if error.is_panic() {
                    warn!(pod = %self.state.desired.described(), %error, "a step ended unexpectedly");
                }
                (error.id(), None)
            }
        };
        let Some((action, _)) = self.running.remove(&id) else { return };
        self.absorb(action, outcome, self.context.clock.now());
    }

    /// Tells the object source what the pod uses, and is woken when one of those changes.
    fn register_objects(&self) {
        if self.state.is_gone() {
            return;
        }
        let signals = self.signal_sender.clone();
        let wake: Wake = Arc::new(move || signals.send_modify(|signals| signals.objects += 1));
        let desired = &self.state.desired;
        self.context.objects.register(desired.uid(), &keys_of(&desired.pod), &wake);
    }

    /// The last traces of a pod that is gone.
    async fn clean_up(&self) {
        self.context.objects.release(self.state.desired.uid());
        let logs = crate::runtime::sandbox_config::log_directory(
            &self.context.config.pod_logs_dir,
            &self.state.desired.pod,
        );
        match tokio::fs::remove_dir_all(&logs).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                warn!(path = %logs.display(), %error, "cannot remove the logs of a pod that is gone");
            }
            _ => self.context.host.log_links.remove_dangling().await,
        }
        debug!(pod = %self.state.desired.described(), "gone");
    }
}

async fn sleep_until(clock: Arc<dyn Clock>, at: Option<Timestamp>) {
    match at {
        None => std::future::pending().await,
        Some(at) => {
            let pause = at.duration_since(clock.now());
            tokio::time::sleep(clock.sleep(pause.try_into().unwrap_or_default())).await;
        }
    }
}
