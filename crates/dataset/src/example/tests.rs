#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use serde_json::json;

fn problem(line: Value) -> String {
    match Example::parse(line.to_string().as_bytes()) {
        Ok(example) => panic!("{line} is taken for {example:?}"),
        Err(problem) => problem.to_string(),
    }
}

fn chat(messages: Value) -> Value {
    json!({"messages": messages})
}

fn user() -> Value {
    json!({"role": "user", "content": "q"})
}

fn assistant() -> Value {
    json!({"role": "assistant", "content": "a"})
}

#[test]
fn formats_are_told_by_their_fields() {
    let format = |line: Value| Example::parse(line.to_string().as_bytes()).unwrap().format();
    assert_eq!(format(chat(json!([user(), assistant()]))), Format::Chat);
    assert_eq!(format(json!({"prompt": "", "completion": "c"})), Format::Completion);
    assert_eq!(format(json!({"text": "t", "id": 7})), Format::Text);
    // Data sets often carry several; null counts as absent.
    assert_eq!(format(json!({"text": "t", "prompt": "p", "messages": [user(), assistant()]})), Format::Chat);
    assert_eq!(format(json!({"text": "t", "messages": null, "tools": null})), Format::Text);
    let pair = json!({
        "input": {"messages": [user()], "tools": [], "parallel_tool_calls": true},
        "preferred_output": [assistant()],
        "non_preferred_output": [assistant()],
    });
    assert_eq!(format(pair), Format::Preference);
}

#[test]
fn messages_become_what_the_gateway_gives_a_template() {
    let line = chat(json!([
        {"role": "developer", "content": "s"},
        {"role": "user", "content": "q", "name": null},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}], "weight": 0},
        {"role": "tool", "tool_call_id": "1", "content": ""},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": [], "weight": 1, "refusal": null},
    ]));
    let Example::Chat(chat) = Example::parse(line.to_string().as_bytes()).unwrap() else { panic!() };
    assert_eq!(chat.trained, [4]);
    assert_eq!(
        Value::Array(chat.messages),
        json!([
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}], "content": null},
            {"role": "tool", "tool_call_id": "1", "content": ""},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ])
    );
}

#[test]
fn a_line_that_is_no_object_says_where() {
    let parse = |line: &[u8]| Example::parse(line).unwrap_err().to_string();
    assert!(parse(b"{\"text\": \"a\xff\"}").contains("byte 11"));
    assert!(parse(b"{\"text\": \"a\"").contains("it ends too early at column 12"));
    assert!(parse(b"{\"text\": a}").contains("a syntax error at column 10"));
    assert!(parse(b"[1]").contains("an array"));
    assert!(parse(b"{}").contains("none of"));
    // As deep as the stack would not bear.
    let deep = [b"{\"text\":".to_vec(), vec![b'['; 1_000_000]].concat();
    assert!(parse(&deep).contains("more than 250000 values"));
    let deep = [b"{\"text\":".to_vec(), vec![b'['; 100_000]].concat();
    assert!(parse(&deep).contains("not valid JSON"));
    let wide = format!("{{\"text\": \"t\", \"x\": [0{}]}}", ",0".repeat(250_000));
    assert!(parse(wide.as_bytes()).contains("more than 250000 values"));
    // What stands in a string does not count.
    let text = json!({"text": "[{,\\\"".repeat(100_000)});
    assert!(Example::parse(text.to_string().as_bytes()).is_ok());
}

