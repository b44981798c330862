//! From an uploaded fine-tuning file to what every training step computes.
//!
//! Layout, in reading order:
//! - `lines`: a file as lines of bounded length;
//! - `example`: what a line may say (chats, prompts with completions, texts, preferences), checked;
//! - `problem`: what is wrong with a line, and `report`: what is said about a whole file;
//! - `chat`: where in the rendered text of a chat the assistant's answers stand;
//! - `tokens`: texts as token sequences in which some tokens are targets;
//! - `prepare`: the way through all of these, once per file;
//! - `file`: samples as bytes, written as a stream and read by index;
//! - `plan`: which samples each step computes, and in which order.
//!
//! **Invariants:** pure: no network, no file system, no clock, no threads, nothing iterated in a random order. A file is read
//! and written as a stream, so its size takes no memory. Whatever a file holds, it is answered with a message, never with a
//! panic; a message names lines and fields and shows none of their text (unless the model's template does, in refusing it). A plan depends on samples, settings and seed alone, not on
//! the machines that carry it out.

#![forbid(unsafe_code)]

mod chat;
mod example;
mod file;
mod lines;
pub mod plan;
mod prepare;
mod problem;
mod report;
mod sample;
mod tokens;

pub use example::{Conversation, Example, Format, Method};
pub use file::{DatasetDigest, DatasetError, DatasetReader, DatasetSummary, DatasetWriter, SampleSize};
pub use lines::LINE_BYTES_MAX;
pub use prepare::{Options, PrepareError, TokenisedExample, Tokeniser, prepare};
pub use problem::{LineProblem, Turn};
pub use report::{FileRefusal, LineError, Longest, PROBLEMS_KEPT_MAX, Problems, Report, Truncation};
pub use sample::{Sample, TokenSequence};

/// Fewer examples than this are refused, as OpenAI does.
pub const EXAMPLES_MIN: u64 = 10;
