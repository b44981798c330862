//! The parts of a `tokenizer.json` that decide how it is written as GGUF.

use super::pre_tokenizers;
use serde::Deserialize;
use serde_json::Value;

/// A `tokenizer.json`, as far as it matters here.
#[derive(Debug, Deserialize)]
pub(crate) struct TokenizerJson {
    #[serde(default)]
    pub(crate) added_tokens: Vec<AddedJson>,
    #[serde(default)]
    pub(crate) normalizer: Value,
    #[serde(default)]
    pub(crate) pre_tokenizer: Value,
    #[serde(default)]
    pub(crate) post_processor: Value,
    #[serde(default)]
    pub(crate) decoder: Value,
    pub(crate) model: ModelJson,
}

/// One added token.
#[derive(Debug, Deserialize)]
pub(crate) struct AddedJson {
    pub(crate) content: String,
    #[serde(default)]
    pub(crate) special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

impl AddedJson {
    /// Whether it is matched in a way that GGUF cannot say.
    pub(crate) fn has_conditions(&self) -> bool {
        self.single_word || self.lstrip || self.rstrip
    }
}

/// The model without its vocabulary.
#[derive(Debug, Deserialize)]
pub(crate) struct ModelJson {
    /// Files of before 2021 leave it out for `BPE`.
    #[serde(rename = "type", default)]
    pub(crate) kind: Option<String>,
    #[serde(default)]
    pub(crate) merges: Vec<MergeJson>,
    #[serde(default)]
    pub(crate) unk_token: Option<String>,
    #[serde(default)]
    pub(crate) byte_fallback: bool,
    #[serde(default)]
    pub(crate) ignore_merges: bool,
    #[serde(default)]
    pub(crate) continuing_subword_prefix: Option<String>,
    #[serde(default)]
    pub(crate) end_of_word_suffix: Option<String>,
}

/// A merge in either of the two forms that files have.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum MergeJson {
    /// Two tokens with a space between.
    Joined(String),
    /// Two tokens.
    Pair(String, String),
}

impl MergeJson {
    /// The two tokens, unless there are more or less.
    pub(crate) fn pair(&self) -> Option<(&str, &str)> {
        match self {
            MergeJson::Joined(text) => text.split_once(' ').filter(|(_, second)| !second.contains(' ')),
            MergeJson::Pair(first, second) => Some((first, second)),
        }
    }
}

/// The steps of a component that may be a `Sequence`, each with its type.
pub(crate) fn steps<'v>(component: &'v Value, list: &str) -> Vec<(&'v str, &'v Value)> {
    match component.get(list).and_then(Value::as_array) {
        Some(inner) => inner.iter().flat_map(|step| steps(step, list)).collect(),
        None => {
            component.get("type").and_then(Value::as_str).map(|kind| (kind, component)).into_iter().collect()
        }
    }
}

/// The patterns that a byte-level pre-tokenizer cuts by. `None` where it cuts by anything else.
pub(crate) fn patterns(pre_tokenizer: &Value) -> Option<Vec<&str>> {
    let mut patterns = Vec::new();
    for (kind, step) in steps(pre_tokenizer, "pretokenizers") {
        let flag = |name: &str, usual: bool| step.get(name).and_then(Value::as_bool).unwrap_or(usual);
        match kind {
            "Split" => {
                let behavior = step.get("behavior").and_then(Value::as_str)?;
                // Removing what lies between matches is the same as isolating them where they cover the text.
                if !matches!((behavior, flag("invert", false)), ("Isolated", false) | ("Removed", true)) {
                    return None;
                }
                patterns.push(step.pointer("/pattern/Regex").and_then(Value::as_str)?);
            }
            "Digits" if flag("individual_digits", false) => patterns.push(pre_tokenizers::SINGLE_DIGITS),
            "ByteLevel" if flag("add_prefix_space", true) => return None,
            "ByteLevel" if flag("use_regex", true) => patterns.push(pre_tokenizers::GPT2),
            "ByteLevel" => {}
            _ => return None,
        }
    }
    Some(patterns)
}

/// What a sentencepiece-like tokenizer does to spaces.
#[derive(Debug, Default)]
pub(crate) struct Spaces {
    /// A space goes before the text.
    pub(crate) prefix: bool,
    /// What GGUF has no word for.
    pub(crate) notes: Vec<String>,
}

/// Reads [`Spaces`] from the normaliser and the pre-tokenizer.
pub(crate) fn spaces(file: &TokenizerJson) -> Spaces {
    let mut spaces = Spaces::default();
    let mut note = |text: String| spaces.notes.push(text);
    let mut prefix = false;
    for (kind, step) in steps(&file.normalizer, "normalizers") {
        let text = |pointer: &str| step.pointer(pointer).and_then(Value::as_str);
        match kind {
            "Prepend" if text("/prepend") == Some("▁") => prefix = true,
            "Replace" if text("/pattern/String") == Some(" ") && text("/content") == Some("▁") => {}
            _ => note(format!(
                "its normaliser `{kind}` is left out: text that it would change is encoded as it is"
            )),
        }
    }
    for (kind, step) in steps(&file.pre_tokenizer, "pretokenizers") {
        if kind != "Metaspace" {
            note(format!("its pre-tokenizer `{kind}` is left out: tokens may reach over its cuts"));
            continue;
        }
        let never = step.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
        match step.get("prepend_scheme").and_then(Value::as_str) {
            Some("never") => {}
            Some("first") => {
                prefix = true;
                note(
                    "it puts a space before the first word only, but GGUF means every word after a special token too"
                        .into(),
                );
            }
            _ => prefix |= !never,
        }
        if prefix {
            note("it adds no space to a text that begins with one, but GGUF means that it does".into());
        }
        if step.get("split").and_then(Value::as_bool).unwrap_or(true) {
            note(
                "it cuts text at spaces first: tokens with a space inside may be encoded differently".into(),
            );
        }
    }
    spaces.prefix = prefix;
    spaces
}

/// The ids that the post-processor puts before and after a text.
pub(crate) fn frame(post_processor: &Value) -> (Vec<u32>, Vec<u32>) {
    let as_id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for (kind, step) in steps(post_processor, "processors") {
        match kind {
            "TemplateProcessing" => {
                let mut text_seen = false;
                for piece in step.get("single").and_then(Value::as_array).into_iter().flatten() {
                    if piece.get("Sequence").is_some() {
                        text_seen = true;
                        continue;
                    }
                    let name = piece.pointer("/SpecialToken/id").and_then(Value::as_str);
                    let special =
                        name.and_then(|name| step.get("special_tokens")?.get(name)?.get("ids")?.as_array());
                    let side = if text_seen { &mut after } else { &mut before };
                    side.extend(special.into_iter().flatten().filter_map(as_id));
                }
            }
            "RobertaProcessing" | "BertProcessing" => {
                before.extend(step.pointer("/cls/1").and_then(as_id));
                after.extend(step.pointer("/sep/1").and_then(as_id));
            }
            _ => {}
        }
    }
    (before, after)
}
