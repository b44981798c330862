//! The fields that say how to sample, shared by chat and completions.

use super::error::ApiError;
use super::fields::{Fields, mistyped};
use crate::config::GatewayConfig;
use crate::text::ModelText;
use ashlar_vocabulary::{SamplingParams, TokenId};
use serde_json::Value;
use uuid::Uuid;

/// How a request is to be sampled and ended, validated but for what depends on its prompt.
#[derive(Debug)]
pub(crate) struct Sampling {
    /// Without `top_logprobs`, `prompt_logprobs` and grammar, which the endpoints set.
    pub(crate) params: SamplingParams,
    pub(crate) n: u32,
    pub(crate) stop_strings: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) stop_tokens: Vec<TokenId>,
    pub(crate) skip_special_tokens: bool,
    pub(crate) priority: i32,
}

/// How the answer is to be sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Delivery {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Usage so far in every chunk.
    pub(crate) continuous_usage: bool,
    pub(crate) receipt: bool,
}

impl Sampling {
    pub(crate) fn take(
        fields: &mut Fields,
        text: &ModelText,
        config: &GatewayConfig,
    ) -> Result<Sampling, ApiError> {
        let defaults = &text.defaults;
        let eos = text.tokenizer.eos_token_ids();
        let own_stops = stop_token_ids(fields, text)?;
        let mut held_back = eos.to_vec();
        held_back.extend(&own_stops);
        let ignore_eos = fields.bool("ignore_eos")?.unwrap_or(false);
        let stop_tokens = if ignore_eos { own_stops } else { held_back.clone() };
        let params = SamplingParams {
            temperature: real(fields, "temperature", 0.0, 2.0)?.or(defaults.temperature).unwrap_or(1.0),
            // OpenAI admits 0, which leaves the likeliest token.
            top_p: real(fields, "top_p", 0.0, 1.0)?.or(defaults.top_p).unwrap_or(1.0).max(f32::MIN_POSITIVE),
            top_k: top_k(fields, defaults.top_k)?,
            min_p: real(fields, "min_p", 0.0, 1.0)?.or(defaults.min_p).unwrap_or(0.0),
            presence_penalty: real(fields, "presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            frequency_penalty: real(fields, "frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            repetition_penalty: repetition_penalty(fields)?.or(defaults.repetition_penalty).unwrap_or(1.0),
            logit_bias: logit_bias(fields, text, config)?,
            seed: fields.integer("seed", i64::MIN, i64::MAX)?.map_or_else(draw_seed, |seed| seed as u64),
            min_tokens: fields.integer("min_tokens", 0, i64::from(u32::MAX))?.unwrap_or(0) as u32,
            stop_token_ids: held_back,
            ..SamplingParams::default()
        };
        // Accepted and without effect here: who asks is told by the key, and scheduling by `priority`.
        fields.string("user")?;
        let priority =
            fields.integer("priority", i64::from(i32::MIN), i64::from(i32::MAX))?.unwrap_or(0) as i32;
        Ok(Sampling {
            params,
            n: choices(fields, config)?,
            stop_strings: stop_strings(fields, config)?,
            include_stop: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            stop_tokens,
            skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
            priority: if config.accept_priority { priority } else { 0 },
        })
    }
}

impl Delivery {
    pub(crate) fn take(fields: &mut Fields) -> Result<Delivery, ApiError> {
        let stream = fields.bool("stream")?.unwrap_or(false);
        let receipt = fields.bool("ashlar_receipt")?.unwrap_or(false);
        let (mut include_usage, mut continuous_usage) = (false, false);
        if let Some(mut options) = fields.object("stream_options")? {
            if !stream {
                return Err(ApiError::field(
                    "stream_options",
                    "`stream_options` is only allowed when `stream` is true: leave it out, or stream",
                ));
            }
            include_usage = options.bool("include_usage")?.unwrap_or(false);
            continuous_usage = options.bool("continuous_usage_stats")?.unwrap_or(false);
            // Padding against traffic analysis; we send none.
            options.bool("include_obfuscation")?;
            fields.finish(options);
        }
        Ok(Delivery { stream, include_usage, continuous_usage, receipt })
    }
}

/// 48 random bits: any client can send them back as a `seed`.
fn draw_seed() -> u64 {
    (Uuid::new_v4().as_u128() >> 80) as u64
}

fn real(fields: &mut Fields, name: &str, min: f64, max: f64) -> Result<Option<f32>, ApiError> {
    Ok(fields.number(name, min, max)?.map(|value| value as f32))
}

/// 0 and vLLM's −1 mean all tokens.
fn top_k(fields: &mut Fields, default: Option<i64>) -> Result<u32, ApiError> {
    let top_k = fields.integer("top_k", -1, i64::from(u32::MAX))?.or(default).unwrap_or(0);
    Ok(u32::try_from(top_k).unwrap_or(0))
}

fn repetition_penalty(fields: &mut Fields) -> Result<Option<f32>, ApiError> {
    let penalty = real(fields, "repetition_penalty", 0.0, 10.0)?;
    if penalty.is_some_and(|penalty| penalty < 1e-3) {
        return Err(ApiError::field(
            "repetition_penalty",
            "`repetition_penalty` must be above 0: 1 means none",
        ));
    }
    Ok(penalty)
}

fn choices(fields: &mut Fields, config: &GatewayConfig) -> Result<u32, ApiError> {
    let n = fields.integer("n", 1, i64::from(config.n_max))?.unwrap_or(1) as u32;
    if let Some(best_of) = fields.integer("best_of", 1, i64::from(config.n_max))?
        && best_of != i64::from(n)
    {
        return Err(ApiError::field(
            "best_of",
            "`best_of` is not supported unless it equals `n`: leave it out",
        ));
    }
    Ok(n)
}

fn stop_strings(fields: &mut Fields, config: &GatewayConfig) -> Result<Vec<String>, ApiError> {
    let list = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![Value::String(stop)],
        Some(Value::Array(list)) => list,
        Some(other) => return Err(fields.mistyped("stop", "a string or an array of strings", &other)),
    };
    if list.len() > config.stop_strings_max {
        let message =
            format!("`stop` may hold at most {} strings, not {}", config.stop_strings_max, list.len());
        return Err(ApiError::field("stop", message));
    }
    let mut stops = Vec::with_capacity(list.len());
    for (index, stop) in list.into_iter().enumerate() {
        let path = format!("stop[{index}]");
        match stop {
            Value::String(stop) if stop.is_empty() => {
                return Err(ApiError::field("stop", format!("`{path}` is empty: a stop string needs text")));
            }
            Value::String(stop) if stop.len() > config.stop_string_bytes_max => {
                let max = config.stop_string_bytes_max;
                return Err(ApiError::field(
                    "stop",
                    format!("`{path}` is longer than {max} bytes: shorten it"),
                ));
            }
            Value::String(stop) => stops.push(stop),
            other => {
                return Err(ApiError {
                    param: Some("stop".to_owned()),
                    ..mistyped(&path, "a string", &other)
                });
            }
        }
    }
    Ok(stops)
}

