//! Whole files, with a tokenizer of a few words that is made here: totals, problems, truncation, what is stored.

#![allow(clippy::unwrap_used)]

use ashlar_dataset::plan::{JobPlan, PlanSettings, auto_batch_size, auto_epochs, split};
use ashlar_dataset::{
    DatasetDigest, DatasetReader, DatasetWriter, Format, LineProblem, Method, Options, Report, Sample,
    prepare,
};
use ashlar_tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::io::Cursor;

/// One token per ASCII character, and two special ones. The chat template is ChatML.
fn tokenizer() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    // GPT-2's alphabet: printable characters are themselves, a space and a line break are not.
    for byte in 33_u8..127 {
        vocab.insert(char::from(byte).to_string(), (u32::from(byte) - 33).into());
    }
    vocab.insert("Ġ".into(), 94.into());
    vocab.insert("Ċ".into(), 95.into());
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [added(96, "<|im_start|>"), added(97, "<|im_end|>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
    // Tests run in one process or in many.
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let unique = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("ashlar-dataset-{}-{unique}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    let loaded = Tokenizer::from_dir(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    loaded
}

fn prepared(file: &[u8], options: &Options) -> (Report, Vec<u8>, DatasetDigest) {
    let mut writer = DatasetWriter::new(Vec::new(), options.method).unwrap();
    let report = prepare(Cursor::new(file), &tokenizer(), options, &mut writer).unwrap();
    let (bytes, summary) = writer.finish().unwrap();
    assert_eq!(u64::from(summary.samples), report.samples);
    (report, bytes, summary.digest)
}

fn samples(bytes: &[u8]) -> Vec<Sample> {
    let mut reader = DatasetReader::open(Cursor::new(bytes)).unwrap();
    (0..reader.sizes().len() as u32).map(|index| reader.read(index).unwrap()).collect()
}

fn file(lines: &[Value]) -> Vec<u8> {
    lines.iter().map(|line| format!("{line}\n")).collect::<String>().into_bytes()
}

fn chat(answer: &str) -> Value {
    json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]})
}

fn supervised() -> Options {
    Options::new(Method::Supervised, 1000)
}

/// Of every sequence its text, with targets in brackets.
fn shown(sample: &Sample) -> Vec<String> {
    let tokenizer = tokenizer();
    let show = |sequence: &ashlar_dataset::TokenSequence| {
        let mut shown = String::new();
        for (at, &id) in (0_u32..).zip(sequence.tokens()) {
            let text = tokenizer.token_text(id);
            let is_target = sequence.targets().iter().any(|range| range.contains(&at));
            shown += &if is_target { format!("[{text}]") } else { text };
        }
        shown
    };
    sample.sequences.iter().map(show).collect()
}

