//! Latencies, throughput and goodput of a run.

use super::client::{Failure, Outcome};
use super::load::Run;
use super::stages::Shares;
use crate::bench::stats::{Summary, mean};
use crate::bench::table::{Table, figure, percent};
use serde::Serialize;
use std::collections::BTreeMap;

/// What a request must meet to count for goodput.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Objectives {
    /// Time to the first token, in milliseconds.
    pub(super) ttft_ms: f64,
    /// Time per output token after the first, in milliseconds.
    pub(super) tpot_ms: f64,
}

impl Objectives {
    fn met_by(&self, outcome: &Outcome) -> bool {
        outcome.ttft_s.is_some_and(|seconds| 1e3 * seconds <= self.ttft_ms)
            && outcome.tpot_s().is_none_or(|seconds| 1e3 * seconds <= self.tpot_ms)
    }
}

/// Everything that is reported.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    url: String,
    model: String,
    load: String,
    seed: u64,
    seconds: f64,
    completed: usize,
    failed: usize,
    abandoned: usize,
    /// Requests that a cap shortened.
    shortened: usize,
    in_flight_max: usize,
    input_tokens: u64,
    cached_input_tokens: u64,
    output_tokens: u64,
    requests_per_s: f64,
    input_tokens_per_s: f64,
    output_tokens_per_s: f64,
    objectives: Objectives,
    /// Requests per second that meet both objectives.
    goodput_requests_per_s: f64,
    /// Their share of all requests that ended, failures included.
    goodput_share: f64,
    ttft_ms: Option<Summary>,
    itl_ms: Option<Summary>,
    tpot_ms: Option<Summary>,
    e2e_ms: Option<Summary>,
    /// How long it took until a request was refused (429).
    refusal_ms: Option<Summary>,
    /// How much later than planned requests were sent: the client's own delay.
    client_lag_ms: Option<Summary>,
    /// Output tokens per chunk with text; above 1 the gaps are of several tokens.
    tokens_per_chunk: f64,
    /// Mean time in the service's queue, where it tells.
    queue_ms_mean: Option<f64>,
    /// Mean time until the prompt was computed, where it tells.
    prefill_ms_mean: Option<f64>,
    /// Failures by status, with an example each.
    errors: BTreeMap<String, Errors>,
    /// What the ranks did, where the service tells.
    stages: Option<Shares>,
}

/// Failures of one kind.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Errors {
    count: usize,
    example: String,
}

/// What was measured, for the heading.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) url: String,
    pub(super) model: String,
    pub(super) load: String,
    pub(super) seed: u64,
    pub(super) objectives: Objectives,
}

impl Report {
    /// Puts the figures together.
    pub(super) fn new(subject: Subject, run: &Run, stages: Option<Shares>) -> Report {
        let good: Vec<&Outcome> = run.outcomes.iter().filter(|outcome| outcome.failure.is_none()).collect();
        let summary =
            |values: Vec<f64>| Summary::of(&values.iter().map(|seconds| 1e3 * seconds).collect::<Vec<_>>());
        let sum = |tokens: fn(&Outcome) -> u64| good.iter().map(|outcome| tokens(outcome)).sum::<u64>();
        let met = good.iter().filter(|outcome| subject.objectives.met_by(outcome)).count();
        let seconds = run.seconds.max(f64::MIN_POSITIVE);
        let chunks: usize = good.iter().map(|outcome| outcome.gaps_s.len() + 1).sum();
        let told = |value: fn(&Outcome) -> Option<f64>| {
            mean(&good.iter().filter_map(|o| value(o)).collect::<Vec<_>>())
        };
        let (input_tokens, output_tokens) = (sum(|o| o.input_tokens), sum(|o| o.output_tokens));
        Report {
            url: subject.url,
            model: subject.model,
            load: subject.load,
            seed: subject.seed,
            seconds: run.seconds,
            completed: good.len(),
            failed: run.outcomes.len() - good.len(),
            abandoned: run.abandoned,
            shortened: run.shortened,
            in_flight_max: run.in_flight_max,
            input_tokens,
            cached_input_tokens: sum(|o| o.cached_tokens),
            output_tokens,
            requests_per_s: good.len() as f64 / seconds,
            input_tokens_per_s: input_tokens as f64 / seconds,
            output_tokens_per_s: output_tokens as f64 / seconds,
            objectives: subject.objectives,
            goodput_requests_per_s: met as f64 / seconds,
            goodput_share: met as f64 / run.outcomes.len().max(1) as f64,
            ttft_ms: summary(good.iter().filter_map(|o| o.ttft_s).collect()),
            itl_ms: summary(good.iter().flat_map(|o| o.gaps_s.iter().copied()).collect()),
            tpot_ms: summary(good.iter().filter_map(|o| o.tpot_s()).collect()),
            e2e_ms: summary(good.iter().map(|o| o.e2e_s).collect()),
            refusal_ms: summary(run.outcomes.iter().filter(|o| o.is_refused()).map(|o| o.e2e_s).collect()),
            client_lag_ms: summary(run.outcomes.iter().map(|o| o.lag_s).collect()),
            tokens_per_chunk: output_tokens as f64 / chunks.max(1) as f64,
            queue_ms_mean: told(|o| o.queue_ms),
            prefill_ms_mean: told(|o| o.prefill_ms),
            errors: errors(run.outcomes.iter().filter_map(|outcome| outcome.failure.as_ref())),
            stages,
        }
    }

