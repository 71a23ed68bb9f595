//! The pod loop's decision: desired pod + observed pod + memory + now → the steps to take at once.
//!
//! [`plan`] is called after every change; it names only steps that are not already running ([`PodMemory::busy`]),
//! so calling it again without a change gives nothing new. It also says why containers wait (for the status) and
//! when time alone will change the answer. It never decides on stale facts: a step's result arrives as Observed or
//! Memory before the next call.

mod continuity;
mod run;
mod teardown;

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Container;

use crate::backoff;
use crate::model::{
    ContainerKind, ContainerSpec, DesiredPod, Fate, ObservedPod, PodMemory, RunState, StepKey, containers,
    restarts,
};

pub use run::CREATE_RETRY;

use crate::resize::Applied;

/// One step, complete: the executor has no choice left.
#[derive(Debug, Clone, PartialEq)]
pub enum PodAction {
    /// Make the pod's cgroup.
    EnsureCgroup,
    /// Set up all volumes.
    MountVolumes,
    /// NodePrepareResources for the pod's ResourceClaims.
    PrepareClaims,
    /// NodeUnprepareResources for those that no other pod uses.
    ReleaseClaims,
    /// RunPodSandbox.
    CreateSandbox {
        /// `metadata.attempt`.
        attempt: u32,
    },
    /// StopPodSandbox (also ends what still runs inside).
    StopSandbox {
        /// CRI id.
        id: String,
    },
    /// RemovePodSandbox with its containers.
    RemoveSandbox {
        /// CRI id.
        id: String,
    },
    /// Look for the image and pull it as the policy says.
    EnsureImage {
        /// Container name.
        container: String,
    },
    /// CreateContainer, StartContainer, postStart.
    StartContainer {
        /// Container name.
        container: String,
        /// Part of the pod.
        kind: ContainerKind,
        /// Restart count of the new instance.
        attempt: u32,
        /// Sandbox to start it in.
        sandbox_id: String,
        /// Image reference.
        image_ref: String,
        /// When the instance that this one replaces ended.
        replaces_failed_at: Option<Timestamp>,
        /// CRI id of the container whose processes an ephemeral one sees.
        target_id: Option<String>,
    },
    /// preStop, StopContainer.
    KillContainer {
        /// CRI id.
        id: String,
        /// Container name.
        container: String,
        /// Seconds for preStop and the stop signal together.
        grace: i64,
        /// Text of the Killing event.
        message: String,
    },
    /// UpdateContainerResources, with the pod's cgroup.
    ResizeContainer {
        /// CRI id.
        id: String,
        /// Container name.
        container: String,
        /// What it is to have.
        applied: Box<Applied>,
    },
    /// RemoveContainer and its log file.
    RemoveContainer {
        /// CRI id.
        id: String,
        /// Log file.
        log_path: String,
    },
    /// Unmount and remove the pod's directory.
    TearDownVolumes,
    /// Remove the pod's cgroup.
    RemoveCgroup,
    /// Delete the API object with grace 0 and the uid as precondition.
    DeleteFromApi,
}

/// Why a container does not run yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// `ContainerCreating`, `CrashLoopBackOff`, ….
    pub reason: String,
    /// For people; may be empty.
    pub message: String,
}

/// What [`plan`] decided.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodPlan {
    /// Steps to start now; they may run side by side.
    pub actions: Vec<PodAction>,
    /// Containers that are to run and do not, by name.
    pub waiting: BTreeMap<String, Waiting>,
    /// Call again then, even without a change.
    pub wake_at: Option<Timestamp>,
    /// No container runs and none will start again: the phase is final.
    pub ended: bool,
    /// Ended, and the sandboxes are stopped too: the status is final.
    pub finished: bool,
    /// Everything of a terminating pod is gone; the loop can end.
    pub done: bool,
}

/// Settings the decision depends on.
#[derive(Debug, Clone, Copy)]
pub struct PlanSettings {
    /// Longest restart delay.
    pub max_restart_delay: SignedDuration,
    /// Ended instances kept for `lastState` and `logs --previous`, beside the newest instance.
    pub kept_instances: usize,
}

impl Default for PlanSettings {
    fn default() -> Self {
        Self { max_restart_delay: backoff::MAX, kept_instances: 1 }
    }
}

/// Everything a decision reads.
#[derive(Debug, Clone, Copy)]
pub struct PlanInput<'a> {
    /// What should be.
    pub desired: &'a DesiredPod,
    /// What is.
    pub observed: &'a ObservedPod,
    /// What the agent remembers.
    pub memory: &'a PodMemory,
    /// The time.
    pub now: Timestamp,
    /// Settings.
    pub settings: PlanSettings,
}

