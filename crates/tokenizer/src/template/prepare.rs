//! Bringing a client's messages into the shape that a template reads.

use super::{ChatTemplate, RenderInput, TemplateError, TemplateTime};
use serde_json::{Map, Value, json};

/// What a template can read, found out by rendering small conversations when it is loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Accepts {
    /// Content as a list of parts.
    parts: bool,
    /// Content as a string.
    strings: bool,
    /// Arguments of a past tool call as an object.
    argument_objects: bool,
    /// Null as the content of an answer that consists of calls alone. Not all do, and not all take an empty string for it.
    null_content: bool,
}

const PROBE: &str = "ashlar probe";

impl Accepts {
    pub(super) fn probe(template: &ChatTemplate) -> Accepts {
        let render = |messages: &Value| {
            template.render_as_is(&RenderInput {
                messages,
                tools: None,
                add_generation_prompt: false,
                kwargs: &Map::new(),
                now: TemplateTime::default(),
            })
        };
        let shows = |messages: Value| {
            // A template that prints the list itself shows the word `type` too, and one that joins markup to text
            // breaks its quotes.
            render(&messages)
                .is_ok_and(|text| text.contains(PROBE) && !text.contains("'type'") && !text.contains("&#34;"))
        };
        let user = |content: Value| json!({"role": "user", "content": content});
        let call = json!({
            "id": "call00001",
            "type": "function",
            "function": {"name": "f", "arguments": {"a": PROBE}},
        });
        let null_answer = json!([
            user(json!("q")),
            {"role": "assistant", "content": null, "tool_calls": [call]},
        ]);
        Accepts {
            parts: shows(json!([user(json!([{"type": "text", "text": PROBE}]))])),
            strings: shows(json!([user(json!(PROBE))])),
            argument_objects: shows(json!([
                user(json!("q")),
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call00001", "name": "f", "content": "r"},
            ])) || shows(null_answer.clone()),
            null_content: render(&null_answer).is_ok(),
        }
    }
}

pub(super) fn prepare(messages: &Value, accepts: Accepts) -> Result<Value, TemplateError> {
    let list = messages.as_array().ok_or(TemplateError::NotAMessage { index: 0 })?;
    let mut prepared = Vec::with_capacity(list.len());
    for (index, message) in list.iter().enumerate() {
        let mut message = message.as_object().cloned().ok_or(TemplateError::NotAMessage { index })?;
        match message.get("content") {
            Some(Value::Array(parts)) => {
                let texts = part_texts(parts, index)?;
                // Templates that take parts from a user still take a tool's answer as a string.
                let of_tool = message.get("role").and_then(Value::as_str) == Some("tool");
                let content = if accepts.parts && !(of_tool && accepts.strings) {
                    texts.into_iter().map(|text| json!({"type": "text", "text": text})).collect()
                } else {
                    // One line per part, as vLLM joins them.
                    Value::from(texts.join("\n"))
                };
                message.insert("content".into(), content);
            }
            Some(Value::String(text)) if accepts.parts && !accepts.strings => {
                let content = json!([{"type": "text", "text": text}]);
                message.insert("content".into(), content);
            }
            Some(Value::Null) if !accepts.null_content && message.contains_key("tool_calls") => {
                let empty = if accepts.parts && !accepts.strings { json!([]) } else { json!("") };
                message.insert("content".into(), empty);
            }
            _ => {}
        }
        if accepts.argument_objects
            && let Some(Value::Array(calls)) = message.get_mut("tool_calls")
        {
            calls.iter_mut().for_each(parse_arguments);
        }
        prepared.push(Value::Object(message));
    }
    Ok(Value::Array(prepared))
}

fn part_texts<'v>(parts: &'v [Value], message: usize) -> Result<Vec<&'v str>, TemplateError> {
    let text_of = |(part, value): (usize, &'v Value)| {
        let kind = value.get("type").and_then(Value::as_str).unwrap_or("text");
        let text = match kind {
            "text" | "input_text" | "output_text" => value.get("text"),
            "refusal" => value.get("refusal"),
            _ => None,
        };
        text.and_then(Value::as_str)
            .or_else(|| value.as_str())
            .ok_or_else(|| TemplateError::UnsupportedPart { message, part, kind: kind.to_string() })
    };
    parts.iter().enumerate().map(text_of).collect()
}

/// The HTTP API carries arguments as a string of JSON; templates print them as an object.
fn parse_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    if let Some(text) = arguments.as_str()
        && let Ok(object @ Value::Object(_)) =
            serde_json::from_str(if text.trim().is_empty() { "{}" } else { text })
    {
        *arguments = object;
    }
}
