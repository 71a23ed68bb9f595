//! Ratios with their uncertainty.

use serde::Serialize;

use super::client::Block;

/// A mean with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// The geometric mean of the rounds.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Half the width, as a fraction of the mean.
    #[must_use]
    pub fn half_width(&self) -> f64 {
        (self.high - self.low) / 2.0 / self.mean
    }
}

/// One way of forwarding, measured beside the others.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Repetitions per second: the median of all blocks.
    pub per_sec: f64,
    /// The slowest of five parts of the run, each its median: how far it spread.
    pub low: f64,
    /// The fastest of them.
    pub high: f64,
    /// Median of one, in microseconds.
    pub p50_us: f64,
    /// 99th percentile of one, in microseconds: the median of the blocks' percentiles.
    pub p99_us: f64,
    /// Rate ÷ the direct one's; `None` for the direct one itself.
    pub ratio: Option<Interval>,
}

/// Blocks of one kind, two per round.
#[derive(Default)]
pub(super) struct Series {
    rounds: Vec<(Block, Block)>,
}

impl Series {
    pub(super) fn push(&mut self, first: Block, second: Block) {
        self.rounds.push((first, second));
    }

    /// All of it in short, beside the base of its ratio.
    pub(super) fn figure(&self, base: Option<&Self>) -> Figure {
        let fifth = self.rounds.len().div_ceil(5).max(1);
        let parts: Vec<f64> = self.rounds.chunks(fifth).map(|part| of(part, Block::per_sec)).collect();
        Figure {
            per_sec: of(&self.rounds, Block::per_sec),
            low: parts.iter().copied().fold(f64::INFINITY, f64::min),
            high: parts.iter().copied().fold(0.0, f64::max),
            p50_us: of(&self.rounds, |block| block.p50_us),
            p99_us: of(&self.rounds, |block| block.p99_us),
            ratio: base.and_then(|base| self.ratio_to(base)),
        }
    }

    /// Ratio of rates, round by round: a round's two blocks lie around those of the other kind.
    pub(super) fn ratio_to(&self, base: &Self) -> Option<Interval> {
        let logs: Vec<f64> = self
            .rounds
            .iter()
            .zip(&base.rounds)
            .map(|((a, b), (c, d))| ((c.seconds + d.seconds) / (a.seconds + b.seconds)).ln())
            .collect();
        interval(&logs)
    }
}

/// The median of a figure over all blocks.
fn of(rounds: &[(Block, Block)], figure: impl Fn(&Block) -> f64) -> f64 {
    let all: Vec<f64> = rounds.iter().flat_map(|(a, b)| [figure(a), figure(b)]).collect();
    median(&all)
}

/// The middle value; 0 when there is none.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// The value that 99 of a hundred do not exceed (nearest rank); 0 when there is none.
pub(super) fn p99(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * 99).div_ceil(100);
    rank.checked_sub(1).and_then(|index| sorted.get(index)).copied().unwrap_or_default()
}

/// Mean of logarithms and its 95 % interval, back on the ratio's scale.
pub(super) fn interval(logs: &[f64]) -> Option<Interval> {
    if logs.len() < 2 {
        return None;
    }
    #[allow(clippy::cast_precision_loss, reason = "a handful of rounds")]
    let n = logs.len() as f64;
    let mean = logs.iter().sum::<f64>() / n;
    let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (n - 1.0);
    // Student's t for ten rounds and more is close to 2.2 and falls to 1.96.
    let half = (1.96 + 2.4 / n) * (variance / n).sqrt();
    Some(Interval { mean: mean.exp(), low: (mean - half).exp(), high: (mean + half).exp() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_holds_the_mean_and_narrows_with_rounds() {
        let few = interval(&[0.1, -0.1, 0.1, -0.1]).unwrap();
        let many = interval(&[0.1, -0.1].repeat(50)).unwrap();
        assert!((few.mean - 1.0).abs() < 1e-9 && few.low < 1.0 && few.high > 1.0);
        assert!(many.half_width() < few.half_width() / 3.0);
        assert!(interval(&[1.0]).is_none());
    }

    #[test]
    fn a_slow_drift_of_the_machine_cancels_out() {
        let block = |seconds: f64| Block { count: 1, seconds, p50_us: seconds, p99_us: seconds };
        let (mut base, mut other) = (Series::default(), Series::default());
        for round in 0..10 {
            let slow = 1.0 + f64::from(round) / 10.0;
            // In the order base, other, other, base, each step a little slower than the one before.
            base.push(block(slow), block(slow + 0.03));
            other.push(block((slow + 0.01) * 2.0), block((slow + 0.02) * 2.0));
        }
        let figure = other.figure(Some(&base));
        assert!((figure.ratio.unwrap().mean - 0.5).abs() < 1e-9, "{figure:?}");
        assert!(figure.low < figure.per_sec && figure.per_sec < figure.high);
    }

    #[test]
    fn ranks_are_those_of_the_sorted_values() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert!((p99(&values) - 198.0).abs() < f64::EPSILON);
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!(p99(&[]).abs() < f64::EPSILON);
    }
}
