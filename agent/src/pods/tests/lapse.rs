//! A clock that runs faster than the machine's, and that can be set.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use crate::pods::clock::Clock;

/// The clock.
pub(super) struct Lapse {
    began: (Timestamp, Instant),
    /// Seconds that pass on it in one.
    rate: u32,
    /// Seconds that it was set by.
    set: AtomicI64,
}

impl Lapse {
    pub(super) fn new(rate: u32) -> Self {
        Self { began: (Timestamp::now(), Instant::now()), rate, set: AtomicI64::new(0) }
    }

    /// How much time has passed on it.
    pub(super) fn passed(&self) -> Duration {
        self.began.1.elapsed() * self.rate
    }

    /// Sets it forth, or back.
    pub(super) fn set(&self, seconds: i64) {
        self.set.store(seconds, Ordering::SeqCst);
    }
}

impl Clock for Lapse {
    fn now(&self) -> Timestamp {
        let passed = SignedDuration::try_from(self.passed()).expect("not that long");
        self.began.0 + passed + SignedDuration::from_secs(self.set.load(Ordering::SeqCst))
    }

    fn sleep(&self, pause: Duration) -> Duration {
        pause / self.rate
    }
}
