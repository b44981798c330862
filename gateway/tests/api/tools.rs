//! Constraints: JSON, schemas, tools; and what is read back from the answer.

use crate::scheduler::say;
use crate::world::{PLAIN_TEMPLATE, World, ask};
use ashlar_vocabulary::GrammarSpec;
use serde_json::{Value, json};

const HERMES: &str = "{{ bos_token }}{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}\
     <|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}\
     {{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|end|>{% endfor %}<|assistant|>";

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}])
}

const CALL: &str = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";

#[tokio::test]
async fn a_tool_call_is_read_from_the_models_own_format() {
    let world = World::with(HERMES, |_| {}, |_| say(CALL)).await;
    for choice in
        [json!("auto"), json!("required"), json!({"type": "function", "function": {"name": "weather"}})]
    {
        let body = world.chat(ask(json!({"tools": tools(), "tool_choice": choice}))).await.json();
        let message = &body["choices"][0]["message"];
        assert_eq!(message["content"], Value::Null, "{body}");
        let call = &message["tool_calls"][0];
        assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("weather")));
        assert!(call["id"].as_str().unwrap().starts_with("call_"));
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert_eq!(arguments, json!({"city": "Oslo"}));
        assert_eq!(body["choices"][0]["finish_reason"], "tool_calls");
    }
    assert!(
        world.scheduler.submits().iter().all(|s| matches!(s.sampling.grammar, Some(GrammarSpec::Lark(_))))
    );
}

#[tokio::test]
async fn a_streamed_tool_call_names_itself_first_and_then_its_arguments() {
    let world = World::with(HERMES, |_| {}, |_| say(CALL)).await;
    let events = world.chat(ask(json!({"tools": tools(), "stream": true}))).await.events();
    let calls: Vec<Value> =
        events.iter().filter_map(|e| e["choices"][0]["delta"]["tool_calls"].get(0).cloned()).collect();
    assert_eq!(calls[0]["index"], 0);
    assert_eq!((&calls[0]["type"], &calls[0]["function"]["name"]), (&json!("function"), &json!("weather")));
    assert!(calls[0]["id"].is_string());
    assert!(calls[1..].iter().all(|call| call.get("id").is_none()));
    let arguments: String =
        calls.iter().filter_map(|call| call["function"]["arguments"].as_str().map(str::to_owned)).collect();
    assert_eq!(serde_json::from_str::<Value>(&arguments).unwrap(), json!({"city": "Oslo"}));
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    assert!(events.iter().all(|e| e["choices"][0]["delta"]["content"].as_str().is_none_or(str::is_empty)));
}

#[tokio::test]
async fn text_instead_of_a_call_is_content() {
    let world = World::with(HERMES, |_| {}, |_| say("No need.")).await;
    let body = world.chat(ask(json!({"tools": tools()}))).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "No need.");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let none = world.chat(ask(json!({"tools": tools(), "tool_choice": "none"}))).await;
    assert_eq!(none.status, 200);
    assert_eq!(world.scheduler.submits()[1].sampling.grammar, None);
}

#[tokio::test]
async fn past_calls_and_their_results_reach_the_template_as_objects() {
    let world = World::with(HERMES, |_| {}, |_| say("Sunny.")).await;
    let messages = json!([
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": "{\"city\": \"Oslo\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]);
    let answer = world.chat(json!({"messages": messages, "tools": tools()})).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let prompt = world.scheduler.submits()[0].prompt.clone();
    let text: Vec<u8> = prompt.iter().filter_map(|token| u8::try_from(*token).ok()).collect();
    assert!(String::from_utf8_lossy(&text).contains("weather({\"city\": \"Oslo\"})"));
}

#[tokio::test]
async fn a_model_without_a_tool_format_is_still_held_to_a_required_call() {
    let world = World::new(|_| say(CALL)).await;
    let body = world.chat(ask(json!({"tools": tools(), "tool_choice": "required"}))).await.json();
    assert_eq!(body["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "weather");
}

#[tokio::test]
async fn json_and_schemas_constrain_the_answer() {
    let world = World::new(|_| say("{}")).await;
    let object = json!({"response_format": {"type": "json_object"}});
    assert_eq!(world.chat(ask(object)).await.status, 200);
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let format = json!({"response_format": {"type": "json_schema", "json_schema": {
        "name": "s", "strict": true, "schema": schema}}});
    assert_eq!(world.chat(ask(format)).await.json()["choices"][0]["message"]["content"], "{}");
    assert_eq!(world.chat(ask(json!({"response_format": {"type": "text"}}))).await.status, 200);
    let grammars: Vec<_> = world.scheduler.submits().into_iter().map(|s| s.sampling.grammar).collect();
    assert_eq!(
        grammars,
        [Some(GrammarSpec::JsonObject), Some(GrammarSpec::JsonSchema(schema.to_string())), None]
    );
}

#[tokio::test]
async fn reasoning_is_told_apart_where_the_template_marks_it() {
    let template = format!("{PLAIN_TEMPLATE}{{# <think></think> #}}");
    let world = World::with(&template, |_| {}, |_| say("<think>why</think>because")).await;
    let message = world.chat(ask(json!({}))).await.json()["choices"][0]["message"].clone();
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("why"), &json!("because")));
    let events = world.chat(ask(json!({"stream": true}))).await.events();
    let part = |name: &str| -> String {
        events.iter().filter_map(|e| e["choices"][0]["delta"][name].as_str().map(str::to_owned)).collect()
    };
    assert_eq!((part("reasoning_content"), part("content")), ("why".into(), "because".into()));
}

#[tokio::test]
async fn an_answer_comes_back_as_history_with_its_nulls() {
    // As Llama 3's template asks: whether the field is there.
    let template = "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% endif %}\
         {{ 'x' + m.content }}{% endfor %}";
    let world = World::with(template, |_| {}, |_| say("ok")).await;
    let nulls = json!({"role": "assistant", "content": "a", "tool_calls": null, "function_call": null, "refusal": null});
    for message in [
        nulls,
        json!({"role": "assistant", "content": null}),
        json!({"role": "assistant", "content": "a", "tool_calls": []}),
        json!({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}),
    ] {
        let messages = json!([{"role": "user", "content": "q"}, message, {"role": "user", "content": "r"}]);
        let answer = world.chat(ask(json!({"messages": messages}))).await;
        assert_eq!(answer.status, 200, "{message}: {}", answer.text());
    }
}

#[tokio::test]
async fn tools_that_may_be_called_and_a_schema_go_together() {
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}});
    let world = World::with(HERMES, |_| {}, |_| say(CALL)).await;
    let answer = world.chat(ask(json!({"tools": tools(), "response_format": format.clone()}))).await.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{answer}");
    let world = World::with(HERMES, |_| {}, |_| say("{\"a\": 1}")).await;
    let answer = world.chat(ask(json!({"tools": tools(), "response_format": format}))).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "{\"a\": 1}", "{answer}");
}
