//! Items of a conversation as `/v1/responses` has them, and the messages that a chat template reads.

use crate::openai::error::ApiError;
use crate::openai::fields::mistyped;
use serde_json::{Map, Value, json};

/// `input`: a text, or a list of items.
pub(super) fn input_items(input: Option<Value>) -> Result<Vec<Value>, ApiError> {
    match input {
        Some(Value::String(text)) => Ok(vec![json!({
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": text}],
        })]),
        Some(Value::Array(items)) if items.is_empty() => {
            Err(ApiError::field("input", "`input` is empty: send a text, or at least one item"))
        }
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(mistyped("input", "a string or an array of items", &other)),
        None => Err(ApiError::field("input", "`input` is missing: it is required")),
    }
}

/// The items with names, as a list shows them: those that a client did not name are called after their place.
pub(super) fn named(items: &[Value], owner: &str) -> Vec<Value> {
    let name = |(index, item): (usize, &Value)| {
        let mut item = item.clone();
        if let Value::Object(item) = &mut item {
            item.entry("type").or_insert_with(|| Value::from("message"));
            if !item.get("id").is_some_and(Value::is_string) {
                item.insert("id".to_owned(), Value::from(format!("item_{owner}_{index}")));
            }
        }
        item
    };
    items.iter().enumerate().map(name).collect()
}

/// The messages that items come to. What a model said in one turn (reasoning, text, calls) is one message.
pub(super) fn messages(items: &[Value], path: &str) -> Result<Vec<Value>, ApiError> {
    let mut conversation = Conversation::default();
    for (index, item) in items.iter().enumerate() {
        conversation.add(item, &format!("{path}[{index}]"))?;
    }
    conversation.end_turn();
    Ok(conversation.messages)
}

#[derive(Default)]
struct Conversation {
    messages: Vec<Value>,
    turn: Turn,
}

/// What the model has said since somebody else spoke.
#[derive(Default)]
struct Turn {
    reasoning: Option<String>,
    content: Option<String>,
    calls: Vec<Value>,
}

impl Conversation {
    fn add(&mut self, item: &Value, path: &str) -> Result<(), ApiError> {
        let Value::Object(item) = item else { return Err(mistyped(path, "an object", item)) };
        match item.get("type").and_then(Value::as_str) {
            Some("message") => self.message(item, path),
            None if item.contains_key("role") => self.message(item, path),
            Some("reasoning") => {
                let text = text_of(item.get("content").or(item.get("summary")), &format!("{path}.content"))?;
                if self.turn.content.is_some() || !self.turn.calls.is_empty() {
                    self.end_turn();
                }
                self.turn.reasoning.get_or_insert_default().push_str(&text);
                Ok(())
            }
            Some("function_call") => {
                let call = json!({
                    "id": string(item, "call_id", path)?,
                    "type": "function",
                    "function": {
                        "name": string(item, "name", path)?,
                        "arguments": string(item, "arguments", path)?,
                    },
                });
                self.turn.calls.push(call);
                Ok(())
            }
            Some("function_call_output") => {
                let content = text_of(item.get("output"), &format!("{path}.output"))?;
                let call = string(item, "call_id", path)?;
                self.end_turn();
                self.messages.push(json!({"role": "tool", "tool_call_id": call, "content": content}));
                Ok(())
            }
            other => {
                let kind: String = other.unwrap_or("nothing").chars().take(40).collect();
                let message = format!(
                    "`{path}.type` is {kind}: this server takes message, reasoning, function_call and function_call_output"
                );
                Err(ApiError::field(format!("{path}.type"), message))
            }
        }
    }

    fn message(&mut self, item: &Map<String, Value>, path: &str) -> Result<(), ApiError> {
        let content = text_of(item.get("content"), &format!("{path}.content"))?;
        let role = match string(item, "role", path)? {
            "assistant" => {
                if self.turn.content.is_some() || !self.turn.calls.is_empty() {
                    self.end_turn();
                }
                self.turn.content = Some(content);
                return Ok(());
            }
            "developer" | "system" => "system",
            "user" => "user",
            _ => {
                let path = format!("{path}.role");
                let message = format!("`{path}` must be user, assistant, system or developer");
                return Err(ApiError::field(path, message));
            }
        };
        self.end_turn();
        self.messages.push(json!({"role": role, "content": content}));
        Ok(())
    }

