//! The body of `POST /v1/completions`, validated.

use super::chat_request::{TOP_LOGPROBS_MAX, response_format};
use super::error::ApiError;
use super::fields::{Fields, mistyped};
use super::sampling::{Delivery, Sampling, token_id};
use crate::config::GatewayConfig;
use crate::text::ModelText;
use ashlar_vocabulary::{GrammarSpec, TokenId};
use serde_json::Value;

/// OpenAI's default, which vLLM keeps.
const MAX_TOKENS_DEFAULT: i64 = 16;

/// A completion request whose fields are all of the right type and in range.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub(crate) model: Option<String>,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) grammar: Option<GrammarSpec>,
    pub(crate) sampling: Sampling,
    pub(crate) delivery: Delivery,
    /// 0 only with `echo`.
    pub(crate) max_tokens: u32,
    pub(crate) echo: bool,
    /// Alternatives per token, where log-probabilities are asked for.
    pub(crate) logprobs: Option<u32>,
    pub(crate) unknown: Vec<String>,
}

/// One prompt, as text and as tokens.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) text: String,
    pub(crate) tokens: Vec<TokenId>,
}

impl CompletionRequest {
    /// Parses and tokenizes.
    pub(crate) fn parse(
        body: &[u8],
        text: &ModelText,
        config: &GatewayConfig,
    ) -> Result<CompletionRequest, ApiError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?;
        let add_special = fields.bool("add_special_tokens")?.unwrap_or(true);
        let prompt = fields.take("prompt").ok_or_else(|| fields.required("prompt"))?;
        let prompts = prompts(prompt, add_special, text, config)?;
        if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::field("suffix", "`suffix` is not supported: leave it out"));
        }
        let grammar = response_format(&mut fields)?;
        let mut sampling = Sampling::take(&mut fields, text, config)?;
        let echo = fields.bool("echo")?.unwrap_or(false);
        let logprobs = fields.integer("logprobs", 0, TOP_LOGPROBS_MAX)?.map(|top| top as u32);
        // The chosen token is always among the alternatives shown, so at least one is asked for.
        sampling.params.top_logprobs = logprobs;
        sampling.params.prompt_logprobs = echo && logprobs.is_some();
        let delivery = Delivery::take(&mut fields)?;
        let max_tokens = fields
            .integer("max_tokens", i64::from(!echo), i64::from(u32::MAX))?
            .unwrap_or(MAX_TOKENS_DEFAULT);
        let choices = prompts.len() * sampling.n as usize;
        if choices > config.choices_max {
            let message = format!(
                "{} prompts with `n` = {} make {choices} choices, at most {} are allowed: send fewer at once",
                prompts.len(),
                sampling.n,
                config.choices_max
            );
            return Err(ApiError::field("n", message));
        }
        let unknown = fields.unknown();
        Ok(CompletionRequest {
            model,
            prompts,
            grammar,
            sampling,
            delivery,
            max_tokens: max_tokens as u32,
            echo,
            logprobs,
            unknown,
        })
    }
}

/// A string, an array of strings, an array of tokens, or an array of arrays of tokens.
fn prompts(
    prompt: Value,
    add_special: bool,
    text: &ModelText,
    config: &GatewayConfig,
) -> Result<Vec<Prompt>, ApiError> {
    const PARAM: &str = "prompt";
    let list = match prompt {
        Value::String(prompt) => return Ok(vec![from_text(prompt, add_special, text)?]),
        Value::Array(list) => list,
        other => return Err(mistyped(PARAM, "a string or an array of strings or tokens", &other)),
    };
    match list.first() {
        None => Err(ApiError::field(PARAM, "`prompt` is empty: send at least one")),
        Some(Value::Number(_)) => Ok(vec![from_tokens(&list, text)?]),
        _ if list.len() > config.prompts_max => {
            let message =
                format!("`prompt` may hold at most {} prompts, not {}", config.prompts_max, list.len());
            Err(ApiError::field(PARAM, message))
        }
        _ => list
            .into_iter()
            .map(|prompt| match prompt {
                Value::String(prompt) => from_text(prompt, add_special, text),
                Value::Array(tokens) => from_tokens(&tokens, text),
                other => Err(mistyped(PARAM, "a string or an array of strings or tokens", &other)),
            })
            .collect(),
    }
}

fn from_text(prompt: String, add_special: bool, text: &ModelText) -> Result<Prompt, ApiError> {
    let tokens = text
        .tokenizer
        .encode(&prompt, add_special)
        .map_err(|error| ApiError::field("prompt", error.to_string()))?;
    not_empty(Prompt { text: prompt, tokens })
}

fn from_tokens(tokens: &[Value], text: &ModelText) -> Result<Prompt, ApiError> {
    let tokens =
        tokens.iter().map(|token| token_id(token, "prompt", text)).collect::<Result<Vec<_>, ApiError>>()?;
    not_empty(Prompt { text: text.tokenizer.decode(&tokens, true), tokens })
}

fn not_empty(prompt: Prompt) -> Result<Prompt, ApiError> {
    if prompt.tokens.is_empty() {
        return Err(ApiError::field("prompt", "`prompt` has no tokens: send some text"));
    }
    Ok(prompt)
}
