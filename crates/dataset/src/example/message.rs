//! One message of a conversation, checked and brought into the form in which the gateway gives messages to a template, so that
//! a model is trained on the text that it will be served.

use super::{mistyped, type_name};
use crate::problem::LineProblem;
use serde_json::{Map, Value};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    System,
    User,
    Assistant,
    Tool,
}

/// A checked message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) role: Role,
    /// Whether it is an answer that is to be learnt.
    pub(super) trained: bool,
    pub(super) calls_tools: bool,
    /// As a template reads it.
    pub(super) value: Value,
}

/// Checks the message at `path`.
pub(super) fn check(value: Value, path: &str) -> Result<Message, LineProblem> {
    let mut fields = match value {
        Value::Object(fields) => fields,
        other => return Err(mistyped(path, "an object", &other)),
    };
    // Templates ask whether a field is there, not whether it is null.
    fields.retain(|_, value| !value.is_null());
    let role = role(&mut fields, path)?;
    let weight = weight(&mut fields, path)?;
    if weight.is_some() && role != Role::Assistant {
        return Err(LineProblem::WeightNotAllowed { path: format!("{path}.weight") });
    }
    if fields.contains_key("function_call") {
        let path = format!("{path}.function_call");
        return Err(LineProblem::Outdated { path, instead: "tool_calls" });
    }
    for name in ["name", "tool_call_id", "reasoning_content", "thinking"] {
        if let Some(other) = fields.get(name).filter(|value| !value.is_string()) {
            return Err(mistyped(format!("{path}.{name}"), "a string", other));
        }
    }
    let calls_tools = tool_calls(&mut fields, path)?;
    if calls_tools && role != Role::Assistant {
        return Err(LineProblem::UnknownRole { path: format!("{path}.role") });
    }
    let has_text = content(&fields, path)?;
    match (role, has_text) {
        (_, Some(true)) | (Role::System | Role::Tool, Some(false)) => {}
        // An answer may consist of calls alone.
        (Role::Assistant, _) if calls_tools => {
            fields.entry("content").or_insert(Value::Null);
        }
        (_, Some(false)) => return Err(LineProblem::Empty { path: format!("{path}.content") }),
        (_, None) => return Err(LineProblem::Missing { path: format!("{path}.content") }),
    }
    let trained = role == Role::Assistant && weight != Some(false);
    Ok(Message { role, trained, calls_tools, value: Value::Object(fields) })
}

fn role(fields: &mut Map<String, Value>, path: &str) -> Result<Role, LineProblem> {
    let path = format!("{path}.role");
    let role = match fields.get("role") {
        Some(Value::String(role)) => role.as_str(),
        Some(other) => return Err(mistyped(path, "a string", other)),
        None => return Err(LineProblem::Missing { path }),
    };
    match role {
        "system" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" => Ok(Role::Tool),
        // OpenAI's newer word for the same thing; templates know only the older.
        "developer" => {
            fields.insert("role".to_owned(), Value::from("system"));
            Ok(Role::System)
        }
        _ => Err(LineProblem::UnknownRole { path }),
    }
}

/// Takes `weight` out: templates do not know it.
fn weight(fields: &mut Map<String, Value>, path: &str) -> Result<Option<bool>, LineProblem> {
    match fields.shift_remove("weight") {
        None => Ok(None),
        Some(Value::Number(weight)) if weight.as_f64() == Some(0.0) => Ok(Some(false)),
        Some(Value::Number(weight)) if weight.as_f64() == Some(1.0) => Ok(Some(true)),
        Some(_) => Err(LineProblem::BadWeight { path: format!("{path}.weight") }),
    }
}

/// Whether the content has any text; `None` where there is no content.
fn content(fields: &Map<String, Value>, path: &str) -> Result<Option<bool>, LineProblem> {
    let path = format!("{path}.content");
    let parts = match fields.get("content") {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(!text.trim().is_empty())),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(mistyped(path, "a string or an array of text parts", other)),
    };
    let mut any = false;
    for (index, part) in parts.iter().enumerate() {
        let field = match part.get("type").and_then(Value::as_str) {
            Some("text") => "text",
            Some("refusal") => "refusal",
            _ => "",
        };
        match part.get(field) {
            Some(Value::String(text)) => any |= !text.trim().is_empty(),
            _ => return Err(LineProblem::UnsupportedPart { path: format!("{path}[{index}]") }),
        }
    }
    Ok(Some(any))
}

/// Whether the message calls tools. An empty list of calls is dropped.
fn tool_calls(fields: &mut Map<String, Value>, path: &str) -> Result<bool, LineProblem> {
    let path = format!("{path}.tool_calls");
    let calls = match fields.get("tool_calls") {
        None => return Ok(false),
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(mistyped(path, "an array", other)),
    };
    for (index, call) in calls.iter().enumerate() {
        let path = format!("{path}[{index}].function");
        let function = match call.get("function") {
            Some(Value::Object(function)) => function,
            Some(other) => return Err(mistyped(path, "an object with `name` and `arguments`", other)),
            None => return Err(LineProblem::Missing { path }),
        };
        match function.get("name") {
            Some(Value::String(name)) if !name.is_empty() => {}
            Some(Value::String(_)) => return Err(LineProblem::Empty { path: format!("{path}.name") }),
            Some(other) => return Err(mistyped(format!("{path}.name"), "a string", other)),
            None => return Err(LineProblem::Missing { path: format!("{path}.name") }),
        }
        if let Some(other) = function.get("arguments")
            && !matches!(other, Value::Null | Value::String(_) | Value::Object(_))
        {
            return Err(mistyped(format!("{path}.arguments"), "a string of JSON", other));
        }
    }
    if calls.is_empty() {
        fields.shift_remove("tool_calls");
        return Ok(false);
    }
    Ok(true)
}

/// Checks a list of tools and returns it; none where it is absent or empty.
pub(super) fn tools(fields: &mut Map<String, Value>, prefix: &str) -> Result<Option<Value>, LineProblem> {
    if fields.contains_key("functions") {
        return Err(LineProblem::Outdated { path: format!("{prefix}functions"), instead: "tools" });
    }
    let path = format!("{prefix}tools");
    let Some(tools) = fields.shift_remove("tools").filter(|tools| !tools.is_null()) else { return Ok(None) };
    let Value::Array(list) = &tools else { return Err(mistyped(path, "an array", &tools)) };
    for (index, tool) in list.iter().enumerate() {
        let path = format!("{path}[{index}].function");
        let function = tool.get("function").unwrap_or(&Value::Null);
        match function.get("name") {
            Some(Value::String(name)) if !name.is_empty() => {}
            _ => {
                return Err(LineProblem::Mistyped {
                    path,
                    expected: "an object with a `name`",
                    found: if function.is_object() { "one without" } else { type_name(function) },
                });
            }
        }
    }
    Ok((!list.is_empty()).then_some(tools))
}