    fn end_turn(&mut self) {
        let Turn { reasoning, content, calls } = std::mem::take(&mut self.turn);
        if reasoning.is_none() && content.is_none() && calls.is_empty() {
            return;
        }
        let mut message = json!({"role": "assistant"});
        message["content"] = match content {
            None if !calls.is_empty() => Value::Null,
            content => Value::from(content.unwrap_or_default()),
        };
        if let Some(reasoning) = reasoning {
            message["reasoning_content"] = Value::from(reasoning);
        }
        if !calls.is_empty() {
            message["tool_calls"] = Value::Array(calls);
        }
        self.messages.push(message);
    }
}

fn string<'a>(item: &'a Map<String, Value>, name: &str, path: &str) -> Result<&'a str, ApiError> {
    let path = format!("{path}.{name}");
    match item.get(name) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(mistyped(&path, "a string", other)),
        None => {
            let message = format!("`{path}` is missing: it is required");
            Err(ApiError::field(path, message))
        }
    }
}

/// A text, or the texts of a list of parts.
fn text_of(content: Option<&Value>, path: &str) -> Result<String, ApiError> {
    let parts = match content {
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        None | Some(Value::Null) => return Ok(String::new()),
        Some(other) => return Err(mistyped(path, "a string or an array of text parts", other)),
    };
    let mut text = String::new();
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Value::Object(part) = part else { return Err(mistyped(&path, "an object", part)) };
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("nothing");
        text.push_str(match kind {
            "input_text" | "output_text" | "text" | "reasoning_text" | "summary_text" => {
                string(part, "text", &path)?
            }
            "refusal" => string(part, "refusal", &path)?,
            other => {
                let kind: String = other.chars().take(40).collect();
                let message = format!("`{path}` is of type `{kind}`: this model takes only text parts");
                return Err(ApiError::field(path, message));
            }
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_a_model_says_in_one_turn_is_one_message() {
        let items = [
            json!({"role": "user", "content": "two and two?"}),
            json!({"type": "reasoning", "content": [{"type": "reasoning_text", "text": "easy"}]}),
            json!({"type": "message", "role": "assistant", "content": [
                {"type": "output_text", "text": "Let me "}, {"type": "output_text", "text": "see."}]}),
            json!({"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}),
            json!({"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"}),
            json!({"type": "function_call_output", "call_id": "c1", "output": "4"}),
            json!({"role": "assistant", "content": "4"}),
            json!({"role": "developer", "content": "short"}),
        ];
        let messages = messages(&items, "input").unwrap();
        let roles: Vec<_> = messages.iter().map(|message| message["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["user", "assistant", "tool", "assistant", "system"]);
        assert_eq!(messages[1]["content"], "Let me see.");
        assert_eq!(messages[1]["reasoning_content"], "easy");
        assert_eq!(messages[1]["tool_calls"].as_array().unwrap().len(), 2);
        assert_eq!(messages[2]["tool_call_id"], "c1");
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_its_path() {
        for (item, param) in [
            (json!("text"), "input[0]"),
            (json!({"type": "item_reference", "id": "x"}), "input[0].type"),
            (json!({"role": "robot", "content": "x"}), "input[0].role"),
            (json!({"role": "user", "content": [{"type": "input_image"}]}), "input[0].content[0]"),
            (json!({"type": "function_call", "name": "f", "arguments": "{}"}), "input[0].call_id"),
            (json!({"role": "user", "content": 7}), "input[0].content"),
        ] {
            let error = messages(std::slice::from_ref(&item), "input").unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{item}: {error}");
        }
        assert!(input_items(Some(json!([]))).is_err() && input_items(None).is_err());
    }
}
