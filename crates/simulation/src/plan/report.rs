//! What came of a plan.

use super::{Plan, PlannedFault};
use crate::Report;
use crate::gateway::Outcome;
use ashlar_vocabulary::TokenId;
use serde::Serialize;
use std::collections::BTreeMap;

/// What a request must meet to count for goodput.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Objectives {
    /// Time to the first token, in milliseconds.
    pub ttft_ms: f64,
    /// Time per output token after the first, in milliseconds.
    pub tpot_ms: f64,
}

impl Default for Objectives {
    /// Two seconds, and ten tokens per second.
    fn default() -> Objectives {
        Objectives { ttft_ms: 2000.0, tpot_ms: 100.0 }
    }
}

/// What came of a plan. Times are virtual; the same plan always has the same report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanReport {
    /// The plan's seed.
    pub seed: u64,
    /// How the model was cut when the cluster came to serve.
    pub replicas: Vec<ReplicaCut>,
    /// Seconds from the start of all processes until the cluster served.
    pub ready_s: f64,
    /// Seconds from then to the last answer.
    pub seconds: f64,
    /// Requests that arrived.
    pub requests: usize,
    /// Requests that were answered in full.
    pub finished: usize,
    /// The others, by what became of them.
    pub failed: BTreeMap<String, usize>,
    /// Tokens of prompts of the finished ones.
    pub input_tokens: u64,
    /// Tokens that the finished ones received.
    pub output_tokens: u64,
    /// The same per second.
    pub output_tokens_per_s: f64,
    /// What counts for goodput.
    pub objectives: Objectives,
    /// Requests per second that met the objectives.
    pub goodput_requests_per_s: f64,
    /// Their share of all requests.
    pub goodput_share: f64,
    /// Time to the first token, of finished requests.
    pub ttft_ms: Option<Spread>,
    /// Time between two tokens of a stream, of finished requests.
    pub itl_ms: Option<Spread>,
    /// Mean of these of each request.
    pub tpot_ms: Option<Spread>,
    /// Time to the last token.
    pub e2e_ms: Option<Spread>,
    /// Longest time between two tokens of each stream.
    pub stall_ms: Option<Spread>,
    /// Every fault.
    pub faults: Vec<FaultReport>,
    /// Their recovery times, of those that met a running stream.
    pub recovery_ms: Option<Spread>,
    /// Steps that the replicas completed.
    pub steps: u64,
    /// Sequences preempted.
    pub preemptions: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// Times that a replica was lost.
    pub replica_losses: u64,
    /// Seconds simulated in all, the start included.
    pub virtual_s: f64,
    /// Events that this took.
    pub events: u64,
}

/// Layers of each stage of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReplicaCut {
    /// First layer and the one after the last, stage by stage.
    pub stages: Vec<(usize, usize)>,
    /// Ranks of each stage.
    pub ranks: usize,
    /// Blocks of KV cache, of 16 tokens each.
    pub kv_blocks: u32,
}

/// A fault, and what streams noticed of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FaultReport {
    /// When, in seconds since the cluster served.
    pub at_s: f64,
    /// Whom.
    pub role: super::Role,
    /// Which of them.
    pub index: usize,
    /// What.
    pub kind: super::FaultKind,
    /// Streams that had begun and not ended.
    pub streams: usize,
    /// Those of them that received nothing more and failed.
    pub lost: usize,
    /// Milliseconds until all others had received another token; `None` where there were none.
    pub recovery_ms: Option<f64>,
}

/// A distribution.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// How many values.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of `values`, in any order; `None` of nothing. Percentiles are interpolated between neighbours.
    pub fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        let at = |percent: f64| {
            let place = percent / 100.0 * last as f64;
            let (low, high) = (values[place.floor() as usize], values[(place.ceil() as usize).min(last)]);
            low + (high - low) * place.fract()
        };
        Some(Spread {
            count: values.len(),
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            max: values[last],
        })
    }
}

/// What a gateway writes down of a request.
#[derive(Debug, Default, Clone)]
pub(crate) struct RequestLog {
    pub(crate) arrival_us: u64,
    pub(crate) prompt_tokens: usize,
    /// What the model says, while the request is in progress.
    pub(crate) expected: Vec<TokenId>,
    /// How many of them have been received and compared.
    pub(crate) verified: usize,
    /// When each token arrived.
    pub(crate) tokens_at_us: Vec<u64>,
    /// How and when it ended.
    pub(crate) ended: Option<(Outcome, u64)>,
}

impl RequestLog {
    pub(crate) fn delivered(&mut self, tokens: usize, now_us: u64) {
        self.tokens_at_us.extend(std::iter::repeat_n(now_us, tokens));
    }

    pub(crate) fn end(&mut self, outcome: Outcome, now_us: u64) {
        self.ended.get_or_insert((outcome, now_us));
    }

