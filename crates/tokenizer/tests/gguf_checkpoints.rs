//! Real vocabularies: from a GGUF file, and from checkpoints and back. All but the demo's live outside the repository;
//! where they are absent the tests say so and pass.

#![allow(clippy::unwrap_used)]

mod golden_files;

use ashlar_tokenizer::{GgufExport, GgufVocabulary, RenderInput, TemplateTime, Tokenizer};
use golden_files::{ids, read_json, shared};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::LazyLock;

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/demo");

/// The metadata of a GGUF file, just enough of it to read a vocabulary.
fn metadata(bytes: &[u8]) -> HashMap<String, Value> {
    struct Reader<'b>(&'b [u8]);
    impl Reader<'_> {
        fn take<const N: usize>(&mut self) -> [u8; N] {
            let (head, rest) = self.0.split_at(N);
            self.0 = rest;
            head.try_into().unwrap()
        }
        fn length(&mut self) -> usize {
            u64::from_le_bytes(self.take()) as usize
        }
        fn text(&mut self) -> String {
            let length = self.length();
            let (text, rest) = self.0.split_at(length);
            self.0 = rest;
            String::from_utf8(text.to_vec()).unwrap()
        }
        fn value(&mut self, kind: u32) -> Value {
            match kind {
                4 => u32::from_le_bytes(self.take()).into(),
                5 => i32::from_le_bytes(self.take()).into(),
                6 => f32::from_le_bytes(self.take()).into(),
                7 => (self.take::<1>()[0] != 0).into(),
                8 => self.text().into(),
                9 => {
                    let kind = u32::from_le_bytes(self.take());
                    let length = self.length();
                    (0..length).map(|_| self.value(kind)).collect()
                }
                10 => u64::from_le_bytes(self.take()).into(),
                other => panic!("no vocabulary needs values of type {other}"),
            }
        }
    }
    let mut reader = Reader(bytes);
    assert_eq!((&reader.take::<4>(), u32::from_le_bytes(reader.take())), (b"GGUF", 3));
    reader.length();
    let count = reader.length();
    let entry = |_| {
        let (key, kind) = (reader.text(), u32::from_le_bytes(reader.take()));
        (key, reader.value(kind))
    };
    (0..count).map(entry).collect()
}

fn vocabulary_of(file: PathBuf) -> GgufVocabulary {
    let metadata = metadata(&std::fs::read(file).unwrap());
    let get = |key: &str| metadata.get(&format!("tokenizer.ggml.{key}")).cloned();
    let id = |key: &str| get(key).map(|id| id.as_u64().unwrap() as u32);
    GgufVocabulary {
        model: get("model").unwrap().as_str().unwrap().to_string(),
        tokens: serde_json::from_value(get("tokens").unwrap()).unwrap(),
        scores: get("scores").map(|scores| serde_json::from_value(scores).unwrap()),
        token_types: get("token_type").map(|types| serde_json::from_value(types).unwrap()),
        bos: id("bos_token_id"),
        eos: id("eos_token_id"),
        unknown: id("unknown_token_id"),
        add_bos: get("add_bos_token").and_then(|flag| flag.as_bool()),
        add_eos: get("add_eos_token").and_then(|flag| flag.as_bool()),
        ..GgufVocabulary::default()
    }
}

/// Texts that have tripped tokenizers.
fn nasty() -> Vec<String> {
    let mut texts: Vec<String> = [
        "",
        "\r\n",
        "a\r\nb\r\n\r\n  c",
        "tab\t\ttab \t end ",
        "x  y   z    w     v      u       t                    s",
        "1234567890123 3.14 ½ ²³ Ⅷ",
        "日本語テキスト、漢字とかな。한국어 中文",
        "👩\u{200d}👩\u{200d}👧 🙂🙂 🏳️\u{200d}🌈",
        "नमस्ते ไทย עברית العربية",
        "it's I'LL we'Re 'ſ O'Neil''s",
        "\u{1}\u{7f}\u{a0}\u{2003}\u{200b}\u{feff}",
        "fn main() {\n\tlet x = a[0] != b;\n\n\n    // note\n}",
        "<s>[INST] hi [/INST] yes</s> <unk> [TOOL_CALLS]",
        "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><think>\n\n</think> <tool_call>",
        "<|bos|><|user|>hi<|end|><|assistant|>",
        "<0x0A><0xFF> ▁ ▁▁literal",
        "<|im_start<|im_end|> <s <s>s>",
    ]
    .map(str::to_string)
    .to_vec();
    texts.push("x".repeat(400));
    texts.push(" ".repeat(100));
    texts.push("\n".repeat(33));
    if let Some(golden) = shared("tokenizers/qwen3/golden_tokenize_llamacpp_qwen2.json") {
        let golden = read_json(golden);
        texts
            .extend(golden.as_array().unwrap().iter().map(|case| case["text"].as_str().unwrap().to_string()));
    }
    texts
}

