//! A load without its content: when requests come and how long they are. What `ashlar bench serve` sends, `ashlar simulate` has
//! arrive.

use super::trace;
use super::workload::{Caps, Length, Pace, Source, Workload};
use anyhow::Result;
use std::path::Path;

/// A load with open-loop arrivals.
#[derive(Debug, Clone)]
pub(crate) struct Load<'a> {
    /// Where the lengths come from.
    pub(crate) lengths: Lengths<'a>,
    /// Longest prompt and answer together.
    pub(crate) context: usize,
    /// Fixes every length and arrival.
    pub(crate) seed: u64,
}

/// Lengths and times of requests.
#[derive(Debug, Clone)]
pub(crate) enum Lengths<'a> {
    /// Lengths drawn at random, with Poisson arrivals for so long.
    Random { rate: f64, input: Length, output: Length, duration_s: f64 },
    /// A recorded trace, at its own times, as far as it goes and the duration reaches.
    Trace { path: &'a Path, duration_s: Option<f64> },
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Arrival {
    /// Seconds after the start.
    pub(crate) at_s: f64,
    /// Tokens of its prompt.
    pub(crate) prompt_tokens: usize,
    /// Tokens to generate.
    pub(crate) output_tokens: usize,
    /// Whether the context shortened it.
    pub(crate) shortened: bool,
}

impl Load<'_> {
    /// Every request, in order of arrival: those that `ashlar bench serve` sends with the same figures and seed.
    ///
    /// # Errors
    /// A trace cannot be read.
    pub(crate) fn arrivals(&self) -> Result<Vec<Arrival>> {
        let (source, pace, duration_s) = match &self.lengths {
            Lengths::Random { rate, input, output, duration_s } => {
                let source = Source::Random { input: *input, output: *output, prefix: 0, groups: 1 };
                (source, Pace::Poisson(*rate), *duration_s)
            }
            Lengths::Trace { path, duration_s } => {
                let entries = trace::read(path, usize::MAX)?;
                (Source::Trace(entries), Pace::Recorded(1.0), duration_s.unwrap_or(f64::INFINITY))
            }
        };
        let workload = Workload {
            source,
            pace,
            caps: Caps { input: usize::MAX, output: usize::MAX, context: self.context },
            vocabulary: 256,
            text: false,
            seed: self.seed,
        };
        workload.check()?;
        let arrival = |planned: super::workload::Planned| Arrival {
            at_s: planned.at_s.unwrap_or_default(),
            prompt_tokens: planned.prompt.as_array().map_or(0, Vec::len),
            output_tokens: planned.output_tokens,
            shortened: planned.shortened,
        };
        Ok(workload.requests().map(arrival).take_while(|arrival| arrival.at_s < duration_s).collect())
    }
}
