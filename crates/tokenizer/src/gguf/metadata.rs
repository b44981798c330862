//! From a file's `tokenizer.*` metadata to a vocabulary, and back.

use super::GgufVocabulary;
use ashlar_gguf::{Array, GgufError, Metadata, Value};

/// Keys of further tokens that end a generation.
const END_OF_GENERATION: [&str; 1] = ["tokenizer.ggml.eom_token_id"];

impl GgufVocabulary {
    /// Reads the vocabulary out of a file's metadata.
    pub fn from_metadata(metadata: &Metadata) -> Result<GgufVocabulary, GgufError> {
        let text = |key: &str| -> Result<Option<String>, GgufError> {
            Ok(metadata.get::<&str>(key)?.map(str::to_owned))
        };
        let id = |key: &str| metadata.get::<u32>(key);
        let flag = |key: &str| metadata.get::<bool>(key);
        let mut end_of_generation = Vec::new();
        for key in END_OF_GENERATION {
            end_of_generation.extend(id(key)?);
        }
        let strings = |key: &str| -> Result<Option<Vec<String>>, GgufError> {
            Ok(metadata.get::<&[String]>(key)?.map(<[String]>::to_vec))
        };
        Ok(GgufVocabulary {
            model: text("tokenizer.ggml.model")?.unwrap_or_default(),
            pre: text("tokenizer.ggml.pre")?,
            tokens: strings("tokenizer.ggml.tokens")?.unwrap_or_default(),
            scores: metadata.get::<&[f32]>("tokenizer.ggml.scores")?.map(<[f32]>::to_vec),
            token_types: metadata.get::<Vec<i32>>("tokenizer.ggml.token_type")?,
            merges: strings("tokenizer.ggml.merges")?,
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: id("tokenizer.ggml.eos_token_id")?,
            eot: id("tokenizer.ggml.eot_token_id")?,
            end_of_generation,
            unknown: id("tokenizer.ggml.unknown_token_id")?,
            padding: id("tokenizer.ggml.padding_token_id")?,
            add_bos: flag("tokenizer.ggml.add_bos_token")?,
            add_eos: flag("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: flag("tokenizer.ggml.add_space_prefix")?,
            chat_template: text("tokenizer.chat_template")?,
            tool_chat_template: text("tokenizer.chat_template.tool_use")?,
            huggingface_json: text("tokenizer.huggingface.json")?,
        })
    }

    /// The metadata that say the same.
    pub fn to_metadata(&self) -> Vec<(&'static str, Value)> {
        let mut out = vec![
            ("tokenizer.ggml.model", Value::Str(self.model.clone())),
            ("tokenizer.ggml.tokens", Value::Array(Array::Str(self.tokens.clone()))),
        ];
        let texts = [
            ("tokenizer.ggml.pre", &self.pre),
            ("tokenizer.chat_template", &self.chat_template),
            ("tokenizer.chat_template.tool_use", &self.tool_chat_template),
            ("tokenizer.huggingface.json", &self.huggingface_json),
        ];
        out.extend(texts.into_iter().filter_map(|(key, text)| Some((key, Value::Str(text.clone()?)))));
        let ids = [
            ("tokenizer.ggml.bos_token_id", self.bos),
            ("tokenizer.ggml.eos_token_id", self.eos),
            ("tokenizer.ggml.eot_token_id", self.eot),
            (END_OF_GENERATION[0], self.end_of_generation.first().copied()),
            ("tokenizer.ggml.unknown_token_id", self.unknown),
            ("tokenizer.ggml.padding_token_id", self.padding),
        ];
        out.extend(ids.into_iter().filter_map(|(key, id)| Some((key, Value::U32(id?)))));
        let flags = [
            ("tokenizer.ggml.add_bos_token", self.add_bos),
            ("tokenizer.ggml.add_eos_token", self.add_eos),
            ("tokenizer.ggml.add_space_prefix", self.add_space_prefix),
        ];
        out.extend(flags.into_iter().filter_map(|(key, flag)| Some((key, Value::Bool(flag?)))));
        if let Some(scores) = &self.scores {
            out.push(("tokenizer.ggml.scores", Value::Array(Array::F32(scores.clone()))));
        }
        if let Some(types) = &self.token_types {
            out.push(("tokenizer.ggml.token_type", Value::Array(Array::I32(types.clone()))));
        }
        if let Some(merges) = &self.merges {
            out.push(("tokenizer.ggml.merges", Value::Array(Array::Str(merges.clone()))));
        }
        out
    }
}
