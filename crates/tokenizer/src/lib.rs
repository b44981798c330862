//! Text to tokens and back, and the model's chat template.
//!
//! Layout, in reading order:
//! - [`tokenizer`](Tokenizer): a checkpoint's `tokenizer.json` with the ids and flags of its special tokens;
//! - `encoder`: what runs behind it, text to ids;
//! - `gguf`: the same from the metadata of a GGUF file, and back;
//! - `pipeline`: what of a `tokenizer.json` is refused before it is run;
//! - `pieces`: the exact bytes of every token, which decoding and grammars share;
//! - `incremental`: a stream of tokens turned into a stream of whole characters;
//! - `template`: chat templates, rendered as Transformers renders them;
//! - `markers`: how the model writes tool calls and reasoning.
//!
//! Invariants: no clock is read here (templates get the time passed in); templates come from the checkpoint's
//! directory only, never from a client; decoding is by bytes, so the increments of a stream always concatenate to
//! the decoding of the whole.

#![forbid(unsafe_code)]

mod checkpoint_files;
mod encoder;
mod gguf;
mod incremental;
mod markers;
mod pieces;
mod pipeline;
mod template;
mod tokenizer;

pub use gguf::{GgufExport, GgufTokenType, GgufVocabulary, GgufVocabularyError};
pub use incremental::{IncrementalDecoder, SpecialTokens, TextStart};
pub use markers::{ReasoningMarkers, ToolFormat};
pub use template::{ChatTemplate, RenderInput, TemplateError, TemplateTime};
pub use tokenizer::{EncodedText, Tokenizer, TokenizerError};
