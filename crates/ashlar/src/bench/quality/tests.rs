//! The command from end to end, on tiny models.
#![allow(clippy::unwrap_used)]

use super::*;
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_vocabulary::FloatType;
use std::path::Path;

const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":64,
    "intermediate_size":128,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,
    "vocab_size":VOCABULARY,"max_position_embeddings":128,"rms_norm_eps":1e-5,"tie_word_embeddings":true}"#;

fn model(folder: &Path, name: &str, vocabulary: usize) -> String {
    let shape = folder.join(format!("{name}.json"));
    std::fs::write(&shape, CONFIG.replace("VOCABULARY", &vocabulary.to_string())).unwrap();
    let out = folder.join(name);
    let request = SynthRequest {
        shape: shape.to_string_lossy().into_owned(),
        dtype: FloatType::F32,
        seed: 5,
        tokenizer: None,
    };
    synthesize(&out, &request, &mut |_, _| {}).unwrap();
    out.to_string_lossy().into_owned()
}

fn args(model: &str, folder: &Path, text: &str) -> QualityArgs {
    let file = folder.join("text.txt");
    std::fs::write(&file, text).unwrap();
    QualityArgs {
        model: model.to_owned(),
        text: file,
        quantize: Vec::new(),
        kv_cache_type: Vec::new(),
        activation_type: Vec::new(),
        against: Vec::new(),
        chunk: 64,
        tokens: None,
        threads: Some(2),
        isa: None,
        json: false,
    }
}

fn sentence() -> String {
    "The quick brown fox jumps over the lazy dog; é. ".repeat(16)
}

fn field(report: &Report, candidate: usize, name: &str) -> f64 {
    serde_json::to_value(&report.candidates[candidate]).unwrap()[name].as_f64().unwrap()
}

#[test]
fn a_model_equals_itself_and_fewer_bits_are_further_away() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), "model", 512);
    let mut args = args(&model, folder.path(), &sentence());
    args.quantize = ["f32", "q8_0", "q4_0"].map(|name| name.parse().unwrap()).to_vec();
    let report = measure(&args).unwrap();
    let of = |name| [0, 1, 2].map(|candidate| field(&report, candidate, name));

    assert_eq!((of("kl_max")[0], of("top1_agreement")[0], of("perplexity_delta")[0]), (0.0, 1.0, 0.0));
    let [_, small, large] = of("kl_mean");
    assert!(0.0 < small && 5.0 * small < large, "q8_0 {small}, q4_0 {large}");
    let [_, small, large] = of("delta_p_rms");
    assert!(0.0 < small && small < large, "q8_0 {small}, q4_0 {large}");
    let [all, eight, four] = of("bits_per_weight");
    assert!(all == 32.0 && (8.5..9.0).contains(&eight) && (4.5..7.0).contains(&four), "{eight} {four}");
    assert!(of("kl_p99").iter().zip(of("kl_max")).all(|(p99, max)| *p99 <= max));

    let json = serde_json::to_value(&report).unwrap();
    let (text, chunks) = (&json["text"], json["text"]["chunks"].as_u64().unwrap());
    assert_eq!((text["tokens"].as_u64(), text["scored"].as_u64()), (Some(64 * chunks), Some(31 * chunks)));
}

#[test]
fn the_size_of_steps_and_threads_changes_no_figure() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), "model", 16_384);
    let mut args = args(&model, folder.path(), &sentence());
    args.quantize = vec!["q4_0".parse().unwrap()];
    args.tokens = Some(150);
    let figures = |args: &QualityArgs| {
        let report = measure(args).unwrap();
        serde_json::to_string(&(&report.reference, &report.candidates, &report.text)).unwrap()
    };
    let expected = figures(&args);
    assert!(expected.contains("\"chunks\":2"), "{expected}");
    // 32 rows × 16,384 logits are scored on several threads, on one thread not.
    args.threads = Some(1);
    assert_eq!(figures(&args), expected);
}

#[test]
fn a_reference_alone_has_a_perplexity() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), "model", 512);
    let report = measure(&args(&model, folder.path(), &sentence())).unwrap();
    let reference = serde_json::to_value(&report.reference).unwrap();
    // Random weights know less than nothing.
    assert!(reference["perplexity"].as_f64().unwrap() > 512.0, "{reference}");
    assert!(report.candidates.is_empty());
}

#[test]
fn what_cannot_be_compared_is_refused_with_advice() {
    let folder = tempfile::tempdir().unwrap();
    let (small, large) = (model(folder.path(), "small", 512), model(folder.path(), "large", 1024));
    let error = |change: &dyn Fn(&mut QualityArgs), text: &str| {
        let mut args = args(&small, folder.path(), text);
        change(&mut args);
        format!("{:#}", measure(&args).unwrap_err())
    };
    let long = sentence();
    let cases: [(String, &str); 8] = [
        (error(&|_| (), ""), "it is empty"),
        (error(&|_| (), "short"), "longer text or a shorter --chunk"),
        (error(&|args| args.tokens = Some(63), &long), "--tokens must allow for one"),
        (error(&|args| args.chunk = 129, &long), "ends at 128 tokens"),
        (error(&|args| args.chunk = 2, &long), "at least 3"),
        (error(&|args| args.text = folder.path().join("absent"), &long), "cannot use the text"),
        (
            error(&|args| args.against = vec![large.clone()], &long),
            "the vocabularies differ: 512 tokens, and 1024",
        ),
        (error(&|args| args.against = vec!["./nothing-here".to_owned()], &long), "neither a model directory"),
    ];
    for (said, expected) in cases {
        assert!(said.contains(expected), "{said:?} should say {expected:?}");
    }
    std::fs::write(folder.path().join("latin1"), [0xe9, 0x20].repeat(500)).unwrap();
    let said = error(&|args| args.text = folder.path().join("latin1"), &long);
    assert!(said.contains("not UTF-8"), "{said}");
}

#[test]
fn a_vocabulary_of_other_words_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (model(folder.path(), "one", 512), model(folder.path(), "other", 512));
    // The same size and other ids: two letters change places.
    let file = Path::new(&other).join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let words = json["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (words["a"].clone(), words["b"].clone());
    words.insert("a".to_owned(), b);
    words.insert("b".to_owned(), a);
    std::fs::write(&file, json.to_string()).unwrap();
    let mut args = args(&one, folder.path(), &sentence());
    args.against = vec![other];
    let said = format!("{:#}", measure(&args).unwrap_err());
    assert!(said.contains("the vocabularies differ: token"), "{said}");
}

#[test]
fn chunks_are_scored_in_their_second_half() {
    assert_eq!(Text::scored(512), 256..511);
    assert_eq!((Text::scored(3), Text::scored(2).len(), Text::scored(0).len()), (1..2, 0, 0));
}
