//! What a model may say, and reading what it said.
//!
//! Layout, in reading order:
//! - `limits`: what a client's schema may cost, checked before anything is compiled;
//! - `compiler`: the token trie of a model, built once, and compilation within limits;
//! - `matcher`: one sequence's place in its grammar, as bitmasks over the vocabulary;
//! - `tool_grammar`: grammars for tool calls in the model's own format, and for answers after reasoning;
//! - `tool_parser`: generated text split into content and tool calls, reading exactly those formats;
//! - `reasoning`: generated text split into reasoning and answer.
//!
//! Invariants: nothing here knows the HTTP API's types, only JSON values; a client's grammar costs bounded time and
//! memory and never panics through; a matcher's state is a function of its grammar and the accepted tokens alone.

#![forbid(unsafe_code)]

mod compiler;
mod lark;
mod limits;
mod matcher;
mod reasoning;
mod tool_grammar;
mod tool_parser;

pub use compiler::{GrammarCompiler, GrammarError};
pub use matcher::Matcher;
pub use reasoning::{ReasoningEvent, ReasoningParser};
pub use tool_grammar::{ToolChoice, ToolSpec, after_reasoning, calls_or, schema_grammar, tool_grammar};
pub use tool_parser::{ToolCallParser, ToolEvent};