    /// Whether anything was answered.
    pub(super) fn is_empty(&self) -> bool {
        self.completed == 0
    }

    /// Tables for people.
    pub(super) fn print(&self) {
        println!("{} at {}: {}, seed {}", self.model, self.url, self.load, self.seed);
        println!(
            "{} requests in {:.1} s, at most {} in flight; {} failed, {} given up, {} shortened to the model's or the \
             given limits",
            self.completed, self.seconds, self.in_flight_max, self.failed, self.abandoned, self.shortened
        );
        let cached = self.cached_input_tokens as f64 / self.input_tokens.max(1) as f64;
        println!(
            "throughput: {} requests/s, {} input tokens/s ({} from the prefix cache), {} output tokens/s",
            figure(self.requests_per_s),
            figure(self.input_tokens_per_s),
            percent(cached),
            figure(self.output_tokens_per_s)
        );
        println!(
            "goodput: {} requests/s, {} of all, within TTFT {} ms and TPOT {} ms\n",
            figure(self.goodput_requests_per_s),
            percent(self.goodput_share),
            self.objectives.ttft_ms,
            self.objectives.tpot_ms
        );
        let mut table = Table::new(["ms", "mean", "p50", "p90", "p99", "of"]);
        let lines = [
            ("TTFT", &self.ttft_ms),
            ("ITL", &self.itl_ms),
            ("TPOT", &self.tpot_ms),
            ("E2E", &self.e2e_ms),
            ("refusals", &self.refusal_ms),
            ("client's own delay", &self.client_lag_ms),
        ];
        for (name, summary) in lines {
            if let Some(s) = summary {
                let cells =
                    [figure(s.mean), figure(s.p50), figure(s.p90), figure(s.p99), s.count.to_string()];
                table.row(std::iter::once(name.to_owned()).chain(cells));
            }
        }
        print!("{}", table.render());
        if self.tokens_per_chunk > 1.05 {
            println!("{:.2} tokens per chunk: ITL is between chunks, TPOT per token", self.tokens_per_chunk);
        }
        if let (Some(queue), Some(prefill)) = (self.queue_ms_mean, self.prefill_ms_mean) {
            println!(
                "the service's receipts, mean: {} ms queued, {} ms of prefill",
                figure(queue),
                figure(prefill)
            );
        }
        for (status, errors) in &self.errors {
            println!("{} × {status}: {}", errors.count, errors.example);
        }
        if let Some(stages) = &self.stages {
            stages.print();
        }
    }
}

fn errors<'a>(failures: impl Iterator<Item = &'a Failure>) -> BTreeMap<String, Errors> {
    let mut by_status: BTreeMap<String, Errors> = BTreeMap::new();
    for failure in failures {
        let errors = by_status.entry(failure.status.clone()).or_default();
        if errors.count == 0 {
            errors.example.clone_from(&failure.message);
        }
        errors.count += 1;
    }
    by_status
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn answered(ttft_s: f64, decode_s: f64, output_tokens: u64) -> Outcome {
        Outcome {
            ttft_s: Some(ttft_s),
            decode_s,
            e2e_s: ttft_s + decode_s,
            input_tokens: 10,
            output_tokens,
            gaps_s: vec![decode_s],
            ..Outcome::default()
        }
    }

    fn report(outcomes: Vec<Outcome>) -> Report {
        let run = Run { outcomes, seconds: 2.0, ..Run::default() };
        let objectives = Objectives { ttft_ms: 500.0, tpot_ms: 100.0 };
        let subject = Subject { url: "u".into(), model: "m".into(), load: "l".into(), seed: 0, objectives };
        Report::new(subject, &run, None)
    }

    #[test]
    fn goodput_counts_requests_that_meet_every_objective() {
        let failed = Outcome {
            failure: Some(Failure { status: "429".into(), message: "slow down".into() }),
            e2e_s: 0.004,
            ..Outcome::default()
        };
        let report = report(vec![
            answered(0.4, 0.9, 10),
            answered(0.6, 0.1, 10),
            answered(0.4, 1.0, 10),
            answered(0.1, 0.0, 1),
            failed,
        ]);
        assert_eq!((report.completed, report.failed), (4, 1));
        assert_eq!(report.goodput_requests_per_s, 1.0);
        assert_eq!(report.goodput_share, 0.4);
        assert_eq!(report.errors["429"], Errors { count: 1, example: "slow down".into() });
        assert_eq!(report.refusal_ms.map(|refusals| (refusals.count, refusals.p50)), Some((1, 4.0)));
    }

    #[test]
    fn throughput_is_over_the_whole_run_and_a_single_token_has_no_tpot() {
        let report = report(vec![answered(0.1, 0.0, 1), answered(0.2, 0.3, 4)]);
        assert_eq!((report.requests_per_s, report.output_tokens_per_s), (1.0, 2.5));
        assert_eq!(report.tpot_ms.unwrap().count, 1);
        assert!((report.tpot_ms.unwrap().mean - 100.0).abs() < 1e-9);
        assert!(!report.is_empty());
    }
}
