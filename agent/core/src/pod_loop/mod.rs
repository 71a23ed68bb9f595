//! One pod's loop without its surroundings: what is known of the pod, and what each input makes of that.
//!
//! Inputs: the desired pod, what the runtime has, how steps and probes ended, the time. Outputs: the plan, the steps to start
//! now, the status with the patch that tells it, the containers to probe, the time of the next look. Whoever owns a
//! [`PodLoop`] carries the steps out and tells people about them: the agent's worker does, and so does the simulation, which
//! therefore plays what runs on a node.

mod ends;

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, PodResourceClaimStatus, PodStatus};
use serde_json::Value;

pub use self::ends::StepEnd;
use crate::model::{
    DesiredPod, Fate, ImageState, ObservedContainer, ObservedPod, PodMemory, ProbeResults, RunState, Step,
    StepKey, containers, find_container,
};
use crate::plan::{PlanInput, PlanSettings, PodAction, PodPlan, active_deadline, is_finished, plan};
use crate::resize::Applied;
use crate::status::sync::StatusSync;
use crate::status::{NodeIdentity, StatusInput, derive};

/// Pause after the runtime could not be looked at.
const OBSERVE_RETRY: SignedDuration = SignedDuration::from_millis(500);
/// A clock that is set this far back is not only corrected a little.
const SET_BACK: SignedDuration = SignedDuration::from_secs(1);
/// Reason of a pod whose `activeDeadlineSeconds` are over.
pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
/// And what is said of it.
pub const DEADLINE_MESSAGE: &str = "Pod was active on the node longer than the specified deadline";

/// Everything that one pod's loop goes by.
#[derive(Debug)]
pub struct PodLoop {
    /// The pod as it should be. Its fate never becomes a better one.
    pub desired: DesiredPod,
    /// What the runtime had at the last look.
    pub observed: Arc<ObservedPod>,
    /// What is remembered of steps, failures and probes.
    pub memory: PodMemory,
    /// The status as last derived.
    pub status: Arc<PodStatus>,
    /// How far the API knows it.
    pub sync: StatusSync,
    /// The runtime must be looked at before anything is planned.
    pub stale: bool,
    refresh_volumes_at: Option<Timestamp>,
    /// Something that the volumes depend on changed while they were set up.
    volumes_outdated: bool,
    mount_failures: u32,
    claim_failures: u32,
    /// Steps that failed a moment ago: how often in a row, and until when they are not tried again.
    holds: BTreeMap<StepKey, (u32, Timestamp)>,
    observe_retry_at: Option<Timestamp>,
    wake_at: Option<Timestamp>,
    /// What the clock showed at the last look.
    clock_read: Timestamp,
}

impl PodLoop {
    /// A loop that knows what the API says of the pod, and nothing of the node yet.
    pub fn new(desired: DesiredPod, settings: PlanSettings) -> Self {
        let shown = desired.mirror.as_ref().unwrap_or(&desired.pod);
        let status = shown.status.clone().unwrap_or_default();
        let mut memory = PodMemory::default();
        memory.recall(&status, settings.max_restart_delay);
        let sync = if desired.is_static() {
            StatusSync::mirrored(desired.mirror.as_deref())
        } else {
            StatusSync::new(&desired.pod)
        };
        Self {
            desired,
            memory,
            sync,
            status: Arc::new(status),
            observed: Arc::default(),
            stale: true,
            refresh_volumes_at: None,
            volumes_outdated: false,
            mount_failures: 0,
            claim_failures: 0,
            holds: BTreeMap::new(),
            observe_retry_at: None,
            wake_at: None,
            clock_read: Timestamp::MIN,
        }
    }

    /// The runtime was looked at.
    pub fn saw(&mut self, observed: ObservedPod) {
        self.observed = Arc::new(observed);
        self.stale = false;
        self.observe_retry_at = None;
    }

    /// It could not be looked at: nothing is planned before it can.
    pub fn look_failed(&mut self, now: Timestamp) {
        self.observe_retry_at = Some(now + OBSERVE_RETRY);
    }

    /// It is time for something.
    pub fn timer(&mut self, now: Timestamp) {
        self.stale |= self.observe_retry_at.is_some_and(|at| at <= now);
    }

