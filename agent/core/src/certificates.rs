//! When a certificate is renewed. Pure: times in, times out.

use jiff::{SignedDuration, Timestamp};

/// From when until when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub from: Timestamp,
    /// The last moment.
    pub until: Timestamp,
}

/// Certificates are renewed after so much of their life at the earliest, in thousandths.
const EARLIEST: i64 = 700;
/// … and up to so much later, so that nodes that joined together do not ask together.
const SPREAD: i64 = 200;
/// The shortest wait after a failure.
const FIRST_RETRY: SignedDuration = SignedDuration::from_secs(2);
/// The longest wait after a failure.
const LONGEST_RETRY: SignedDuration = SignedDuration::from_mins(5);

impl Validity {
    /// When to ask for the next one: after 70 to 90 % of its life, as upstream. `jitter` is any number, the same for one
    /// certificate.
    pub fn renewal_due(&self, jitter: u64) -> Timestamp {
        let life = self.until.as_second().saturating_sub(self.from.as_second()).max(0);
        let share = EARLIEST + i64::try_from(jitter % 1000).unwrap_or(0) * SPREAD / 1000;
        // Thousandths of whole seconds; lives of centuries still fit.
        let after = life / 1000 * share + life % 1000 * share / 1000;
        self.from.checked_add(SignedDuration::from_secs(after)).unwrap_or(self.until)
    }

    /// Whether it is valid now.
    pub fn holds(&self, now: Timestamp) -> bool {
        self.from <= now && now < self.until
    }
}

/// How long to wait after so many failures in a row.
pub fn retry_after(failures: u32) -> SignedDuration {
    let factor = 1_i32.checked_shl(failures.min(16)).unwrap_or(i32::MAX);
    FIRST_RETRY.saturating_mul(factor).min(LONGEST_RETRY)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn validity(from: i64, life: i64) -> Validity {
        let at = |second| Timestamp::from_second(second).unwrap();
        Validity { from: at(from), until: at(from + life) }
    }

    proptest! {
        #[test]
        fn renewal_is_between_seven_and_nine_tenths(from in 0_i64..4_000_000_000, life in 0_i64..4_000_000_000, jitter: u64) {
            let due = validity(from, life).renewal_due(jitter).as_second() - from;
            // Rounding takes a second per thousand at most.
            prop_assert!(due * 10 <= life * 9, "{due} of {life}");
            prop_assert!(due * 10 + 20 >= life * 7, "{due} of {life}");
        }

        #[test]
        fn waits_grow_and_stay_bounded(failures: u32) {
            prop_assert!(retry_after(failures) <= retry_after(failures.saturating_add(1)));
            prop_assert!(retry_after(failures) <= LONGEST_RETRY && retry_after(failures) >= FIRST_RETRY);
        }
    }

    #[test]
    fn a_year_is_renewed_in_its_fourth_quarter() {
        let year = validity(0, 365 * 86_400);
        assert_eq!(year.renewal_due(0).as_second(), 365 * 86_400 * 7 / 10);
        assert!(year.holds(year.renewal_due(999)));
        assert!(!year.holds(year.until));
    }
}
