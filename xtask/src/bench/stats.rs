//! Order statistics of small samples.

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
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    };
    Summary {
        min: sorted.first().copied().unwrap_or_default(),
        median,
        max: sorted.last().copied().unwrap_or_default(),
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
}
