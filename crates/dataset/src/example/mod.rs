//! What a line may say, checked.
//!
//! `message` checks one message, `conversation` a list of them; this file tells the formats apart.

mod conversation;
mod message;

pub use conversation::Conversation;

use crate::problem::LineProblem;
use conversation::{preference_input, preference_output};
use serde_json::{Map, Value};
use std::fmt;

/// A value takes up to a hundred bytes where its text takes two, so their number is bounded, too.
const VALUES_MAX: usize = 250_000;

/// One training example.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// `{"messages": […], "tools"?: […]}`: assistant messages are learnt, but those of `weight` 0.
    Chat(Conversation),
    /// `{"prompt": …, "completion": …}`: the completion is learnt.
    Completion {
        /// What stands before it.
        prompt: String,
        /// What is learnt.
        completion: String,
    },
    /// `{"text": …}`: all of it is learnt.
    Text(String),
    /// `{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}`: the model learns to prefer one answer
    /// to the other.
    Preference {
        /// What is to be answered.
        input: Conversation,
        /// The better answer, an assistant message.
        preferred: Value,
        /// The worse answer, an assistant message.
        non_preferred: Value,
    },
}

/// The form of an example. A file keeps to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// [`Example::Chat`].
    Chat,
    /// [`Example::Completion`].
    Completion,
    /// [`Example::Text`].
    Text,
    /// [`Example::Preference`].
    Preference,
}

/// How a job learns from examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Likelihood of target tokens.
    Supervised,
    /// Direct preference optimisation over pairs of answers.
    Dpo,
}

impl Format {
    /// The method that takes it.
    pub fn method(self) -> Method {
        match self {
            Format::Chat | Format::Completion | Format::Text => Method::Supervised,
            Format::Preference => Method::Dpo,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Chat => "a chat (`messages`)",
            Format::Completion => "a prompt with its completion",
            Format::Text => "a plain `text`",
            Format::Preference => "a preference pair",
        })
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Method::Supervised => "supervised",
            Method::Dpo => "dpo",
        })
    }
}

impl Example {
    /// Reads a line. Fields that no format knows are ignored; where fields of several formats are there, `messages` comes
    /// first, then a preference, then a prompt, then a text.
    pub fn parse(line: &[u8]) -> Result<Example, LineProblem> {
        let text =
            std::str::from_utf8(line).map_err(|error| LineProblem::NotUtf8 { at: error.valid_up_to() })?;
        if values(line) > VALUES_MAX {
            return Err(LineProblem::TooManyValues { values_max: VALUES_MAX });
        }
        let value: Value = serde_json::from_str(text).map_err(|error| LineProblem::NotJson {
            what: if error.is_eof() { "it ends too early" } else { "a syntax error" },
            column: error.column(),
        })?;
        let mut fields = match value {
            Value::Object(fields) => fields,
            other => return Err(LineProblem::NotAnObject { found: type_name(&other) }),
        };
        // A null field counts as absent, as in the rest of the API.
        fields.retain(|_, value| !value.is_null());
        let has = |name: &str| fields.contains_key(name);
        if has("messages") {
            return Conversation::training(&mut fields).map(Example::Chat);
        }
        if has("input") || has("preferred_output") || has("non_preferred_output") {
            return Ok(Example::Preference {
                input: preference_input(&mut fields)?,
                preferred: preference_output(&mut fields, "preferred_output")?,
                non_preferred: preference_output(&mut fields, "non_preferred_output")?,
            });
        }
        if has("prompt") || has("completion") {
            let prompt = string(&mut fields, "prompt")?;
            let completion = string(&mut fields, "completion")?;
            if completion.is_empty() {
                return Err(LineProblem::Empty { path: "completion".to_owned() });
            }
            return Ok(Example::Completion { prompt, completion });
        }
        if has("text") {
            let text = string(&mut fields, "text")?;
            if text.is_empty() {
                return Err(LineProblem::Empty { path: "text".to_owned() });
            }
            return Ok(Example::Text(text));
        }
        Err(LineProblem::UnknownFormat)
    }

    /// Its form.
    pub fn format(&self) -> Format {
        match self {
            Example::Chat(_) => Format::Chat,
            Example::Completion { .. } => Format::Completion,
            Example::Text(_) => Format::Text,
            Example::Preference { .. } => Format::Preference,
        }
    }
}

/// An upper bound on the values of a JSON text: what stands outside strings and begins, or parts, elements.
fn values(json: &[u8]) -> usize {
    let (mut in_string, mut escaped, mut count) = (false, false, 0);
    for &byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' | b',' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}

fn string(fields: &mut Map<String, Value>, name: &str) -> Result<String, LineProblem> {
    match fields.shift_remove(name) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(mistyped(name, "a string", &other)),
        None => Err(LineProblem::Missing { path: name.to_owned() }),
    }
}

fn mistyped(path: impl Into<String>, expected: &'static str, found: &Value) -> LineProblem {
    LineProblem::Mistyped { path: path.into(), expected, found: type_name(found) }
}

/// JSON's name of a value's type.
fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests;
