//! Text to ids by whichever model the vocabulary needs, with the ids that go around a text.

use crate::gguf::SpmTokenizer;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The part of a tokenizer that `tokenizers` runs: added tokens, normaliser, pre-tokenizer, model.
pub(crate) enum Pipeline {
    /// A model that `tokenizers` brings.
    Standard(Box<tokenizers::Tokenizer>),
    /// Sentencepiece by scores, which `tokenizers` lacks.
    Scored(Box<SpmTokenizer>),
}

/// A pipeline, and what it does not add to a text itself.
pub(crate) struct Encoder {
    pub(crate) pipeline: Pipeline,
    /// Put before a text that is encoded with special tokens. None where the pipeline's post-processor does it.
    pub(crate) before: Option<u32>,
    /// Put after such a text.
    pub(crate) after: Option<u32>,
}

impl Encoder {
    /// An encoder whose pipeline adds the special tokens itself.
    pub(crate) fn standard(pipeline: tokenizers::Tokenizer) -> Encoder {
        Encoder { pipeline: Pipeline::Standard(Box::new(pipeline)), before: None, after: None }
    }

    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, tokenizers::Error> {
        let encoding = match &self.pipeline {
            Pipeline::Standard(pipeline) => guarded(|| pipeline.encode_fast(text, add_special))?,
            Pipeline::Scored(pipeline) => pipeline.encode_fast(text, add_special)?,
        };
        let (before, after) = if add_special { (self.before, self.after) } else { (None, None) };
        Ok(before.into_iter().chain(encoding.get_ids().iter().copied()).chain(after).collect())
    }

    /// The same ids, each with the byte of the text at which it begins; what is added after a text begins at its end.
    pub(crate) fn encode_with_starts(
        &self,
        text: &str,
        add_special: bool,
    ) -> Result<(Vec<u32>, Vec<usize>), tokenizers::Error> {
        let encoding = match &self.pipeline {
            Pipeline::Standard(pipeline) => guarded(|| pipeline.encode(text, add_special))?,
            Pipeline::Scored(pipeline) => pipeline.encode(text, add_special)?,
        };
        let (before, after) = if add_special { (self.before, self.after) } else { (None, None) };
        let ids = before.into_iter().chain(encoding.get_ids().iter().copied()).chain(after).collect();
        let mut starts: Vec<usize> = encoding.get_offsets().iter().map(|&(start, _)| start).collect();
        // A post-processor gives (0, 0) to what it adds, on both sides.
        let added = encoding.get_special_tokens_mask().iter().rev().take_while(|&&mask| mask == 1).count();
        if added < starts.len() {
            let first_added = starts.len() - added;
            starts[first_added..].fill(text.len());
        }
        let starts = before.map(|_| 0).into_iter().chain(starts).chain(after.map(|_| text.len())).collect();
        Ok((ids, starts))
    }

    pub(crate) fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.pipeline {
            Pipeline::Standard(pipeline) => pipeline.token_to_id(token),
            Pipeline::Scored(pipeline) => pipeline.token_to_id(token),
        }
    }

    /// Every token with its id, added tokens included.
    pub(crate) fn vocabulary(&self) -> HashMap<String, u32> {
        match &self.pipeline {
            Pipeline::Standard(pipeline) => pipeline.get_vocab(true),
            Pipeline::Scored(pipeline) => pipeline.get_vocab(true),
        }
    }
}

/// Runs the library so that a panic inside becomes an error: files that it should have refused break it only when they are used.
pub(crate) fn guarded<T>(run: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, tokenizers::Error> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|_| Err("the tokenizer's parts contradict each other".into()))
}
