//! Real tokenizers, templates and files. These live outside the repository; where they are absent the tests say so and pass.

#![allow(clippy::unwrap_used)]

use ashlar_dataset::{
    DatasetWriter, Example, LineProblem, Method, Options, Report, TokenSequence, Tokeniser, prepare,
};
use ashlar_tokenizer::{RenderInput, TemplateTime, Tokenizer};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufReader, Cursor};
use std::path::PathBuf;

/// A file or directory of the shared data; says so where it is absent.
fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ASHLAR_SHARED_DATA").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data")),
        PathBuf::from,
    );
    let full = root.join(path);
    if full.exists() {
        return Some(full);
    }
    eprintln!("SKIPPED: {} is absent; set ASHLAR_SHARED_DATA to run this test", full.display());
    None
}

/// Qwen 2.5 has the vocabulary of Qwen 3 and a template of its own.
fn qwen_2_5() -> Option<Tokenizer> {
    let (tokenizer, config) =
        (shared("tokenizers/qwen3/tokenizer.json")?, shared("tokenizers/qwen2.5/tokenizer_config.json")?);
    let unique = (std::process::id(), std::thread::current().id());
    let dir = std::env::temp_dir().join(format!("ashlar-dataset-qwen-{unique:?}"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::copy(tokenizer, dir.join("tokenizer.json")).unwrap();
    std::fs::copy(config, dir.join("tokenizer_config.json")).unwrap();
    let loaded = Tokenizer::from_dir(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    Some(loaded)
}

fn load(path: &str) -> Option<Tokenizer> {
    Some(Tokenizer::from_dir(shared(path)?).unwrap())
}

/// Each sample's first sequence, as pieces: targets in brackets.
fn pieces(tokenizer: &Tokenizer, line: &Value) -> Vec<String> {
    let options = Options::new(Method::Supervised, 4096);
    let example = Example::parse(line.to_string().as_bytes()).unwrap();
    let made = Tokeniser::new(tokenizer, &options).tokenise(example).unwrap();
    assert_eq!(made.unterminated, 0);
    made.samples.iter().map(|sequences| shown(tokenizer, &sequences[0])).collect()
}

fn shown(tokenizer: &Tokenizer, sequence: &TokenSequence) -> String {
    let mut shown = String::new();
    for (at, &id) in (0_u32..).zip(sequence.tokens()) {
        let text = tokenizer.token_text(id);
        let is_target = sequence.targets().iter().any(|range| range.contains(&at));
        shown += &if is_target { format!("[{text}]") } else { format!("{text}|") };
    }
    shown
}

fn two_turns() -> Value {
    json!({"messages": [
        {"role": "user", "content": "Good day"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]})
}

#[test]
fn the_masks_of_qwen_2_5() {
    let Some(tokenizer) = qwen_2_5() else { return };
    assert_eq!(
        pieces(&tokenizer, &two_turns()),
        [
            "<|im_start|>|system|\n|You| are| Q|wen|,| created| by| Alibaba| Cloud|.| You| are| a| helpful| assistant|.|<|im_end|>|\n|\
          <|im_start|>|user|\n|Good| day|<|im_end|>|\n|<|im_start|>|assistant|\n|[Hello][ there][<|im_end|>]\n|\
          <|im_start|>|user|\n|By|e|<|im_end|>|\n|<|im_start|>|assistant|\n|[See][ you][<|im_end|>]"
        ]
    );
}

#[test]
fn the_masks_of_qwen_3() {
    let Some(tokenizer) = load("tokenizers/qwen3") else { return };
    assert_eq!(
        pieces(&tokenizer, &two_turns()),
        [
            "<|im_start|>|user|\n|Good| day|<|im_end|>|\n|<|im_start|>|assistant|\n|\
             [<think>][\n\n][</think>][\n\n][Hello][ there][<|im_end|>]",
            "<|im_start|>|user|\n|Good| day|<|im_end|>|\n|<|im_start|>|assistant|\n|Hello| there|<|im_end|>|\n|\
             <|im_start|>|user|\n|By|e|<|im_end|>|\n|<|im_start|>|assistant|\n|\
             [<think>][\n\n][</think>][\n\n][See][ you][<|im_end|>]",
        ]
    );
}

#[test]
fn the_masks_of_mistral_v3() {
    let Some(tokenizer) = load("tokenizers/mistral-v3") else { return };
    assert_eq!(
        pieces(&tokenizer, &two_turns()),
        ["<s>|[INST]| Good| day|[/INST]|[ Hello][ there][</s>][INST]| By|e|[/INST]|[ See][ you][</s>]"]
    );
}

#[test]
fn the_masks_of_stories260k() {
    let Some(tokenizer) = load("models/stories260K") else { return };
    let line = json!({"messages": [
        {"role": "user", "content": "Once upon a time"},
        {"role": "assistant", "content": "there was a cat."},
    ]});
    assert_eq!(pieces(&tokenizer, &line), ["<s>| Once| upon| a| time|[ there][ was][ a][ c][at][.][</s>]"]);
    // A text begins and ends with the tokens that the model was trained with.
    assert_eq!(
        pieces(&tokenizer, &json!({"text": "Once upon a time"})),
        ["<s>|[ Once][ upon][ a][ time][</s>]"]
    );
    assert_eq!(
        pieces(&tokenizer, &json!({"prompt": "Once upon", "completion": " a time"})),
        ["<s>| Once| upon|[ a][ time][</s>]"]
    );
}

/// Whole files over every model: what stands before an answer is, token by token, what serving sends for the same messages, and
/// what is learnt reads as the answer.
#[test]
fn real_files_are_trained_on_the_tokens_that_are_served() {
    let Some(data) = shared("finetune/openai-chat") else { return };
    let models = [
        (qwen_2_5(), "gsm8k-chat-valid100.jsonl", ""),
        (load("tokenizers/qwen3"), "gsm8k-chat-valid100.jsonl", "<think>\n\n</think>\n\n"),
        (load("tokenizers/mistral-v3"), "gsm8k-chat-valid100.jsonl", " "),
        (load("models/stories260K"), "tinystories-chat-valid60.jsonl", " "),
    ];
    let options = Options::new(Method::Supervised, 4096);
    for (tokenizer, file, before_answer) in models {
        let Some(tokenizer) = tokenizer else { continue };
        let tokeniser = Tokeniser::new(&tokenizer, &options);
        for line in std::fs::read_to_string(data.join(file)).unwrap().lines() {
            let made = tokeniser.tokenise(Example::parse(line.as_bytes()).unwrap()).unwrap();
            assert_eq!(made.samples.len(), 1);
            let sequence = &made.samples[0][0];
            let [target] = sequence.targets() else { panic!("{line}") };
            let value: Value = serde_json::from_str(line).unwrap();
            let mut messages = value["messages"].clone();
            let answer = messages.as_array_mut().unwrap().pop().unwrap();
            let prompt = tokenizer
                .chat_template()
                .unwrap()
                .render(&RenderInput {
                    messages: &messages,
                    tools: None,
                    add_generation_prompt: true,
                    kwargs: &Map::new(),
                    now: TemplateTime::default(),
                })
                .unwrap();
            let (before, learnt) = sequence.tokens().split_at(target.start as usize);
            assert_eq!(before, tokenizer.encode_chat(&prompt).unwrap(), "{file}: {line}");
            let bytes: Vec<u8> = learnt.iter().flat_map(|&id| tokenizer.token_bytes(id).to_vec()).collect();
            let end = String::from_utf8(tokenizer.token_bytes(*learnt.last().unwrap()).to_vec()).unwrap();
            assert!(tokenizer.eos_token_ids().contains(learnt.last().unwrap()));
            let content = answer["content"].as_str().unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), format!("{before_answer}{content}{end}"));
        }
    }
}

fn report(tokenizer: &Tokenizer, file: PathBuf, max_seq_len: usize) -> Report {
    let mut writer = DatasetWriter::new(std::io::sink(), Method::Supervised).unwrap();
    let file = BufReader::new(File::open(file).unwrap());
    prepare(file, tokenizer, &Options::new(Method::Supervised, max_seq_len), &mut writer).unwrap()
}

#[test]
fn openais_toy_file_has_one_missing_question_and_one_answer_that_is_too_long() {
    let Some(file) = shared("finetune/openai-chat/toy_chat_fine_tuning.jsonl") else { return };
    let Some(tokenizer) = qwen_2_5() else { return };
    let toy = report(&tokenizer, file.clone(), 4096);
    assert_eq!((toy.examples, toy.problems.total), (4, 1));
    assert_eq!(toy.problems.first[0].line, 4);
    assert!(matches!(toy.problems.first[0].problem, LineProblem::NoUser { .. }));
    let refusal = toy.verdict().unwrap_err();
    assert_eq!(refusal.code, "invalid_training_file");
    assert_eq!(
        refusal.message,
        "1 line(s) cannot be used: line 4: `messages` has no user message: an example needs at least one"
    );
    let longest = toy.longest.unwrap();
    assert_eq!((longest.line, toy.truncated.examples), (5, 1));
    assert_eq!(toy.truncated.tokens as usize, longest.tokens - 4096);
    assert_eq!(toy.truncated.target_tokens, toy.truncated.tokens);

    // Without the bad line it is still too small.
    let text = std::fs::read_to_string(file).unwrap();
    let good: Vec<&str> = text.lines().enumerate().filter(|&(at, _)| at != 3).map(|(_, line)| line).collect();
    let mut writer = DatasetWriter::new(std::io::sink(), Method::Supervised).unwrap();
    let options = Options::new(Method::Supervised, 4096);
    let toy = prepare(Cursor::new(good.join("\n")), &tokenizer, &options, &mut writer).unwrap();
    let refusal = toy.verdict().unwrap_err();
    assert_eq!((refusal.code, refusal.param), ("invalid_n_examples", "training_file"));
}

#[test]
fn whole_training_files_have_the_totals_that_were_counted() {
    let Some(data) = shared("finetune/openai-chat") else { return };
    if let Some(tokenizer) = load("models/stories260K") {
        let stories = report(&tokenizer, data.join("tinystories-chat-train600.jsonl"), 512);
        stories.verdict().unwrap();
        assert_eq!((stories.examples, stories.samples, stories.truncated.examples), (600, 600, 0));
        assert_eq!(stories.longest.unwrap().tokens, 441);
        // Counted with Hugging Face's library from the template's words.
        assert_eq!((stories.tokens, stories.target_tokens), (209_134, 196_774));
    }
    if let Some(tokenizer) = load("tokenizers/qwen3") {
        let sums = report(&tokenizer, data.join("gsm8k-chat-train500.jsonl"), 4096);
        sums.verdict().unwrap();
        assert_eq!((sums.examples, sums.split_examples, sums.unterminated_turns), (500, 0, 0));
        assert_eq!((sums.tokens, sums.target_tokens), (93_426, 49_894));
    }
}
