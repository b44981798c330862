//! The search for the scale of one group of values: which scale, and which minimum, lose least.
//!
//! Both searches take several guesses at the integers and, for each, the scale that is best for these integers in the
//! sense of weighted least squares, which has a closed form. The guesses widen or narrow the range that the integers
//! cover by a few tenths of a step, because clipping the extremes a little often pays.

/// Values of the longest group.
const GROUP_LEN_MAX: usize = 32;

/// The nearest integer, halves to even; right for magnitudes below 2²².
pub(super) fn nearest(value: f32) -> f32 {
    // Adding 1.5 · 2²³ leaves no bits for a fraction. `f32::round` is a function call where SSE4.1 is not assumed.
    const NO_FRACTION: f32 = 12_582_912.0;
    (value + NO_FRACTION) - NO_FRACTION
}

/// `scale · quant − min` approximates a value; neither number is negative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Affine {
    pub(super) scale: f32,
    pub(super) min: f32,
}

/// How [`affine`] searches.
#[derive(Debug, Clone, Copy)]
pub(super) struct AffineSearch {
    /// The largest integer.
    pub(super) quant_max: f32,
    /// The first guess maps the range of the values to `quant_max + first` steps.
    pub(super) first: f32,
    /// Each later guess maps it to 0.1 steps more.
    pub(super) guesses: u8,
}

/// Scale and minimum for integers from 0 to `quant_max`, minimising the squared errors times `weights`.
pub(super) fn affine(values: &[f32], weights: &[f32], search: AffineSearch) -> Affine {
    // A minimum is stored without a sign, so the range always includes zero.
    let low = values.iter().copied().fold(0f32, f32::min);
    let high = values.iter().copied().fold(f32::MIN, f32::max);
    let range = high - low;
    if range <= 0.0 {
        return Affine { scale: 0.0, min: -low };
    }
    let mut weighted = Sums::default();
    for (value, weight) in values.iter().zip(weights) {
        weighted.weight += weight;
        weighted.value += weight * value;
    }
    let mut best = Affine { scale: range / search.quant_max, min: -low };
    let mut best_error = affine_error(values, weights, best, search.quant_max);
    for guess in 0..search.guesses {
        let steps = search.quant_max + search.first + 0.1 * f32::from(guess);
        let inverse = steps / range;
        let mut sums = Sums { weight: weighted.weight, value: weighted.value, ..Sums::default() };
        for (value, weight) in values.iter().zip(weights) {
            let quant = nearest(inverse * (value - low)).clamp(0.0, search.quant_max);
            sums.quant += weight * quant;
            sums.quant_squared += weight * quant * quant;
            sums.quant_value += weight * quant * value;
        }
        let Some(fit) = sums.fit() else { continue };
        let error = affine_error(values, weights, fit, search.quant_max);
        if error < best_error {
            (best, best_error) = (fit, error);
        }
    }
    best
}

/// Weighted squared error when every value takes the nearest integer under `fit`.
pub(super) fn affine_error(values: &[f32], weights: &[f32], fit: Affine, quant_max: f32) -> f32 {
    let inverse = if fit.scale == 0.0 { 0.0 } else { 1.0 / fit.scale };
    let mut error = 0.0;
    for (value, weight) in values.iter().zip(weights) {
        let quant = nearest(((value + fit.min) * inverse).clamp(0.0, quant_max));
        let difference = fit.scale * quant - fit.min - value;
        error += weight * difference * difference;
    }
    error
}

/// Weighted sums over a group.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    weight: f32,
    value: f32,
    quant: f32,
    quant_squared: f32,
    quant_value: f32,
}

impl Sums {
    /// The least-squares line through (quant, value), through the origin if its minimum had the wrong sign; `None` if
    /// all integers are equal.
    fn fit(self) -> Option<Affine> {
        let determinant = self.weight * self.quant_squared - self.quant * self.quant;
        if determinant <= 0.0 {
            return None;
        }
        let scale = (self.weight * self.quant_value - self.value * self.quant) / determinant;
        let intercept = (self.quant_squared * self.value - self.quant * self.quant_value) / determinant;
        let fit = if intercept > 0.0 {
            Affine { scale: self.quant_value / self.quant_squared, min: 0.0 }
        } else {
            Affine { scale, min: -intercept }
        };
        (fit.scale.is_finite() && fit.scale > 0.0).then_some(fit)
    }
}

/// The scale, of either sign, for integers from −`quant_max` − 1 to `quant_max`, minimising the squared errors times the
/// squared values. Zero if all values are negligible.
pub(super) fn symmetric(values: &[f32], quant_max: f32) -> f32 {
    const NEGLIGIBLE: f32 = 1e-15;
    let lowest = -quant_max - 1.0;
    let extreme =
        values.iter().fold(0f32, |most, &value| if value.abs() > most.abs() { value } else { most });
    if extreme.abs() < NEGLIGIBLE {
        return 0.0;
    }
    let mut weights = [0f32; GROUP_LEN_MAX];
    for (weight, value) in weights.iter_mut().zip(values) {
        // Relative to the extreme, so that fourth powers of small values do not vanish.
        let relative = value / extreme;
        *weight = relative * relative;
    }
    let (mut best_scale, mut best_gain) = (0.0, 0.0);
    // The plain guess comes first: it wins where others are no better.
    for guess in [0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
        let inverse = (lowest - 0.1 * guess as f32) / extreme;
        let (mut quant_value, mut quant_squared) = (0.0, 0.0);
        for (value, weight) in values.iter().zip(&weights) {
            let quant = nearest((inverse * value).clamp(lowest, quant_max));
            quant_value += weight * quant * value;
            quant_squared += weight * quant * quant;
        }
        // The best scale s lowers the error Σ w (x − s q)² by (Σ w q x)² / Σ w q² from that of all zeros.
        if quant_squared > 0.0 {
            let gain = quant_value * quant_value / quant_squared;
            if gain > best_gain {
                (best_scale, best_gain) = (quant_value / quant_squared, gain);
            }
        }
    }
    if best_gain == 0.0 { extreme / lowest } else { best_scale }
}

/// Squared error times squared value when every value takes the nearest integer under `scale`.
pub(super) fn symmetric_error(values: &[f32], scale: f32, quant_max: f32) -> f32 {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut error = 0.0;
    for value in values {
        let quant = nearest((value * inverse).clamp(-quant_max - 1.0, quant_max));
        let difference = scale * quant - value;
        error += value * value * difference * difference;
    }
    error
}
