//! Log-probabilities in the older form that `/v1/completions` has: parallel arrays.

use super::logprobs::finite;
use crate::text::ModelText;
use crate::transcript::OutputToken;
use ashlar_tokenizer::{SpecialTokens, TextStart};
use ashlar_vocabulary::{TokenId, TokenLogprobs};
use serde_json::{Map, Value, json};

/// The parallel arrays, in the making.
#[derive(Debug, Default)]
pub(crate) struct LegacyLogprobs {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
}

impl LegacyLogprobs {
    /// Adds the tokens of an echoed prompt; the first has no probability.
    pub(crate) fn add_prompt(
        &mut self,
        prompt: &[TokenId],
        described: &[Option<TokenLogprobs>],
        text: &ModelText,
    ) {
        let mut decoder = text.tokenizer.incremental(SpecialTokens::Hide, TextStart::Beginning);
        let mut offset = 0;
        for (position, token) in prompt.iter().enumerate() {
            let logprobs = described.get(position).and_then(Option::as_ref);
            self.add(*token, logprobs, offset, text);
            offset += decoder.push(*token).chars().count();
        }
    }

    /// Adds generated tokens; `before` is how many characters stand before the generated text.
    pub(crate) fn add_generated(&mut self, tokens: &[OutputToken], before: usize, text: &ModelText) {
        for token in tokens {
            self.add(token.token, token.logprobs.as_ref(), before + token.text_offset, text);
        }
    }

    pub(crate) fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }

    fn add(&mut self, token: TokenId, logprobs: Option<&TokenLogprobs>, offset: usize, text: &ModelText) {
        let name = token_name(token, text);
        self.text_offset.push(offset);
        match logprobs {
            None => {
                self.token_logprobs.push(Value::Null);
                self.top_logprobs.push(Value::Null);
            }
            Some(logprobs) => {
                self.token_logprobs.push(json!(finite(logprobs.logprob)));
                let mut top: Map<String, Value> = logprobs
                    .top
                    .iter()
                    .map(|alternative| {
                        (token_name(alternative.token, text), json!(finite(alternative.logprob)))
                    })
                    .collect();
                // OpenAI shows the token that was chosen among the alternatives, even when it is a lesser one.
                top.entry(name.clone()).or_insert_with(|| json!(finite(logprobs.logprob)));
                self.top_logprobs.push(Value::Object(top));
            }
        }
        self.tokens.push(Value::from(name));
    }
}

/// A token's text; one that is no text by itself is named by its bytes, as OpenAI does.
fn token_name(token: TokenId, text: &ModelText) -> String {
    let bytes = text.tokenizer.token_bytes(token);
    match std::str::from_utf8(bytes) {
        Ok(name) => name.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}")),
    }
}
