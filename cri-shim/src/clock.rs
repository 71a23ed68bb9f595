//! The wall clock in the unit CRI speaks.

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}
