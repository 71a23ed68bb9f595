//! Ratios with their uncertainty.

use serde::Serialize;

use super::pods::Block;

/// A mean with its 95 % interval.
#[derive(Clone, Copy, Debug, Serialize)]
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

/// Blocks of one kind, two per round.
#[derive(Default)]
pub(super) struct Series {
    rounds: Vec<(Block, Block)>,
}

impl Series {
    pub(super) fn push(&mut self, first: Block, second: Block) {
        self.rounds.push((first, second));
    }

    /// Number of rounds.
    pub(super) fn pairs(&self) -> usize {
        self.rounds.len()
    }

    /// Median connections per second over all blocks.
    pub(super) fn rate(&self) -> f64 {
        let mut rates: Vec<f64> = self.rounds.iter().flat_map(|(a, b)| [a.per_sec(), b.per_sec()]).collect();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or(0.0)
    }

    /// 99th percentile of a connect, in microseconds: the median of the blocks' percentiles.
    pub(super) fn p99_us(&self) -> f64 {
        let mut all: Vec<f64> = self.rounds.iter().flat_map(|(a, b)| [a.p99_us, b.p99_us]).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or(0.0)
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

/// Mean of logarithms and its 95 % interval, back on the ratio's scale.
fn interval(logs: &[f64]) -> Option<Interval> {
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
}
