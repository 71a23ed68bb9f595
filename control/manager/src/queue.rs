//! Work queues: keys to reconcile, each at most once in the queue and in one worker at a time.
//!
//! A key added while it is being worked on runs again afterwards, so no change is lost; failures come back
//! after a growing wait. Bounded by the number of distinct keys.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::write::{WriteError, chain};

/// A wait that doubles from failure to failure.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// Starts at `first` and never exceeds `longest`.
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Backoff { first, longest, failures: 0 }
    }

    /// The wait after one more failure.
    pub(crate) fn next_wait(&mut self) -> Duration {
        let wait = wait_after(self.failures, self.first, self.longest);
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// Failures that no success has followed.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Starts over after a success.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

fn wait_after(failures: u32, first: Duration, longest: Duration) -> Duration {
    first.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX)).min(longest)
}

const FIRST_RETRY: Duration = Duration::from_millis(10);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// A queue of keys.
#[derive(Debug)]
pub(crate) struct Queue<K> {
    state: Mutex<State<K>>,
    wake: Notify,
}

#[derive(Debug)]
struct State<K> {
    ready: VecDeque<K>,
    /// What `ready` holds.
    queued: BTreeSet<K>,
    running: BTreeSet<K>,
    /// Added again while running.
    dirty: BTreeSet<K>,
    /// The earliest time each waiting key becomes ready.
    due: BTreeMap<K, Instant>,
    timers: BTreeSet<(Instant, K)>,
    failures: BTreeMap<K, u32>,
}

impl<K: Ord + Clone + Debug + Send + 'static> Queue<K> {
    /// An empty queue.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Queue {
            state: Mutex::new(State {
                ready: VecDeque::new(),
                queued: BTreeSet::new(),
                running: BTreeSet::new(),
                dirty: BTreeSet::new(),
                due: BTreeMap::new(),
                timers: BTreeSet::new(),
                failures: BTreeMap::new(),
            }),
            wake: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the key worked on as soon as a worker is free.
    pub(crate) fn add(&self, key: K) {
        self.lock().add(key);
        self.wake.notify_one();
    }

    /// [`Self::add`] for many keys.
    pub(crate) fn add_all(&self, keys: impl IntoIterator<Item = K>) {
        keys.into_iter().for_each(|key| self.add(key));
    }

    /// The next key; it is running until [`Self::finish`] is called for it.
    async fn next(&self) -> K {
        loop {
            let timer = {
                let mut state = self.lock();
                state.wake_due(Instant::now());
                if let Some(key) = state.take() {
                    if !state.ready.is_empty() {
                        self.wake.notify_one();
                    }
                    return key;
                }
                state.timers.first().map(|(at, _)| *at)
            };
            // Both arms are cancel-safe: nothing is taken from the queue here.
            match timer {
                Some(at) => tokio::select! {
                    () = self.wake.notified() => {}
                    () = sleep_until(at) => {}
                },
                None => self.wake.notified().await,
            }
        }
    }

    fn finish(&self, key: K, outcome: &Result<Option<Duration>, WriteError>) {
        let mut state = self.lock();
        state.running.remove(&key);
        let wait = if let Ok(again) = outcome {
            state.failures.remove(&key);
            *again
        } else {
            let failures = state.failures.entry(key.clone()).or_default();
            let wait = wait_after(*failures, FIRST_RETRY, LONGEST_RETRY);
            *failures = failures.saturating_add(1);
            Some(wait)
        };
        if let Some(wait) = wait {
            state.add_at(key.clone(), Instant::now() + wait);
        }
        if state.dirty.remove(&key) {
            state.add(key);
        }
        drop(state);
        self.wake.notify_one();
    }
}

impl<K: Ord + Clone> State<K> {
    fn add(&mut self, key: K) {
        if let Some(at) = self.due.remove(&key) {
            self.timers.remove(&(at, key.clone()));
        }
        if self.running.contains(&key) {
            self.dirty.insert(key);
        } else if self.queued.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    fn add_at(&mut self, key: K, at: Instant) {
        match self.due.get(&key) {
            Some(earlier) if *earlier <= at => return,
            Some(later) => {
                self.timers.remove(&(*later, key.clone()));
            }
            None => {}
        }
        self.due.insert(key.clone(), at);
        self.timers.insert((at, key));
    }

    fn wake_due(&mut self, now: Instant) {
        while self.timers.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, key)) = self.timers.pop_first() {
                self.due.remove(&key);
                self.add(key);
            }
        }
    }

    fn take(&mut self) -> Option<K> {
        let key = self.ready.pop_front()?;
        self.queued.remove(&key);
        self.running.insert(key.clone());
        Some(key)
    }
}

