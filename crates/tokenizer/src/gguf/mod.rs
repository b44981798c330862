//! The vocabulary of a GGUF file, and what makes a tokenizer of it.
//!
//! Layout, in reading order:
//! - this file: [`GgufVocabulary`], the plain values of a file's `tokenizer.*` metadata;
//! - `check`: what is refused, so that nothing after it can be out of range;
//! - `load`: [`Tokenizer::from_gguf`](crate::Tokenizer::from_gguf);
//! - `spm`: encoding by scores (`tokenizer.ggml.model` = `llama`);
//! - `pre_tokenizers`: how `tokenizer.ggml.pre` cuts a text (`gpt2`);
//! - `export`, `export_json`: the way back, from a checkpoint's `tokenizer.json`.
//!
//! - `metadata`: from and to the metadata of a file.
//!
//! Invariant: only `metadata` knows the file format; everything else works on the plain fields.

mod check;
mod export;
mod export_json;
mod load;
mod metadata;
mod pre_tokenizers;
mod spm;

pub use check::GgufVocabularyError;
pub use export::GgufExport;

pub(crate) use spm::SpmTokenizer;

/// What a GGUF file says of its tokenizer. Each field names its metadata key; absent keys are `None` or empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `llama` (sentencepiece by scores) or `gpt2` (byte-level pairs by merges).
    pub model: String,
    /// `tokenizer.ggml.pre`: how `gpt2` cuts words.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`, by id. Needed by `llama`.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.token_type`, by id, see [`GgufTokenType`]. Without it every token is normal.
    pub token_types: Option<Vec<i32>>,
    /// `tokenizer.ggml.merges`, each two tokens with a space between. Needed by `gpt2`, where it may be empty.
    pub merges: Option<Vec<String>>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`, the end of a turn.
    pub eot: Option<u32>,
    /// Further ids that end a generation, for instance `tokenizer.ggml.eom_token_id`.
    pub end_of_generation: Vec<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub padding: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`: `llama` puts a space before a text and after every special token.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.tool_use`, the template for requests with tools where there is a separate one.
    pub tool_chat_template: Option<String>,
    /// `tokenizer.huggingface.json`: a whole `tokenizer.json`. Where it is there, it encodes instead of the lists
    /// above, because it also says what they cannot (normalisers, a space before the first word only).
    pub huggingface_json: Option<String>,
}

/// The numbers of `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum GgufTokenType {
    /// A piece of text.
    Normal = 1,
    /// Stands for text outside the vocabulary.
    Unknown = 2,
    /// No text: begins, ends or structures a sequence. Matched in text as a whole.
    Control = 3,
    /// Text that is always one token. Matched in text as a whole.
    UserDefined = 4,
    /// A gap in the numbering; never text.
    Unused = 5,
    /// `<0xNN>`, one byte.
    Byte = 6,
}

impl GgufTokenType {
    /// The type of a number; numbers that nobody has defined are no text, as in llama.cpp.
    pub fn from_number(number: i32) -> GgufTokenType {
        match number {
            1 => GgufTokenType::Normal,
            2 => GgufTokenType::Unknown,
            3 => GgufTokenType::Control,
            4 => GgufTokenType::UserDefined,
            6 => GgufTokenType::Byte,
            _ => GgufTokenType::Unused,
        }
    }

    /// Its number.
    pub fn number(self) -> i32 {
        self as i32
    }
}

/// Lower than any real score, so that padding is never preferred.
const PADDING_SCORE: f32 = -1e6;

impl GgufVocabulary {
    /// Appends unused tokens `[PAD…]`, numbered by id, until there are `size`, the rows of the model's embedding.
    /// A vocabulary that is large enough already stays as it is.
    pub fn pad_to(&mut self, size: usize) {
        let from = self.tokens.len();
        if from >= size {
            return;
        }
        let taken: std::collections::HashSet<String> =
            self.tokens.iter().filter(|token| token.starts_with("[PAD")).cloned().collect();
        self.tokens.extend((from..size).map(|id| padding_token(id, &taken)));
        if let Some(scores) = &mut self.scores {
            scores.resize(size, PADDING_SCORE);
        }
        // Without types every token is normal, so those of the real tokens must be written out now.
        let types = self.token_types.get_or_insert_with(|| vec![GgufTokenType::Normal.number(); from]);
        types.resize(size, GgufTokenType::Unused.number());
    }

    /// What is unusual about this vocabulary and worth a line in a log. An empty list is the rule.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.model == check::GPT2
            && self.pre.as_deref().is_none_or(|pre| pre.is_empty() || pre == "default")
        {
            notes.push(
                "the file does not name its pre-tokenizer: text is cut in the `default` way, which may not be the model's"
                    .to_string(),
            );
        }
        let mut seen = std::collections::HashSet::new();
        let again =
            self.tokens.iter().filter(|token| !token.is_empty() && !seen.insert(token.as_str())).count();
        if again > 0 {
            notes.push(format!(
                "{again} tokens repeat the text of another: only the first of each is encoded"
            ));
        }
        notes
    }

    pub(crate) fn token_type(&self, id: usize) -> GgufTokenType {
        match &self.token_types {
            Some(types) => types.get(id).map_or(GgufTokenType::Unused, |&n| GgufTokenType::from_number(n)),
            None => GgufTokenType::Normal,
        }
    }
}

/// A text for a gap in the numbering that is no other token's: llama.cpp refuses two tokens of one text.
pub(crate) fn padding_token(id: usize, taken: &std::collections::HashSet<String>) -> String {
    let mut token = format!("[PAD{id}]");
    while taken.contains(&token) {
        token.push('_');
    }
    token
}
