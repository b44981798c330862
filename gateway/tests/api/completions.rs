//! Completions: every form of prompt, echo, the older log-probabilities.

use crate::scheduler::{Action, say, say_until_length};
use crate::world::{BOS, World, bytes};
use serde_json::{Value, json};

#[tokio::test]
async fn every_form_of_prompt_is_taken() {
    let world = World::new(|_| say("!")).await;
    let cases = [
        (json!("ab"), vec![vec![BOS, 97, 98]]),
        (json!(["a", "b"]), vec![vec![BOS, 97], vec![BOS, 98]]),
        (json!([97, 98]), vec![vec![97, 98]]),
        (json!([[97], [98, 99]]), vec![vec![97], vec![98, 99]]),
    ];
    for (prompt, expected) in cases {
        let before = world.scheduler.submits().len();
        let answer = world.completion(json!({"model": "alias", "prompt": prompt, "n": 2})).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let body = answer.json();
        assert_eq!((&body["object"], &body["model"]), (&json!("text_completion"), &json!("tiny")));
        let indices: Vec<&Value> =
            body["choices"].as_array().unwrap().iter().map(|choice| &choice["index"]).collect();
        assert_eq!(indices, (0..expected.len() * 2).collect::<Vec<_>>());
        assert_eq!(body["usage"]["prompt_tokens"], expected.iter().map(Vec::len).sum::<usize>());
        let submits = world.scheduler.submits();
        let prompts: Vec<_> =
            submits[before..].iter().step_by(2).map(|submit| submit.prompt.clone()).collect();
        assert_eq!(prompts, expected);
        let choice: Vec<u32> = submits[before..].iter().map(|submit| submit.sampling.choice_index).collect();
        assert_eq!(choice, [0, 1].repeat(expected.len()), "a prompt samples alike alone and in a list");
    }
}

#[tokio::test]
async fn the_default_is_sixteen_tokens() {
    let world = World::new(|_| say_until_length("x")).await;
    let body = world.completion(json!({"prompt": "a"})).await.json();
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(world.scheduler.submits()[0].max_new_tokens, 16);
}

#[tokio::test]
async fn echo_with_logprobs_describes_prompt_and_answer() {
    let script = |_: &_| {
        let mut script = vec![Action::PromptLogprobs];
        script.extend(say("c"));
        script
    };
    let world = World::new(script).await;
    let request = json!({"prompt": "éb", "echo": true, "logprobs": 1});
    let body = world.completion(request.clone()).await.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["text"], "ébc");
    let expected = json!({
        "tokens": ["<|bos|>", "bytes:\\xc3", "bytes:\\xa9", "b", "c"],
        "token_logprobs": [null, -0.5, -0.5, -0.5, -0.5],
        "top_logprobs": [null, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 0, 0, 1, 2],
    });
    assert_eq!(choice["logprobs"], expected);
    assert!(world.scheduler.submits()[0].sampling.prompt_logprobs);

    let mut streamed = request;
    streamed["stream"] = json!(true);
    let events = world.completion(streamed).await.events();
    let text: String = events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "ébc");
    let tokens: Vec<Value> = events
        .iter()
        .flat_map(|e| e["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone())
        .collect();
    assert_eq!(Value::from(tokens), expected["tokens"]);
}

#[tokio::test]
async fn echo_alone_returns_the_prompt_and_nothing_else() {
    let world = World::new(|_| say_until_length("x")).await;
    for stream in [false, true] {
        let answer = world
            .completion(json!({"prompt": bytes("ab"), "echo": true, "max_tokens": 0, "stream": stream}))
            .await;
        let choice = if stream {
            answer.events()[0]["choices"][0].clone()
        } else {
            answer.json()["choices"][0].clone()
        };
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("ab"), &json!("length")));
        if !stream {
            assert_eq!(answer.json()["usage"]["completion_tokens"], 0);
        }
    }
}

#[tokio::test]
async fn a_streamed_completion_carries_text_and_usage() {
    let world = World::new(|_| say("a€")).await;
    let events = world
        .completion(json!({"prompt": "p", "stream": true, "stream_options": {"include_usage": true}}))
        .await
        .events();
    let texts: Vec<&Value> = events.iter().filter_map(|e| e["choices"].get(0)).map(|c| &c["text"]).collect();
    assert_eq!(texts, ["a", "€", ""], "a character is never split");
    assert_eq!(events[2]["choices"][0]["finish_reason"], "stop");
    assert_eq!(events[3]["usage"]["completion_tokens"], 5);
}
