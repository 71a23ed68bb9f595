//! What goes on through a restart of the agent, a change of the pod's fate, and a clock that is set back. Pure.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PodStatus;

use crate::backoff::BackOff;
use crate::model::{Fate, ImageState, PodMemory, ProbeResults, Step};
use crate::resize::Applied;

impl Fate {
    /// What becomes of a pod of this fate when it is told `next`: a pod that failed runs no more, and an end that has begun is
    /// not taken back, only made shorter. Whoever says otherwise tells of an older state of the pod.
    pub fn followed_by(&self, next: Self) -> Self {
        match (self, next) {
            (Self::Fail { .. }, Self::Run) | (Self::Terminate { .. }, Self::Run | Self::Fail { .. }) => {
                self.clone()
            }
            (Self::Terminate { grace: old, gone: was }, Self::Terminate { grace, gone }) => {
                Self::Terminate { grace: grace.min(*old), gone: gone || *was }
            }
            (_, next) => next,
        }
    }
}

impl PodMemory {
    /// Readiness and back-off as the API remembers them from the agent before this one.
    pub fn recall(&mut self, status: &PodStatus, max_delay: SignedDuration) {
        for known in status.container_statuses.iter().chain(&status.init_container_statuses).flatten() {
            let entry = self.containers.entry(known.name.clone()).or_default();
            entry.applied = known.resources.clone().map(|resources| Applied {
                attempt: u32::try_from(known.restart_count).unwrap_or(0),
                resources,
            });
            let id = known.container_id.as_deref().and_then(|id| id.split_once("://")).map(|(_, id)| id);
            if let Some(id) = id {
                entry.probes = ProbeResults {
                    container_id: id.to_owned(),
                    started: known.started.unwrap_or(false),
                    ready: known.ready,
                    failed: None,
                };
            }
            let crashed = known.state.as_ref().and_then(|state| state.waiting.as_ref());
            let ended =
                known.last_state.as_ref().and_then(|last| last.terminated.as_ref()?.finished_at.clone());
            if let Some(ended) =
                ended.filter(|_| crashed.and_then(|w| w.reason.as_deref()) == Some("CrashLoopBackOff"))
            {
                let restarts = u32::try_from(known.restart_count).unwrap_or(0) + 1;
                entry.restart_backoff = BackOff::resumed(restarts, ended.0, max_delay);
            }
        }
    }

    /// The clock was set back to `now`: what was to be tried again at a time of the old clock is due at once, and what failed
    /// did so now. Else nothing would be tried until the clock is where it was.
    pub fn clock_went_back(&mut self, now: Timestamp) {
        for step in [&mut self.cgroup, &mut self.volumes, &mut self.claims, &mut self.sandbox] {
            if matches!(step, Step::Failed { .. }) {
                *step = Step::Todo;
            }
        }
        for memory in self.containers.values_mut() {
            if let ImageState::Failed { at, .. } = &mut memory.image {
                *at = now.min(*at);
            }
            if let Some(failure) = &mut memory.start_failure {
                failure.at = now.min(failure.at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::StartFailure;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).expect("in range")
    }

    #[test]
    fn an_end_is_never_taken_back_only_made_shorter() {
        let fail = Fate::Fail { reason: "Evicted".to_owned(), message: String::new(), grace: Some(1) };
        let end = |grace, gone| Fate::Terminate { grace, gone };
        assert_eq!(Fate::Run.followed_by(fail.clone()), fail);
        assert_eq!(fail.followed_by(Fate::Run), fail);
        assert_eq!(fail.followed_by(end(30, false)), end(30, false));
        assert_eq!(end(30, false).followed_by(Fate::Run), end(30, false));
        assert_eq!(end(30, false).followed_by(fail), end(30, false));
        assert_eq!(end(5, false).followed_by(end(30, false)), end(5, false));
        assert_eq!(end(30, true).followed_by(end(1, false)), end(1, true));
    }

    #[test]
    fn nothing_waits_for_a_clock_that_was_set_back() {
        let mut memory = PodMemory { volumes: Step::Failed { retry_at: at(3605) }, ..PodMemory::default() };
        let container = memory.containers.entry("a".to_owned()).or_default();
        container.start_failure =
            Some(StartFailure { reason: String::new(), message: String::new(), at: at(3600) });
        memory.clock_went_back(at(0));
        assert_eq!(memory.volumes, Step::Todo);
        assert_eq!(memory.container("a").start_failure.map(|failure| failure.at), Some(at(0)));
    }
}
