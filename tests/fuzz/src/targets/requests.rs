//! Bodies of the gateway's API.

use super::text::schemas;
use super::{LARGE, SMALL, model_texts, subject, texts};
use crate::mutate::Seed;
use crate::{Subject, Target};
use anyhow::Result;
use ashlar_gateway::openai::error::ApiError;
use ashlar_gateway::trial::{MODEL, Trial};
use serde_json::{Value, json};
use std::path::Path;

pub(super) const CHAT: Target =
    Target { name: "chat", about: "POST /v1/chat/completions", memory: LARGE, open: chat };
pub(super) const COMPLETION: Target =
    Target { name: "completion", about: "POST /v1/completions", memory: LARGE, open: completion };
pub(super) const RESPONSE: Target =
    Target { name: "response", about: "POST /v1/responses", memory: LARGE, open: response };
pub(super) const TOKENIZE: Target =
    Target { name: "tokenize", about: "POST /tokenize", memory: LARGE, open: tokenize };
pub(super) const JOB: Target =
    Target { name: "job", about: "POST /v1/fine_tuning/jobs", memory: SMALL, open: job };
pub(super) const DEPLOYMENT: Target =
    Target { name: "deployment", about: "POST /admin/models", memory: SMALL, open: deployment };
pub(super) const LIST: Target =
    Target { name: "list", about: "addresses of lists and their queries", memory: SMALL, open: list };
pub(super) const MULTIPART: Target =
    Target { name: "multipart", about: "POST /v1/files", memory: LARGE, open: multipart };

/// An answer to a client; a failure of the server's own is a failure of the input's.
fn answered(answer: Result<(), ApiError>) -> bool {
    match answer {
        Ok(()) => true,
        Err(error) => {
            assert!(error.status.is_client_error(), "{} instead of a refusal: {error}", error.status);
            false
        }
    }
}

fn requests(
    directory: &Path,
    seeds: Vec<Value>,
    own: &str,
    read: fn(&Trial, &[u8]) -> Result<(), ApiError>,
) -> Result<Subject> {
    let trial = Trial::open(&model_texts(directory)?, &directory.join("blobs"))?;
    let corpus = texts(seeds.into_iter().map(|seed| Seed::json(seed.to_string())), own);
    Ok(subject(corpus, move |input| answered(read(&trial, input))))
}

const SAMPLING_WORDS: &str = "model messages role content system user assistant tool developer name tool_calls tool_call_id function arguments parameters temperature top_p top_k min_p n seed stop stream stream_options include_usage logit_bias logprobs top_logprobs max_tokens max_completion_tokens min_tokens presence_penalty frequency_penalty repetition_penalty response_format json_schema json_object schema strict type text tools tool_choice required auto none parallel_tool_calls chat_template_kwargs add_generation_prompt enable_thinking stop_token_ids ignore_eos skip_special_tokens priority echo suffix prompt best_of user <|end|> <think> </think> <tool_call> 258 287 288 4294967295 1e308 -1e-320";

fn sampling() -> Value {
    json!({"model": MODEL, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "n": 2, "seed": 7, "stop": ["x", "\n"], "stream": true, "stream_options": {"include_usage": true}, "logit_bias": {"258": -100, "65": 5.5}, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [65], "ignore_eos": false, "user": "u"})
}

fn with(mut body: Value, more: Value) -> Value {
    if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
        body.extend(more);
    }
    body
}

fn tools() -> Value {
    let schemas = schemas();
    let function = |(index, schema): (usize, &String)| {
        let parameters: Value = serde_json::from_str(schema).unwrap_or_default();
        json!({"type": "function", "function": {"name": format!("f{index}"), "description": "d", "parameters": parameters}})
    };
    schemas.iter().take(2).enumerate().map(function).collect()
}

fn chat(directory: &Path) -> Result<Subject> {
    let messages = json!([
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f0", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "46"},
        {"role": "user", "content": "t"},
    ]);
    let schema: Value = serde_json::from_str(&schemas()[0])?;
    let seeds = vec![
        with(json!({"messages": messages, "max_tokens": 5, "logprobs": true, "top_logprobs": 3}), sampling()),
        json!({"messages": messages, "tools": tools(), "tool_choice": "auto", "parallel_tool_calls": true}),
        json!({"messages": messages, "tools": tools(), "tool_choice": {"type": "function", "function": {"name": "f0"}}, "chat_template_kwargs": {"enable_thinking": false}}),
        json!({"messages": messages, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}, "max_completion_tokens": 9}),
    ];
    requests(directory, seeds, SAMPLING_WORDS, Trial::chat)
}

fn completion(directory: &Path) -> Result<Subject> {
    let seeds = vec![
        with(json!({"prompt": "p", "max_tokens": 5, "logprobs": 2, "echo": true}), sampling()),
        json!({"prompt": ["a", "b"], "response_format": {"type": "json_object"}}),
        json!({"prompt": [1, 2, 3], "min_tokens": 3}),
        json!({"prompt": [[1, 2], [3]], "add_special_tokens": false}),
    ];
    requests(directory, seeds, SAMPLING_WORDS, Trial::completion)
}

