//! Vocabularies of GGUF files: what is built from them and what is refused.

#![allow(clippy::unwrap_used)]

use ashlar_tokenizer::{GgufTokenType, GgufVocabulary, Tokenizer};
use proptest::prelude::*;
use serde_json::json;

fn tiny() -> GgufVocabulary {
    GgufVocabulary {
        model: "llama".into(),
        tokens: ["<unk>", "<s>", "</s>", "▁", "a", "▁a", "<tool>", "a"].map(String::from).to_vec(),
        scores: Some(vec![0.0, 0.0, 0.0, -2.0, -3.0, -1.0, 0.0, -4.0]),
        token_types: Some(vec![2, 3, 3, 1, 1, 1, 4, 1]),
        ..GgufVocabulary::default()
    }
}

fn tiny_bytes(merges: &[&str]) -> GgufVocabulary {
    GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: ["a", "b", "ab", "Ġ", "<|endoftext|>", "abc"].map(String::from).to_vec(),
        merges: Some(merges.iter().map(|merge| (*merge).to_string()).collect()),
        ..GgufVocabulary::default()
    }
}

fn refusal(vocabulary: GgufVocabulary) -> String {
    Tokenizer::from_gguf(vocabulary).unwrap_err().to_string()
}

#[test]
fn a_sentencepiece_vocabulary_has_its_usual_ids_and_spaces() {
    let tokenizer = Tokenizer::from_gguf(tiny()).unwrap();
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_ids()), (Some(1), &[2][..]));
    assert_eq!(tokenizer.encode("a a</s>a<tool>z", true).unwrap(), [1, 5, 5, 2, 5, 6, 3, 0]);
    assert_eq!(tokenizer.decode(&[1, 5, 5], true), "a a");
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(6));
    let bare = GgufVocabulary { add_space_prefix: Some(false), add_bos: Some(false), ..tiny() };
    assert_eq!(tiny().notes().len(), 1, "one token is there twice");
    let bare = Tokenizer::from_gguf(bare).unwrap();
    assert_eq!(bare.encode("a a", true).unwrap(), [4, 5]);
    assert_eq!(bare.decode(&[5, 5], true), " a a");
}

#[test]
fn the_chat_template_sees_the_special_tokens() {
    let template = Some("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}".to_string());
    let vocabulary = GgufVocabulary { chat_template: template, ..tiny() };
    let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
    let rendered = tokenizer.chat_template().unwrap().render(&ashlar_tokenizer::RenderInput {
        messages: &json!([{"role": "user", "content": "hi"}]),
        tools: None,
        add_generation_prompt: false,
        kwargs: &serde_json::Map::new(),
        now: ashlar_tokenizer::TemplateTime::default(),
    });
    assert_eq!(rendered.unwrap(), "<s>hi</s>");
    let broken = GgufVocabulary { chat_template: Some("{% if".into()), ..tiny() };
    assert!(refusal(broken).contains("tokenizer.chat_template"));
}

#[test]
fn byte_level_merges_are_obeyed_and_names_end_a_generation() {
    let tokenizer = Tokenizer::from_gguf(tiny_bytes(&["a b"])).unwrap();
    assert_eq!(tokenizer.encode("ab a<|endoftext|>", true).unwrap(), [2, 3, 0, 4]);
    assert_eq!((tokenizer.eos_token_ids(), tokenizer.bos_token_id()), (&[4][..], None));
    assert_eq!(tokenizer.token_bytes(3), b" ");
}

