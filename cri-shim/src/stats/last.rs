//! What is kept of a container or sandbox between two requests for its figures.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cri_shim_api::v1::FilesystemUsage;
use cri_shim_core::stats::nano_cores;
use tokio::task::JoinHandle;

use crate::host::handles::CgroupFiles;

/// The least time in nanoseconds between two readings that a new rate is told from.
const RATE_WINDOW: i64 = 500_000_000;
/// The least time between the first two readings.
const FIRST_WINDOW: i64 = 50_000_000;
/// An earlier reading older than this tells nothing about now.
const STALE: i64 = 120_000_000_000;

/// The figures of earlier requests, and the files that they came from. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct LastFigures(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    kept: Mutex<Kept>,
    files: CgroupFiles,
}

#[derive(Debug, Default)]
struct Kept {
    /// When, and CPU time used until then.
    cpu: Option<(i64, u64)>,
    rate: Option<u64>,
    layer: Option<(Instant, FilesystemUsage)>,
    measuring: bool,
}

impl LastFigures {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Files of the cgroup that stay open.
    pub(crate) fn files(&self) -> &CgroupFiles {
        &self.0.files
    }

    /// The rate since an earlier reading; the last one told when that was only just now; nothing for a first reading.
    pub(crate) fn rate(&self, now: i64, used: u64) -> Option<u64> {
        let mut kept = self.lock();
        let elapsed = kept.cpu.map(|(at, _)| now - at);
        let window = if kept.rate.is_some() { RATE_WINDOW } else { FIRST_WINDOW };
        match (kept.cpu, elapsed) {
            (Some(earlier), Some(elapsed)) if (window..STALE).contains(&elapsed) => {
                // A counter that went back is a new cgroup's.
                kept.rate = nano_cores(earlier, (now, used));
                kept.cpu = Some((now, used));
            }
            (Some(_), Some(elapsed)) if (0..window).contains(&elapsed) => {}
            _ => (kept.cpu, kept.rate) = (Some((now, used)), None),
        }
        kept.rate
    }

    /// The size of the writable layer, when it was measured within `age`.
    pub(crate) fn layer(&self, age: Duration) -> Option<FilesystemUsage> {
        let kept = self.lock();
        kept.layer.as_ref().filter(|(at, _)| at.elapsed() < age).map(|(_, layer)| layer.clone())
    }

    /// Keeps what `work` measures, in a task of its own; nothing when somebody measures already.
    pub(crate) fn measure_layer(
        &self,
        work: impl Future<Output = Option<FilesystemUsage>> + Send + 'static,
    ) -> Option<JoinHandle<()>> {
        if std::mem::replace(&mut self.lock().measuring, true) {
            return None;
        }
        let kept = self.clone();
        Some(tokio::spawn(async move {
            let done = Done(kept);
            let found = work.await;
            if let Some(layer) = found {
                done.0.lock().layer = Some((Instant::now(), layer));
            }
        }))
    }
}

/// Lets the next one measure, also when this one was cut off.
struct Done(LastFigures);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.lock().measuring = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_rate_needs_two_readings_some_time_apart() {
        let last = LastFigures::default();
        assert_eq!(last.rate(0, 0), None);
        assert_eq!(last.rate(SECOND, 250_000_000), Some(250_000_000));
        assert_eq!(last.rate(SECOND + 1, 999_000_000), Some(250_000_000), "too soon for a new one");
        assert_eq!(last.rate(3 * SECOND, 250_000_000), Some(0), "idle since");
    }

    #[test]
    fn a_first_rate_comes_soon_and_an_old_reading_counts_for_nothing() {
        let last = LastFigures::default();
        assert_eq!(last.rate(0, 0), None);
        assert_eq!(last.rate(100_000_000, 50_000_000), Some(500_000_000), "half a core");
        assert_eq!(last.rate(1000 * SECOND, 60_000_000), None, "nobody asked for a long time");
        assert_eq!(last.rate(1001 * SECOND, 5), None, "the counter went back");
        assert_eq!(last.rate(1002 * SECOND, SECOND.unsigned_abs() + 5), Some(1_000_000_000));
    }

    #[tokio::test]
    async fn one_measures_at_a_time_and_the_result_is_kept() {
        let last = LastFigures::default();
        let (open, gate) = tokio::sync::oneshot::channel::<()>();
        let first = last.measure_layer(async {
            gate.await.ok();
            Some(FilesystemUsage::default())
        });
        assert!(last.measure_layer(async { None }).is_none(), "somebody measures");
        open.send(()).expect("waited for");
        first.expect("measures").await.expect("ended");
        assert!(last.layer(Duration::from_secs(60)).is_some());
        assert!(last.layer(Duration::ZERO).is_none());
        assert!(last.measure_layer(async { None }).is_some(), "and again");
    }
}
