//! Probe thresholds and timing as a state machine. Pure: the prober runs the check and tells the result.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};

/// First pause of the early readiness checks; each further one is twice as long, up to the period.
const EARLY_PAUSE: Duration = Duration::from_millis(100);

/// Which probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProbeKind {
    /// Gates the other two; a failure kills.
    Startup,
    /// A failure kills.
    Liveness,
    /// Decides whether the container is ready.
    Readiness,
}

impl ProbeKind {
    /// As events and metrics spell it, capitalised.
    pub fn title(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }

    /// As Killing events spell it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Startup => "startup",
            Self::Liveness => "liveness",
            Self::Readiness => "readiness",
        }
    }
}

/// A probe's verdict about an instance of a container changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeReport {
    /// Container name.
    pub container: String,
    /// Instance.
    pub container_id: String,
    /// Which probe.
    pub kind: ProbeKind,
    /// The new verdict.
    pub healthy: bool,
    /// The probe's own grace period.
    pub grace: Option<i64>,
}

/// The probes that run of a container that runs. Until a startup probe has succeeded (`started`) it is the only one. Of a pod
/// that is being deleted (`ending`) only readiness is asked.
pub fn wanted(container: &Container, started: bool, ending: bool) -> Vec<(ProbeKind, &Probe)> {
    let startup = container.startup_probe.as_ref().filter(|_| !started);
    if let Some(probe) = startup {
        return if ending { Vec::new() } else { vec![(ProbeKind::Startup, probe)] };
    }
    let liveness = container.liveness_probe.as_ref().filter(|_| !ending);
    let readiness = container.readiness_probe.as_ref();
    liveness
        .map(|probe| (ProbeKind::Liveness, probe))
        .into_iter()
        .chain(readiness.map(|probe| (ProbeKind::Readiness, probe)))
        .collect()
}

/// Numbers of a probe with their defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeSettings {
    /// From the container's start to the first check.
    pub initial_delay: Duration,
    /// Between checks.
    pub period: Duration,
    /// Of one check.
    pub timeout: Duration,
    /// Successes in a row that count as success.
    pub success_threshold: u32,
    /// Failures in a row that count as failure.
    pub failure_threshold: u32,
}

impl ProbeSettings {
    /// Reads a probe.
    pub fn of(probe: &Probe) -> Self {
        let number = |value: Option<i32>, default: u32| {
            value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
        };
        let seconds = |value, default| Duration::from_secs(u64::from(number(value, default)));
        Self {
            initial_delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            success_threshold: number(probe.success_threshold, 1),
            failure_threshold: number(probe.failure_threshold, 3),
        }
    }
}

/// What a result means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeStep {
    /// The verdict changed to this.
    pub verdict: Option<bool>,
    /// The failure is worth an Unhealthy event.
    pub report: bool,
    /// Pause until the next check; `None`: the probe has said all it can.
    pub next: Option<Duration>,
}

/// One probe of one container instance.
#[derive(Debug, Clone)]
pub struct ProbeState {
    kind: ProbeKind,
    settings: ProbeSettings,
    verdict: Option<bool>,
    last: Option<bool>,
    in_a_row: u32,
    early: Option<Duration>,
}

impl ProbeState {
    /// A probe whose container has just started. `cheap` checks (no process to run) may repeat quickly until the
    /// container is ready for the first time.
    pub fn new(kind: ProbeKind, settings: ProbeSettings, cheap: bool) -> Self {
        let verdict = match kind {
            ProbeKind::Startup => None,
            ProbeKind::Liveness => Some(true),
            ProbeKind::Readiness => Some(false),
        };
        let early = (kind == ProbeKind::Readiness && cheap && settings.initial_delay.is_zero())
            .then_some(EARLY_PAUSE);
        Self { kind, settings, verdict, last: None, in_a_row: 0, early }
    }

    /// A probe of a container that ran before the agent did, with what was known then.
    pub fn resumed(kind: ProbeKind, settings: ProbeSettings, verdict: bool) -> Self {
        let mut state = Self::new(kind, settings, false);
        state.verdict = Some(verdict);
        state
    }

    /// Takes one result. A check that could not be made is not a result: leave it out.
    pub fn on_result(&mut self, success: bool) -> ProbeStep {
        if let Some(pause) = self.early.filter(|pause| !success && *pause < self.settings.period) {
            // Within the first period upstream would not have looked again: such failures do not count.
            self.early = Some(pause.saturating_mul(2));
            return ProbeStep { verdict: None, report: false, next: Some(pause) };
        }
        self.early = None;
        self.in_a_row = if self.last == Some(success) { self.in_a_row.saturating_add(1) } else { 1 };
        self.last = Some(success);
        let threshold =
            if success { self.settings.success_threshold } else { self.settings.failure_threshold };
        let decided = self.in_a_row >= threshold && self.verdict != Some(success);
        if decided {
            self.verdict = Some(success);
        }
        let over = match self.kind {
            ProbeKind::Startup => self.verdict.is_some(),
            ProbeKind::Liveness => self.verdict == Some(false),
            ProbeKind::Readiness => false,
        };
        ProbeStep {
            verdict: decided.then_some(success),
            report: !success,
            next: (!over).then_some(self.settings.period),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(success: u32, failure: u32) -> ProbeSettings {
        ProbeSettings {
            initial_delay: Duration::ZERO,
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            success_threshold: success,
            failure_threshold: failure,
        }
    }

    /// Feeds results (`+`, `-`) and shows the verdicts (`R`eady/ok, `F`ailed, `.` unchanged).
    #[track_caller]
    fn check(kind: ProbeKind, numbers: (u32, u32), results: &str, expected: &str) {
        let mut state = ProbeState::new(kind, settings(numbers.0, numbers.1), false);
        let verdicts: String = results
            .chars()
            .map(|result| match state.on_result(result == '+').verdict {
                Some(true) => 'R',
                Some(false) => 'F',
                None => '.',
            })
            .collect();
        assert_eq!(verdicts, expected, "{kind:?} {numbers:?} {results}");
    }

    #[test]
    fn thresholds_decide() {
        check(ProbeKind::Readiness, (1, 3), "+--+---+", "R.....FR");
        check(ProbeKind::Readiness, (2, 1), "+-++", "...R");
        check(ProbeKind::Liveness, (1, 3), "--+---", ".....F");
        check(ProbeKind::Startup, (1, 3), "--+", "..R");
        check(ProbeKind::Startup, (1, 3), "---", "..F");
    }

    #[test]
    fn a_startup_probe_ends_with_its_verdict() {
        let mut state = ProbeState::new(ProbeKind::Startup, settings(1, 1), false);
        assert_eq!(state.on_result(true).next, None);
    }

    #[test]
    fn early_checks_are_quick_and_do_not_count() {
        let mut state = ProbeState::new(ProbeKind::Readiness, settings(1, 1), true);
        let step = state.on_result(false);
        assert_eq!((step.report, step.next), (false, Some(Duration::from_millis(100))));
        assert_eq!(state.on_result(false).next, Some(Duration::from_millis(200)));
        assert_eq!(state.on_result(true).verdict, Some(true));
        assert_eq!(state.on_result(false).verdict, Some(false), "afterwards failures count");
    }
}