#[test]
fn a_chat_is_stored_with_its_answer_as_targets() {
    let lines: Vec<Value> = (0..12).map(|_| chat("ab")).collect();
    let (report, bytes, digest) = prepared(&file(&lines), &supervised());
    report.verdict().unwrap();
    assert_eq!((report.examples, report.samples, report.problems.total), (12, 12, 0));
    let first = &samples(&bytes)[0];
    assert_eq!(shown(first), ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[a][b][<|im_end|>]"]);
    assert_eq!(report.tokens, 12 * first.token_count());
    assert_eq!(report.target_tokens, 36);
    assert_eq!(report.longest.unwrap().tokens as u64, first.token_count());
    assert_eq!((report.split_examples, report.unterminated_turns, report.truncated.examples), (0, 0, 0));
    assert_eq!(DatasetDigest::of(&bytes[..]).unwrap(), digest);
    // The same file gives the same bytes.
    assert_eq!(prepared(&file(&lines), &supervised()).1, bytes);
}

#[test]
fn a_completion_is_learnt_with_the_token_that_closes_it_and_a_text_but_for_its_first_token() {
    let (report, bytes, _) = prepared(&file(&[json!({"prompt": "a b", "completion": " c"})]), &supervised());
    assert_eq!(report.format, Some((Format::Completion, 1)));
    assert_eq!(shown(&samples(&bytes)[0]), ["a b[ ][c][<|im_end|>]"]);
    let (_, bytes, _) = prepared(&file(&[json!({"prompt": "", "completion": "cd"})]), &supervised());
    assert_eq!(shown(&samples(&bytes)[0]), ["c[d][<|im_end|>]"]);
    let (_, bytes, _) = prepared(&file(&[json!({"text": "abc"})]), &supervised());
    assert_eq!(shown(&samples(&bytes)[0]), ["a[b][c][<|im_end|>]"]);
}

#[test]
fn a_preference_is_one_sample_of_two_sequences() {
    let answer = |text: &str| json!([{"role": "assistant", "content": text}]);
    let line = json!({
        "input": {"messages": [{"role": "user", "content": "q"}]},
        "preferred_output": answer("x"),
        "non_preferred_output": answer("yz"),
    });
    let (report, bytes, _) = prepared(&file(&[line]), &Options::new(Method::Dpo, 1000));
    assert_eq!((report.examples, report.samples, report.target_tokens), (1, 1, 5));
    let prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(
        shown(&samples(&bytes)[0]),
        [format!("{prompt}[x][<|im_end|>]"), format!("{prompt}[y][z][<|im_end|>]")]
    );
}

#[test]
fn every_bad_line_is_reported_by_its_number() {
    let mut bytes = b"\xef\xbb\xbf".to_vec();
    bytes.extend(file(&[chat("a")]));
    bytes.extend(b"\n");
    bytes.extend(b"{\"messages\": [}\n");
    bytes.extend(b"{\"text\": \"\xff\"}\n");
    bytes.extend(file(&[json!({"text": "another format"})]));
    bytes.extend(file(&[json!({"input": {"messages": [{"role": "user", "content": "q"}]},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": "b"}]})]));
    bytes.extend(format!("{{\"text\": \"{}\"}}\n", "x".repeat(500)).into_bytes());
    bytes.extend(chat("the last line has no end").to_string().into_bytes());
    let options = Options { line_bytes_max: 400, ..supervised() };
    let (report, _, _) = prepared(&bytes, &options);
    assert_eq!((report.examples, report.problems.total), (2, 5));
    let found: Vec<(u64, String)> =
        report.problems.first.iter().map(|error| (error.line, error.problem.to_string())).collect();
    let expected = [
        (3, "not valid JSON"),
        (4, "not UTF-8"),
        (5, "the example is a plain `text`, but line 1 is a chat"),
        (6, "a preference pair, which the method `supervised` does not take"),
        (7, "longer than 400 bytes"),
    ];
    for ((line, problem), (at, words)) in found.iter().zip(expected) {
        assert!(*line == at && problem.contains(words), "{line}: {problem}");
    }
    let refusal = report.verdict().unwrap_err();
    assert_eq!((refusal.code, refusal.param), ("invalid_training_file", "training_file"));
    assert!(
        refusal.message.starts_with("5 line(s) cannot be used: line 3: the line is not valid JSON"),
        "{refusal}"
    );
    assert_eq!(report.verdict_as_validation().unwrap_err().param, "validation_file");
}

#[test]
fn the_first_hundred_problems_are_kept_and_all_are_counted() {
    let (report, _, _) = prepared(&b"{}\n".repeat(1234), &supervised());
    assert_eq!((report.problems.first.len(), report.problems.total, report.examples), (100, 1234, 0));
    assert_eq!(report.problems.first[99].line, 100);
    let message = report.verdict().unwrap_err().message;
    assert!(message.ends_with("; and 1229 more"), "{message}");
}

#[test]
fn too_few_examples_are_refused_in_openais_words() {
    for (count, refused) in [(0, true), (9, true), (10, false)] {
        let lines: Vec<Value> = (0..count).map(|_| chat("a")).collect();
        let (report, _, _) = prepared(&file(&lines), &supervised());
        assert_eq!(report.verdict().is_err(), refused, "{count}");
        if let Err(refusal) = report.verdict() {
            assert_eq!((refusal.code, refusal.param), ("invalid_n_examples", "training_file"));
            assert!(refusal.message.contains(&format!("has {count} example(s)")));
        }
        assert_eq!(report.verdict_as_validation().is_err(), count == 0);
    }
}

#[test]
fn what_is_too_long_is_cut_and_counted_and_refused_where_nothing_is_left() {
    let prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n";
    let prompt_tokens = 3 + "user\nq\nassistant\n".len();
    let options = Options::new(Method::Supervised, prompt_tokens + 2);
    let lines = [chat("abcde"), chat("a"), chat("abcd")];
    let (report, bytes, _) = prepared(&file(&lines), &options);
    assert_eq!(shown(&samples(&bytes)[0]), [format!("{prompt}[a][b]")]);
    assert_eq!(
        (report.truncated.examples, report.truncated.tokens, report.truncated.target_tokens),
        (2, 7, 7)
    );
    assert_eq!(report.longest.map(|longest| (longest.line, longest.tokens)), Some((1, prompt_tokens + 6)));
    assert_eq!(report.problems.total, 0);

    let options = Options::new(Method::Supervised, prompt_tokens);
    let (report, _, _) = prepared(&file(&lines), &options);
    assert_eq!((report.examples, report.problems.total), (0, 3));
    let LineProblem::NoTargetLeft { tokens, max_seq_len } = report.problems.first[0].problem else {
        panic!()
    };
    assert_eq!((tokens, max_seq_len), (prompt_tokens + 6, prompt_tokens));
}

#[test]
fn a_file_becomes_a_plan() {
    let lines: Vec<Value> = (0..40).map(|index| chat(&"x".repeat(index % 7 + 1))).collect();
    let (report, bytes, _) = prepared(&file(&lines), &supervised());
    let mut reader = DatasetReader::open(Cursor::new(&bytes)).unwrap();
    let parts = split(reader.sizes(), 4, 1);
    let settings = PlanSettings { epochs: auto_epochs(report.examples), batch_size: 8, seed: 1 };
    let plan = JobPlan::new(reader.sizes().to_vec(), parts.training, settings).unwrap();
    assert_eq!((plan.steps(), auto_batch_size(report.samples)), (15, 1));
    let batch = plan.batch(4).unwrap();
    assert_eq!((batch.epoch, batch.samples().len()), (0, 4));
    let read: u64 = batch.samples().iter().map(|&index| reader.read(index).unwrap().target_count()).sum();
    assert_eq!(read, batch.targets());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_damaged_file_is_answered_with_problems(
        at in any::<prop::sample::Index>(),
        damage in prop::collection::vec(any::<u8>(), 0..20),
        max_seq_len in 0_usize..60,
    ) {
        let tool = json!({"messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
            {"role": "assistant", "content": "a", "weight": 1},
        ]});
        let mut bytes = file(&[chat("abc"), tool, chat("d")]);
        let at = at.index(bytes.len());
        bytes.splice(at..(at + damage.len()).min(bytes.len()), damage);
        let (report, stored, _) = prepared(&bytes, &Options::new(Method::Supervised, max_seq_len));
        for sample in samples(&stored) {
            for sequence in &sample.sequences {
                prop_assert!(sequence.tokens().len() <= max_seq_len && sequence.target_count() > 0);
            }
        }
        prop_assert!(report.verdict().is_err());
    }
}
