//! How steps and probes ended, taken into what the loop goes by.

use jiff::{SignedDuration, Timestamp};

use super::PodLoop;
use crate::backoff::{self, BackOff};
use crate::model::{ContainerMemory, ImageState, PodMemory, ProbeFailure, StartFailure, Step};
use crate::plan::PodAction;
use crate::probe::{ProbeKind, ProbeReport};
use crate::resize::Applied;

/// Pauses after a step that has to be tried again, growing.
const FIRST_HOLD: SignedDuration = SignedDuration::from_millis(250);
const LONGEST_HOLD: SignedDuration = SignedDuration::from_secs(10);
/// Pauses after volumes could not be mounted or ResourceClaims not be made ready, growing; a change of what they need ends
/// them.
const FIRST_RETRY: SignedDuration = SignedDuration::from_secs(1);
const LONGEST_RETRY: SignedDuration = SignedDuration::from_secs(30);
/// Pause after a sandbox could not be made.
const SANDBOX_RETRY: SignedDuration = SignedDuration::from_secs(2);

/// How a step ended, as far as it decides what comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepEnd {
    /// It is done.
    Done,
    /// It failed: it is tried again after a pause of its kind.
    Failed,
    /// The runtime was away, and what it did nobody knows: it is tried again soon, whatever its kind.
    Away,
    /// It was cut short, or ended in a way that nobody meant.
    CutShort,
    /// The volumes are mounted.
    Mounted {
        /// When their contents grow old.
        refresh_at: Option<Timestamp>,
    },
    /// The volumes are not mounted, because something that is on its way has not come yet.
    Waits,
    /// The image is there.
    ImageReady {
        /// The reference to create the container with.
        image_ref: String,
    },
    /// The image is not there, or the container was not started; the status tells why.
    Refused {
        /// One word.
        reason: String,
        /// For people.
        message: String,
    },
}

impl PodMemory {
    pub(super) fn container_mut(&mut self, name: &str) -> &mut ContainerMemory {
        self.containers.entry(name.to_owned()).or_default()
    }
}

impl PodLoop {
    /// Takes the end of a step.
    pub fn absorb(&mut self, action: &PodAction, end: StepEnd, now: Timestamp) {
        self.memory.finished(action);
        // Whatever was left behind by one that was cut short is observed.
        self.stale |= touches_runtime(action) || end == StepEnd::CutShort;
        if let PodAction::StartContainer { container, .. } = action {
            // The look at the image was for this start.
            self.memory.container_mut(container).image = ImageState::Unknown;
        }
        match end {
            StepEnd::Done => self.step_done(action),
            StepEnd::Failed => self.step_failed(action, now),
            StepEnd::Away | StepEnd::CutShort => self.hold(action, now),
            StepEnd::Mounted { refresh_at } => {
                self.memory.volumes = Step::Done;
                self.mount_failures = 0;
                self.refresh_volumes_at = refresh_at;
                self.mount_again_if_outdated();
            }
            StepEnd::Waits => {
                self.memory.volumes = Step::Failed { retry_at: now + FIRST_RETRY };
                self.mount_again_if_outdated();
            }
            StepEnd::ImageReady { image_ref } => self.image_ready(action, image_ref),
            StepEnd::Refused { reason, message } => self.refused(action, reason, message, now),
        }
    }

    /// Takes a probe's verdict, unless it is about an instance that is no more. True when it means that the container is
    /// killed.
    pub fn absorb_probe(&mut self, report: &ProbeReport) -> bool {
        let instance = self.observed.instances(&report.container).next();
        let Some(instance) = instance.filter(|instance| instance.id == report.container_id) else {
            return false;
        };
        let entry = self.memory.container_mut(&report.container);
        entry.probes = entry.probes_of(instance);
        match (report.kind, report.healthy) {
            (ProbeKind::Readiness, ready) => entry.probes.ready = ready,
            (ProbeKind::Startup, true) => entry.probes.started = true,
            (ProbeKind::Liveness, true) => {}
            (kind, false) => {
                entry.probes.failed = Some(ProbeFailure { probe: kind.word(), grace: report.grace });
                return true;
            }
        }
        false
    }

