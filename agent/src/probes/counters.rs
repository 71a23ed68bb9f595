//! Counters of probe results, for `/metrics/probes`.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use agent_core::probe::ProbeKind;

use super::check::Checked;

/// Results by probe type, and the time spent.
#[derive(Debug, Default)]
pub struct ProbeCounters {
    cells: [[AtomicU64; 3]; 3],
    micros: [AtomicU64; 3],
}

const KINDS: [ProbeKind; 3] = [ProbeKind::Startup, ProbeKind::Liveness, ProbeKind::Readiness];
const RESULTS: [&str; 3] = ["successful", "failed", "unknown"];

impl ProbeCounters {
    /// Counts one check.
    pub fn count(&self, kind: ProbeKind, checked: &Checked, took: Duration) {
        let result = match checked {
            Checked::Success(_) | Checked::Warning(_) => 0,
            Checked::Failure(_) => 1,
            Checked::Unknown(_) => 2,
        };
        let row = KINDS.iter().position(|known| *known == kind).unwrap_or_default();
        if let Some(cell) = self.cells.get(row).and_then(|row| row.get(result)) {
            cell.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(cell) = self.micros.get(row) {
            cell.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }

    /// Prometheus text.
    pub fn render(&self) -> String {
        let mut text = String::from(
            "# HELP prober_probe_total Cumulative number of a liveness, readiness or startup probe by result.\n\
             # TYPE prober_probe_total counter\n",
        );
        for (kind, row) in KINDS.iter().zip(&self.cells) {
            for (result, cell) in RESULTS.iter().zip(row) {
                let count = cell.load(Ordering::Relaxed);
                // Writing to a String cannot fail.
                let kind = kind.title();
                writeln!(text, "prober_probe_total{{probe_type=\"{kind}\",result=\"{result}\"}} {count}")
                    .ok();
            }
        }
        text.push_str("# HELP prober_probe_duration_seconds_sum Time spent in probes.\n# TYPE prober_probe_duration_seconds_sum counter\n");
        for (kind, cell) in KINDS.iter().zip(&self.micros) {
            let seconds = Duration::from_micros(cell.load(Ordering::Relaxed)).as_secs_f64();
            let kind = kind.title();
            writeln!(text, "prober_probe_duration_seconds_sum{{probe_type=\"{kind}\"}} {seconds}").ok();
        }
        text
    }
}
