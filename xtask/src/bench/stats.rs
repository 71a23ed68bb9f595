//! Order statistics of small samples, and ratios of two samples with their uncertainty.

use serde::Serialize;

/// A sample in short.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Summary {
    /// Smallest value.
    pub(crate) min: f64,
    /// Middle value.
    pub(crate) median: f64,
    /// Largest value.
    pub(crate) max: f64,
}

/// Summary of a sample; all zero when it is empty.
pub(crate) fn summary(values: &[f64]) -> Summary {
    let sorted = sorted(values);
    Summary {
        min: sorted.first().copied().unwrap_or_default(),
        median: median(values),
        max: sorted.last().copied().unwrap_or_default(),
    }
}

/// The middle value; 0 when there is none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The value that nine tenths of the sample do not exceed (nearest rank); 0 when there is none.
pub(crate) fn p90(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    let rank = (sorted.len() * 9).div_ceil(10);
    rank.checked_sub(1).map_or(0.0, |index| sorted[index])
}

/// The mean; 0 when there is none.
pub(crate) fn mean(values: &[f64]) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a few thousand values at the most")]
    let count = values.len().max(1) as f64;
    values.iter().sum::<f64>() / count
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// What one interleaved round measured: ours and the peer's values.
pub(crate) type Round = (Vec<f64>, Vec<f64>);

/// An estimate with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Interval {
    /// The estimate.
    pub(crate) value: f64,
    /// Lower end.
    pub(crate) low: f64,
    /// Upper end.
    pub(crate) high: f64,
}

/// Resamplings behind an interval.
const RESAMPLES: usize = 2000;

/// Ours ÷ peer of a statistic of all rounds, with a bootstrap interval.
///
/// Whole rounds are drawn, not single values: what disturbs the machine disturbs a round's neighbours alike. `None` with
/// fewer than three rounds, or when the peer's statistic is 0. The draws are the same in every run.
pub(crate) fn ratio(rounds: &[Round], statistic: fn(&[f64]) -> f64) -> Option<Interval> {
    let all: Vec<&Round> = rounds.iter().collect();
    let value = ratio_of(&all, statistic)?;
    if rounds.len() < 3 {
        return None;
    }
    let mut random = SplitMix(0x6b65_656c_736f_6e00);
    let draws: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            let drawn: Vec<&Round> = rounds.iter().map(|_| &rounds[random.below(rounds.len())]).collect();
            ratio_of(&drawn, statistic)
        })
        .collect();
    let draws = sorted(&draws);
    let at = |permille: usize| draws.get((draws.len() * permille / 1000).min(draws.len().saturating_sub(1)));
    Some(Interval { value, low: *at(25)?, high: *at(975)? })
}

/// Ours ÷ peer as the middle of the rounds' own ratios, with a bootstrap interval: for rounds whose measurements were taken
/// next to each other, so that what slows the machine for minutes slows both sides of a round. A round's ratio is that of
/// the geometric means. Rounds with a value that is not above 0 say nothing, and are left out: one side never had its turn.
/// `None` with fewer than three rounds.
pub(crate) fn paired(rounds: &[Round]) -> Option<Interval> {
    let level = |values: &[f64]| {
        let logarithms: Vec<f64> = values.iter().map(|value| value.ln()).collect();
        mean(&logarithms)
    };
    let says_something = |round: &&Round| {
        let sides = [&round.0, &round.1];
        sides.iter().all(|side| !side.is_empty() && side.iter().all(|value| *value > 0.0))
    };
    let differences: Vec<f64> =
        rounds.iter().filter(says_something).map(|round| level(&round.0) - level(&round.1)).collect();
    if differences.len() < 3 {
        return None;
    }
    let mut random = SplitMix(0x6b65_656c_736f_6e00);
    let draws: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let drawn: Vec<f64> =
                differences.iter().map(|_| differences[random.below(differences.len())]).collect();
            median(&drawn)
        })
        .collect();
    let draws = sorted(&draws);
    Some(Interval {
        value: median(&differences).exp(),
        low: draws[RESAMPLES * 25 / 1000].exp(),
        high: draws[RESAMPLES * 975 / 1000].exp(),
    })
}

