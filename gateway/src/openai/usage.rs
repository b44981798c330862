//! Usage and latency receipts.

use ashlar_protocol::serving::Receipt;
use serde_json::{Value, json};

/// Token counts of a whole request.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) cached_tokens: usize,
}

impl Usage {
    /// OpenAI's object.
    pub(crate) fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

/// Where the time of a request went: the slowest of its choices, their preemptions together.
pub(crate) fn receipt_json(receipts: &[Receipt]) -> Value {
    let slowest = |field: fn(&Receipt) -> u64| receipts.iter().map(field).max().unwrap_or(0);
    json!({
        "queue_ms": slowest(|r| r.queue_ms),
        "prefill_ms": slowest(|r| r.prefill_ms),
        "decode_ms": slowest(|r| r.decode_ms),
        "cached_tokens": slowest(|r| u64::from(r.cached_tokens)),
        "preemptions": receipts.iter().map(|r| u64::from(r.preemptions)).sum::<u64>(),
    })
}
