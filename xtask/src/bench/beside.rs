//! A peer's measurements beside ours, taken in the same interleaved rounds; and the word for a peer that was not there.

use std::fmt;

use serde::{Serialize, Serializer};

use super::stats::{Interval, Round, Summary, median, ratio, summary};

/// What the peer measured, as far as there is one.
#[derive(Debug, Clone)]
pub(super) enum Beside {
    /// No peer was given.
    Absent,
    /// Its values and how ours compare.
    Measured(Measured),
}

/// The values of a peer.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measured {
    values: Vec<f64>,
    summary: Summary,
    /// Ratio of the medians with its interval; absent with fewer than three rounds.
    ours_to_peer: Option<Interval>,
}

impl Beside {
    /// Of rounds that hold ours and the peer's values; rounds without any of the peer are those of a run without one.
    pub(super) fn of(rounds: &[Round]) -> Self {
        let values: Vec<f64> = rounds.iter().flat_map(|round| &round.1).copied().collect();
        if values.is_empty() {
            return Self::Absent;
        }
        let summary = summary(&values);
        Self::Measured(Measured { values, summary, ours_to_peer: ratio(rounds, median) })
    }

    /// One line for the terminal.
    pub(super) fn line(&self, unit: &str) -> String {
        let Self::Measured(Measured { summary, ours_to_peer, .. }) = self else {
            return "peer: absent".to_owned();
        };
        let Summary { min, median, max } = summary;
        let compared = match ours_to_peer {
            Some(ratio) => format!("ours ÷ peer {ratio}"),
            None => "fewer than three rounds: no ratio".to_owned(),
        };
        format!("peer: {median:.3} {unit} ({min:.3}-{max:.3}); {compared}")
    }
}

impl Serialize for Beside {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Absent => serializer.serialize_str("absent"),
            Self::Measured(measured) => measured.serialize(serializer),
        }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} (95 %: {:.3}-{:.3})", self.value, self.low, self.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_was_not_there_is_told_as_absent() {
        let alone = Beside::of(&[(vec![1.0], vec![]), (vec![1.1], vec![])]);
        assert_eq!(serde_json::to_value(&alone).unwrap(), "absent");
        assert!(alone.line("s").contains("absent"));
    }

    #[test]
    fn a_ratio_needs_three_rounds() {
        let rounds: Vec<Round> = (0..3).map(|_| (vec![1.0], vec![4.0])).collect();
        let value = serde_json::to_value(Beside::of(&rounds)).unwrap();
        assert_eq!(value["ours_to_peer"]["value"], 0.25);
        assert_eq!(value["summary"]["median"], 4.0);
        assert!(Beside::of(&rounds).line("s").contains("0.250 (95 %: 0.250-0.250)"));
        assert!(Beside::of(&rounds[..2]).line("s").contains("no ratio"));
    }
}
