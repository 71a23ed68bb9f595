//! Takes the outcomes of steps and probes into the loop's memory, with the events that belong to them.

use std::collections::HashMap;
use std::sync::Arc;

use agent_core::model::{ImageState, ProbeFailure, StartFailure, Step as Progress};
use agent_core::plan::PodAction;
use agent_core::probe::ProbeKind;
use agent_core::resize::Applied;
use agent_core::status::sync::Written;
use jiff::{SignedDuration, Timestamp};
use tracing::{debug, info, warn};

use super::start::StartError;
use super::steps::{Outcome, StepError};
use super::worker::Worker;
use crate::contracts::{MountedVolumes, VolumeError};
use crate::events::EventType;
use crate::probes::ProbeReport;
use crate::runtime::cri::CriError;
use crate::runtime::images::{ImageError, ReadyImage};

/// Pauses after a step that has to be tried again.
const FIRST_HOLD: SignedDuration = SignedDuration::from_millis(250);
const LONGEST_HOLD: SignedDuration = SignedDuration::from_secs(10);
/// Pauses after volumes could not be mounted, growing; a change of what they need ends them.
const FIRST_MOUNT_RETRY: SignedDuration = SignedDuration::from_secs(1);
const LONGEST_MOUNT_RETRY: SignedDuration = SignedDuration::from_secs(30);
/// Pauses after ResourceClaims could not be made ready, growing; a driver that registers ends them.
const FIRST_CLAIM_RETRY: SignedDuration = SignedDuration::from_secs(1);
const LONGEST_CLAIM_RETRY: SignedDuration = SignedDuration::from_secs(30);
/// Pause after a sandbox could not be made.
const SANDBOX_RETRY: SignedDuration = SignedDuration::from_secs(2);

impl Worker {
    /// Takes the end of a step; no outcome means that it was cut short.
    pub(super) fn absorb(&mut self, action: Option<PodAction>, outcome: Option<Outcome>, now: Timestamp) {
        if let Some(action) = &action {
            self.memory.finished(action);
            if touches_claims(action) {
                self.memory.claims_held = self.context.claims.holds(self.desired.uid());
            }
        }
        match (action, outcome) {
            (None, Some(Outcome::Status(written))) => {
                if let Some(error) = self.sync.done(written, now) {
                    warn!(pod = %self.desired.described(), %error, "status not written");
                }
            }
            (Some(action), Some(Outcome::Plain(result))) => {
                self.stale |= touches_cri(&action);
                match result {
                    Ok(()) => self.step_done(&action),
                    Err(error) => {
                        warn!(pod = %self.desired.described(), ?action, %error, "step failed");
                        self.hold(&action, now);
                    }
                }
            }
            (Some(_), Some(Outcome::Volumes(result))) => self.absorb_volumes(result, now),
            (Some(_), Some(Outcome::Claims(result))) => self.absorb_claims(result, now),
            (Some(action), Some(Outcome::Sandbox(result))) => self.absorb_sandbox(&action, result, now),
            (Some(PodAction::EnsureImage { container }), Some(Outcome::Image(result))) => {
                self.absorb_image(container, result, now);
            }
            (Some(action), Some(Outcome::Started(result))) => self.absorb_start(&action, result, now),
            // Cut short, or it panicked (logged): whatever it left behind is observed.
            (Some(action), _) => {
                self.stale = true;
                self.hold(&action, now);
            }
            (None, _) => {
                let failed = Written::Failed("the write ended unexpectedly".to_owned());
                self.sync.done(failed, now);
            }
        }
    }

    /// Takes a probe's verdict, unless it is about an instance that is no more.
    pub(super) fn absorb_probe(&mut self, report: &ProbeReport) {
        let instance = self.observed.instances(&report.container).next();
        let Some(instance) = instance.filter(|instance| instance.id == report.container_id) else { return };
        let entry = self.memory.containers.entry(report.container.clone()).or_default();
        entry.probes = entry.probes_of(instance);
        match (report.kind, report.healthy) {
            (ProbeKind::Readiness, ready) => entry.probes.ready = ready,
            (ProbeKind::Startup, true) => entry.probes.started = true,
            (ProbeKind::Liveness, true) => {}
            (kind, false) => {
                info!(pod = %self.desired.described(), container = %report.container, probe = kind.word(), "probe failed");
                entry.probes.failed = Some(ProbeFailure { probe: kind.word(), grace: report.grace });
            }
        }
    }

    fn step_done(&mut self, action: &PodAction) {
        self.holds.remove(&action.key());
        match action {
            PodAction::EnsureCgroup => self.memory.cgroup = Progress::Done,
            PodAction::StopSandbox { id } => {
                self.memory.stopped_sandboxes.insert(id.clone());
            }
            PodAction::RemoveSandbox { id } => {
                self.memory.stopped_sandboxes.remove(id);
            }
            PodAction::ResizeContainer { container, applied, .. } => {
                let entry = self.memory.containers.entry(container.clone()).or_default();
                entry.applied = Some(Applied::clone(applied));
            }
            PodAction::TearDownVolumes => self.memory.released.volumes = true,
            PodAction::RemoveCgroup => self.memory.released.cgroup = true,
            PodAction::DeleteFromApi => self.memory.released.api = true,
            _ => {}
        }
    }

