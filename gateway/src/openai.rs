//! OpenAI's HTTP schema: the only place that knows it.
//!
//! Layout: [`error`] (the envelope), `fields` (typed reading of a JSON object), `sampling` and `output` (fields that
//! chat and completions share), `chat*` and `completions*` (requests, answers, streams), `responses`, `models`,
//! `adapters`, `tokenize`, `tuning` (files and fine-tuning jobs).

pub(crate) mod adapters;
pub(crate) mod answer;
pub(crate) mod chat;
pub(crate) mod chat_grammar;
pub(crate) mod chat_request;
pub(crate) mod chat_stream;
pub(crate) mod chat_tools;
pub(crate) mod completions;
pub(crate) mod completions_logprobs;
pub(crate) mod completions_request;
pub(crate) mod completions_stream;
pub mod error;
pub(crate) mod fields;
pub(crate) mod logprobs;
pub(crate) mod models;
pub(crate) mod respond;
pub(crate) mod responses;
pub(crate) mod sampling;
pub(crate) mod sse;
pub(crate) mod stream;
pub(crate) mod tokenize;
pub(crate) mod tuning;
pub(crate) mod usage;
