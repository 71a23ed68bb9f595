//! How far pulls have come: for their no-progress deadline, for the log, the figures and whoever asks for the status.
//!
//! Input: what the transfers tell. Output: [`Pulls::list`], a line in the log every [`REPORT`] of a pull, counters.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::pull::PullError;
use super::records::Details;
use crate::telemetry;

/// How often a wait that is nobody's fault is counted as progress.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often the log tells how far a pull has come.
const REPORT: Duration = Duration::from_secs(10);

/// How far a pull has come, and when something last happened in it. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    begun: Instant,
    /// Milliseconds after `begun`.
    last: AtomicU64,
    /// Bytes that came over the network.
    received: AtomicU64,
    /// Bytes of all layers as they are transferred; 0 until the manifest is known.
    bytes: AtomicU64,
    layers: AtomicU64,
    layers_done: AtomicU64,
    /// Transfers from a registry under way.
    transfers: AtomicU64,
}

/// A transfer from a registry under way.
#[derive(Debug)]
pub struct Transferring(Progress);

impl Drop for Transferring {
    fn drop(&mut self) {
        self.0.0.transfers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(Counts {
            begun: Instant::now(),
            last: AtomicU64::default(),
            received: AtomicU64::default(),
            bytes: AtomicU64::default(),
            layers: AtomicU64::default(),
            layers_done: AtomicU64::default(),
            transfers: AtomicU64::default(),
        }))
    }
}

impl Progress {
    /// Something happened.
    pub fn tick(&self) {
        let now = u64::try_from(self.0.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.last.store(now, Ordering::Relaxed);
    }

    /// Bytes came from a registry.
    pub fn received(&self, bytes: usize) {
        let bytes = bytes as u64;
        self.0.received.fetch_add(bytes, Ordering::Relaxed);
        telemetry::pulled_bytes(bytes);
        self.tick();
    }

    /// It is known what there is to fetch.
    pub fn expect(&self, details: &Details) {
        let layers = details.manifest.layers();
        self.0.bytes.store(layers.iter().map(oci_spec::image::Descriptor::size).sum(), Ordering::Relaxed);
        self.0.layers.store(layers.len() as u64, Ordering::Relaxed);
        self.tick();
    }

    /// A layer is in its place.
    pub fn layer_done(&self) {
        self.0.layers_done.fetch_add(1, Ordering::Relaxed);
        self.tick();
    }

    /// Waits for `work` that has a deadline or an owner of its own, without counting the time as standing still.
    pub async fn patiently<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            // Cancel-safe: the work stays pinned here while the time runs out.
            match tokio::time::timeout(PATIENCE, &mut work).await {
                Ok(done) => return done,
                Err(_) => self.tick(),
            }
        }
    }

    /// Counts a transfer until what is returned is dropped.
    pub fn transferring(&self) -> Transferring {
        self.0.transfers.fetch_add(1, Ordering::Relaxed);
        self.tick();
        Transferring(self.clone())
    }

    /// Waits for what others hold: another pull, or another layer of this one. While transfers of this pull are under way, it
    /// is they that have to come on; else it stands still for as long as they do, and is told of by its own deadline.
    pub async fn in_turn<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            // Cancel-safe: the work stays pinned here while the time runs out.
            match tokio::time::timeout(PATIENCE, &mut work).await {
                Ok(done) => return done,
                Err(_) if self.0.transfers.load(Ordering::Relaxed) > 0 => {}
                Err(_) => self.tick(),
            }
        }
    }

    fn idle(&self) -> Duration {
        let last = Duration::from_millis(self.0.last.load(Ordering::Relaxed));
        self.0.begun.elapsed().saturating_sub(last)
    }

    /// Returns once nothing has happened for `deadline`.
    async fn stalled(&self, deadline: Duration) {
        loop {
            let left = deadline.saturating_sub(self.idle());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }

    /// Runs `work` unless it stands still for `deadline`.
    pub async fn watch<T, E: From<PullError>>(
        &self,
        deadline: Duration,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        // Cancel-safe: what the work has begun is under a lease that its owner gives back.
        tokio::select! {
            result = work => result,
            () = self.stalled(deadline) => Err(PullError::Stalled(deadline).into()),
        }
    }

    /// As a status shows it.
    fn shown(&self, image: &str) -> Value {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        json!({
            "image": image,
            "receivedBytes": load(&self.0.received),
            "bytes": load(&self.0.bytes),
            "layersDone": load(&self.0.layers_done),
            "layers": load(&self.0.layers),
            "seconds": self.0.begun.elapsed().as_secs(),
            "secondsWithoutProgress": self.idle().as_secs(),
        })
    }

    /// Tells the log how far it has come, again and again.
    pub async fn report(&self, image: &str) -> Infallible {
        loop {
            tokio::time::sleep(REPORT).await;
            let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
            tracing::info!(
                image,
                received = load(&self.0.received),
                bytes = load(&self.0.bytes),
                layers_done = load(&self.0.layers_done),
                layers = load(&self.0.layers),
                without_progress = ?self.idle(),
                "pulling"
            );
        }
    }
}

/// The pulls under way. Bounded by the distinct images being pulled.
#[derive(Debug, Default)]
pub struct Pulls {
    next: AtomicU64,
    all: Mutex<BTreeMap<u64, (String, Progress)>>,
}

/// A pull that is on the list until this is dropped.
#[derive(Debug)]
pub struct Listed {
    pulls: Arc<Pulls>,
    number: u64,
    progress: Progress,
}

impl Deref for Listed {
    type Target = Progress;

    fn deref(&self) -> &Progress {
        &self.progress
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.pulls.lock().remove(&self.number);
    }
}

impl Pulls {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (String, Progress)>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a pull on the list.
    pub fn begin(self: &Arc<Self>, image: String) -> Listed {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let progress = Progress::default();
        self.lock().insert(number, (image, progress.clone()));
        Listed { pulls: Arc::clone(self), number, progress }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// All of them as a status shows them, the oldest first.
    pub fn list(&self) -> Value {
        self.lock().values().map(|(image, progress)| progress.shown(image)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pull_is_listed_while_it_lasts_with_what_has_come() {
        let pulls = Arc::new(Pulls::default());
        let first = pulls.begin("docker.io/library/a:1".to_owned());
        let second = pulls.begin("docker.io/library/b:1".to_owned());
        first.received(700);
        first.received(70);
        first.layer_done();
        assert_eq!(pulls.count(), 2);
        let shown = pulls.list();
        assert_eq!(shown[0]["image"], "docker.io/library/a:1");
        assert_eq!((&shown[0]["receivedBytes"], &shown[0]["layersDone"]), (&json!(770), &json!(1)));
        assert_eq!(shown[1]["receivedBytes"], 0);
        drop(first);
        assert_eq!(pulls.list().as_array().map(Vec::len), Some(1));
        drop(second);
        assert_eq!(pulls.count(), 0);
    }

    #[tokio::test]
    async fn one_that_stands_still_is_given_up() {
        let progress = Progress::default();
        let never = std::future::pending::<Result<(), PullError>>();
        // The clock of the progress is the real one: nothing is left of this deadline.
        let result = progress.watch(Duration::ZERO, never).await;
        assert!(matches!(result, Err(PullError::Stalled(_))), "{result:?}");
    }
}