/// A bound on one reconcile as a whole; each of its requests has a shorter one.
const RECONCILE_DEADLINE: Duration = Duration::from_secs(300);

/// Runs `workers` tasks that reconcile the queue's keys until `cancel` fires. `reconcile` returns when to
/// look again even if nothing changes.
pub(crate) fn work<K, F>(
    tasks: &TaskTracker,
    cancel: &CancellationToken,
    name: &'static str,
    queue: &Arc<Queue<K>>,
    workers: usize,
    reconcile: impl Fn(K) -> F + Clone + Send + Sync + 'static,
) where
    K: Ord + Clone + Debug + Send + 'static,
    F: Future<Output = Result<Option<Duration>, WriteError>> + Send,
{
    for _ in 0..workers {
        let (queue, cancel, reconcile) = (Arc::clone(queue), cancel.clone(), reconcile.clone());
        tasks.spawn(async move {
            // Cancel-safe: a reconcile that is dropped half-way is repeated from the start after a restart.
            let forever = async {
                loop {
                    let key = queue.next().await;
                    let pass = tokio::time::timeout(RECONCILE_DEADLINE, reconcile(key.clone())).await;
                    let outcome = pass.unwrap_or_else(|_elapsed| Err(WriteError::reconcile_deadline()));
                    if let Err(error) = &outcome {
                        log_failure(name, &key, error);
                    }
                    queue.finish(key, &outcome);
                }
            };
            tokio::select! {
                () = cancel.cancelled() => {}
                () = forever => {}
            }
        });
    }
}

/// Conflicts are how optimistic writes lose a race and no news; everything else is told.
fn log_failure(controller: &str, key: &dyn Debug, error: &WriteError) {
    let is_race = error.is_conflict() || error.is_not_found();
    if is_race {
        tracing::debug!(controller, ?key, error = %chain(error), "reconcile lost a race, trying again");
    } else {
        tracing::warn!(controller, ?key, error = %chain(error), "reconcile failed, trying again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Long enough for a ready key to come, short enough to wait for one that must not.
    const SHORT: Duration = Duration::from_millis(30);

    async fn stays_empty(queue: &Queue<&'static str>) -> bool {
        tokio::time::timeout(SHORT, queue.next()).await.is_err()
    }

    #[tokio::test]
    async fn a_key_runs_once_at_a_time_and_again_if_it_changed_meanwhile() {
        let queue = Queue::new();
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        assert!(stays_empty(&queue).await, "not while it is running");
        queue.finish("a", &Ok(None));
        assert_eq!(queue.next().await, "a");
        queue.finish("a", &Ok(None));
        assert!(stays_empty(&queue).await);
    }

    #[tokio::test]
    async fn failures_come_back_later_and_later() {
        let queue = Queue::new();
        queue.add("a");
        let mut waits = Vec::new();
        for _ in 0..3 {
            let began = Instant::now();
            let key = queue.next().await;
            waits.push(began.elapsed());
            queue.finish(key, &Err(WriteError::reconcile_deadline()));
        }
        assert!(waits[1] >= FIRST_RETRY && waits[2] >= FIRST_RETRY * 2, "{waits:?}");
    }

    #[tokio::test]
    async fn an_earlier_event_beats_the_timer() {
        let queue = Queue::new();
        queue.add_at("a", SHORT * 3);
        queue.add_at("a", SHORT);
        queue.add("a");
        assert_eq!(tokio::time::timeout(SHORT, queue.next()).await, Ok("a"));
        queue.finish("a", &Ok(Some(SHORT / 2)));
        assert_eq!(tokio::time::timeout(SHORT * 2, queue.next()).await, Ok("a"), "asked to come back");
        queue.finish("a", &Ok(None));
        assert!(stays_empty(&queue).await, "the timers are gone");
    }

    impl Queue<&'static str> {
        fn add_at(&self, key: &'static str, wait: Duration) {
            self.lock().add_at(key, Instant::now() + wait);
        }
    }
}