    /// Keeps a failed step from being tried again at once.
    fn hold(&mut self, action: &PodAction, now: Timestamp) {
        let failures = self.holds.get(&action.key()).map_or(0, |(failures, _)| *failures);
        let pause = FIRST_HOLD.saturating_mul(1 << failures.min(6)).min(LONGEST_HOLD);
        self.holds.insert(action.key(), (failures + 1, now + pause));
    }

    fn absorb_volumes(&mut self, result: Result<MountedVolumes, VolumeError>, now: Timestamp) {
        match result {
            Ok(mounted) => {
                self.memory.volumes = Progress::Done;
                self.mount_problem = None;
                self.mount_failures = 0;
                self.volumes = Arc::new(mounted.volumes);
                self.refresh_volumes_at = mounted.refresh_at;
                for event in mounted.events {
                    let kind = if event.is_warning { EventType::Warning } else { EventType::Normal };
                    self.event(None, kind, event.reason, &event.message);
                }
            }
            Err(error) if error.waits => {
                debug!(pod = %self.desired.described(), %error, "volumes wait");
                self.memory.volumes = Progress::Failed { retry_at: now + FIRST_MOUNT_RETRY };
            }
            Err(error) => {
                let pause = FIRST_MOUNT_RETRY.saturating_mul(1 << self.mount_failures.min(6));
                self.mount_failures += 1;
                let retry_at = now + pause.min(LONGEST_MOUNT_RETRY);
                self.memory.volumes = Progress::Failed { retry_at };
                let message = error.to_string();
                if self.mount_problem.as_ref() != Some(&message) {
                    self.event(None, EventType::Warning, error.step.reason(), &message);
                    self.mount_problem = Some(message);
                }
            }
        }
        if std::mem::take(&mut self.volumes_outdated) {
            self.memory.volumes = Progress::Todo;
        }
    }

    fn absorb_claims(&mut self, result: Result<(), StepError>, now: Timestamp) {
        match result {
            Ok(()) => {
                self.memory.claims = Progress::Done;
                self.claim_failures = 0;
            }
            Err(error) => {
                warn!(pod = %self.desired.described(), %error, "ResourceClaims not ready");
                let pause = FIRST_CLAIM_RETRY.saturating_mul(1 << self.claim_failures.min(6));
                self.claim_failures += 1;
                self.memory.claims = Progress::Failed { retry_at: now + pause.min(LONGEST_CLAIM_RETRY) };
            }
        }
    }

    fn absorb_sandbox(&mut self, action: &PodAction, result: Result<(), CriError>, now: Timestamp) {
        self.stale = true;
        match result {
            Ok(()) => self.memory.sandbox = Progress::Done,
            Err(error) if error.is_unavailable() => self.hold(action, now),
            Err(error) => {
                warn!(pod = %self.desired.described(), %error, "sandbox not created");
                self.memory.sandbox = Progress::Failed { retry_at: now + SANDBOX_RETRY };
            }
        }
    }

    fn absorb_image(&mut self, container: String, result: Result<ReadyImage, ImageError>, now: Timestamp) {
        let entry = self.memory.containers.entry(container.clone()).or_default();
        match result {
            Ok(ready) => {
                entry.image = ImageState::Present { image_ref: ready.image_ref };
                entry.pull_backoff = agent_core::backoff::BackOff::default();
                let mut users = HashMap::clone(&self.image_users);
                users.insert(container, ready.user);
                self.image_users = Arc::new(users);
            }
            Err(error) if error.runtime_away => self.hold(&PodAction::EnsureImage { container }, now),
            Err(error) => {
                entry.pull_backoff.advance(now, now, agent_core::backoff::MAX);
                entry.image =
                    ImageState::Failed { reason: error.reason.to_owned(), message: error.message, at: now };
            }
        }
    }

    fn absorb_start(&mut self, action: &PodAction, result: Result<(), StartError>, now: Timestamp) {
        self.stale = true;
        let PodAction::StartContainer { container, .. } = action else { return };
        let entry = self.memory.containers.entry(container.clone()).or_default();
        match result {
            Ok(()) => entry.image = ImageState::Unknown,
            Err(error) if error.runtime_away => {
                entry.image = ImageState::Unknown;
                self.hold(action, now);
            }
            Err(error) => {
                info!(pod = %self.desired.described(), %container, reason = error.reason, problem = %error.message,
                    "container not started");
                entry.image = ImageState::Unknown;
                entry.start_failure =
                    Some(StartFailure { reason: error.reason.to_owned(), message: error.message, at: now });
            }
        }
    }
}

/// Whether the CRI must be read again after the step.
fn touches_cri(action: &PodAction) -> bool {
    !matches!(
        action,
        PodAction::EnsureCgroup
            | PodAction::ReleaseClaims
            | PodAction::TearDownVolumes
            | PodAction::RemoveCgroup
            | PodAction::DeleteFromApi
    )
}

/// Whether what the pod holds of ResourceClaims may be another thing after the step.
fn touches_claims(action: &PodAction) -> bool {
    matches!(action, PodAction::PrepareClaims | PodAction::ReleaseClaims | PodAction::StartContainer { .. })
}