    /// Whether what was received since it was last looked at is what the model says.
    pub(crate) fn verify(&mut self, received: &[TokenId]) -> Result<(), String> {
        let (from, to) = (self.verified, received.len());
        if self.expected.get(from..to) != received.get(from..) {
            return Err(format!(
                "received {:?} at {from}, the model says {:?}",
                received.get(from..),
                self.expected
            ));
        }
        self.verified = to;
        match &self.ended {
            Some((Outcome::Finished(_), _)) if to != self.expected.len() => {
                Err(format!("finished after {to} tokens of {}", self.expected.len()))
            }
            Some(_) => {
                self.expected = Vec::new();
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn finished_us(&self) -> Option<u64> {
        self.ended.as_ref().filter(|(outcome, _)| matches!(outcome, Outcome::Finished(_))).map(|(_, at)| *at)
    }

    fn gaps_ms(&self) -> impl Iterator<Item = f64> {
        self.tokens_at_us.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 1e3)
    }

    fn ttft_ms(&self) -> Option<f64> {
        self.tokens_at_us.first().map(|first| (first - self.arrival_us) as f64 / 1e3)
    }

    fn tpot_ms(&self) -> Option<f64> {
        let (first, last) = (self.tokens_at_us.first()?, self.tokens_at_us.last()?);
        let gaps = self.tokens_at_us.len() - 1;
        (gaps > 0).then(|| (last - first) as f64 / 1e3 / gaps as f64)
    }

    /// Of a stream that is running at this moment, when it received its next token; `Err` if it never did.
    fn next_token(&self, at_us: u64) -> Option<Result<u64, ()>> {
        let begun = self.tokens_at_us.first().is_some_and(|first| *first <= at_us);
        let next = self.tokens_at_us.partition_point(|token| *token <= at_us);
        let next = self.tokens_at_us.get(next).copied().ok_or(());
        let running = match &self.ended {
            // It may have had its last token without knowing that it was.
            Some((Outcome::Finished(_), _)) => next.is_ok(),
            // The fault itself may have ended it.
            Some((_, ended)) => *ended >= at_us,
            None => true,
        };
        (begun && running).then_some(next)
    }
}

/// A fault that has happened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Struck {
    pub(crate) at_us: u64,
    pub(crate) fault: PlannedFault,
}

/// What a run has seen.
pub(crate) struct Observed {
    /// When the cluster served, and when all was over.
    pub(crate) opened_us: u64,
    pub(crate) ended_us: u64,
    pub(crate) replicas: Vec<ReplicaCut>,
    pub(crate) requests: Vec<RequestLog>,
    pub(crate) struck: Vec<Struck>,
    pub(crate) counters: Report,
    pub(crate) events: u64,
}

impl PlanReport {
    pub(crate) fn new(plan: &Plan, observed: Observed) -> PlanReport {
        let finished: Vec<&RequestLog> =
            observed.requests.iter().filter(|log| log.finished_us().is_some()).collect();
        let last = finished.iter().filter_map(|log| log.finished_us()).max().unwrap_or(observed.opened_us);
        let seconds = (last - observed.opened_us) as f64 / 1e6;
        let per_s = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
        let good = |log: &&&RequestLog| {
            log.ttft_ms().is_some_and(|ms| ms <= plan.objectives.ttft_ms)
                && log.tpot_ms().is_none_or(|ms| ms <= plan.objectives.tpot_ms)
        };
        let good = finished.iter().filter(good).count();
        let output_tokens: u64 = finished.iter().map(|log| log.tokens_at_us.len() as u64).sum();
        let of = |value: &dyn Fn(&RequestLog) -> Option<f64>| {
            Spread::of(finished.iter().filter_map(|log| value(log)).collect())
        };
        let mut failed: BTreeMap<String, usize> = BTreeMap::new();
        for log in &observed.requests {
            match &log.ended {
                Some((Outcome::Finished(_), _)) => {}
                Some((Outcome::Failed(kind), _)) => *failed.entry(format!("{kind:?}")).or_default() += 1,
                Some((other, _)) => *failed.entry(format!("{other:?}")).or_default() += 1,
                None => *failed.entry("unfinished".into()).or_default() += 1,
            }
        }
        let faults: Vec<FaultReport> = observed.struck.iter().map(|fault| felt(fault, &observed)).collect();
        let recovery_ms = Spread::of(faults.iter().filter_map(|fault| fault.recovery_ms).collect());
        PlanReport {
            seed: plan.seed,
            ready_s: observed.opened_us as f64 / 1e6,
            seconds,
            requests: observed.requests.len(),
            finished: finished.len(),
            failed,
            input_tokens: finished.iter().map(|log| log.prompt_tokens as u64).sum(),
            output_tokens,
            output_tokens_per_s: per_s(output_tokens as f64),
            objectives: plan.objectives,
            goodput_requests_per_s: per_s(good as f64),
            goodput_share: good as f64 / observed.requests.len().max(1) as f64,
            ttft_ms: of(&RequestLog::ttft_ms),
            itl_ms: Spread::of(finished.iter().flat_map(|log| log.gaps_ms()).collect()),
            tpot_ms: of(&RequestLog::tpot_ms),
            e2e_ms: of(&|log| Some((log.finished_us()? - log.arrival_us) as f64 / 1e3)),
            stall_ms: of(&|log| log.gaps_ms().reduce(f64::max)),
            faults,
            recovery_ms,
            steps: observed.counters.steps,
            preemptions: observed.counters.preemptions,
            cached_tokens: observed.counters.cached_tokens,
            replica_losses: observed.counters.replica_losses,
            virtual_s: observed.ended_us as f64 / 1e6,
            events: observed.events,
            replicas: observed.replicas,
        }
    }
}

/// What streams noticed of a fault.
fn felt(struck: &Struck, observed: &Observed) -> FaultReport {
    let at_us = struck.at_us;
    let next: Vec<Result<u64, ()>> =
        observed.requests.iter().filter_map(|log| log.next_token(at_us)).collect();
    let last = next.iter().flatten().max();
    FaultReport {
        at_s: (at_us - observed.opened_us) as f64 / 1e6,
        role: struck.fault.role,
        index: struck.fault.index,
        kind: struck.fault.kind,
        streams: next.len(),
        lost: next.iter().filter(|next| next.is_err()).count(),
        recovery_ms: last.map(|last| (last - at_us) as f64 / 1e3),
    }
}
