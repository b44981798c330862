//! Masks against brute force on a small vocabulary, replay, generation, and hostile grammars.

#![allow(clippy::unwrap_used)]

use ashlar_grammar::{
    GrammarCompiler, GrammarError, Matcher, ToolCallParser, ToolChoice, ToolEvent, ToolSpec, after_reasoning,
    schema_grammar, tool_grammar,
};
use ashlar_tokenizer::{ReasoningMarkers, SpecialTokens, TextStart, Tokenizer, ToolFormat};
use ashlar_vocabulary::GrammarSpec;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Single bytes, some words, an added marker as text, markers as special tokens, and the end of sequence.
const WORDS: [&str; 14] = [
    "true",
    "{\"",
    "\":",
    "\"}",
    "name",
    "\"name\": \"",
    "arguments",
    "12",
    "null",
    "  ",
    "]]",
    "\"a\"",
    "say",
    "\n{\"",
];
const SPECIAL: [&str; 4] = ["</s>", "[TOOL_CALLS]", "<|python_tag|>", "</think>"];

fn tiny_tokenizer() -> Tokenizer {
    // Byte-level: the printable ASCII characters and a few others stand for themselves.
    let char_of = |byte: u8| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
        0x7f..=0xa0 => char::from_u32(0x100 + 33 + u32::from(byte) - 0x7f).unwrap(),
        0xad => '\u{143}',
    };
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocab.insert(char_of(byte).to_string(), vocab.len().into());
    }
    for word in WORDS {
        vocab.insert(word.bytes().map(char_of).collect(), vocab.len().into());
    }
    let mut added = Vec::new();
    for (text, special) in [("<tool_call>", false)].into_iter().chain(SPECIAL.map(|text| (text, true))) {
        added.push(
            json!({"id": vocab.len() + added.len(), "content": text, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": special}),
        );
    }
    let json = json!({"version": "1.0", "added_tokens": added, "normalizer": null, "post_processor": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    let dir = std::env::temp_dir().join(format!("ashlar-grammar-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    std::fs::write(
        dir.join("tokenizer_config.json"),
        r#"{"eos_token": "</s>", "chat_template": "[TOOL_CALLS]"}"#,
    )
    .unwrap();
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    tokenizer
}

static MODEL: LazyLock<(Tokenizer, GrammarCompiler)> = LazyLock::new(|| {
    let tokenizer = tiny_tokenizer();
    // Padded beyond the tokenizer, as models' logits are.
    let compiler = GrammarCompiler::new(&tokenizer, tokenizer.vocab_size() + 13).unwrap();
    (tokenizer, compiler)
});

fn allowed(matcher: &mut Matcher) -> Vec<u32> {
    let mut mask = vec![0; matcher.mask_len()];
    matcher.mask(&mut mask).unwrap();
    (0..mask.len() as u32 * 32).filter(|t| mask[*t as usize / 32] >> (t % 32) & 1 == 1).collect()
}

/// Follows masks, choosing by `choices` and then towards the end; the tokens, without the end of sequence.
fn generate(spec: &GrammarSpec, choices: &[u32]) -> Option<Vec<u32>> {
    let (tokenizer, compiler) = &*MODEL;
    let eos = tokenizer.eos_token_ids()[0];
    let mut matcher = Matcher::new(compiler, spec).unwrap();
    let mut tokens = Vec::new();
    for step in 0..600 {
        let options = allowed(&mut matcher);
        assert!(!options.is_empty(), "dead end after {:?}", tokenizer.decode(&tokens, false));
        if step >= choices.len() && options.contains(&eos) {
            matcher.accept(eos).unwrap();
            assert!(matcher.has_ended());
            return Some(tokens);
        }
        let closing = |t: &&u32| matches!(tokenizer.token_bytes(**t), b"\"" | b"}" | b"]" | b"\"}");
        let token = match choices.get(step) {
            Some(choice) => options[*choice as usize % options.len()],
            None => *options.iter().find(closing).unwrap_or(&options[step * 7 % options.len()]),
        };
        if token == eos {
            return Some(tokens);
        }
        matcher.accept(token).unwrap();
        tokens.push(token);
    }
    None
}

/// Whether a text is a JSON object; a number may be larger than this parser holds.
fn is_object(text: &str) -> bool {
    match serde_json::from_str::<Value>(text) {
        Ok(value) => value.is_object(),
        Err(error) => error.to_string().contains("number out of range"),
    }
}

fn schema() -> Value {
    json!({"type": "object", "properties": {"name": {"enum": ["ab", "ac"]}, "n": {"type": "integer"},
        "ok": {"type": ["boolean", "null"]}}, "required": ["name"], "additionalProperties": false})
}

fn specs() -> Vec<GrammarSpec> {
    let (tokenizer, _) = &*MODEL;
    let tools = [
        ToolSpec { name: "say".into(), parameters: schema() },
        ToolSpec { name: "a\"b".into(), parameters: Value::Null },
    ];
    let mut specs = vec![GrammarSpec::JsonObject, schema_grammar(&schema()), schema_grammar(&json!(true))];
    for format in [ToolFormat::Hermes, ToolFormat::Llama3Json, ToolFormat::Mistral] {
        for choice in [ToolChoice::Auto, ToolChoice::Required, ToolChoice::Named("say".into())] {
            specs.push(tool_grammar(&tools, &choice, format, true, tokenizer).unwrap());
        }
    }
    let markers = ReasoningMarkers { start: "<think>".into(), end: "</think>".into() };
    specs.push(after_reasoning(&specs[1], &markers, true, tokenizer));
    specs.push(after_reasoning(&specs[3], &markers, false, tokenizer));
    specs
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn masks_agree_with_trying_every_token(choices in prop::collection::vec(any::<u32>(), 0..14), which in 0usize..14) {
        let (tokenizer, compiler) = &*MODEL;
        let spec = &specs()[which];
        let mut matcher = Matcher::new(compiler, spec).unwrap();
        let mut taken = Vec::new();
        for choice in choices {
            let options = allowed(&mut matcher);
            // A replica that has only accepted tokens, and never made a mask, is in the same state.
            let replay = || {
                let mut replica = Matcher::new(compiler, spec).unwrap();
                taken.iter().for_each(|&token| replica.accept(token).unwrap());
                replica
            };
            prop_assert_eq!(&allowed(&mut replay()), &options);
            // Refusing leaves the matcher in place, so one replica can try every refused token.
            let mut refusing = replay();
            for token in 0..compiler.vocab_size() as u32 {
                if !options.contains(&token) {
                    let refused = refusing.accept(token);
                    prop_assert_eq!(refused, Err(GrammarError::NotAllowed { token }), "{:?}", taken);
                }
            }
            prop_assert_eq!(&allowed(&mut refusing), &options);
            let token = options[choice as usize % options.len()];
            if tokenizer.eos_token_ids().contains(&token) {
                prop_assert!(matcher.may_end());
                break;
            }
            matcher.accept(token).unwrap();
            taken.push(token);
        }
    }

    #[test]
    fn allowed_tokens_are_exactly_those_whose_bytes_are_allowed(choices in prop::collection::vec(any::<u32>(), 0..10)) {
        let (tokenizer, compiler) = &*MODEL;
        let spec = schema_grammar(&schema());
        let mut matcher = Matcher::new(compiler, &spec).unwrap();
        let mut taken = Vec::new();
        for choice in choices {
            let options = allowed(&mut matcher);
            for token in 0..256 + WORDS.len() as u32 {
                let mut bytewise = Matcher::new(compiler, &spec).unwrap();
                taken.iter().for_each(|&token| bytewise.accept(token).unwrap());
                let fits = tokenizer.token_bytes(token).iter().all(|&byte| bytewise.accept(u32::from(byte)).is_ok());
                prop_assert_eq!(options.contains(&token), fits && token != 255, "{:?}", tokenizer.token_text(token));
            }
            let token = options[choice as usize % options.len()];
            if tokenizer.eos_token_ids().contains(&token) {
                break;
            }
            matcher.accept(token).unwrap();
            taken.push(token);
        }
    }

    #[test]
    fn what_follows_the_masks_satisfies_the_schema(choices in prop::collection::vec(any::<u32>(), 0..60)) {
        let (tokenizer, _) = &*MODEL;
        if let Some(tokens) = generate(&schema_grammar(&schema()), &choices) {
            let text = tokenizer.decode(&tokens, true);
            let value: Value = serde_json::from_str(&text).unwrap();
            let object = value.as_object().unwrap();
            prop_assert!(object["name"] == "ab" || object["name"] == "ac", "{}", text);
            prop_assert!(object.get("n").is_none_or(|n| n.is_i64() || n.is_u64() || n.as_f64().is_some_and(|f| f.fract() == 0.0)), "{}", text);
            prop_assert!(object.keys().all(|key| ["name", "n", "ok"].contains(&key.as_str())), "{}", text);
        }
        if let Some(tokens) = generate(&GrammarSpec::JsonObject, &choices) {
            let text = tokenizer.decode(&tokens, true);
            prop_assert!(is_object(&text), "{}", text);
        }
    }

    #[test]
    fn generated_calls_are_read_back(choices in prop::collection::vec(any::<u32>(), 0..40), which in 0usize..3) {
        let (tokenizer, _) = &*MODEL;
        let format = [ToolFormat::Hermes, ToolFormat::Llama3Json, ToolFormat::Mistral][which];
        let tools = [ToolSpec { name: "say".into(), parameters: schema() }];
        let spec = tool_grammar(&tools, &ToolChoice::Required, format, false, tokenizer).unwrap();
        if let Some(tokens) = generate(&spec, &choices) {
            let mut decoder = tokenizer.incremental(SpecialTokens::Show, TextStart::Beginning);
            let mut parser = ToolCallParser::new(format, vec!["say".into()]);
            let mut events: Vec<ToolEvent> = tokens.iter().flat_map(|&t| parser.push(&decoder.push(t))).collect();
            events.extend(parser.finish());
            let mut arguments = String::new();
            for event in &events {
                match event {
                    ToolEvent::Content(text) => prop_assert!(false, "content {:?} in {:?}", text, tokenizer.decode(&tokens, false)),
                    ToolEvent::Call { index, name } => prop_assert_eq!((*index, name.as_str()), (0, "say")),
                    ToolEvent::Arguments { text, .. } => arguments.push_str(text),
                }
            }
            let arguments: Value = serde_json::from_str(&arguments).unwrap();
            prop_assert!(arguments["name"].is_string());
        }
    }
}

#[test]
fn an_automatic_choice_allows_prose_and_then_holds_a_call_to_its_schema() {
    let (tokenizer, compiler) = &*MODEL;
    let tools = [ToolSpec { name: "say".into(), parameters: schema() }];
    for (format, text, follows) in [
        (ToolFormat::Hermes, "Let me see. <tool_call>\n{\"name\": \"say\", \"arguments\": ", b'{'),
        (ToolFormat::Mistral, "Well [TOOL_CALLS] [{\"name\": \"say\", \"arguments\": ", b'{'),
        (ToolFormat::Llama3Json, "{\"name\": \"say\", \"parameters\": ", b'{'),
    ] {
        let spec = tool_grammar(&tools, &ToolChoice::Auto, format, true, tokenizer).unwrap();
        let mut matcher = Matcher::new(compiler, &spec).unwrap();
        assert!(matcher.may_end(), "{format:?}: an empty answer");
        for token in tokenizer.encode(text, false).unwrap() {
            matcher
                .accept(token)
                .unwrap_or_else(|e| panic!("{format:?}: {e}: {}", tokenizer.token_text(token)));
        }
        assert!(!matcher.may_end());
        let options = allowed(&mut matcher);
        assert!(options.contains(&u32::from(follows)) && !options.contains(&u32::from(b'x')), "{format:?}");
    }
}

#[test]
fn hostile_grammars_are_refused_in_bounded_time() {
    let (_, compiler) = &*MODEL;
    let any_of = |n: usize| json!({"anyOf": (0..n).map(|i| json!({"type": "object", "properties": {format!("k{i}"): {"type": "string"}}})).collect::<Vec<_>>()});
    let mut fork = json!({"type": "string"});
    for _ in 0..25 {
        fork = json!({"anyOf": [fork.clone(), {"type": "object", "properties": {"a": fork}}]});
        if fork.to_string().len() > 100_000 {
            break;
        }
    }
    let long_any: Vec<Value> = (0..4000).map(|i| json!({"const": format!("v{i}")})).collect();
    let chain = |links: usize| {
        let mut defs: serde_json::Map<String, serde_json::Value> =
            (0..links).map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)}))).collect();
        defs.insert(format!("d{links}"), json!({"type": "string"}));
        json!({"$ref": "#/$defs/d0", "$defs": defs}).to_string()
    };
    let hostile = [
        (chain(700), false),
        (chain(5_000), false),
        (json!({"allOf": vec![json!({"anyOf": [1]}); 15_000]}).to_string(), true),
        ("[".repeat(100_000), true),
        (format!("{}1{}", "{\"not\":".repeat(100_000), "}".repeat(100_000)), true),
        (format!("{}{}{}", "{\"properties\":{\"a\":".repeat(500), "{}", "}}".repeat(500)), true),
        (json!({"allOf": vec![any_of(10); 20]}).to_string(), true),
        (json!({"type": "string", "pattern": "(a{1000}){1000}{1000}"}).to_string(), false),
        (json!({"type": "string", "pattern": "(".repeat(10_000)}).to_string(), true),
        (json!({"type": "string", "pattern": "(x+x+)+y|(a|aa)*b|((a?){30}a{30})*"}).to_string(), false),
        (json!({"type": "array", "minItems": 1_000_000_000u64}).to_string(), true),
        (
            json!({"type": "array", "items": {"type": "array", "minItems": 9000}, "minItems": 9000})
                .to_string(),
            false,
        ),
        (json!({"type": "integer", "multipleOf": 1e-300}).to_string(), false),
        (json!({"type": "number", "minimum": -1e308, "maximum": 1e308, "multipleOf": 7}).to_string(), false),
        (json!({"$ref": "#"}).to_string(), false),
        (json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]}).to_string(), false),
        (json!({"$ref": "http://169.254.169.254/schema"}).to_string(), true),
        (json!({"x-guidance": {"whitespace_pattern": "(a*)*"}, "type": "object"}).to_string(), false),
        (fork.to_string(), false),
        (json!({"anyOf": long_any}).to_string(), false),
        (json!(17).to_string(), true),
        (json!({"type": "string", "pattern": "(a|b)*".repeat(20_000)}).to_string(), true),
        (json!({"type": "string", "pattern": "(a|b)*".repeat(600)}).to_string(), false),
        (json!({"type": "string", "minLength": 900_000, "maxLength": 1_000_000}).to_string(), false),
        (json!({"type": "array", "minItems": 9_000, "uniqueItems": true}).to_string(), false),
        ("not json".into(), true),
    ];
    for (source, must_fail) in hostile {
        let label: String = source.chars().take(70).collect();
        let begun = Instant::now();
        let spec = GrammarSpec::JsonSchema(source);
        match (compiler.check(&spec), Matcher::new(compiler, &spec)) {
            (Err(error), _) => assert!(!error.to_string().is_empty(), "{label}"),
            (Ok(()), matcher) => {
                assert!(!must_fail, "accepted: {label}");
                let mut matcher = matcher.unwrap();
                let mut mask = vec![0; matcher.mask_len()];
                let _ = matcher.mask(&mut mask);
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{label} took {:?}", begun.elapsed());
        eprintln!("{:>8.1?} {label}", begun.elapsed());
    }
    for source in [
        "start: ".to_string() + &"(".repeat(100_000),
        "start: start start | \"a\"".into(),
        "start: /".to_string() + &"(a|b)*".repeat(20_000) + "/",
        "start: /".to_string() + &"(a|b)*\n".repeat(4_000) + "/",
        "start: A{1000}\nA: B{1000}\nB: /a{1000}/".into(),
        "start: %json {\"allOf\": [".to_string() + &vec![any_of(10).to_string(); 20].join(",") + "]}",
        "start: <nonesuch>".into(),
        "nonsense".into(),
    ] {
        let label: String = source.chars().take(70).collect();
        let begun = Instant::now();
        let checked = compiler.check(&GrammarSpec::Lark(source));
        assert!(begun.elapsed() < Duration::from_secs(5), "{label} took {:?}", begun.elapsed());
        eprintln!("{:>8.1?} {label} {}", begun.elapsed(), checked.is_ok());
    }
}

#[test]
fn what_the_engine_panics_on_is_refused_without_its_words() {
    for bound in ["-9223372036854775808", "-1e308"] {
        let schema = format!(r#"{{"type": "integer", "minimum": {bound}, "maximum": 150}}"#);
        match MODEL.1.check(&GrammarSpec::JsonSchema(schema)) {
            Ok(()) => {}
            Err(GrammarError::Invalid(reason)) => {
                assert!(!reason.contains("panic") && !reason.contains(".rs"), "{bound}: {reason}");
            }
            Err(other) => panic!("{bound}: {other}"),
        }
    }
}

#[test]
fn a_mask_buffer_of_the_wrong_length_is_refused() {
    let (_, compiler) = &*MODEL;
    let mut matcher = Matcher::new(compiler, &GrammarSpec::JsonObject).unwrap();
    assert!(matches!(matcher.mask(&mut [0; 2]), Err(GrammarError::MaskLength { .. })));
}

#[test]
fn a_real_vocabulary_follows_a_schema() {
    let root = std::env::var_os("ASHLAR_SHARED_DATA").map_or_else(
        || concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data").into(),
        std::path::PathBuf::from,
    );
    for (name, padded) in
        [("models/stories260K", 512), ("tokenizers/qwen3", 151_936), ("tokenizers/mistral-v3", 32_768)]
    {
        let dir = root.join(name);
        if !dir.exists() {
            eprintln!("SKIPPED: {} is absent; set ASHLAR_SHARED_DATA to run this test", dir.display());
            continue;
        }
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let begun = Instant::now();
        let compiler = GrammarCompiler::new(&tokenizer, padded).unwrap();
        eprintln!("{name}: trie {:?}", begun.elapsed());
        let text = "{\"name\": \"ab\", \"n\": 12}";
        let mut matcher = Matcher::new(&compiler, &schema_grammar(&schema())).unwrap();
        let begun = Instant::now();
        // Sentencepiece puts a space first, which a schema does not; the first piece goes by its bytes.
        let mut ids = tokenizer.encode(text, false).unwrap();
        if matcher.accept(ids[0]).is_err() {
            ids = text
                .bytes()
                .map(|byte| (0..padded as u32).find(|&id| tokenizer.token_bytes(id) == [byte]).unwrap())
                .collect();
        } else {
            ids.remove(0);
        }
        for id in ids {
            assert!(allowed(&mut matcher).contains(&id), "{name}: {:?}", tokenizer.token_text(id));
            matcher.accept(id).unwrap();
        }
        assert_eq!(allowed(&mut matcher), tokenizer.eos_token_ids(), "{name}");
        eprintln!("{name}: masks {:?}", begun.elapsed());
    }
}
