//! Log-probabilities of a chat answer.

use crate::text::ModelText;
use crate::transcript::OutputToken;
use ashlar_vocabulary::{TokenId, TokenLogprob};
use serde_json::{Value, json};

/// JSON has no infinity; OpenAI and vLLM show this instead.
const LOGPROB_MIN: f32 = -9999.0;

/// `{"content": […], "refusal": null}` for these tokens.
pub(crate) fn chat_logprobs(tokens: &[OutputToken], top: u32, text: &ModelText) -> Value {
    json!({"content": chat_logprobs_content(tokens, top, text), "refusal": null})
}

/// The entries alone.
pub(crate) fn chat_logprobs_content(tokens: &[OutputToken], top: u32, text: &ModelText) -> Vec<Value> {
    tokens
        .iter()
        .map(|token| {
            let described = token.logprobs.as_ref();
            let mut entry = token_json(text, token.token, described.map_or(LOGPROB_MIN, |l| l.logprob));
            let shown = described.map_or(&[][..], |l| &l.top);
            entry["top_logprobs"] = shown
                .iter()
                .take(top as usize)
                .map(|alternative| alternative_json(text, alternative))
                .collect();
            entry
        })
        .collect()
}

fn alternative_json(text: &ModelText, alternative: &TokenLogprob) -> Value {
    token_json(text, alternative.token, alternative.logprob)
}

fn token_json(text: &ModelText, token: TokenId, logprob: f32) -> Value {
    json!({
        "token": text.tokenizer.token_text(token),
        "logprob": finite(logprob),
        "bytes": text.tokenizer.token_bytes(token),
    })
}

/// A log-probability that JSON can carry.
pub(crate) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(LOGPROB_MIN) } else { LOGPROB_MIN }
}
