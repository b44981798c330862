//! Bad input: each a clear message with its field, nothing hangs, and a stream beside it is not disturbed.

use crate::http::Answer;
use crate::scheduler::{Action, say};
use crate::world::{World, ask};
use ashlar_protocol::serving::{FailureKind, FinishReason};
use serde_json::{Value, json};

fn assert_envelope(answer: &Answer, status: u16, param: Option<&str>, what: &str) {
    assert_eq!(answer.status, status, "{what}: {}", answer.text());
    let error = &answer.json()["error"];
    assert_eq!(error["param"].as_str(), param, "{what}: {error}");
    assert!(error["type"].is_string() && error.get("code").is_some(), "{what}: {error}");
    assert!(error["message"].as_str().is_some_and(|message| message.len() > 10), "{what}: {error}");
}

/// Fields that make a good chat request bad, and the parameter that is at fault.
fn bad_chats() -> Vec<(Value, &'static str)> {
    let tool = |name: Value| json!({"tools": [{"type": "function", "function": {"name": name}}]});
    let with_tool = |choice: Value| json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": choice});
    let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}});
    vec![
        (json!({"model": 5}), "model"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": [1]}), "messages[0]"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "robot", "content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0]",
        ),
        (json!({"messages": [{"role": "assistant", "tool_calls": {}}]}), "messages[0].tool_calls"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1_000_000}), "n"),
        (json!({"n": 1.5}), "n"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": "many"}), "max_tokens"),
        (json!({"max_tokens": 1e300}), "max_tokens"),
        (json!({"max_completion_tokens": 5000}), "max_completion_tokens"),
        (json!({"min_tokens": -1}), "min_tokens"),
        (json!({"min_tokens": 9, "max_tokens": 8}), "min_tokens"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop": [""]}), "stop"),
        (json!({"stop": vec!["a"; 17]}), "stop"),
        (json!({"stop": ["a".repeat(2000)]}), "stop"),
        (json!({"seed": "x"}), "seed"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"99999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias"),
        (json!({"logit_bias": []}), "logit_bias"),
        (json!({"stop_token_ids": [99999]}), "stop_token_ids"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (json!({"response_format": "json"}), "response_format"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (schema(json!("x")), "response_format.json_schema.schema"),
        (schema(json!({"type": "no such type"})), "response_format"),
        (schema(json!({"$ref": "#/nowhere"})), "response_format"),
        (json!({"tools": {}}), "tools"),
        (json!({"tools": [1]}), "tools[0]"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (tool(json!("a b")), "tools[0].function.name"),
        (tool(json!(5)), "tools[0].function.name"),
        (with_tool(json!("maybe")), "tool_choice"),
        (with_tool(json!({"type": "function", "function": {"name": "g"}})), "tool_choice"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"chat_template_kwargs": []}), "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"messages": 1}}), "chat_template_kwargs"),
        (json!({"user": 5}), "user"),
        (json!({"priority": 1e12}), "priority"),
    ]
}

#[tokio::test]
async fn every_bad_field_of_a_chat_is_named_with_a_400() {
    let world = World::new(|_| say("x")).await;
    for (fields, param) in bad_chats() {
        let answer = world.chat(ask(fields.clone())).await;
        assert_envelope(&answer, 400, Some(param), &fields.to_string());
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    assert!(world.scheduler.submits().is_empty(), "nothing of it was submitted");
}

#[tokio::test]
async fn every_bad_field_of_a_completion_is_named_with_a_400() {
    let world = World::new(|_| say("x")).await;
    let cases = [
        (json!({}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": {}}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [99999]}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": ["a", 1]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": vec!["a"; 129]}), "prompt"),
        (json!({"prompt": vec!["a"; 100], "n": 3}), "n"),
        (json!({"prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"prompt": "a", "logprobs": 21}), "logprobs"),
        (json!({"prompt": "a", "logprobs": true}), "logprobs"),
        (json!({"prompt": "a", "echo": 1}), "echo"),
        (json!({"prompt": "a", "max_tokens": 0}), "max_tokens"),
        (json!({"prompt": "a", "max_tokens": 4096}), "max_tokens"),
        (json!({"prompt": "a".repeat(5000)}), "prompt"),
    ];
    for (body, param) in cases {
        let what: String = body.to_string().chars().take(80).collect();
        assert_envelope(&world.completion(body).await, 400, Some(param), &what);
    }
}

#[tokio::test]
async fn too_many_tokens_are_refused_with_the_numbers() {
    let world = World::new(|_| say("x")).await;
    let answer = world.chat(ask(json!({"max_tokens": 4096}))).await;
    assert_eq!(
        answer.json()["error"]["message"],
        "This model's maximum context length is 4096 tokens. However, you requested 4102 tokens (6 in the messages, \
         4096 in the completion). Please reduce the length of the messages or `max_tokens`."
    );
    assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
}

#[tokio::test]
async fn malformed_bodies_are_400_and_unknown_things_404_405_413() {
    let world = World::with(
        crate::world::PLAIN_TEMPLATE,
        |config| config.request_body_bytes_max = 300_000,
        |_| say("x"),
    )
    .await;
    let path = "/v1/chat/completions";
    let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    let deep_in_field = [b"{\"messages\":".to_vec(), vec![b'['; 100_000]].concat();
    let malformed: [&[u8]; 8] = [
        b"",
        b"  ",
        b"{",
        b"[]",
        b"{\"messages\": \"\xff\xfe\"}",
        b"{\"model\": \"\\ud800\"}",
        &deep,
        &deep_in_field,
    ];
    for body in malformed {
        let what = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        assert_envelope(&world.http.post_bytes(path, body.to_vec()).await, 400, None, &what);
    }
    assert_envelope(&world.chat(ask(json!({"model": "gpt-9"}))).await, 404, Some("model"), "model");
    assert_envelope(&world.http.get("/v1/nothing").await, 404, None, "path");
    assert_envelope(&world.http.get(path).await, 405, None, "method");
    assert_envelope(&world.http.post_bytes(path, vec![b' '; 400_000]).await, 413, None, "size");

    let chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    let flood =
        [chunked.to_vec(), b"61A80\r\n".to_vec(), vec![b' '; 400_000], b"\r\n0\r\n\r\n".to_vec()].concat();
    assert!(world.http.raw(&flood).await.starts_with("HTTP/1.1 413"), "an unannounced size is limited too");
    assert!(world.http.raw(b"nonsense\r\n\r\n").await.starts_with("HTTP/1.1 400"));
}

#[tokio::test]
async fn a_body_that_never_comes_is_a_408() {
    let world =
        World::with(crate::world::PLAIN_TEMPLATE, |config| config.body_timeout_ms = 50, |_| say("x")).await;
    let head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{";
    assert!(world.http.raw(head).await.starts_with("HTTP/1.1 408"));
}

#[tokio::test]
async fn failures_of_the_scheduler_have_their_status() {
    let cases = [
        (FailureKind::Invalid, 400, ""),
        (FailureKind::UnknownModel, 404, ""),
        (FailureKind::Overloaded, 429, "3"),
        (FailureKind::Unavailable, 503, "3"),
        (FailureKind::DeadlineExceeded, 504, ""),
        (FailureKind::Internal, 500, ""),
    ];
    for (kind, status, retry_after) in cases {
        let world = World::new(move |_| vec![Action::Fail(kind, "for this reason")]).await;
        for stream in [false, true] {
            let answer = world.chat(ask(json!({"stream": stream}))).await;
            assert_eq!(
                answer.status, status,
                "before the first token, a stream's failure has its status too"
            );
            assert_eq!(answer.header("retry-after"), retry_after);
            assert_eq!(answer.json()["error"]["message"], "for this reason");
        }
    }
}

/// The scheduler is asked about the first of them, and again now and then; about what is more urgent, always.
#[tokio::test]
async fn who_asks_right_after_a_refusal_is_refused_without_a_question() {
    let world = World::new(|_| vec![Action::Fail(FailureKind::Overloaded, "190 requests wait")]).await;
    let mut asked = 0;
    while world.scheduler.submits().len() == asked {
        assert!(asked < 1_000, "the scheduler was asked about each of {asked}");
        for (path, body) in [
            ("/v1/chat/completions", ask(json!({}))),
            ("/v1/completions", json!({"prompt": "a", "stream": true})),
            ("/v1/responses", json!({"input": "a"})),
        ] {
            let answer = world.http.post(path, body).await;
            assert_eq!((answer.status, answer.header("retry-after")), (429, "3"));
            assert_eq!(answer.json()["error"]["message"], "190 requests wait");
            asked += 1;
        }
    }
    let page = world.http.get("/metrics").await.text();
    let count = |line: &&str| line.starts_with("ashlar_turned_away_total") && line.contains("429");
    let turned_away = page.lines().find(count).and_then(|line| line.rsplit(' ').next());
    assert_eq!(turned_away, Some((asked - world.scheduler.submits().len()).to_string().as_str()));

    let before = world.scheduler.submits().len();
    assert_eq!(world.chat(ask(json!({"priority": -1}))).await.status, 429);
    assert_eq!(world.scheduler.submits().len(), before + 1);
}

#[tokio::test]
async fn a_failure_within_a_stream_is_its_last_event() {
    let script = |_: &_| vec![Action::Token(97), Action::Fail(FailureKind::Internal, "broke")];
    let world = World::new(script).await;
    let events = world.chat(ask(json!({"stream": true}))).await.events();
    assert_eq!(events[1]["choices"][0]["delta"]["content"], "a");
    assert_eq!(events.last().unwrap()["error"]["message"], "broke");
}

#[tokio::test]
async fn a_stream_beside_bad_input_is_not_disturbed() {
    let text = "undisturbed ".repeat(40);
    let said = text.clone();
    let world = World::new(move |_| {
        let mut script: Vec<Action> =
            said.bytes().flat_map(|byte| [Action::Token(u32::from(byte)), Action::Yield]).collect();
        script.insert(20, Action::Gate);
        script.push(Action::Finish(FinishReason::Length));
        script
    })
    .await;
    let mut witness = world.http.stream("/v1/chat/completions", ask(json!({"stream": true}))).await;
    witness.next().await.unwrap();
    let mut attacks = Vec::new();
    for round in 0..4 {
        for body in [
            vec![b'['; 100_000],
            b"{\"messages\": [{\"role\": \"\xc3\"}]}".to_vec(),
            vec![b'x'; 1 << 20],
            vec![round; 9],
        ] {
            let http = world.http;
            attacks.push(tokio::spawn(
                async move { http.post_bytes("/v1/chat/completions", body).await.status },
            ));
        }
        let http = world.http;
        let alternatives = json!({"anyOf": (0..300).map(|i| json!({"const": i.to_string().repeat(50)})).collect::<Vec<_>>()});
        let schema =
            ask(json!({"response_format": {"type": "json_schema", "json_schema": {"schema": alternatives}}}));
        attacks.push(tokio::spawn(async move { http.post("/v1/chat/completions", schema).await.status }));
    }
    world.scheduler.open_gate();
    let events = witness.rest().await;
    for attack in attacks {
        let status = attack.await.unwrap();
        assert!(status == 400 || status == 200, "{status}");
    }
    let heard: String = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event.strip_prefix("data: ")?).ok())
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(heard, text);
}