fn stop_token_ids(fields: &mut Fields, text: &ModelText) -> Result<Vec<TokenId>, ApiError> {
    let list = fields.array("stop_token_ids")?.unwrap_or_default();
    if list.len() > 128 {
        return Err(ApiError::field("stop_token_ids", "`stop_token_ids` may hold at most 128 tokens"));
    }
    list.iter().map(|id| token_id(id, "stop_token_ids", text)).collect()
}

/// A token id that the vocabulary has.
pub(crate) fn token_id(value: &Value, param: &str, text: &ModelText) -> Result<TokenId, ApiError> {
    let size = text.tokenizer.vocab_size();
    let id = value.as_u64().ok_or_else(|| {
        ApiError::field(
            param,
            format!("`{param}` must hold token ids (integers from 0), not {}", shown(value)),
        )
    })?;
    TokenId::try_from(id).ok().filter(|id| (*id as usize) < size).ok_or_else(|| {
        ApiError::field(param, format!("token {id} of `{param}` is not in the vocabulary of {size} tokens"))
    })
}

fn shown(value: &Value) -> String {
    value.to_string().chars().take(40).collect()
}

fn logit_bias(
    fields: &mut Fields,
    text: &ModelText,
    config: &GatewayConfig,
) -> Result<Vec<(TokenId, f32)>, ApiError> {
    const PARAM: &str = "logit_bias";
    let map = match fields.take(PARAM) {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(fields.mistyped(PARAM, "an object", &other)),
    };
    if map.len() > config.logit_bias_max {
        let max = config.logit_bias_max;
        return Err(ApiError::field(
            PARAM,
            format!("`logit_bias` may hold at most {max} tokens, not {}", map.len()),
        ));
    }
    let mut bias = Vec::with_capacity(map.len());
    for (key, value) in map {
        let id = key.parse::<u64>().map(Value::from).unwrap_or_else(|_| Value::String(key));
        let id = token_id(&id, PARAM, text)?;
        let amount = value.as_f64().filter(|amount| (-100.0..=100.0).contains(amount)).ok_or_else(|| {
            ApiError::field(PARAM, format!("`logit_bias` of token {id} must be a number from -100 to 100"))
        })?;
        bias.push((id, amount as f32));
    }
    bias.sort_by_key(|(id, _)| *id);
    bias.dedup_by_key(|(id, _)| *id);
    Ok(bias)
}