/// A checkpoint's tokenizer, and one from its vocabulary alone.
fn round_trip(dir: &PathBuf) -> (Tokenizer, Tokenizer, GgufExport) {
    let original = Tokenizer::from_dir(dir).unwrap();
    let export = GgufVocabulary::from_checkpoint(dir).unwrap();
    let lists = GgufVocabulary { huggingface_json: None, ..export.vocabulary.clone() };
    assert_eq!(lists.notes(), Vec::<String>::new());
    (original, Tokenizer::from_gguf(lists).unwrap(), export)
}

fn assert_same_tokens(original: &Tokenizer, read: &Tokenizer) {
    assert_eq!(original.vocab_size(), read.vocab_size());
    assert_eq!(original.bos_token_id(), read.bos_token_id());
    assert_eq!(original.tool_format(), read.tool_format());
    assert_eq!(original.reasoning(), read.reasoning());
    let chat = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]);
    let render = |tokenizer: &Tokenizer| {
        let input = RenderInput {
            messages: &chat,
            tools: None,
            add_generation_prompt: false,
            kwargs: &serde_json::Map::new(),
            now: TemplateTime::default(),
        };
        tokenizer.chat_template().map(|template| template.render(&input).unwrap())
    };
    assert_eq!(render(original), render(read));
    for id in 0..original.vocab_size() as u32 {
        assert_eq!(original.token_bytes(id), read.token_bytes(id), "{id}");
        assert_eq!(original.is_special(id), read.is_special(id), "{id}");
        assert_eq!(original.is_marker(id), read.is_marker(id), "{id}");
    }
}

#[test]
fn the_stories260k_file_encodes_as_its_golden_file() {
    let Some(file) = shared("models/stories260K-gguf/stories260K-f32.gguf") else { return };
    let vocabulary = vocabulary_of(file);
    let tokenizer = Tokenizer::from_gguf(vocabulary.clone()).unwrap();
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_ids()), (Some(1), &[2][..]));
    assert_eq!((tokenizer.token_bytes(13), tokenizer.is_special(1)), (&b"\n"[..], true));
    let golden = read_json(shared("models/stories260K/golden_tokenize.json").unwrap());
    for case in golden["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode(&ids(&case["ids"]), true), text);
    }
    // The file was written from the same model, by other hands.
    let ours = GgufVocabulary::from_checkpoint(shared("models/stories260K").unwrap()).unwrap().vocabulary;
    assert_eq!((ours.tokens, ours.token_types), (vocabulary.tokens, vocabulary.token_types));
    assert_eq!((ours.add_bos, ours.add_eos), (vocabulary.add_bos, vocabulary.add_eos));
}

#[test]
fn checkpoints_encode_the_same_after_a_round_trip() {
    let shared_dirs = ["models/stories260K", "tokenizers/qwen3", "tokenizers/gpt-neox-20b"];
    let dirs = shared_dirs.iter().filter_map(|dir| shared(dir)).chain([PathBuf::from(DEMO)]);
    for dir in dirs {
        let (original, read, export) = round_trip(&dir);
        assert_same_tokens(&original, &read);
        let embedded = Tokenizer::from_gguf(export.vocabulary).unwrap();
        for text in nasty() {
            for special in [false, true] {
                let expected = original.encode(&text, special).unwrap();
                assert_eq!(read.encode(&text, special).unwrap(), expected, "{} {text:?}", dir.display());
                assert_eq!(embedded.encode(&text, special).unwrap(), expected, "{} {text:?}", dir.display());
            }
            let found = read.encode(&text, false).unwrap();
            // Sentencepiece writes a space after every special token, which decoding cannot tell from the text's own.
            if !text.contains('▁') && !found.iter().any(|&id| read.is_special(id)) {
                assert_eq!(read.decode(&found, false), text, "{}", dir.display());
            }
        }
    }
}

