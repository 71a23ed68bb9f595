//! Durations as Kubernetes configuration files write them (`1m30s`, `100ms`). Pure.

use std::fmt;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Serialize};

/// A `metav1.Duration`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GoDuration(pub Duration);

impl GoDuration {
    /// For defaults.
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// Parses Go's notation without a sign; `0` needs no unit. `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "0" {
            return Some(Self(Duration::ZERO));
        }
        let mut rest = text;
        let mut seconds = 0.0_f64;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
            let number: f64 = rest.get(..digits)?.parse().ok()?;
            rest = rest.get(digits..)?;
            let unit_end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
            seconds += number * unit_seconds(rest.get(..unit_end)?)?;
            rest = rest.get(unit_end..)?;
        }
        if text.is_empty() {
            return None;
        }
        Duration::try_from_secs_f64(seconds).ok().map(Self)
    }
}

fn unit_seconds(unit: &str) -> Option<f64> {
    Some(match unit {
        "h" => 3600.0,
        "m" => 60.0,
        "s" => 1.0,
        "ms" => 1e-3,
        "us" | "µs" => 1e-6,
        "ns" => 1e-9,
        _ => return None,
    })
}

/// As Go writes it: `1m30s`, `100ms`, `0s`.
impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = (self.0.as_secs(), self.0.subsec_nanos());
        if seconds == 0 {
            return match nanos {
                0 => write!(f, "0s"),
                1_000_000.. => write!(f, "{}ms", f64::from(nanos) / 1e6),
                1000.. => write!(f, "{}µs", f64::from(nanos) / 1e3),
                _ => write!(f, "{nanos}ns"),
            };
        }
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if seconds >= 60 {
            write!(f, "{minutes}m")?;
        }
        let rest = u32::try_from(seconds % 60).unwrap_or(0);
        write!(f, "{}s", f64::from(rest) + f64::from(nanos) / 1e9)
    }
}

impl Serialize for GoDuration {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            D::Error::custom(format!("invalid duration {text:?}, expected one like \"1m30s\""))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_notation_is_read() {
        for (text, millis) in
            [("1m30s", 90_000), ("100ms", 100), ("0", 0), ("1.5h", 5_400_000), ("2m0s", 120_000)]
        {
            assert_eq!(GoDuration::parse(text), Some(GoDuration::from_millis(millis)), "{text}");
        }
        for text in ["0s", "100ms", "1.5s", "1m0s", "1m30s", "4h0m0s"] {
            assert_eq!(GoDuration::parse(text).map(|read| read.to_string()).as_deref(), Some(text));
        }
        for text in ["", "5", "1x", "-1s", "s", "1 m"] {
            assert_eq!(GoDuration::parse(text), None, "{text}");
        }
    }
}
