//! Usage and latency receipts.

use crate::generation::{Generation, TokenCounts};
use ashlar_protocol::serving::Receipt;
use ashlar_protocol::step::StepTiming;
use serde_json::{Value, json};

/// OpenAI's object.
pub(crate) fn usage_json(counts: TokenCounts) -> Value {
    json!({
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.generated,
        "total_tokens": counts.prompt + counts.generated,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
    })
}

/// Where the time of a request went: the slowest of its choices, their preemptions and replays together.
pub(crate) fn receipt_json(generation: &Generation) -> Value {
    let slowest = |field: fn(&Receipt) -> u64| generation.receipts().map(field).max().unwrap_or(0);
    json!({
        "queue_ms": slowest(|r| r.queue_ms),
        "prefill_ms": slowest(|r| r.prefill_ms),
        "decode_ms": slowest(|r| r.decode_ms),
        "cached_tokens": generation.counts().cached,
        "preemptions": generation.receipts().map(|r| u64::from(r.preemptions)).sum::<u64>(),
        "stages": stages(generation),
        "replays": generation.receipts().map(|r| u64::from(r.replays)).sum::<u64>(),
    })
}

/// How each stage spent the steps that the choices were in, summed up.
fn stages(generation: &Generation) -> Vec<StepTiming> {
    let mut sums: Vec<StepTiming> = Vec::new();
    for receipt in generation.receipts() {
        sums.resize(sums.len().max(receipt.stages.len()), StepTiming::default());
        sums.iter_mut().zip(&receipt.stages).for_each(|(sum, stage)| sum.add(stage));
    }
    sums
}