fn response(directory: &Path) -> Result<Subject> {
    let input = json!([
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "function_call", "call_id": "1", "name": "f0", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "46"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
        {"role": "user", "content": "t"},
    ]);
    let flat_tools: Value = tools()
        .as_array()
        .into_iter()
        .flatten()
        .map(|tool| with(json!({"type": "function"}), tool["function"].clone()))
        .collect();
    let schema: Value = serde_json::from_str(&schemas()[0])?;
    let seeds = vec![
        json!({"model": MODEL, "input": "q", "instructions": "i", "store": false, "max_output_tokens": 9, "temperature": 1, "metadata": {"a": "b"}, "stream": true}),
        json!({"input": input, "tools": flat_tools, "tool_choice": "auto", "include": ["message.output_text.logprobs"], "top_logprobs": 2, "store": true, "background": true}),
        json!({"input": "q", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}, "reasoning": {"effort": "low"}, "truncation": "disabled"}),
    ];
    let own = format!(
        "{SAMPLING_WORDS} input instructions input_text output_text reasoning reasoning_text function_call function_call_output call_id output summary annotations store background previous_response_id resp_ metadata include max_output_tokens truncation format conversation"
    );
    requests(directory, seeds, &own, Trial::response)
}

fn tokenize(directory: &Path) -> Result<Subject> {
    let seeds = vec![
        json!({"prompt": "p <|end|> \u{e9}", "add_special_tokens": true}),
        json!({"messages": [{"role": "user", "content": "q"}], "tools": tools(), "add_generation_prompt": false}),
    ];
    requests(directory, seeds, SAMPLING_WORDS, Trial::tokenize)
}

fn job(directory: &Path) -> Result<Subject> {
    let file = "file-00000000000000000000000000000007";
    let seeds = vec![
        json!({"model": MODEL, "training_file": file, "validation_file": file, "suffix": "s", "metadata": {"a": "b"}, "seed": 7, "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 1.5}}}, "learning_rate": 1e-4, "weight_decay": 0.1, "grad_clip": 1.0, "lora": {"rank": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["q_proj"]}, "max_seq_len": 128, "schedule": {"type": "cosine", "warmup_steps": 3}, "early_stopping": {"patience": 2}, "packing": true}),
        json!({"model": MODEL, "training_file": file, "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": "auto"}}}, "promote": {"metric": "accuracy"}}),
        json!({"model": MODEL, "training_file": file, "hyperparameters": {"n_epochs": 1}, "full": true}),
    ];
    let own = "model training_file validation_file suffix metadata seed method type supervised dpo hyperparameters n_epochs batch_size learning_rate_multiplier auto beta learning_rate weight_decay grad_clip lora rank alpha dropout target_modules q_proj all full model random schedule linear cosine constant warmup_steps warmup_ratio early_stopping patience packing promote metric max_seq_len integrations file-00000000000000000000000000000007 1e308 0";
    requests(directory, seeds, own, Trial::job)
}

fn deployment(directory: &Path) -> Result<Subject> {
    let seeds = vec![
        json!({"name": "b", "model": "demo", "nodes": 2, "stages": 1, "tensor_parallel_size": 2, "replicas": 1, "quantize": "q8_0", "max_context_tokens": 128}),
        json!({"model": "org/name"}),
    ];
    let own = "name model nodes stages tensor_parallel_size replicas quantize q4_k_m q8_0 max_context_tokens 4294967295 .. / ../.. /etc/passwd";
    requests(directory, seeds, own, Trial::deployment)
}

fn list(directory: &Path) -> Result<Subject> {
    let trial = Trial::open(&model_texts(directory)?, &directory.join("blobs"))?;
    let seeds = [
        "/v1/files?limit=5&after=7",
        "/v1/fine_tuning/jobs/x/events?stream=true&limit=%31&x=%C3%A9",
        "http://a:1/v1/x?a=b&a=c",
        "*",
    ];
    let corpus =
        texts(seeds, "%00 %ff %zz & = ? # + limit after stream [] :: // 99999999999999999999 %2e%2e/");
    Ok(subject(corpus, move |input| answered(trial.list(input))))
}

fn multipart(directory: &Path) -> Result<Subject> {
    let trial = Trial::open(&model_texts(directory)?, &directory.join("blobs"))?;
    let form = |parts: &[(&str, &str)]| {
        let mut text = "multipart/form-data; boundary=XX\n".to_owned();
        for (head, body) in parts {
            text.push_str(&format!("--XX\r\ncontent-disposition: form-data; {head}\r\n\r\n{body}\r\n"));
        }
        text + "--XX--\r\n"
    };
    let file =
        ("name=\"file\"; filename=\"a.jsonl\"\r\ncontent-type: application/json", "{\"text\": \"a\"}\n");
    let purpose = ("name=\"purpose\"", "fine-tune");
    let seeds =
        [form(&[purpose, file]), form(&[file, purpose, ("name=\"x\"; filename*=UTF-8''a%C3%A9", "y")])];
    let own = "--XX --XX-- --XX\r\n \r\n \r\n\r\n content-disposition: form-data; name=\"file\" name=\"purpose\" filename= filename*=UTF-8'' boundary= boundary=\"\" multipart/form-data multipart/mixed content-type: charset=utf-7 content-length: \\\" %00 ../../x";
    let mut corpus = texts(seeds, own);
    corpus.words.push(b"\r\n--XX\r\ncontent-disposition: form-data; name=\"y\"\r\n\r\n".to_vec());
    Ok(subject(corpus, move |input| {
        let line = input.iter().position(|&byte| byte == b'\n').unwrap_or(input.len());
        let (content_type, body) = input.split_at(line);
        answered(trial.upload(content_type, body.get(1..).unwrap_or_default()))
    }))
}