impl Interval {
    /// Half of its width, as a part of the estimate.
    pub(crate) fn uncertainty(&self) -> f64 {
        (self.high - self.low) / (2.0 * self.value)
    }
}

/// [`ratio`] without an interval.
pub(crate) fn plain_ratio(rounds: &[Round], statistic: fn(&[f64]) -> f64) -> Option<f64> {
    ratio_of(&rounds.iter().collect::<Vec<_>>(), statistic)
}

fn ratio_of(rounds: &[&Round], statistic: fn(&[f64]) -> f64) -> Option<f64> {
    let ours: Vec<f64> = rounds.iter().flat_map(|round| &round.0).copied().collect();
    let peers: Vec<f64> = rounds.iter().flat_map(|round| &round.1).copied().collect();
    let base = statistic(&peers);
    (base > 0.0 && !ours.is_empty()).then(|| statistic(&ours) / base)
}

/// A small generator whose only task is to draw rounds.
struct SplitMix(u64);

impl SplitMix {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        // The bound is a handful of rounds, so that the bias of the remainder is nothing.
        usize::try_from(mixed % bound.max(1) as u64).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert!((summary(&[3.0, 1.0, 2.0]).median - 2.0).abs() < f64::EPSILON);
        assert!((summary(&[4.0, 1.0, 2.0, 3.0]).median - 2.5).abs() < f64::EPSILON);
        assert!(summary(&[]).median.abs() < f64::EPSILON);
    }

    #[test]
    fn nine_tenths_are_not_above_the_p90() {
        let values: Vec<f64> = (1..=10).map(f64::from).collect();
        assert!((p90(&values) - 9.0).abs() < f64::EPSILON);
        assert!((p90(&[7.0]) - 7.0).abs() < f64::EPSILON);
        assert!(p90(&[]).abs() < f64::EPSILON);
    }

    #[test]
    fn the_interval_holds_the_ratio_and_is_narrow_for_steady_rounds() {
        let round = |noise: f64| (vec![1.0 + noise, 1.0 - noise], vec![4.0 + noise, 4.0 - noise]);
        let steady: Vec<Round> = (0..10).map(|_| round(0.01)).collect();
        let found = ratio(&steady, median).unwrap();
        assert!((found.value - 0.25).abs() < 1e-9 && found.high - found.low < 0.01, "{found:?}");
        let shaky: Vec<Round> = (0..10).map(|index| (vec![1.0 + f64::from(index % 3)], vec![4.0])).collect();
        let wide = ratio(&shaky, median).unwrap();
        assert!(wide.low < wide.value && wide.value <= wide.high, "{wide:?}");
        assert_eq!(ratio(&steady[..2], median), None, "two rounds say nothing about their spread");
        assert_eq!(plain_ratio(&[(vec![1.0], vec![])], median), None);
    }

    #[test]
    fn rounds_that_are_slow_as_a_whole_do_not_widen_a_paired_interval() {
        let round = |index: u32| {
            let speed = 1.0 + f64::from(index % 5);
            let noise = 0.01 * (f64::from(index % 3) - 1.0);
            (vec![0.9 * speed * (1.0 + noise)], vec![speed])
        };
        let rounds: Vec<Round> = (0..30).map(round).collect();
        let found = paired(&rounds).unwrap();
        assert!((found.value - 0.9).abs() < 0.01, "{found:?}");
        assert!(found.low <= found.value && found.value <= found.high, "{found:?}");
        assert!(found.uncertainty() < 0.011, "{found:?}");
        assert!(ratio(&rounds, median).unwrap().uncertainty() > found.uncertainty());
        assert_eq!(paired(&rounds[..2]), None);
        assert_eq!(paired(&vec![(vec![0.0], vec![1.0]); 5]), None);
        let starved = [rounds.clone(), vec![(vec![0.0], vec![1.0])]].concat();
        assert_eq!(paired(&starved), Some(found), "a round in which one side never ran counts for nothing");
    }
}