    fn step_done(&mut self, action: &PodAction) {
        self.holds.remove(&action.key());
        match action {
            PodAction::EnsureCgroup => self.memory.cgroup = Step::Done,
            PodAction::PrepareClaims => {
                self.memory.claims = Step::Done;
                self.claim_failures = 0;
            }
            PodAction::CreateSandbox { .. } => self.memory.sandbox = Step::Done,
            PodAction::StopSandbox { id } => {
                self.memory.stopped_sandboxes.insert(id.clone());
            }
            PodAction::RemoveSandbox { id } => {
                self.memory.stopped_sandboxes.remove(id);
            }
            PodAction::ResizeContainer { container, applied, .. } => {
                self.memory.container_mut(container).applied = Some(Applied::clone(applied));
            }
            PodAction::TearDownVolumes => self.memory.released.volumes = true,
            PodAction::RemoveCgroup => self.memory.released.cgroup = true,
            PodAction::DeleteFromApi => self.memory.released.api = true,
            _ => {}
        }
    }

    fn step_failed(&mut self, action: &PodAction, now: Timestamp) {
        match action {
            PodAction::MountVolumes => {
                let retry_at = now + growing_pause(&mut self.mount_failures);
                self.memory.volumes = Step::Failed { retry_at };
                self.mount_again_if_outdated();
            }
            PodAction::PrepareClaims => {
                let retry_at = now + growing_pause(&mut self.claim_failures);
                self.memory.claims = Step::Failed { retry_at };
            }
            PodAction::CreateSandbox { .. } => {
                self.memory.sandbox = Step::Failed { retry_at: now + SANDBOX_RETRY };
            }
            _ => self.hold(action, now),
        }
    }

    /// Keeps a failed step from being tried again at once.
    fn hold(&mut self, action: &PodAction, now: Timestamp) {
        let failures = self.holds.get(&action.key()).map_or(0, |(failures, _)| *failures);
        let pause = FIRST_HOLD.saturating_mul(1 << failures.min(6)).min(LONGEST_HOLD);
        self.holds.insert(action.key(), (failures + 1, now + pause));
    }

    fn mount_again_if_outdated(&mut self) {
        if std::mem::take(&mut self.volumes_outdated) {
            self.memory.volumes = Step::Todo;
        }
    }

    fn image_ready(&mut self, action: &PodAction, image_ref: String) {
        if let PodAction::EnsureImage { container } = action {
            let entry = self.memory.container_mut(container);
            entry.image = ImageState::Present { image_ref };
            entry.pull_backoff = BackOff::default();
        }
    }

    fn refused(&mut self, action: &PodAction, reason: String, message: String, now: Timestamp) {
        match action {
            PodAction::EnsureImage { container } => {
                let entry = self.memory.container_mut(container);
                entry.pull_backoff.advance(now, now, backoff::MAX);
                entry.image = ImageState::Failed { reason, message, at: now };
            }
            PodAction::StartContainer { container, .. } => {
                let failure = StartFailure { reason, message, at: now };
                self.memory.container_mut(container).start_failure = Some(failure);
            }
            _ => self.hold(action, now),
        }
    }
}

/// Pause after one more failure of volumes or ResourceClaims.
fn growing_pause(failures: &mut u32) -> SignedDuration {
    let pause = FIRST_RETRY.saturating_mul(1 << (*failures).min(6)).min(LONGEST_RETRY);
    *failures = failures.saturating_add(1);
    pause
}

/// Whether the runtime has something else after the step.
fn touches_runtime(action: &PodAction) -> bool {
    match action {
        PodAction::CreateSandbox { .. }
        | PodAction::StopSandbox { .. }
        | PodAction::RemoveSandbox { .. }
        | PodAction::StartContainer { .. }
        | PodAction::KillContainer { .. }
        | PodAction::ResizeContainer { .. }
        | PodAction::RemoveContainer { .. } => true,
        PodAction::EnsureCgroup
        | PodAction::MountVolumes
        | PodAction::PrepareClaims
        | PodAction::ReleaseClaims
        | PodAction::EnsureImage { .. }
        | PodAction::TearDownVolumes
        | PodAction::RemoveCgroup
        | PodAction::DeleteFromApi => false,
    }
}