#[test]
fn every_end_of_a_checkpoint_is_kept_and_further_ones_are_told_by_name() {
    if let Some(dir) = shared("models/stories260K") {
        assert_eq!(round_trip(&dir).1.eos_token_ids(), [1, 2]);
    }
    if let Some(dir) = shared("tokenizers/qwen3") {
        let (original, read, _) = round_trip(&dir);
        assert_eq!(original.eos_token_ids(), [151_645]);
        // `<|endoftext|>` too; but `</s>`, 128247, is ordinary text of this vocabulary.
        assert_eq!(read.eos_token_ids(), [151_643, 151_645]);
    }
    let (_, read, _) = round_trip(&PathBuf::from(DEMO));
    assert_eq!(read.eos_token_ids(), [258]);
}

#[test]
fn exports_name_their_pre_tokenizer_and_note_what_gguf_cannot_say() {
    let (_, _, demo) = round_trip(&PathBuf::from(DEMO));
    assert_eq!((demo.vocabulary.pre.as_deref(), demo.vocabulary.merges), (Some("gpt-2"), Some(vec![])));
    assert_eq!(demo.notes, Vec::<String>::new());
    for (dir, pre) in [("tokenizers/qwen3", "qwen2"), ("tokenizers/gpt-neox-20b", "olmo")] {
        let Some(dir) = shared(dir) else { continue };
        let export = GgufVocabulary::from_checkpoint(dir).unwrap();
        assert_eq!(export.vocabulary.pre.as_deref(), Some(pre));
        assert_eq!(export.notes.len(), 1, "{:?}", export.notes);
        assert!(export.notes[0].contains("NFC"));
    }
    if let Some(dir) = shared("tokenizers/mistral-v3") {
        let export = GgufVocabulary::from_checkpoint(dir).unwrap();
        assert!(export.notes.iter().any(|note| note.contains("first word only")), "{:?}", export.notes);
    }
}

/// Mistral's tokenizer from its export, and the original with a space after every special token, as GGUF means it.
static MISTRAL: LazyLock<Option<(Tokenizer, Tokenizer)>> = LazyLock::new(|| {
    let dir = shared("tokenizers/mistral-v3")?;
    let (_, read, _) = round_trip(&dir);
    let mut json = read_json(dir.join("tokenizer.json"));
    json["pre_tokenizer"] = Value::Null;
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    Some((Tokenizer::from_json(&json.to_string()).unwrap(), read))
});

#[test]
fn mistral_encodes_the_same_but_for_the_space_after_special_tokens() {
    let Some((spaced, read)) = MISTRAL.as_ref() else { return };
    let (original, _, export) = round_trip(&shared("tokenizers/mistral-v3").unwrap());
    assert_same_tokens(&original, read);
    let embedded = Tokenizer::from_gguf(export.vocabulary).unwrap();
    for text in nasty() {
        assert_eq!(read.encode(&text, true).unwrap(), spaced.encode(&text, true).unwrap(), "{text:?}");
        let expected = original.encode(&text, true).unwrap();
        assert_eq!(embedded.encode(&text, true).unwrap(), expected, "{text:?}");
        let special = ["<s>", "</s>", "<unk>", "[INST]"].iter().any(|token| text.contains(token));
        if !special && !text.starts_with([' ', '▁']) {
            assert_eq!(read.encode(&text, true).unwrap(), expected, "{text:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn joining_by_score_equals_joining_by_merges(
        text in prop_oneof![".{0,60}", "[a-e \n]{0,80}", "(the|ing| {1,20}|\\[INST\\]|</s>|é|日|🙂|1|\n){0,20}"],
    ) {
        if let Some((spaced, read)) = MISTRAL.as_ref() {
            let found = read.encode(&text, false).unwrap();
            prop_assert_eq!(&found, &spaced.encode(&text, false).unwrap());
            if !text.contains('▁') && !text.contains("[INST]") && !text.contains("</s>") {
                prop_assert_eq!(read.decode(&found, false), text);
            }
        }
    }
}
