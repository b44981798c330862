//! `/v1/responses`: items in and out, events, and what is refused. What outlives a process is tested over real ones.

use crate::http::Answer;
use crate::scheduler::{Action, say, say_until_length};
use crate::world::{PLAIN_TEMPLATE, World};
use ashlar_protocol::serving::{FailureKind, FinishReason};
use ashlar_vocabulary::GrammarSpec;
use serde_json::{Value, json};

const PATH: &str = "/v1/responses";
const TOOLS: &str = "{{ bos_token }}{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}\
     <|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}\
     {{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|end|>{% endfor %}<|assistant|>";
const CALL: &str = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";

fn ask(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "input": "hi"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The events of a stream, each of which is named as it says.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let text = answer.text();
    let frames = text.split("\n\n").filter(|frame| !frame.is_empty() && !frame.starts_with(':'));
    let events: Vec<Value> = frames
        .map(|frame| {
            let (name, data) = frame.split_once('\n').unwrap();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(name.strip_prefix("event: ").unwrap(), data["type"], "{frame}");
            data
        })
        .collect();
    for (place, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], place);
    }
    events
}

fn kinds(events: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    kinds
}

/// The prompt that the scheduler got, as text.
fn prompt(world: &World) -> String {
    let submit = world.scheduler.submits().last().unwrap().clone();
    let special = |token: u32| match token {
        257 => "<s>".to_owned(),
        byte => char::from(byte as u8).to_string(),
    };
    submit.prompt.iter().map(|token| special(*token)).collect()
}

#[tokio::test]
async fn a_text_is_answered_with_a_message_and_the_whole_request() {
    let world = World::new(|_| say("Hello.")).await;
    let body = ask(
        json!({"instructions": "Be kind.", "temperature": 0.5, "metadata": {"a": "b"}, "max_output_tokens": 20}),
    );
    let answer = world.http.post(PATH, body).await;
    let response = answer.json();
    assert_eq!(answer.status, 200, "{response}");
    let id = response["id"].as_str().unwrap();
    assert!(id.starts_with("resp_") && id.len() == 37, "{id}");
    let output = &response["output"];
    assert_eq!(output.as_array().unwrap().len(), 1);
    assert_eq!(
        (&output[0]["type"], &output[0]["role"], &output[0]["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    let part = json!({"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []});
    assert_eq!(output[0]["content"], json!([part]));
    for (field, value) in [
        ("object", json!("response")),
        ("status", json!("completed")),
        ("model", json!("tiny")),
        ("instructions", json!("Be kind.")),
        ("temperature", json!(0.5)),
        ("max_output_tokens", json!(20)),
        ("metadata", json!({"a": "b"})),
        ("store", json!(false)),
        ("background", json!(false)),
        ("error", Value::Null),
        ("incomplete_details", Value::Null),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("text", json!({"format": {"type": "text"}})),
    ] {
        assert_eq!(response[field], value, "{field}");
    }
    let usage = &response["usage"];
    assert_eq!(usage["output_tokens"], 7);
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], 2);
    assert_eq!(usage["total_tokens"].as_u64(), Some(usage["input_tokens"].as_u64().unwrap() + 7));
    assert!(prompt(&world).contains("Be kind.") && !world.scheduler.submits()[0].kept);
    assert!(answer.headers.contains_key("x-ashlar-seed"));
}

