//! Takes the outcomes of steps and probes into the loop, with the events and words in the log that belong to them.

use std::collections::HashMap;
use std::sync::Arc;

use agent_core::plan::PodAction;
use agent_core::pod_loop::StepEnd;
use agent_core::probe::ProbeReport;
use agent_core::status::sync::Written;
use jiff::Timestamp;
use tracing::{debug, info, warn};

use super::start::StartError;
use super::steps::Outcome;
use super::worker::Worker;
use crate::contracts::{MountedVolumes, VolumeError};
use crate::events::EventType;
use crate::runtime::cri::CriError;
use crate::runtime::images::{ImageError, ReadyImage};

impl Worker {
    /// Takes the end of a step, or of a status write where there is no action; no outcome means that it was cut short.
    pub(super) fn absorb(&mut self, action: Option<PodAction>, outcome: Option<Outcome>, now: Timestamp) {
        let Some(action) = action else { return self.absorb_write(outcome, now) };
        let end = self.end_of(&action, outcome);
        self.state.absorb(&action, end, now);
        if touches_claims(&action) {
            self.state.memory.claims_held = self.context.claims.holds(self.state.desired.uid());
        }
    }

    /// Takes a probe's verdict.
    pub(super) fn absorb_probe(&mut self, report: &ProbeReport) {
        if self.state.absorb_probe(report) {
            info!(pod = %self.state.desired.described(), container = %report.container, probe = report.kind.word(),
                "probe failed");
        }
    }

    fn absorb_write(&mut self, outcome: Option<Outcome>, now: Timestamp) {
        let written = match outcome {
            Some(Outcome::Status(written)) => written,
            _ => Written::Failed("the write ended unexpectedly".to_owned()),
        };
        if let Some(error) = self.state.sync.done(written, now) {
            warn!(pod = %self.state.desired.described(), %error, "status not written");
        }
    }

    /// What the outcome means for the loop; what people are to know of it is told here.
    fn end_of(&mut self, action: &PodAction, outcome: Option<Outcome>) -> StepEnd {
        match outcome {
            Some(
                Outcome::Plain(Ok(()))
                | Outcome::Claims(Ok(()))
                | Outcome::Sandbox(Ok(()))
                | Outcome::Started(Ok(())),
            ) => StepEnd::Done,
            Some(Outcome::Plain(Err(error))) => {
                warn!(pod = %self.state.desired.described(), ?action, %error, "step failed");
                StepEnd::Failed
            }
            Some(Outcome::Claims(Err(error))) => {
                warn!(pod = %self.state.desired.described(), %error, "ResourceClaims not ready");
                StepEnd::Failed
            }
            Some(Outcome::Volumes(Ok(mounted))) => self.mounted(mounted),
            Some(Outcome::Volumes(Err(error))) => self.not_mounted(&error),
            Some(Outcome::Sandbox(Err(error))) => self.no_sandbox(&error),
            Some(Outcome::Image(Ok(ready))) => self.image_ready(action, ready),
            Some(Outcome::Image(Err(error))) => no_image(error),
            Some(Outcome::Started(Err(error))) => self.not_started(action, error),
            Some(Outcome::Status(_)) | None => StepEnd::CutShort,
        }
    }

    fn mounted(&mut self, mounted: MountedVolumes) -> StepEnd {
        self.mount_problem = None;
        self.volumes = Arc::new(mounted.volumes);
        for event in mounted.events {
            let kind = if event.is_warning { EventType::Warning } else { EventType::Normal };
            self.event(None, kind, event.reason, &event.message);
        }
        StepEnd::Mounted { refresh_at: mounted.refresh_at }
    }

    fn not_mounted(&mut self, error: &VolumeError) -> StepEnd {
        if error.waits {
            debug!(pod = %self.state.desired.described(), %error, "volumes wait");
            return StepEnd::Waits;
        }
        let message = error.to_string();
        if self.mount_problem.as_ref() != Some(&message) {
            self.event(None, EventType::Warning, error.step.reason(), &message);
            self.mount_problem = Some(message);
        }
        StepEnd::Failed
    }

    fn no_sandbox(&self, error: &CriError) -> StepEnd {
        if error.is_unavailable() {
            return StepEnd::Away;
        }
        warn!(pod = %self.state.desired.described(), %error, "sandbox not created");
        StepEnd::Failed
    }

    fn image_ready(&mut self, action: &PodAction, ready: ReadyImage) -> StepEnd {
        if let PodAction::EnsureImage { container } = action {
            let mut users = HashMap::clone(&self.image_users);
            users.insert(container.clone(), ready.user);
            self.image_users = Arc::new(users);
        }
        StepEnd::ImageReady { image_ref: ready.image_ref }
    }

    fn not_started(&self, action: &PodAction, error: StartError) -> StepEnd {
        if error.runtime_away {
            return StepEnd::Away;
        }
        if let PodAction::StartContainer { container, .. } = action {
            info!(pod = %self.state.desired.described(), %container, reason = error.reason, problem = %error.message,
                "container not started");
        }
        StepEnd::Refused { reason: error.reason.to_owned(), message: error.message }
    }
}

fn no_image(error: ImageError) -> StepEnd {
    if error.runtime_away {
        return StepEnd::Away;
    }
    StepEnd::Refused { reason: error.reason.to_owned(), message: error.message }
}

/// Whether what the pod holds of ResourceClaims may be another thing after the step.
fn touches_claims(action: &PodAction) -> bool {
    matches!(action, PodAction::PrepareClaims | PodAction::ReleaseClaims | PodAction::StartContainer { .. })
}
