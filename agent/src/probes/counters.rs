//! Counters of probe results by probe, for `/metrics/probes`, under the kubelet's names.
//!
//! A series begins with a probe's first check and ends with the probe, as upstream: a node does not remember pods that are gone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_core::probe::ProbeKind;
use k8s_openapi::api::core::v1::Pod;

use super::check::Checked;

const RESULTS: [&str; 3] = ["successful", "failed", "unknown"];
/// How long checks take.
const DURATION: &str = "prober_probe_duration_seconds";
/// Upper bounds in seconds, Prometheus' usual ones.
const BOUNDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Results of all probes under way.
#[derive(Debug, Default)]
pub struct ProbeCounters(Mutex<BTreeMap<Labels, Arc<Cells>>>);

/// Which probe.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Labels {
    kind: &'static str,
    container: String,
    pod: String,
    namespace: String,
    uid: String,
}

#[derive(Debug, Default)]
struct Cells {
    results: [AtomicU64; 3],
    /// How many took at most as long as each bound, and not as short as the one before.
    within: [AtomicU64; BOUNDS.len()],
    micros: AtomicU64,
}

/// One probe's counters; they go with the last holder.
#[derive(Debug)]
pub struct Tally {
    all: Arc<ProbeCounters>,
    labels: Labels,
    cells: Arc<Cells>,
}

impl ProbeCounters {
    /// The counters of one probe: those that it had before its container was started again, if they are still held.
    pub fn tally(self: &Arc<Self>, pod: &Pod, container: &str, kind: ProbeKind) -> Tally {
        let metadata = &pod.metadata;
        let labels = Labels {
            kind: kind.title(),
            container: container.to_owned(),
            pod: metadata.name.clone().unwrap_or_default(),
            namespace: metadata.namespace.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
        };
        let cells = Arc::clone(self.lock().entry(labels.clone()).or_default());
        Tally { all: Arc::clone(self), labels, cells }
    }

    /// Prometheus text.
    pub fn render(&self) -> String {
        let mut text = String::from(
            "# HELP prober_probe_total Cumulative number of a liveness, readiness or startup probe by result.\n\
             # TYPE prober_probe_total counter\n",
        );
        let all = self.lock();
        for (labels, cells) in all.iter() {
            labels.render_total(cells, &mut text);
        }
        text.push_str(
            "# HELP prober_probe_duration_seconds Duration in seconds for a probe response.\n\
             # TYPE prober_probe_duration_seconds histogram\n",
        );
        for (labels, cells) in all.iter() {
            labels.render_duration(cells, &mut text);
        }
        text
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Labels, Arc<Cells>>> {
        // Counters are right whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Labels {
    fn render_total(&self, cells: &Cells, text: &mut String) {
        let Self { kind, container, pod, namespace, uid } = self;
        for (result, cell) in RESULTS.iter().zip(&cells.results) {
            let count = cell.load(Ordering::Relaxed);
            if count == 0 {
                continue;
            }
            // Writing to a String cannot fail.
            writeln!(
                text,
                "prober_probe_total{{container=\"{container}\",namespace=\"{namespace}\",pod=\"{pod}\",\
                 pod_uid=\"{uid}\",probe_type=\"{kind}\",result=\"{result}\"}} {count}"
            )
            .ok();
        }
    }

    fn render_duration(&self, cells: &Cells, text: &mut String) {
        let count: u64 = cells.results.iter().map(|cell| cell.load(Ordering::Relaxed)).sum();
        if count == 0 {
            return;
        }
        let Self { kind, container, pod, namespace, .. } = self;
        let labels = format!(
            "container=\"{container}\",namespace=\"{namespace}\",pod=\"{pod}\",probe_type=\"{kind}\""
        );
        let mut until = 0;
        for (bound, cell) in BOUNDS.iter().zip(&cells.within) {
            until += cell.load(Ordering::Relaxed);
            writeln!(text, "{DURATION}_bucket{{{labels},le=\"{bound}\"}} {until}").ok();
        }
        // A check may be counted between the two loads.
        let count = count.max(until);
        let seconds = Duration::from_micros(cells.micros.load(Ordering::Relaxed)).as_secs_f64();
        writeln!(text, "{DURATION}_bucket{{{labels},le=\"+Inf\"}} {count}").ok();
        writeln!(text, "{DURATION}_sum{{{labels}}} {seconds}").ok();
        writeln!(text, "{DURATION}_count{{{labels}}} {count}").ok();
    }
}

impl Tally {
    /// Counts one check.
    pub fn count(&self, checked: &Checked, took: Duration) {
        let result = match checked {
            Checked::Success(_) | Checked::Warning(_) => 0,
            Checked::Failure(_) => 1,
            Checked::Unknown(_) => 2,
        };
        let add = |cell: Option<&AtomicU64>, by| cell.map(|cell| cell.fetch_add(by, Ordering::Relaxed));
        let bucket = BOUNDS.iter().position(|bound| took.as_secs_f64() <= *bound);
        add(self.cells.results.get(result), 1);
        add(bucket.and_then(|bucket| self.cells.within.get(bucket)), 1);
        add(Some(&self.cells.micros), u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        // The map's and this one: no other task counts for this probe.
        if Arc::strong_count(&self.cells) == 2 {
            all.remove(&self.labels);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some("web".to_owned());
        pod.metadata.namespace = Some("shop".to_owned());
        pod.metadata.uid = Some("u1".to_owned());
        pod
    }

    #[test]
    fn a_probe_is_counted_as_long_as_it_is_made() {
        let counters = Arc::new(ProbeCounters::default());
        let first = counters.tally(&pod(), "main", ProbeKind::Liveness);
        assert!(!counters.render().contains("web"), "nothing was asked yet");
        first.count(&Checked::Success(String::new()), Duration::from_millis(7));
        let again = counters.tally(&pod(), "main", ProbeKind::Liveness);
        drop(first);
        again.count(&Checked::Failure(String::new()), Duration::from_secs(30));
        let text = counters.render();
        let of = "container=\"main\",namespace=\"shop\",pod=\"web\"";
        for line in [
            format!(
                "prober_probe_total{{{of},pod_uid=\"u1\",probe_type=\"Liveness\",result=\"successful\"}} 1\n"
            ),
            format!(
                "prober_probe_total{{{of},pod_uid=\"u1\",probe_type=\"Liveness\",result=\"failed\"}} 1\n"
            ),
            format!("prober_probe_duration_seconds_bucket{{{of},probe_type=\"Liveness\",le=\"0.005\"}} 0\n"),
            format!("prober_probe_duration_seconds_bucket{{{of},probe_type=\"Liveness\",le=\"0.01\"}} 1\n"),
            format!("prober_probe_duration_seconds_bucket{{{of},probe_type=\"Liveness\",le=\"+Inf\"}} 2\n"),
            format!("prober_probe_duration_seconds_count{{{of},probe_type=\"Liveness\"}} 2\n"),
        ] {
            assert!(text.contains(&line), "{line} is not in {text}");
        }
        drop(again);
        assert!(!counters.render().contains("web"), "the probe is over");
    }
}
