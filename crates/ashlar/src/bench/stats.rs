//! Means and percentiles.

use serde::Serialize;

/// A distribution in the four figures that serving reports use.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// How many values.
    pub(crate) count: usize,
    /// Arithmetic mean.
    pub(crate) mean: f64,
    /// Median.
    pub(crate) p50: f64,
    /// 90th percentile.
    pub(crate) p90: f64,
    /// 99th percentile.
    pub(crate) p99: f64,
}

impl Summary {
    /// Of `values`, in any order; `None` of nothing.
    pub(crate) fn of(values: &[f64]) -> Option<Summary> {
        let sorted = sorted(values);
        Some(Summary {
            count: sorted.len(),
            mean: mean(values)?,
            p50: percentile_of_sorted(&sorted, 50.0)?,
            p90: percentile_of_sorted(&sorted, 90.0)?,
            p99: percentile_of_sorted(&sorted, 99.0)?,
        })
    }
}

/// The median; 0 of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    percentile(values, 50.0)
}

/// The value below which `percent` of the values lie; 0 of nothing.
pub(crate) fn percentile(values: &[f64], percent: f64) -> f64 {
    percentile_of_sorted(&sorted(values), percent).unwrap_or(0.0)
}

/// The arithmetic mean; `None` of nothing.
pub(crate) fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The value below which `percent` of the values lie, interpolated between neighbours (as NumPy does by default).
fn percentile_of_sorted(sorted: &[f64], percent: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = percent / 100.0 * last as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[(place.ceil() as usize).min(last)]);
    Some(low + (high - low) * place.fract())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn percentiles_interpolate_between_neighbours() {
        let values: Vec<f64> = (1..=5).map(f64::from).collect();
        assert_eq!(percentile_of_sorted(&values, 0.0), Some(1.0));
        assert_eq!(percentile_of_sorted(&values, 50.0), Some(3.0));
        assert_eq!(percentile_of_sorted(&values, 90.0), Some(4.6));
        assert_eq!(percentile_of_sorted(&values, 100.0), Some(5.0));
    }

    #[test]
    fn order_does_not_matter_and_nothing_has_no_summary() {
        let summary = Summary::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((summary.count, summary.mean, summary.p50), (4, 2.5, 2.5));
        assert_eq!(Summary::of(&[]), None);
        assert_eq!((median(&[7.0]), median(&[])), (7.0, 0.0));
    }
}
