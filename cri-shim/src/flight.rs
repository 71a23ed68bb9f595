//! Joins repeated requests: while one with the same key is under way, later ones wait for its result instead of failing
//! with "name is reserved". The work goes on when every caller has gone away.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tracing::Instrument;

use crate::error::RuntimeError;

type Outcome<T> = Result<T, Arc<RuntimeError>>;
type Running<T> = HashMap<String, watch::Receiver<Option<Outcome<T>>>>;

/// The requests under way, by key. Clones share them. Bounded by the number of names in use at once.
#[derive(Clone, Debug)]
pub struct Flights<T> {
    running: Arc<Mutex<Running<T>>>,
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self { running: Arc::default() }
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// The result of `work`, or of the same work that is under way already.
    pub async fn join<W>(&self, key: &str, work: W) -> Result<T, RuntimeError>
    where
        W: Future<Output = Result<T, RuntimeError>> + Send + 'static,
    {
        let mut outcome = self.enter(key, work);
        let ended = outcome.wait_for(Option::is_some).await.map(|value| value.clone());
        match ended {
            Ok(Some(Ok(value))) => Ok(value),
            Ok(Some(Err(error))) => Err(RuntimeError::Shared(error)),
            // The sender only goes away without a value when the task panicked.
            Ok(None) | Err(_) => Err(RuntimeError::Interrupted("the request")),
        }
    }

    /// Whether something with this key is under way.
    pub fn has(&self, key: &str) -> bool {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).contains_key(key)
    }

    fn enter<W>(&self, key: &str, work: W) -> watch::Receiver<Option<Outcome<T>>>
    where
        W: Future<Output = Result<T, RuntimeError>> + Send + 'static,
    {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(outcome) = running.get(key) {
            return outcome.clone();
        }
        let (sender, receiver) = watch::channel(None);
        running.insert(key.to_owned(), receiver.clone());
        let landing = Landing { key: key.to_owned(), running: Arc::clone(&self.running) };
        let flight = async move {
            let outcome = work.await.map_err(Arc::new);
            // Leave first: whoever asks after the result is known starts anew.
            drop(landing);
            sender.send_replace(Some(outcome));
        };
        // What it logs belongs to the request that began it.
        tokio::spawn(flight.in_current_span());
        receiver
    }
}

/// Takes the key out again, also when the work panics.
struct Landing<T> {
    key: String,
    running: Arc<Mutex<Running<T>>>,
}

impl<T> Drop for Landing<T> {
    fn drop(&mut self) {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn a_second_caller_joins_and_a_gone_one_stops_nothing() {
        let flights = Flights::<usize>::default();
        let runs = Arc::new(AtomicUsize::new(0));
        let (open, gate) = watch::channel(false);
        let work = |mut gate: watch::Receiver<bool>| {
            let runs = Arc::clone(&runs);
            async move {
                gate.wait_for(|open| *open).await.ok();
                Ok(runs.fetch_add(1, Ordering::SeqCst))
            }
        };
        let mut first = Box::pin(flights.join("a", work(gate.clone())));
        assert!(futures::poll!(&mut first).is_pending());
        drop(first);
        let mut second = Box::pin(flights.join("a", work(gate)));
        assert!(futures::poll!(&mut second).is_pending());
        assert!(flights.has("a") && !flights.has("b"));
        open.send_replace(true);
        assert_eq!(second.await.unwrap(), 0);
        assert!(!flights.has("a"));
        assert_eq!(runs.load(Ordering::SeqCst), 1);
    }
}
