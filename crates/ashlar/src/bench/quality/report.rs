//! What `bench quality` reports.

use super::evaluator::Source;
use super::score::{Totals, perplexity};
use super::text::Text;
use crate::bench::table::Table;
use serde::Serialize;

/// Everything that is reported.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) text: TextReport,
    pub(super) threads: usize,
    pub(super) isa: String,
    pub(super) reference: Reference,
    pub(super) candidates: Vec<Candidate>,
}

/// What was computed.
#[derive(Debug, Serialize)]
pub(super) struct TextReport {
    file: String,
    bytes: usize,
    /// Tokens in whole chunks.
    tokens: usize,
    chunk: usize,
    chunks: usize,
    /// Predictions that count.
    scored: u64,
}

/// The model that others are compared with.
#[derive(Debug, Serialize)]
pub(super) struct Reference {
    name: String,
    bits_per_weight: f64,
    weight_bytes: u64,
    perplexity: f64,
    perplexity_error: f64,
}

/// One candidate. An `_error` is a standard error.
#[derive(Debug, Serialize)]
pub(super) struct Candidate {
    name: String,
    bits_per_weight: f64,
    weight_bytes: u64,
    perplexity: f64,
    perplexity_error: f64,
    /// Perplexity above the reference's.
    perplexity_delta: f64,
    /// From differences position by position, so far smaller than the errors of both.
    perplexity_delta_error: f64,
    /// KL(reference ‖ candidate) per position, in nats.
    kl_mean: f64,
    kl_mean_error: f64,
    kl_median: f64,
    kl_p99: f64,
    kl_max: f64,
    /// Share of positions at which both hold the same token for the likeliest.
    top1_agreement: f64,
    top1_agreement_error: f64,
    /// Root mean square of the change of the true token's probability.
    delta_p_rms: f64,
}

impl TextReport {
    pub(super) fn new(file: String, text: &Text, chunk: usize, scored: u64) -> TextReport {
        let (tokens, chunks) = (text.tokens().len(), text.chunks_count());
        TextReport { file, bytes: text.bytes, tokens, chunk, chunks, scored }
    }
}

impl Reference {
    pub(super) fn new(source: &Source, totals: &Totals) -> Reference {
        let (perplexity, perplexity_error) = perplexity(&totals.reference);
        Reference {
            name: source.name.clone(),
            bits_per_weight: source.bits_per_weight(),
            weight_bytes: source.weight_bytes().0,
            perplexity,
            perplexity_error,
        }
    }
}

impl Candidate {
    pub(super) fn new(source: &Source, totals: &Totals) -> Candidate {
        let (value, error) = perplexity(&totals.candidate);
        Candidate {
            name: source.name.clone(),
            bits_per_weight: source.bits_per_weight(),
            weight_bytes: source.weight_bytes().0,
            perplexity: value,
            perplexity_error: error,
            perplexity_delta: value - perplexity(&totals.reference).0,
            perplexity_delta_error: value * totals.difference.error(),
            kl_mean: totals.kl.mean(),
            kl_mean_error: totals.kl.error(),
            kl_median: totals.kl_percentile(50.0),
            kl_p99: totals.kl_percentile(99.0),
            kl_max: totals.kl_percentile(100.0),
            top1_agreement: totals.agreement(),
            top1_agreement_error: totals.agreement_error(),
            delta_p_rms: totals.change_rms(),
        }
    }
}

impl Report {
    /// Prints a table.
    pub(super) fn print(&self) {
        let text = &self.text;
        println!(
            "{}: {} tokens in {} chunks of {}, {} predictions scored; {} threads, {}\n",
            text.file, text.tokens, text.chunks, text.chunk, text.scored, self.threads, self.isa
        );
        let reference = &self.reference;
        let mut table =
            Table::new(["", "bits", "perplexity", "Δ", "mean KL", "p99 KL", "max KL", "same top", "RMS Δp"]);
        let first = [
            reference.name.clone(),
            format!("{:.2}", reference.bits_per_weight),
            format!("{:.4} ± {:.4}", reference.perplexity, reference.perplexity_error),
        ];
        table.row(first.into_iter().chain(std::iter::repeat_n("–".to_owned(), 6)));
        for candidate in &self.candidates {
            table.row([
                candidate.name.clone(),
                format!("{:.2}", candidate.bits_per_weight),
                format!("{:.4} ± {:.4}", candidate.perplexity, candidate.perplexity_error),
                format!("{:+.4} ± {:.4}", candidate.perplexity_delta, candidate.perplexity_delta_error),
                format!("{} ± {}", small(candidate.kl_mean), small(candidate.kl_mean_error)),
                small(candidate.kl_p99),
                small(candidate.kl_max),
                format!(
                    "{:.2} ± {:.2} %",
                    100.0 * candidate.top1_agreement,
                    100.0 * candidate.top1_agreement_error
                ),
                format!("{:.3} %", 100.0 * candidate.delta_p_rms),
            ]);
        }
        print!("{}", table.render());
    }
}

/// Three digits of a number that may be very small.
fn small(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let decimals = (2.0 - value.abs().log10().floor()).clamp(0.0, 9.0);
    format!("{value:.0$}", decimals as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_numbers_keep_three_digits() {
        assert_eq!(
            [small(0.0), small(0.001_863_7), small(0.12), small(12.34)],
            ["0", "0.00186", "0.120", "12.3"]
        );
        assert_eq!([small(3e-15), small(1234.0)], ["0.000000000", "1234"]);
    }
}