#[tokio::test]
async fn a_stream_tells_item_part_and_text_from_beginning_to_end() {
    let world = World::new(|_| say_until_length("ab")).await;
    let body = ask(json!({"stream": true, "top_logprobs": 1, "include": ["message.output_text.logprobs"]}));
    let events = events(&world.http.post(PATH, body).await);
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ];
    assert_eq!(kinds(&events), expected);
    let deltas: Vec<&Value> =
        events.iter().filter(|event| event["type"] == "response.output_text.delta").collect();
    let texts: Vec<_> = deltas.iter().map(|delta| delta["delta"].as_str().unwrap()).collect();
    assert_eq!(texts, ["a", "b"]);
    assert_eq!(deltas[0]["logprobs"][0]["top_logprobs"].as_array().unwrap().len(), 1);
    let last = events.last().unwrap();
    assert_eq!(last["response"]["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(last["response"]["output"][0]["status"], "incomplete");
    let item = events.iter().find(|event| event["type"] == "response.output_item.done").unwrap();
    assert_eq!(item["item"], last["response"]["output"][0]);
    assert_eq!(item["item"]["id"], deltas[0]["item_id"]);
}

#[tokio::test]
async fn a_call_is_an_item_and_its_result_goes_back_to_the_model() {
    let world = World::with(TOOLS, |_| {}, |_| say(CALL)).await;
    let tools = json!([{"type": "function", "name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}]);
    for choice in [json!("auto"), json!("required"), json!({"type": "function", "name": "weather"})] {
        let body = ask(json!({"tools": tools, "tool_choice": choice}));
        let response = world.http.post(PATH, body.clone()).await.json();
        let item = &response["output"][0];
        assert_eq!(
            (&item["type"], &item["name"]),
            (&json!("function_call"), &json!("weather")),
            "{response}"
        );
        assert_eq!(
            serde_json::from_str::<Value>(item["arguments"].as_str().unwrap()).unwrap(),
            json!({"city": "Oslo"})
        );
        assert_eq!((&response["tools"], &response["tool_choice"]), (&tools, &choice));

        let mut streamed = body;
        streamed["stream"] = json!(true);
        let events = events(&world.http.post(PATH, streamed).await);
        assert!(kinds(&events).contains(&"response.function_call_arguments.delta"));
        let done =
            events.iter().find(|event| event["type"] == "response.function_call_arguments.done").unwrap();
        assert_eq!(done["arguments"], item["arguments"]);
    }
    assert!(
        world.scheduler.submits().iter().all(|s| matches!(s.sampling.grammar, Some(GrammarSpec::Lark(_))))
    );

    let items = json!([
        {"role": "user", "content": "Weather?"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{\"city\":\"Oslo\"}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]);
    world.http.post(PATH, ask(json!({"input": items}))).await;
    let prompt = prompt(&world);
    assert!(prompt.contains("weather({\"city\": \"Oslo\"})") && prompt.contains("rain"), "{prompt}");
}

#[tokio::test]
async fn a_schema_constrains_the_answer() {
    let world = World::new(|_| say("{}")).await;
    let schema = json!({"type": "object"});
    let format = json!({"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": true}});
    let response = world.http.post(PATH, ask(json!({"text": format}))).await.json();
    assert_eq!(response["text"], format, "{response}");
    let grammar = world.scheduler.submits()[0].sampling.grammar.clone();
    assert_eq!(grammar, Some(GrammarSpec::JsonSchema(schema.to_string())));
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_by_its_field() {
    let world = World::new(|_| say("x")).await;
    for (more, param) in [
        (json!({"input": null}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type"),
        (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input[0].content[0]"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"max_output_tokens": 5000}), "max_output_tokens"),
        (json!({"temperature": 3}), "temperature"),
        (json!({"n": 2}), "n"),
        (json!({"store": true}), "store"),
        (json!({"background": true}), "background"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"metadata": {"a": 1}}), "metadata"),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format.type"),
        (json!({"text": {"format": {"type": "json_schema", "name": "x"}}}), "text.format.schema"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function", "name": ""}]}), "tools[0].name"),
        (json!({"tool_choice": {"type": "function", "name": "f"}}), "tool_choice"),
        (json!({"top_logprobs": 21}), "top_logprobs"),
        (json!({"include": [1]}), "include"),
        (json!({"instructions": 1}), "instructions"),
    ] {
        let answer = world.http.post(PATH, ask(more.clone())).await;
        assert_eq!(
            (answer.status, &answer.json()["error"]["param"]),
            (400, &json!(param)),
            "{more}: {}",
            answer.text()
        );
    }
    let missing = world.http.post(PATH, ask(json!({"previous_response_id": "resp_1"}))).await;
    assert_eq!(missing.status, 404, "{}", missing.text());
    assert_eq!(world.http.post(PATH, ask(json!({"model": "other"}))).await.status, 404);
    for path in ["/v1/responses/resp_1", "/v1/responses/x/input_items"] {
        assert_eq!(world.http.get(path).await.status, 404);
    }
    let unknown = world.http.post(PATH, ask(json!({"colour": "blue"}))).await;
    assert_eq!(unknown.headers["x-ashlar-warning"], "ignored unknown fields: colour");
    assert!(world.scheduler.submits().len() == 1, "nothing that was refused is computed");
}

#[tokio::test]
async fn a_failure_before_the_first_output_has_its_status_and_later_an_event() {
    let world = World::new(|_| vec![Action::Fail(FailureKind::Overloaded, "busy")]).await;
    for stream in [false, true] {
        let answer = world.http.post(PATH, ask(json!({"stream": stream}))).await;
        assert_eq!(answer.status, 429, "{}", answer.text());
    }
    let world = World::new(|_| vec![Action::Token(97), Action::Fail(FailureKind::Internal, "broken")]).await;
    let events = events(&world.http.post(PATH, ask(json!({"stream": true}))).await);
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(last["response"]["error"], json!({"code": "server_error", "message": "broken"}));
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], "a");
}

#[tokio::test]
async fn a_client_that_goes_takes_a_response_with_it_that_is_not_stored() {
    let script =
        || vec![Action::Token(97), Action::Gate, Action::Token(98), Action::Finish(FinishReason::Length)];
    let world = World::with(PLAIN_TEMPLATE, |_| {}, move |_| script()).await;
    let mut stream = world.http.stream(PATH, ask(json!({"stream": true}))).await;
    stream.next().await.unwrap();
    drop(stream);
    world.scheduler.until(|seen| seen.cancels.len() == 1).await;
}
