//! Chat completions, whole and streamed.

use crate::scheduler::{Action, say, say_until_length};
use crate::world::{BOS, EOS, World, ask, bytes};
use ashlar_protocol::serving::FinishReason;
use serde_json::{Value, json};

#[tokio::test]
async fn a_chat_answer_has_openais_shape() {
    let world = World::new(|_| say("Hello")).await;
    let answer = world.chat(ask(json!({"seed": 5}))).await;
    assert_eq!(answer.status, 200);
    let body = answer.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "tiny");
    assert_eq!(body["system_fingerprint"], "fp_abababababababab_n2");
    assert!(body["created"].as_u64().unwrap() > 1_600_000_000);
    let message = json!({"role": "assistant", "content": "Hello", "refusal": null});
    assert_eq!(
        body["choices"],
        json!([{"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"}])
    );
    // <|bos|><|user|>hi<|end|><|assistant|> and Hello with its end of sequence.
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12,
               "prompt_tokens_details": {"cached_tokens": 2}})
    );
    assert_eq!(answer.header("x-ashlar-seed"), "5");

    let submit = &world.scheduler.submits()[0];
    assert_eq!(submit.prompt, [BOS, 260, u32::from(b'h'), u32::from(b'i'), EOS, 261]);
    assert_eq!(submit.stop_tokens, [EOS]);
    assert_eq!(submit.max_new_tokens, 4096 - 6, "the rest of the context");
    assert_eq!((submit.sampling.seed, submit.sampling.temperature), (5, 1.0));
}

#[tokio::test]
async fn a_stream_names_the_role_then_content_then_the_reason_then_usage() {
    let world = World::new(|_| say("né")).await;
    let answer = world.chat(ask(json!({"stream": true, "stream_options": {"include_usage": true}}))).await;
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    let events = answer.events();
    let deltas: Vec<&Value> =
        events.iter().filter_map(|e| e["choices"].get(0)).map(|c| &c["delta"]).collect();
    assert_eq!(
        deltas,
        [
            &json!({"role": "assistant", "content": "", "refusal": null}),
            &json!({"content": "n"}),
            &json!({"content": "é"}),
            &json!({})
        ]
    );
    assert!(events.iter().all(|e| e["object"] == "chat.completion.chunk" && e["id"] == events[0]["id"]));
    let reasons: Vec<&Value> =
        events.iter().filter_map(|e| e["choices"].get(0)).map(|c| &c["finish_reason"]).collect();
    assert_eq!(reasons, [&Value::Null, &Value::Null, &Value::Null, &json!("stop")]);
    let last = events.last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(4)));
    assert_eq!(events[0]["usage"], Value::Null);
}

#[tokio::test]
async fn stop_strings_end_the_answer_across_tokens_and_cancel_the_rest() {
    let world = World::new(|_| {
        let mut script = say_until_length("keep<end>drop this too");
        script.insert(15, Action::Gate);
        script
    })
    .await;
    let stop = json!({"stop": ["<end>", "never"], "logprobs": true});
    let body = world.chat(ask(stop)).await.json();
    let choice = &body["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("keep"), &json!("stop")));
    assert_eq!(body["usage"]["completion_tokens"], 9);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
    assert_eq!(choice["logprobs"]["content"].as_array().unwrap().len(), 4);
    world.scheduler.until(|seen| seen.cancels.len() == 1).await;

    let streamed = world.chat(ask(json!({"stop": "<end>", "stream": true}))).await;
    let text: String = streamed
        .events()
        .iter()
        .filter_map(|e| e["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(text, "keep");

    let included = world.chat(ask(json!({"stop": "<end>", "include_stop_str_in_output": true}))).await.json();
    assert_eq!(included["choices"][0]["message"]["content"], "keep<end>");
}

#[tokio::test]
async fn logprobs_describe_each_token_of_the_content() {
    let world = World::new(|_| say("aé")).await;
    let body = world.chat(ask(json!({"logprobs": true, "top_logprobs": 2}))).await.json();
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 3, "a, and the two bytes of é, without the end of sequence");
    assert_eq!(content[0]["token"], "a");
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["bytes"], json!([97]));
    assert_eq!(content[0]["top_logprobs"][1], json!({"token": "b", "logprob": -1.5, "bytes": [98]}));
    assert_eq!(content[1]["bytes"], json!([0xc3]));
    assert_eq!(world.scheduler.submits()[0].sampling.top_logprobs, Some(2));

    let streamed = world.chat(ask(json!({"logprobs": true, "stream": true}))).await.events();
    let tokens: usize =
        streamed.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array().map(Vec::len)).sum();
    assert_eq!(tokens, 3);
}