#[test]
fn what_does_not_fit_together_is_refused_with_its_name() {
    let cases = [
        (GgufVocabulary { model: "bert".into(), ..tiny() }, "`bert`"),
        (GgufVocabulary { scores: None, ..tiny() }, "scores is missing"),
        (GgufVocabulary { scores: Some(vec![0.0]), ..tiny() }, "scores has 1 entries for 8 tokens"),
        (GgufVocabulary { scores: Some(vec![f32::NAN; 8]), ..tiny() }, "no number for token 0"),
        (GgufVocabulary { token_types: Some(vec![1; 9]), ..tiny() }, "token_type has 9 entries"),
        (GgufVocabulary { tokens: vec![], ..tiny() }, "has 0 tokens"),
        (GgufVocabulary { eos: Some(8), ..tiny() }, "eos_token_id is 8"),
        (GgufVocabulary { end_of_generation: vec![99], ..tiny() }, "is 99"),
        (GgufVocabulary { tokens: vec!["x".repeat(1 << 20); 8], ..tiny() }, "has 1048576 bytes"),
        (GgufVocabulary { pre: Some("kimi-k2".into()), ..tiny_bytes(&[]) }, "known are qwen2, "),
        (GgufVocabulary { merges: None, ..tiny_bytes(&[]) }, "merges is missing"),
        (GgufVocabulary { add_bos: Some(true), ..tiny_bytes(&[]) }, "add_bos_token is true"),
        (tiny_bytes(&["a b", "ab"]), "merges[1] is \"ab\""),
        (tiny_bytes(&["a "]), "merges[0] is \"a \""),
        (tiny_bytes(&[" "]), "merges[0] is \" \""),
        (tiny_bytes(&["a c"]), "needs the token \"c\""),
        (tiny_bytes(&["b a"]), "needs the token \"ba\""),
        (GgufVocabulary { huggingface_json: Some("{}".into()), ..tiny() }, "tokenizer.huggingface.json"),
    ];
    for (vocabulary, part) in cases {
        let message = refusal(vocabulary);
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn an_embedded_tokenizer_must_number_tokens_as_the_file_does() {
    let mut export = GgufVocabulary::from_checkpoint(concat!(env!("CARGO_MANIFEST_DIR"), "/../model/demo"))
        .unwrap()
        .vocabulary;
    export.tokens.swap(7, 8);
    assert!(refusal(export.clone()).contains("disagree about token 7"));
    // Where they agree, the way to encode may be one that the lists cannot say.
    export.tokens.swap(7, 8);
    export.pre = Some("kimi-k2".into());
    assert!(Tokenizer::from_gguf(export).is_ok());
}

#[test]
fn padding_is_unused_and_never_another_tokens_name() {
    let mut vocabulary = tiny();
    vocabulary.tokens[4] = "[PAD8]".into();
    vocabulary.pad_to(4);
    assert_eq!(vocabulary.tokens.len(), 8);
    vocabulary.pad_to(10);
    assert_eq!(vocabulary.tokens[8..], ["[PAD8]_", "[PAD9]"]);
    assert_eq!(vocabulary.token_types.as_ref().unwrap()[8..], [GgufTokenType::Unused.number(); 2]);
    let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.token_bytes(9)), (10, &b""[..]));
}

#[test]
fn types_have_their_numbers() {
    for number in 1..=6 {
        assert_eq!(GgufTokenType::from_number(number).number(), number);
    }
    assert_eq!(GgufTokenType::from_number(0), GgufTokenType::Unused);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_vocabulary_makes_it_panic(
        model in prop_oneof![Just("llama"), Just("gpt2")],
        tokens in prop::collection::vec(prop_oneof!["[ab▁ ]{0,3}", Just("<0x61>".to_string()), "\\PC{0,4}"], 0..12),
        scores in prop::option::of(prop::collection::vec(any::<f32>(), 0..12)),
        fitting in any::<bool>(),
        types in prop::option::of(prop::collection::vec(-1..8_i32, 12)),
        merges in prop::option::of(prop::collection::vec("[ab▁]{0,2} ?[ab ]{0,2}", 0..4)),
        pre in prop::option::of(prop_oneof![Just("llama-bpe"), Just("qwen2"), Just(""), Just("none")]),
        id in prop::option::of(0..12_u32),
        flag in prop::option::of(any::<bool>()),
        text in "[ab▁ <>x]{0,12}",
    ) {
        let fit = |mut list: Vec<f32>| {
            if fitting {
                list.resize(tokens.len(), 0.5);
            }
            list
        };
        let vocabulary = GgufVocabulary {
            model: model.to_string(),
            pre: pre.map(str::to_string),
            scores: scores.map(fit),
            token_types: types.map(|types| types.into_iter().take(tokens.len()).collect()),
            merges,
            bos: id,
            add_bos: flag,
            add_space_prefix: flag,
            tokens,
            ..GgufVocabulary::default()
        };
        let mut padded = vocabulary.clone();
        padded.pad_to(15);
        prop_assert!(padded.tokens.len() == 15);
        for vocabulary in [vocabulary, padded] {
            vocabulary.notes();
            if let Ok(tokenizer) = Tokenizer::from_gguf(vocabulary)
                && let Ok(found) = tokenizer.encode(&text, true)
            {
                tokenizer.decode(&found, false);
            }
        }
    }
}
