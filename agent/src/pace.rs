//! How often something may happen, by the clock: [`TokenBucket`]s that many may take from.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use agent_core::pace::{Rate, TokenBucket};

/// A rate that is kept. Clones share it.
#[derive(Debug, Clone)]
pub struct Pace {
    bucket: Arc<Mutex<TokenBucket>>,
    since: Instant,
}

impl Pace {
    /// Full at first.
    pub fn new(rate: Rate) -> Self {
        Self { bucket: Arc::new(Mutex::new(TokenBucket::new(rate))), since: Instant::now() }
    }

    /// Whether it may happen now.
    pub fn try_take(&self) -> bool {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.try_take(self.since.elapsed())
    }

    /// Waits until it may happen. Whoever stops waiting has had a turn all the same.
    pub async fn wait(&self) {
        let wait = {
            let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.reserve(self.since.elapsed())
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}
