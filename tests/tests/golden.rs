//! A real, trained model over two nodes against the outputs of other implementations.

use ashlar_tests::{Cluster, shared};
use ashlar_tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The reference has four decimals and was computed in another order of additions.
const LOGPROB_TOLERANCE: f64 = 3e-4;

fn stories(test: &str) -> Option<PathBuf> {
    Some(shared::data(test)?.join("models/stories260K"))
}

fn over_two_stages(model: &Path) -> Cluster {
    let cluster = Cluster::start(&["--model", &model.to_string_lossy(), "--stages", "2"]);
    assert_eq!(cluster.view()["nodes"].as_array().map(Vec::len), Some(2));
    cluster
}

/// The model as safetensors and as a GGUF file, which holds the same weights in another order.
fn models(test: &str) -> Option<[PathBuf; 2]> {
    let file = "models/stories260K-gguf/stories260K-f32.gguf";
    Some([stories(test)?, shared::data(test)?.join(file)])
}

#[test]
fn greedy_continuations_over_two_stages_are_the_reference_token_for_token() {
    let Some([directory, file]) = models("golden") else { return };
    greedy_continuations(&directory, &directory);
    greedy_continuations(&directory, &file);
}

fn greedy_continuations(model: &Path, served: &Path) {
    let golden = shared::json(&model.join("golden_greedy.json"));
    let tokenizer = Tokenizer::open(served).expect("the model's tokenizer");
    // `/v1/completions` names tokens by their text; a golden id is compared by its own.
    let name = |id: &Value| {
        String::from_utf8_lossy(tokenizer.token_bytes(id.as_u64().expect("an id") as u32)).into_owned()
    };
    let cluster = over_two_stages(served);
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 8);
    for case in cases {
        // A story also ends where the next begins, which only the directory's generation_config.json says.
        let asked = json!({"prompt": case["prompt_ids"], "temperature": 0, "max_tokens": 200, "logprobs": 5,
            "stop_token_ids": [1]});
        let answer = cluster.post("/v1/completions", &asked).ok();
        let choice = &answer["choices"][0];
        let ids = case["greedy_ids"].as_array().expect("greedy_ids");
        let expected: Vec<String> = ids.iter().map(name).collect();
        let tokens: Vec<&str> = choice["logprobs"]["tokens"]
            .as_array()
            .expect("tokens")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        // A token that ends the answer is told as such, not shown.
        assert_eq!(tokens, expected, "prompt {}", case["prompt"]);
        // A completion goes on from its prompt, so that the space before its first word is kept.
        let text = |value: &Value| value.as_str().expect("text").trim_start().to_owned();
        assert_eq!(text(&choice["text"]), text(&case["greedy_text"]), "prompt {}", case["prompt"]);
        assert_eq!(choice["finish_reason"], case["finish"], "prompt {}", case["prompt"]);
        assert_eq!(answer["usage"]["prompt_tokens"], case["prompt_ids"].as_array().expect("ids").len());
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().expect("token_logprobs");
        for (ours, theirs) in
            logprobs.iter().zip(case["greedy_logprobs_first16"].as_array().expect("logprobs"))
        {
            let difference = (ours.as_f64().expect("number") - theirs.as_f64().expect("number")).abs();
            assert!(difference < LOGPROB_TOLERANCE, "{ours} instead of {theirs}, prompt {}", case["prompt"]);
        }
        for top in case["first_token_top5"].as_array().expect("top five") {
            let ours = choice["logprobs"]["top_logprobs"][0][name(&top[0])].as_f64();
            let theirs = top[1].as_f64().expect("number");
            assert!(
                ours.is_some_and(|ours| (ours - theirs).abs() < LOGPROB_TOLERANCE),
                "{ours:?} instead of {theirs} for token {}, prompt {}",
                top[0],
                case["prompt"]
            );
        }
    }
}

#[test]
fn tokenize_gives_the_reference_ids() {
    let Some([directory, file]) = models("golden") else { return };
    for served in [&directory, &file] {
        tokenize(&directory, served);
    }
}

fn tokenize(model: &Path, served: &Path) {
    let golden = shared::json(&model.join("golden_tokenize.json"));
    let cluster = over_two_stages(served);
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 13);
    for case in cases {
        let answer = cluster.post("/tokenize", &json!({"prompt": case["text"]})).ok();
        assert_eq!(answer["tokens"], case["ids"], "{}", case["text"]);
        assert_eq!(answer["count"], case["ids"].as_array().expect("ids").len());
        let back = cluster.post("/detokenize", &json!({"tokens": answer["tokens"]})).ok();
        let text = back["prompt"].as_str().expect("a text");
        assert!(text.ends_with(case["text"].as_str().expect("a text")), "{text:?} from {}", case["text"]);
    }
}
