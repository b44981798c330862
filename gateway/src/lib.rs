//! The edge of the cluster: OpenAI's HTTP API in, token events of the scheduler out of which answers are made.
//!
//! Layout, in the order of a request: [`server`](serve) (bind, accept, drain), `router` and `context` (paths, layers,
//! ids, traces), [`openai`] (the schema: requests, answers, errors), `text` (tokenizer, templates, grammars),
//! `generation` (a request in flight), [`transcript`] (one choice, pure), [`scheduler_client`] (the connection),
//! `tuning` (fine-tuning's files: uploads become blobs, a job's files samples),
//! `import` (adapters, from files to blobs), `models` (those beside the scheduler's own one), `metrics`, `degradation` and `system` (what operators see), `admin` (what they want), `access` (who may do what) and `audit` (who has done what).
//!
//! **Invariants:** only this crate knows OpenAI's schema; it knows no tensor and no placement. [`transcript`] has no
//! clock, no I/O and no async, so that the simulation runs exactly it. Bad input never becomes a 500, and never
//! disturbs another request: parsing, templates and tokenizing run away from the threads that serve streams. Prompts
//! and answers are never logged.
#![forbid(unsafe_code)]

mod access;
mod admin;
mod app;
mod audit;
mod config;
mod context;
mod degradation;
mod error;
mod generation;
mod import;
mod live;
mod metrics;
mod models;
pub mod openai;
mod pages;
mod reference;
mod refusals;
mod router;
pub mod scheduler_client;
mod server;
mod system;
mod text;
pub mod transcript;
#[doc(hidden)]
pub mod trial;
mod tuning;

pub use access::KeyTable;
pub use config::GatewayConfig;
pub use error::GatewayError;
pub use models::ModelFinder;
pub use server::{Gateway, serve};