    /// Reads the clock. Where it was set back, what it showed before; no time that was read from it is waited for any more.
    pub fn read_clock(&mut self, now: Timestamp) -> Option<Timestamp> {
        let before = std::mem::replace(&mut self.clock_read, now);
        if before.duration_since(now) <= SET_BACK {
            return None;
        }
        self.memory.clock_went_back(now);
        self.holds.clear();
        self.sync.retry_now();
        self.refresh_volumes_at = self.refresh_volumes_at.map(|_| now);
        Some(before)
    }

    /// What time alone changes: contents that grow old, and the pod's deadline. True when the deadline is over and nobody was
    /// told yet.
    pub fn apply_times(&mut self, now: Timestamp) -> bool {
        if self.refresh_volumes_at.is_some_and(|at| at <= now) {
            self.refresh_volumes_at = None;
            self.memory.volumes = Step::Todo;
        }
        if self.deadline().is_none_or(|deadline| deadline > now) {
            return false;
        }
        self.desired.fate = Fate::Fail {
            reason: DEADLINE_EXCEEDED.to_owned(),
            message: DEADLINE_MESSAGE.to_owned(),
            grace: None,
        };
        // A phase that is told is final, and so was this said before.
        !matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed"))
    }

    /// When a pod that runs has run long enough.
    fn deadline(&self) -> Option<Timestamp> {
        let started = self.status.start_time.as_ref().map(|time| time.0);
        active_deadline(&self.desired, started).filter(|_| self.desired.fate == Fate::Run)
    }

    /// What is to be done now.
    pub fn plan(&mut self, now: Timestamp, settings: PlanSettings) -> PodPlan {
        let input = PlanInput {
            desired: &self.desired,
            observed: &self.observed,
            memory: &self.memory,
            now,
            settings,
        };
        let (plan, over) = (plan(input), is_finished(input));
        self.memory.over |= over;
        self.wake_at = plan.wake_at;
        plan
    }

    /// The plan's steps to start at once, noted as running: all but those that failed a moment ago.
    pub fn begin(&mut self, plan: &PodPlan, now: Timestamp, settings: PlanSettings) -> Vec<PodAction> {
        let mut begun = Vec::new();
        for action in &plan.actions {
            if let Some((_, until)) = self.holds.get(&action.key()).filter(|(_, until)| *until > now) {
                self.wake_at = Some(self.wake_at.map_or(*until, |at| at.min(*until)));
                continue;
            }
            self.memory.dispatched(action, now, settings);
            if let PodAction::StartContainer { container, attempt, .. } = action {
                let spec = find_container(self.desired.spec(), container);
                let applied = spec.map(|container| Applied::of(&container, *attempt));
                self.memory.container_mut(container).applied = applied;
            }
            begun.push(action.clone());
        }
        begun
    }

    /// Derives the status. Once the last one of an ending pod is told, what the runtime forgets afterwards is no news.
    pub fn derive_status(&mut self, plan: &PodPlan, node: &NodeIdentity, now: Timestamp) {
        if self.memory.status_written {
            return;
        }
        let derived = derive(StatusInput {
            desired: &self.desired,
            observed: &self.observed,
            memory: &self.memory,
            plan,
            previous: &self.status,
            node,
            now,
        });
        self.status = Arc::new(derived);
    }

    /// The patch to write now, if any, and whether the plan depends on what this found: that the API has the last status.
    pub fn tell(&mut self, plan: &PodPlan, now: Timestamp) -> (Option<Value>, bool) {
        if self.is_gone() {
            return (None, false);
        }
        let patch = self.sync.next(self.desired.uid(), &self.status, now);
        let last_word =
            self.is_ending() && plan.finished && self.sync.in_sync(self.desired.uid(), &self.status);
        let news = last_word && !self.memory.status_written;
        self.memory.status_written |= last_word;
        (patch, news)
    }

    /// The pod is being deleted.
    pub fn is_ending(&self) -> bool {
        matches!(self.desired.fate, Fate::Terminate { .. })
    }