#[tokio::test]
async fn n_choices_are_sampled_apart_and_answered_together() {
    let world = World::new(|submit| say(["zero", "one", "two"][submit.id.choice as usize])).await;
    let body = world.chat(ask(json!({"n": 3, "seed": 9}))).await.json();
    let texts: Vec<&Value> =
        body["choices"].as_array().unwrap().iter().map(|c| &c["message"]["content"]).collect();
    assert_eq!(texts, ["zero", "one", "two"]);
    assert_eq!(body["usage"]["prompt_tokens"], 6);
    assert_eq!(body["usage"]["completion_tokens"], 5 + 4 + 4);
    let submits = world.scheduler.submits();
    let indices: Vec<u32> = submits.iter().map(|submit| submit.sampling.choice_index).collect();
    assert_eq!(indices, [0, 1, 2]);
    assert!(submits.iter().all(|submit| submit.sampling.seed == 9));

    let events = world.chat(ask(json!({"n": 2, "stream": true}))).await.events();
    for (index, expected) in ["zero", "one"].iter().enumerate() {
        let text: String = events
            .iter()
            .filter(|e| e["choices"][0]["index"] == index)
            .filter_map(|e| e["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
            .collect();
        assert_eq!(text, *expected);
    }
}

#[tokio::test]
async fn every_sampling_field_reaches_the_scheduler() {
    let world = World::new(|_| say("x")).await;
    let fields = json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "presence_penalty": 0.1,
        "frequency_penalty": -0.2, "repetition_penalty": 1.1, "logit_bias": {"98": 5, "97": -100}, "seed": -1,
        "min_tokens": 2, "stop_token_ids": [65], "ignore_eos": true, "priority": -3, "max_completion_tokens": 7,
    });
    assert_eq!(world.chat(ask(fields)).await.status, 200);
    let submit = &world.scheduler.submits()[0];
    let sampling = &submit.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.5, 0.9, 40, 0.05));
    assert_eq!(
        (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty),
        (0.1, -0.2, 1.1)
    );
    assert_eq!(sampling.logit_bias, [(97, -100.0), (98, 5.0)]);
    assert_eq!((sampling.seed, sampling.min_tokens), (u64::MAX, 2));
    assert_eq!(sampling.stop_token_ids, [EOS, 65], "what min_tokens holds back");
    assert_eq!(submit.stop_tokens, [65], "ignore_eos leaves the client's own");
    assert_eq!((submit.priority, submit.max_new_tokens), (-3, 7));
}

#[tokio::test]
async fn a_missing_seed_is_drawn_and_told() {
    let world = World::new(|_| say("x")).await;
    let answer = world.chat(ask(json!({}))).await;
    let seed: u64 = answer.header("x-ashlar-seed").parse().unwrap();
    assert_eq!(world.scheduler.submits()[0].sampling.seed, seed);
    assert!(seed < 1 << 53, "any client can send it back");
}

#[tokio::test]
async fn unknown_fields_are_ignored_with_a_warning() {
    let world = World::new(|_| say("x")).await;
    let answer = world.chat(ask(json!({"store": true, "reasoning_effort": "low", "user": "u"}))).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("x-ashlar-warning"), "ignored unknown fields: store, reasoning_effort");
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "strcit": true, "schema": {}}});
    let tools = json!([{"type": "function", "function": {"name": "f", "paramters": {}}}]);
    let nested =
        json!({"response_format": format, "tools": tools, "stream_options": {"a": 1}, "stream": true});
    let answer = world.chat(ask(nested)).await;
    let warning = answer.header("x-ashlar-warning");
    for path in ["response_format.json_schema.strcit", "tools[0].function.paramters", "stream_options.a"] {
        assert!(warning.contains(path), "{path}: {warning}");
    }
}

#[tokio::test]
async fn the_request_id_is_the_clients_own_if_it_gave_one() {
    let world = World::new(|_| say("x")).await;
    let request = hyper::Request::post("/v1/chat/completions").header("x-request-id", "mine-1");
    let answer = world.http.send(request, ask(json!({})).to_string().into_bytes()).await;
    assert_eq!(answer.header("x-request-id"), "mine-1");
    assert_eq!(world.http.get("/health").await.header("x-request-id").len(), 32);
}

#[tokio::test]
async fn a_receipt_comes_only_when_asked_for() {
    let world = World::new(|_| say("x")).await;
    assert!(world.chat(ask(json!({}))).await.json().get("ashlar").is_none());
    let body = world.chat(ask(json!({"ashlar_receipt": true}))).await.json();
    let stage = json!({"compute_us": 7, "wait_us": 0, "collective_us": 0, "send_us": 0, "sent_bytes": 0});
    let expected = json!({
        "queue_ms": 3, "prefill_ms": 4, "decode_ms": 5, "cached_tokens": 2, "preemptions": 0, "replays": 0, "stages": [stage],
    });
    assert_eq!(body["ashlar"], expected);
}

#[tokio::test]
async fn content_parts_and_the_developer_role_reach_the_template() {
    let world = World::new(|_| say("x")).await;
    let messages = json!([
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]);
    assert_eq!(world.chat(json!({"messages": messages})).await.status, 200);
    let mut expected = vec![BOS, 259, u32::from(b's'), EOS, 260];
    expected.extend(bytes("a\nb"));
    expected.extend([EOS, 261]);
    assert_eq!(world.scheduler.submits()[0].prompt, expected);
}

#[tokio::test]
async fn an_idle_stream_is_kept_alive_by_comments() {
    let script = |_: &_| vec![Action::Gate, Action::Token(97), Action::Finish(FinishReason::Length)];
    let world = World::with(crate::world::PLAIN_TEMPLATE, |config| config.keep_alive_ms = 5, script).await;
    let mut stream = world.http.stream("/v1/chat/completions", ask(json!({"stream": true}))).await;
    assert_eq!(stream.next().await.unwrap(), ": keep-alive");
    assert_eq!(stream.next().await.unwrap(), ": keep-alive");
    world.scheduler.open_gate();
    let rest = stream.rest().await;
    assert!(rest.iter().any(|event| event.contains("\"content\":\"a\"")));
    assert_eq!(rest.last().unwrap(), "data: [DONE]");
}
