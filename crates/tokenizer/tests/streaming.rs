//! Streams of tokens decode to the same text in whatever steps they come.

#![allow(clippy::unwrap_used)]

use ashlar_tokenizer::{SpecialTokens, TextStart, Tokenizer};
use proptest::prelude::*;
use std::path::PathBuf;
use std::sync::LazyLock;

const BYTE_LEVEL: &str = r#"{"version":"1.0","added_tokens":[
  {"id":9,"content":"<|end|>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],
  "normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true},
  "post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true},
  "model":{"type":"BPE","vocab":{"a":0,"Ġ":1,"Ã":2,"©":3,"ð":4,"Ł":5,"ĺ":6,"Ģ":7,"Ġa":8},"merges":["Ġ a"]}}"#;

const SENTENCEPIECE: &str = r#"{"version":"1.0","added_tokens":[
  {"id":0,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],
  "normalizer":null,"pre_tokenizer":null,"post_processor":null,
  "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
  {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
  "model":{"type":"BPE","unk_token":"<unk>","byte_fallback":true,"vocab":{"<s>":0,"▁":1,"a":2,"▁a":3,"<0xF0>":4,
  "<0x9F>":5,"<0x98>":6,"<0x80>":7,"é":8,"<unk>":9},"merges":["▁ a"]}}"#;

/// The in-repository tokenizers, and the real ones where they are at hand, each with `tokenizers`' own decoder.
static TOKENIZERS: LazyLock<Vec<(String, Tokenizer, tokenizers::Tokenizer)>> = LazyLock::new(|| {
    let mut all = Vec::new();
    for (name, json) in [("tiny byte-level", BYTE_LEVEL), ("tiny sentencepiece", SENTENCEPIECE)] {
        let reference = tokenizers::Tokenizer::from_bytes(json).unwrap();
        all.push((name.to_string(), Tokenizer::from_json(json).unwrap(), reference));
    }
    let root = std::env::var_os("ASHLAR_SHARED_DATA").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data")),
        PathBuf::from,
    );
    for name in ["models/stories260K", "tokenizers/qwen3", "tokenizers/mistral-v3", "tokenizers/gpt-neox-20b"]
    {
        let dir = root.join(name);
        if !dir.exists() {
            eprintln!("SKIPPED: {} is absent; set ASHLAR_SHARED_DATA to test it", dir.display());
            continue;
        }
        let reference = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        all.push((name.to_string(), Tokenizer::from_dir(&dir).unwrap(), reference));
    }
    all
});

fn stream(tokenizer: &Tokenizer, ids: &[u32], special: SpecialTokens) -> String {
    let mut decoder = tokenizer.incremental(special, TextStart::Beginning);
    let mut text = String::new();
    for &id in ids {
        text.push_str(&decoder.push(id));
    }
    text + &decoder.finish()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn increments_concatenate_to_the_whole(seeds in prop::collection::vec(any::<u32>(), 0..40), low in any::<bool>()) {
        for (name, tokenizer, reference) in TOKENIZERS.iter() {
            // Low ids are the byte tokens of real vocabularies, where characters get split.
            let size = tokenizer.vocab_size() as u32;
            let range = if low { size.min(300) } else { size };
            let ids: Vec<u32> = seeds.iter().map(|seed| seed % range).collect();
            for (skip, special) in [(true, SpecialTokens::Hide), (false, SpecialTokens::Show)] {
                let whole = tokenizer.decode(&ids, skip);
                prop_assert_eq!(&stream(tokenizer, &ids, special), &whole, "{} {:?}", name, ids);
                // `tokenizers` replaces whole runs of byte tokens when one byte is broken; else both agree.
                let theirs = reference.decode(&ids, skip).unwrap();
                if !theirs.contains('\u{fffd}') || name.contains("byte-level") || name.contains("qwen3") {
                    prop_assert_eq!(&whole, &theirs, "{} {:?}", name, ids);
                }
            }
        }
    }

    #[test]
    fn text_survives_encoding_and_decoding(text in "[a-zA-Z0-9 .,é日🙂\n\t]{0,60}") {
        for (name, tokenizer, _) in TOKENIZERS.iter().skip(2) {
            let ids = tokenizer.encode(&text, false).unwrap();
            // The "first" Metaspace does not double a space that the text already begins with.
            let expected = match name.as_str() {
                "tokenizers/mistral-v3" => text.strip_prefix(' ').unwrap_or(&text),
                _ => &text,
            };
            prop_assert_eq!(tokenizer.decode(&ids, true), expected, "{}", name);
        }
    }
}

#[test]
fn a_character_in_four_tokens_comes_out_whole() {
    let tokenizer = Tokenizer::from_json(BYTE_LEVEL).unwrap();
    let mut decoder = tokenizer.incremental(SpecialTokens::Hide, TextStart::Beginning);
    let steps: Vec<String> = [0, 4, 5, 6, 7, 8, 9].iter().map(|&id| decoder.push(id)).collect();
    assert_eq!(steps, ["a", "", "", "", "😀", " a", ""]);
    assert_eq!(decoder.push(2), "");
    assert_eq!(decoder.finish(), "\u{fffd}");
    assert_eq!(decoder.finish(), "");
}

#[test]
fn a_continuation_keeps_the_space_that_a_beginning_drops() {
    let tokenizer = Tokenizer::from_json(SENTENCEPIECE).unwrap();
    let text = |start| tokenizer.incremental(SpecialTokens::Hide, start).push_all(&[0, 3, 3]);
    assert_eq!(text(TextStart::Beginning), "a a");
    assert_eq!(text(TextStart::Continuation), " a a");
}

#[test]
fn token_bytes_are_exact_and_unknown_ids_are_empty() {
    let tokenizer = Tokenizer::from_json(BYTE_LEVEL).unwrap();
    assert_eq!(tokenizer.token_bytes(8), b" a");
    assert_eq!(tokenizer.token_bytes(2), [0xc3]);
    assert_eq!(tokenizer.token_text(2), "\u{fffd}");
    assert_eq!((tokenizer.token_bytes(9), tokenizer.is_special(9)), (&b"<|end|>"[..], true));
    assert!(tokenizer.token_bytes(99).is_empty() && !tokenizer.is_special(99));
    let pieces = Tokenizer::from_json(SENTENCEPIECE).unwrap();
    assert_eq!((pieces.token_bytes(4), pieces.token_bytes(3)), (&[0xf0][..], &b" a"[..]));
}