    /// The API has no such pod any more.
    pub fn is_gone(&self) -> bool {
        matches!(self.desired.fate, Fate::Terminate { gone: true, .. })
    }

    /// Containers whose probes run, each with the instance and what was found of it so far.
    pub fn probed(&self) -> impl Iterator<Item = (&Container, &ObservedContainer, ProbeResults)> {
        containers(self.desired.spec()).filter_map(move |entry| {
            let name = &entry.container.name;
            let instance = self.observed.newest(name, &self.memory)?;
            if instance.state != RunState::Running || self.memory.starting.contains_key(name) {
                return None;
            }
            let results = self.memory.container(name).probes_of(instance);
            results.failed.is_none().then_some((entry.container, instance, results))
        })
    }

    /// When to look again though nothing happened.
    pub fn next_wake(&self) -> Option<Timestamp> {
        if self.observe_retry_at.is_some() {
            return self.observe_retry_at;
        }
        [self.wake_at, self.refresh_volumes_at, self.sync.retry_at(self.clock_read), self.deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether the fate that comes makes a step that runs pointless: pulls and mounts of a pod that ends, and kills with a
    /// longer grace than is allowed from now on.
    pub fn is_pointless(&self, action: &PodAction, coming: &Fate) -> bool {
        let Fate::Terminate { grace: allowed, .. } = coming else { return false };
        match action {
            PodAction::EnsureImage { .. } | PodAction::MountVolumes | PodAction::PrepareClaims => {
                !self.is_ending()
            }
            PodAction::KillContainer { grace, .. } => grace > allowed,
            _ => false,
        }
    }

    /// Takes what is wanted of the pod now. True when its spec is another one.
    pub fn take_desired(&mut self, next: DesiredPod, settings: PlanSettings) -> bool {
        let (old, new) = (&self.desired.pod, &next.pod);
        let spec_changed = new.spec != old.spec;
        let metadata_changed = new.metadata.labels != old.metadata.labels
            || new.metadata.annotations != old.metadata.annotations;
        let claims_changed = claims_told(new) != claims_told(old);
        if self.desired.is_static() {
            self.learn_mirror(next.mirror.as_deref(), settings);
        } else {
            self.sync.learn(&next.pod);
        }
        let shown = if self.desired.is_static() { next.mirror.as_ref() } else { Some(&next.pod) };
        if let Some(shown) = shown.filter(|_| next.list != self.desired.list) {
            self.sync.relearn(shown);
        }
        if claims_changed {
            self.retry_claims();
        }
        let fate = self.desired.fate.followed_by(next.fate.clone());
        self.desired = DesiredPod { fate, ..next };
        if spec_changed {
            // A changed image is a new chance for a container that could not start.
            for memory in self.memory.containers.values_mut() {
                memory.image = ImageState::Unknown;
                memory.start_failure = None;
            }
        }
        if (spec_changed || metadata_changed) && self.memory.volumes == Step::Done {
            self.memory.volumes = Step::Todo;
        }
        spec_changed
    }

    /// Takes the object that shows this static pod. What it says of containers that run is the memory of the agent before
    /// this one.
    fn learn_mirror(&mut self, mirror: Option<&Pod>, settings: PlanSettings) {
        self.sync.learn_mirror(mirror);
        let knows_nothing = self.memory.containers.values().all(|known| known.probes.container_id.is_empty());
        let status = mirror.and_then(|mirror| mirror.status.as_ref()).filter(|_| knows_nothing);
        if let Some(status) = status {
            self.memory.recall(status, settings.max_restart_delay);
        }
    }

    /// Something of the pod changed at the runtime or, where `objects` says so, among the objects that it uses.
    pub fn take_signal(&mut self, objects: bool) {
        if objects {
            self.memory.volumes = Step::Todo;
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
        if matches!(self.memory.claims, Step::Failed { .. }) {
            self.memory.claims = Step::Todo;
        }
    }
}

/// Which ResourceClaims were made for the pod.
fn claims_told(pod: &Pod) -> Option<&Vec<PodResourceClaimStatus>> {
    pod.status.as_ref()?.resource_claim_statuses.as_ref()
}

#[cfg(test)]
mod tests;
