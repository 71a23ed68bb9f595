//! The time that pod loops go by. Given to them, so that a test can let an hour pass in seconds, or set the clock back.

use std::time::Duration;

use jiff::Timestamp;

/// A clock that may be set.
pub trait Clock: Send + Sync {
    /// What it shows.
    fn now(&self) -> Timestamp;

    /// How long to sleep until `pause` has passed on it.
    fn sleep(&self, pause: Duration) -> Duration;
}

/// The machine's.
#[derive(Debug, Clone, Copy, Default)]
pub struct WallClock;

impl Clock for WallClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn sleep(&self, pause: Duration) -> Duration {
        pause
    }
}