#[test]
fn what_is_wrong_is_named_by_its_path() {
    let tool = json!({"role": "tool", "tool_call_id": "1", "content": "r"});
    for (line, expected) in [
        (chat(json!([])), "`messages` is empty"),
        (chat(json!("x")), "`messages` must be an array of messages, not a string"),
        (chat(json!([user(), "x"])), "`messages[1]` must be an object, not a string"),
        (chat(json!([{"content": "q"}, assistant()])), "`messages[0].role` is missing"),
        (chat(json!([{"role": "bot", "content": "q"}])), "`messages[0].role` must be system"),
        (chat(json!([{"role": 1, "content": "q"}])), "`messages[0].role` must be a string, not a number"),
        (chat(json!([{"role": "user"}, assistant()])), "`messages[0].content` is missing"),
        (chat(json!([{"role": "user", "content": " \n"}, assistant()])), "`messages[0].content` is empty"),
        (chat(json!([user(), {"role": "assistant", "content": []}])), "`messages[1].content` is empty"),
        (chat(json!([user(), {"role": "assistant"}])), "`messages[1].content` is missing"),
        (
            chat(json!([{"role": "user", "content": 1}, assistant()])),
            "`messages[0].content` must be a string or",
        ),
        (
            chat(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])),
            "`messages[0].content[0]` must be a part of type `text`",
        ),
        (chat(json!([user()])), "`messages` has no assistant message"),
        (chat(json!([{"role": "system", "content": "s"}, assistant()])), "`messages` has no user message"),
        (
            chat(json!([user(), {"role": "assistant", "content": "a", "weight": 0}])),
            "every assistant message has weight 0",
        ),
        (
            chat(json!([user(), {"role": "assistant", "content": "a", "weight": 0.5}])),
            "`messages[1].weight` must be 0 or 1",
        ),
        (
            chat(json!([user(), {"role": "assistant", "content": "a", "weight": true}])),
            "`messages[1].weight` must be 0 or 1",
        ),
        (
            chat(json!([{"role": "user", "content": "q", "weight": 1}, assistant()])),
            "`messages[0].weight` is only allowed in an assistant message",
        ),
        (chat(json!([user(), tool, assistant()])), "`messages[1]` is a tool's answer"),
        (
            chat(json!([user(), {"role": "assistant", "content": "", "tool_calls": [{}]}])),
            "`messages[1].tool_calls[0].function` is missing",
        ),
        (
            chat(
                json!([user(), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]),
            ),
            "`messages[1].tool_calls[0].function.arguments` must be a string of JSON, not an array",
        ),
        (
            chat(json!([user(), {"role": "assistant", "content": "a", "function_call": {"name": "f"}}])),
            "`messages[1].function_call` is no longer supported: use `tool_calls`",
        ),
        (json!({"messages": [user(), assistant()], "functions": []}), "`functions` is no longer supported"),
        (json!({"messages": [user(), assistant()], "tools": [{}]}), "`tools[0].function` must be"),
        (json!({"prompt": "p"}), "`completion` is missing"),
        (json!({"completion": "c"}), "`prompt` is missing"),
        (json!({"prompt": "p", "completion": ""}), "`completion` is empty"),
        (json!({"prompt": ["p"], "completion": "c"}), "`prompt` must be a string, not an array"),
        (json!({"text": ""}), "`text` is empty"),
        (
            json!({"input": {"messages": [user()]}, "preferred_output": [assistant()]}),
            "`non_preferred_output` is missing",
        ),
        (json!({"input": {}, "preferred_output": [assistant()]}), "`input.messages` is missing"),
        (
            json!({"input": [], "preferred_output": [assistant()]}),
            "`input` must be an object with `messages`",
        ),
        (
            json!({"input": {"messages": [user()]}, "preferred_output": [user()], "non_preferred_output": [assistant()]}),
            "`preferred_output` must be a list of exactly one assistant message",
        ),
        (
            json!({"input": {"messages": [user()]}, "preferred_output": [assistant(), assistant()]}),
            "`preferred_output` must be a list of exactly one assistant message",
        ),
        (json!({"input": {"messages": [assistant()]}}), "`input.messages` has no user message"),
    ] {
        let problem = problem(line.clone());
        assert!(problem.contains(expected), "{line}\n got {problem}\nwant {expected}");
    }
}

/// JSON that is often nearly right.
fn nearly() -> impl Strategy<Value = Value> {
    let word = prop::sample::select(vec![
        "messages",
        "role",
        "content",
        "user",
        "assistant",
        "tool",
        "system",
        "weight",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "text",
        "type",
        "prompt",
        "completion",
        "input",
        "preferred_output",
        "non_preferred_output",
        "tools",
        "",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-1_i64..3).prop_map(Value::from),
        word.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((word.clone(), inner), 0..5).prop_map(|fields| Value::Object(
                fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
            )),
        ]
    })
}

proptest! {
    #[test]
    fn no_line_panics(line in nearly()) {
        if let Err(problem) = Example::parse(line.to_string().as_bytes()) {
            prop_assert!(!problem.to_string().is_empty());
        }
        let _ = Example::parse(json!({"messages": line}).to_string().as_bytes());
        let _ = Example::parse(json!({"messages": [line]}).to_string().as_bytes());
        let _ = Example::parse(json!({"input": {"messages": [user()]}, "preferred_output": line}).to_string().as_bytes());
    }

    #[test]
    fn no_bytes_panic(line in prop::collection::vec(any::<u8>(), 0..60)) {
        let _ = Example::parse(&line);
    }
}
