//! A token bucket: so many at once, and so many a second after that. Pure: the time comes from outside.

use std::time::Duration;

/// How fast something may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Each second; above 0.
    pub per_second: u32,
    /// At once; above 0.
    pub burst: u32,
}

/// What is left of a [`Rate`].
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Time in which one token comes.
    each: Duration,
    /// Time in which an empty bucket fills.
    full: Duration,
    /// When all tokens that were taken will have come back.
    full_again: Duration,
}

impl Rate {
    /// What a pair of settings means: `None` where there is no limit.
    pub fn of(per_second: u32, burst: u32) -> Option<Self> {
        (per_second > 0).then(|| Self { per_second, burst: burst.max(1) })
    }
}

impl TokenBucket {
    /// A full bucket; times count from any moment before the first use.
    pub fn new(rate: Rate) -> Self {
        let each = Duration::from_secs(1) / rate.per_second.max(1);
        Self { each, full: each.saturating_mul(rate.burst.max(1)), full_again: Duration::ZERO }
    }

    /// Takes a token if there is one at `now`.
    pub fn try_take(&mut self, now: Duration) -> bool {
        let due = self.due(now);
        if due > now {
            return false;
        }
        self.take_at(now);
        true
    }

    /// Takes a token that may still be to come; how long to wait for it.
    pub fn reserve(&mut self, now: Duration) -> Duration {
        let wait = self.due(now).saturating_sub(now);
        self.take_at(now);
        wait
    }

    /// When the next token is there.
    fn due(&self, now: Duration) -> Duration {
        (self.level(now) + self.each).saturating_sub(self.full)
    }

    fn take_at(&mut self, now: Duration) {
        self.full_again = self.level(now) + self.each;
    }

    /// The same, or `now` where they have.
    fn level(&self, now: Duration) -> Duration {
        self.full_again.max(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn bucket(per_second: u32, burst: u32) -> TokenBucket {
        TokenBucket::new(Rate::of(per_second, burst).expect("a limit"))
    }

    #[test]
    fn a_burst_goes_at_once_and_then_the_rate_counts() {
        let mut bucket = bucket(10, 3);
        let taken = |bucket: &mut TokenBucket, now: u64| bucket.try_take(at(now));
        assert!((0..3).all(|_| taken(&mut bucket, 1000)));
        assert!(!taken(&mut bucket, 1000) && !taken(&mut bucket, 1099));
        assert!(taken(&mut bucket, 1100) && !taken(&mut bucket, 1150));
        assert!((0..3).all(|_| taken(&mut bucket, 9000)), "a long pause fills it");
        assert!(!taken(&mut bucket, 9000), "and no more than that");
    }

    #[test]
    fn those_who_wait_queue_up() {
        let mut bucket = bucket(2, 1);
        let waits: Vec<Duration> = (0..3).map(|_| bucket.reserve(at(5000))).collect();
        assert_eq!(waits, [at(0), at(500), at(1000)]);
        assert_eq!(bucket.reserve(at(6000)), at(500));
    }

    #[test]
    fn no_rate_is_no_limit() {
        assert_eq!(Rate::of(0, 10), None);
        assert_eq!(Rate::of(5, 0), Some(Rate { per_second: 5, burst: 1 }));
    }
}
