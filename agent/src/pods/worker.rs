//! One pod's loop: woken by a change, observes, plans, starts steps, reports.
//!
//! Inputs: the desired pod, signals, step outcomes, probe verdicts, time. Outputs: steps, status, events, a view for
//! lookups. The loop itself never waits for anything but its inputs; it ends when nothing of the pod is left. At
//! shutdown it just stops: the containers go on, and the next agent picks them up.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use agent_core::model::{DesiredPod, Fate, ObservedPod, PodMemory, Step as Progress, StepKey};
use agent_core::plan::{PlanInput, PodAction, PodPlan, Waiting, active_deadline, is_finished, plan};
use agent_core::resize::Applied;
use agent_core::status::sync::StatusSync;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodResourceClaimStatus, PodStatus};
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
use crate::probes::{ProbeReport, ProbeSet};
use crate::runtime::observe::Observer;
use crate::runtime::security::ImageUser;
use crate::sources::objects::{Wake, keys_of};

/// Verdicts waiting for the loop; a probe task waits when it is full.
const PROBE_REPORTS: usize = 16;
/// Pause after the CRI could not be read.
const OBSERVE_RETRY: SignedDuration = SignedDuration::from_millis(500);
/// A clock that is set this far back is not only corrected a little.
const SET_BACK: SignedDuration = SignedDuration::from_secs(1);
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
    pub(super) inbox: watch::Receiver<DesiredPod>,
    signals: watch::Receiver<Signals>,
    signal_sender: watch::Sender<Signals>,
    pub(super) view: watch::Sender<PodView>,
    cancel: CancellationToken,
    pub(super) desired: DesiredPod,
    pub(super) observer: Observer,
    pub(super) observed: Arc<ObservedPod>,
    pub(super) memory: PodMemory,
    pub(super) status: Arc<PodStatus>,
    pub(super) sync: StatusSync,
    pub(super) waiting: BTreeMap<String, Waiting>,
    pub(super) volumes: Arc<HashMap<String, HostPath>>,
    pub(super) refresh_volumes_at: Option<Timestamp>,
    pub(super) mount_problem: Option<String>,
    pub(super) mount_failures: u32,
    pub(super) claim_failures: u32,
    /// Something that the volumes depend on changed while they were set up.
    pub(super) volumes_outdated: bool,
    pub(super) image_users: Arc<HashMap<String, ImageUser>>,
    pub(super) probes: ProbeSet,
    reports: mpsc::Receiver<ProbeReport>,
    tasks: JoinSet<Outcome>,
    running: HashMap<tokio::task::Id, (Option<PodAction>, AbortHandle)>,
    pub(super) holds: BTreeMap<StepKey, (u32, Timestamp)>,
    ending: CancellationToken,
    pub(super) stale: bool,
    seen_objects: u64,
    observe_retry_at: Option<Timestamp>,
    wake_at: Option<Timestamp>,
    /// What the clock showed at the last look.
    clock_read: Timestamp,
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
        let shown = now.mirror.as_ref().unwrap_or(&now.pod);
        let status = shown.status.clone().unwrap_or_default();
        let mut memory = PodMemory::default();
        memory.recall(&status, context.plan_settings().max_restart_delay);
        memory.claims_held = context.claims.holds(now.uid());
        Self {
            observer: Observer::new(now.uid(), context.pod_dir(now.uid())),
            sync: if now.is_static() {
                StatusSync::mirrored(now.mirror.as_deref())
            } else {
                StatusSync::new(&now.pod)
            },
            probes: ProbeSet::new(context.prober.clone(), report_sender),
            signals: signals.subscribe(),
            signal_sender: signals,
            status: Arc::new(status),
            desired: now,
            inbox: desired,
            context,
            view,
            cancel,
            memory,
            reports,
            observed: Arc::default(),
            waiting: BTreeMap::new(),
            volumes: Arc::default(),
            refresh_volumes_at: None,
            mount_problem: None,
            mount_failures: 0,
            claim_failures: 0,
            volumes_outdated: false,
            image_users: Arc::default(),
            tasks: JoinSet::new(),
            running: HashMap::new(),
            holds: BTreeMap::new(),
            ending: CancellationToken::new(),
            stale: true,
            seen_objects: 0,
            observe_retry_at: None,
            wake_at: None,
            clock_read: Timestamp::MIN,
        }
    }

    /// Observes if needed, plans until nothing new comes out, reports. True when the pod is gone.
    async fn pass(&mut self) -> bool {
        if self.stale && !self.observe().await {
            return false;
        }
        // Static pods do not wait for the API.
        self.memory.services_synced = *self.context.services.synced.borrow() || self.desired.is_static();
        for _ in 0..PASSES {
            let now = self.read_clock();
            self.apply_times(now);
            let plan = self.plan(now);
            self.wake_at = plan.wake_at;
            if plan.done {
                return true;
            }
            let started = self.dispatch(&plan, now);
            let told = self.report(&plan, now);
            if !started && !told {
                return false;
            }
        }
        warn!(pod = %self.desired.described(), "the plan does not settle");
        false
    }

    fn read_clock(&mut self) -> Timestamp {
        let now = self.context.clock.now();
        if self.clock_read.duration_since(now) > SET_BACK {
            info!(pod = %self.desired.described(), from = %self.clock_read, to = %now, "the clock was set back");
            self.memory.clock_went_back(now);
            self.holds.clear();
            self.sync.retry_now();
            self.refresh_volumes_at = self.refresh_volumes_at.map(|_| now);
        }
        self.clock_read = now;
        now
    }

    fn plan(&mut self, now: Timestamp) -> PodPlan {
        let input = PlanInput {
            desired: &self.desired,
            observed: &self.observed,
            memory: &self.memory,
            now,
            settings: self.context.plan_settings(),
        };
        let (plan, over) = (plan(input), is_finished(input));
        self.memory.over |= over;
        plan
    }

    async fn observe(&mut self) -> bool {
        match self.observer.observe(&self.context.cri).await {
            Ok(observed) => {
                self.observed = Arc::new(observed);
                self.stale = false;
                self.observe_retry_at = None;
                true
            }
            Err(error) => {
                debug!(pod = %self.desired.described(), call = error.call, %error, "cannot read the CRI");
                self.observe_retry_at = Some(self.context.clock.now() + OBSERVE_RETRY);
                false
            }
        }
    }

    /// What time alone changes: the pod's deadline, and contents that grow old.
    fn apply_times(&mut self, now: Timestamp) {
        if self.refresh_volumes_at.is_some_and(|at| at <= now) {
            self.refresh_volumes_at = None;
            self.memory.volumes = Progress::Todo;
        }
        let started = self.status.start_time.as_ref().map(|time| time.0);
        let over = active_deadline(&self.desired, started).is_some_and(|deadline| deadline <= now);
        if over && self.desired.fate == Fate::Run {
            const MESSAGE: &str = "Pod was active on the node longer than the specified deadline";
            // A phase that is told is final, and so was this said before.
            if !matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed")) {
                self.event(None, EventType::Normal, "DeadlineExceeded", MESSAGE);
            }
            self.desired.fate = Fate::Fail {
                reason: "DeadlineExceeded".to_owned(),
                message: MESSAGE.to_owned(),
                grace: None,
            };
        }
        if self.desired.fate != Fate::Run {
            self.ending.cancel();
        }
    }

    /// Starts the plan's steps, but for those that failed a moment ago.
    fn dispatch(&mut self, plan: &PodPlan, now: Timestamp) -> bool {
        let mut started = false;
        for action in &plan.actions {
            match self.holds.get(&action.key()) {
                Some((_, until)) if *until > now => {
                    self.wake_at = Some(self.wake_at.map_or(*until, |at| at.min(*until)));
                    continue;
                }
                _ => {}
            }
            debug!(pod = %self.desired.described(), ?action, "step");
            self.memory.dispatched(action, now, self.context.plan_settings());
            if let PodAction::StartContainer { container, attempt, .. } = action {
                let spec = agent_core::model::find_container(self.desired.spec(), container);
                let applied = spec.map(|container| Applied::of(&container, *attempt));
                self.memory.containers.entry(container.clone()).or_default().applied = applied;
            }
            self.spawn(Step::Action(action.clone()));
            started = true;
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
        let sandbox = self.observed.sandboxes.first();
        StepInput {
            context: Arc::clone(&self.context),
            pod: Arc::clone(&self.desired.pod),
            volumes: Arc::clone(&self.volumes),
            image_users: Arc::clone(&self.image_users),
            pod_ips: self.pod_ips(),
            sandbox_attempt: sandbox.map_or(0, |sandbox| sandbox.attempt),
            ending: self.ending.clone(),
        }
    }

    /// Addresses of the current sandbox; the node's in the host network.
    pub(super) fn pod_ips(&self) -> Vec<String> {
        if self.desired.spec().host_network.unwrap_or(false) {
            return vec![self.context.config.keelson.node_ip.to_string()];
        }
        self.observed.sandboxes.first().map(|sandbox| sandbox.ips.clone()).unwrap_or_default()
    }

    /// Waits for the next input and takes it in. True at shutdown.
    async fn wait(&mut self) -> bool {
        let timer = sleep_until(Arc::clone(&self.context.clock), self.next_wake());
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
            () = timer => {
                if self.observe_retry_at.is_some_and(|at| at <= self.context.clock.now()) {
                    self.stale = true;
                }
            }
        }
        false
    }

    fn next_wake(&self) -> Option<Timestamp> {
        if self.observe_retry_at.is_some() {
            // Nothing is planned before the runtime answers.
            return self.observe_retry_at;
        }
        let started = self.status.start_time.as_ref().map(|time| time.0);
        let deadline = active_deadline(&self.desired, started).filter(|_| self.desired.fate == Fate::Run);
        [self.wake_at, self.refresh_volumes_at, self.sync.retry_at(self.clock_read), deadline]
            .into_iter()
            .flatten()
            .min()
    }

    fn take_desired(&mut self) {
        let next = self.inbox.borrow_and_update().clone();
        let spec_changed = next.pod.spec != self.desired.pod.spec;
        let metadata_changed = next.pod.metadata.labels != self.desired.pod.metadata.labels
            || next.pod.metadata.annotations != self.desired.pod.metadata.annotations;
        if self.desired.is_static() {
            self.learn_mirror(next.mirror.as_deref());
        } else {
            self.sync.learn(&next.pod);
        }
        self.cut_short(&next.fate);
        if claims_told(&next.pod) != claims_told(&self.desired.pod) {
            self.retry_claims();
        }
        let fate = self.desired.fate.followed_by(next.fate.clone());
        self.desired = DesiredPod { fate, ..next };
        if spec_changed {
            self.register_objects();
            // A changed image is a new chance for a container that could not start.
            for memory in self.memory.containers.values_mut() {
                memory.image = agent_core::model::ImageState::Unknown;
                memory.start_failure = None;
            }
        }
        if (spec_changed || metadata_changed) && self.memory.volumes == Progress::Done {
            self.memory.volumes = Progress::Todo;
        }
    }

    /// Takes the object that shows this static pod. What it says of containers that run is the memory of the agent before
    /// this one.
    fn learn_mirror(&mut self, mirror: Option<&Pod>) {
        self.sync.learn_mirror(mirror);
        let status = mirror.and_then(|mirror| mirror.status.as_ref());
        if let Some(status) = status
            .filter(|_| self.memory.containers.values().all(|known| known.probes.container_id.is_empty()))
        {
            self.memory.recall(status, self.context.plan_settings().max_restart_delay);
        }
    }

    /// Steps that a new fate makes pointless: pulls of a pod that ends, and kills with a longer grace than allowed now.
    fn cut_short(&mut self, next: &Fate) {
        let Fate::Terminate { grace: new_grace, .. } = next else { return };
        let old_grace = match &self.desired.fate {
            Fate::Terminate { grace, .. } => Some(*grace),
            _ => None,
        };
        for (action, task) in self.running.values() {
            let pointless = match action {
                Some(PodAction::EnsureImage { .. } | PodAction::MountVolumes | PodAction::PrepareClaims) => {
                    old_grace.is_none()
                }
                Some(PodAction::KillContainer { grace, .. }) => grace > new_grace,
                _ => false,
            };
            if pointless {
                task.abort();
            }
        }
    }

    fn take_signals(&mut self) {
        let signals = *self.signals.borrow_and_update();
        if signals.objects != self.seen_objects {
            self.seen_objects = signals.objects;
            self.memory.volumes = Progress::Todo;
            self.volumes_outdated = self.memory.busy.contains(&StepKey::Volumes);
            self.retry_claims();
            for memory in self.memory.containers.values_mut() {
                memory.start_failure = None;
            }
        }
        self.stale = true;
    }

    /// Something that its ResourceClaims wait for may have come.
    fn retry_claims(&mut self) {
        if matches!(self.memory.claims, Progress::Failed { .. }) {
            self.memory.claims = Progress::Todo;
        }
    }

    fn take_outcome(&mut self, joined: Result<(tokio::task::Id, Outcome), tokio::task::JoinError>) {
        let (id, outcome) = match joined {
            Ok((id, outcome)) => (id, Some(outcome)),
            Err(error) => {
                if error.is_panic() {
                    warn!(pod = %self.desired.described(), %error, "a step ended unexpectedly");
                }
                (error.id(), None)
            }
        };
        let Some((action, _)) = self.running.remove(&id) else { return };
        self.absorb(action, outcome, self.context.clock.now());
    }

    /// Tells the object source what the pod uses, and is woken when one of those changes.
    fn register_objects(&self) {
        if matches!(self.desired.fate, Fate::Terminate { gone: true, .. }) {
            return;
        }
        let signals = self.signal_sender.clone();
        let wake: Wake = Arc::new(move || signals.send_modify(|signals| signals.objects += 1));
        self.context.objects.register(self.desired.uid(), &keys_of(&self.desired.pod), &wake);
    }

    /// The last traces of a pod that is gone.
    async fn clean_up(&self) {
        self.context.objects.release(self.desired.uid());
        let logs = crate::runtime::sandbox_config::log_directory(
            &self.context.config.pod_logs_dir,
            &self.desired.pod,
        );
        match tokio::fs::remove_dir_all(&logs).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                warn!(path = %logs.display(), %error, "cannot remove the logs of a pod that is gone");
            }
            _ => self.context.host.log_links.remove_dangling().await,
        }
        debug!(pod = %self.desired.described(), "gone");
    }
}

/// Which ResourceClaims were made for the pod.
fn claims_told(pod: &Pod) -> Option<&Vec<PodResourceClaimStatus>> {
    pod.status.as_ref()?.resource_claim_statuses.as_ref()
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
