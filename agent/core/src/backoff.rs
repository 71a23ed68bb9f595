//! Exponential back-off with a reset, for restarts and image pulls. Pure: time is passed in.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// First delay.
pub const INITIAL: SignedDuration = SignedDuration::from_secs(10);
/// Longest delay.
pub const MAX: SignedDuration = SignedDuration::from_secs(300);

/// Delay state of one container or image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackOff {
    delay_seconds: i64,
    updated: Option<Timestamp>,
}

impl BackOff {
    /// What the back-off of a container must have been that was in CrashLoopBackOff after `restarts` restarts, the last
    /// failure at `failed_at`: rebuilt after a restart of the agent, so that it does not restart crashed containers.
    pub fn resumed(restarts: u32, failed_at: Timestamp, max: SignedDuration) -> Self {
        let doublings = restarts.saturating_sub(1).min(16);
        let delay = INITIAL.saturating_mul(1 << doublings).min(max);
        Self { delay_seconds: delay.as_secs(), updated: Some(failed_at) }
    }

    /// When the next try is allowed, given that the last one failed at `failed_at`; `None`: now.
    ///
    /// The first failure ever (and the first after a long quiet run) is retried at once; so is one of the future, whose
    /// time is of a clock that was set back since: nobody is to wait until it is there again.
    pub fn retry_at(&self, failed_at: Timestamp, now: Timestamp, max: SignedDuration) -> Option<Timestamp> {
        if self.delay_seconds == 0 || failed_at > now || self.expired(failed_at, max) {
            return None;
        }
        let retry_at = failed_at + self.delay();
        (retry_at > now).then_some(retry_at)
    }

    /// The current delay, for messages.
    pub fn delay(&self) -> SignedDuration {
        SignedDuration::from_secs(self.delay_seconds)
    }

    /// A try starts after a failure at `failed_at`: the next delay doubles, or starts over after a quiet time of
    /// twice the maximum.
    pub fn advance(&mut self, failed_at: Timestamp, now: Timestamp, max: SignedDuration) {
        let fresh = self.delay_seconds == 0 || self.expired(failed_at, max);
        let next = if fresh { INITIAL } else { self.delay().saturating_mul(2) };
        self.delay_seconds = next.min(max).as_secs();
        self.updated = Some(now);
    }

    fn expired(&self, failed_at: Timestamp, max: SignedDuration) -> bool {
        self.updated.is_none_or(|updated| failed_at.duration_since(updated) > max.saturating_mul(2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).expect("in range")
    }

    #[test]
    fn delays_double_to_the_maximum() {
        let mut backoff = BackOff::default();
        assert_eq!(backoff.retry_at(at(0), at(0), MAX), None, "the first restart is immediate");
        let mut now = 0;
        let mut delays = Vec::new();
        for _ in 0..7 {
            backoff.advance(at(now), at(now), MAX);
            let retry = backoff.retry_at(at(now), at(now), MAX).expect("waits");
            delays.push(retry.duration_since(at(now)).as_secs());
            now += delays.last().copied().unwrap_or_default();
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn a_failure_of_the_future_holds_nothing_back() {
        let mut backoff = BackOff::default();
        backoff.advance(at(0), at(0), MAX);
        assert_eq!(backoff.retry_at(at(60), at(50), MAX), None);
        assert_eq!(backoff.retry_at(at(60), at(60), MAX), Some(at(70)));
    }

    #[test]
    fn ten_quiet_minutes_reset_it() {
        let mut backoff = BackOff::default();
        backoff.advance(at(0), at(0), MAX);
        backoff.advance(at(10), at(10), MAX);
        assert_eq!(backoff.retry_at(at(611), at(611), MAX), None);
        backoff.advance(at(611), at(611), MAX);
        assert_eq!(backoff.delay(), INITIAL);
    }
}