/// Decides. Pure: equal inputs, equal plans.
pub fn plan(input: PlanInput<'_>) -> PodPlan {
    let mut plan = PodPlan::default();
    match &input.desired.fate {
        Fate::Terminate { .. } => teardown::terminate(input, &mut plan),
        Fate::Fail { .. } => teardown::finish(input, &mut plan),
        Fate::Run if is_finished(input) => teardown::finish(input, &mut plan),
        Fate::Run => run::run(input, &mut plan),
    }
    plan
}

/// Whether a pod that may run has nothing left to run: every main container ended for good, or an init container
/// failed for good.
pub fn is_finished(input: PlanInput<'_>) -> bool {
    let spec = input.desired.spec();
    // A phase told to the API is never taken back, even when the CRI has forgotten the containers.
    let told = input.desired.api_status().and_then(|status| status.phase.as_deref());
    if input.memory.over || matches!(told, Some("Succeeded" | "Failed")) {
        return true;
    }
    let ended_for_good = |container: &Container| {
        let entry = ContainerSpec { container, kind: ContainerKind::Main };
        !input.memory.starting.contains_key(&container.name)
            && input.observed.newest(&container.name, input.memory).is_some_and(|instance| {
                instance.state == RunState::Exited
                    && !restarts(spec, entry, instance.exit_code)
                    && !instance.is_outdated(container)
            })
    };
    let init_failed = containers(spec).any(|entry| {
        entry.kind == ContainerKind::Init
            && input.observed.newest(&entry.container.name, input.memory).is_some_and(|instance| {
                instance.state == RunState::Exited
                    && instance.exit_code != 0
                    && !restarts(spec, entry, instance.exit_code)
            })
    });
    init_failed || (!spec.containers.is_empty() && spec.containers.iter().all(ended_for_good))
}

/// When a pod's `activeDeadlineSeconds` is over; `None` without one.
pub fn active_deadline(desired: &DesiredPod, started: Option<Timestamp>) -> Option<Timestamp> {
    let seconds = desired.spec().active_deadline_seconds?;
    Some(started? + SignedDuration::from_secs(seconds))
}

impl PodPlan {
    /// Wakes the loop at `at` at the latest.
    fn wake(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
    }

    /// Adds `action` unless its step runs already.
    fn step(&mut self, memory: &PodMemory, action: PodAction) {
        if !memory.busy.contains(&action.key())
            && self.actions.iter().all(|other| other.key() != action.key())
        {
            self.actions.push(action);
        }
    }

    fn wait(&mut self, container: &str, reason: &str, message: impl Into<String>) {
        let waiting = Waiting { reason: reason.to_owned(), message: message.into() };
        self.waiting.insert(container.to_owned(), waiting);
    }
}

impl PodAction {
    /// The step that this action occupies while it runs.
    pub fn key(&self) -> StepKey {
        match self {
            Self::EnsureCgroup | Self::RemoveCgroup => StepKey::Cgroup,
            Self::MountVolumes | Self::TearDownVolumes => StepKey::Volumes,
            Self::PrepareClaims | Self::ReleaseClaims => StepKey::Claims,
            Self::CreateSandbox { .. } | Self::StopSandbox { .. } | Self::RemoveSandbox { .. } => {
                StepKey::Sandbox
            }
            Self::EnsureImage { container } => StepKey::Image(container.clone()),
            Self::StartContainer { container, .. }
            | Self::KillContainer { container, .. }
            | Self::ResizeContainer { container, .. } => StepKey::Container(container.clone()),
            Self::RemoveContainer { id, .. } => StepKey::Garbage(id.clone()),
            Self::DeleteFromApi => StepKey::Api,
        }
    }
}

impl PodMemory {
    /// Notes that `action` starts now.
    pub fn dispatched(&mut self, action: &PodAction, now: Timestamp, settings: PlanSettings) {
        self.busy.insert(action.key());
        if let PodAction::StartContainer { container, attempt, replaces_failed_at, .. } = action {
            self.starting.insert(container.clone(), *attempt);
            let memory = self.containers.entry(container.clone()).or_default();
            memory.start_failure = None;
            if let Some(failed_at) = replaces_failed_at {
                memory.restart_backoff.advance(*failed_at, now, settings.max_restart_delay);
            }
        }
    }

    /// Notes that `action` has ended (its result is recorded by the caller).
    pub fn finished(&mut self, action: &PodAction) {
        self.busy.remove(&action.key());
        if let PodAction::StartContainer { container, .. } = action {
            self.starting.remove(container);
        }
    }
}

#[cfg(test)]
mod tests;
