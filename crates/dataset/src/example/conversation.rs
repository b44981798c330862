//! A list of messages, checked.

use super::message::{self, Message, Role};
use super::mistyped;
use crate::problem::LineProblem;
use serde_json::{Map, Value};

/// A checked conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// A list of messages as a chat template reads them, without their weights.
    pub(crate) messages: Vec<Value>,
    /// Indices of the assistant messages that are to be learnt, ascending.
    pub(crate) trained: Vec<usize>,
    /// A list of tools; never empty.
    pub(crate) tools: Option<Value>,
}

impl Conversation {
    /// Reads `messages` and `tools` of a line; something in it must be learnt.
    pub(super) fn training(fields: &mut Map<String, Value>) -> Result<Conversation, LineProblem> {
        let list = messages(fields.shift_remove("messages"), "messages")?;
        let (conversation, answers) = check(list, "messages")?;
        if answers == 0 {
            return Err(LineProblem::NoAssistant);
        }
        if conversation.trained.is_empty() {
            return Err(LineProblem::NothingWeighted);
        }
        Ok(Conversation { tools: message::tools(fields, "")?, ..conversation })
    }

    /// How many answers are to be learnt.
    pub fn trained_turns(&self) -> usize {
        self.trained.len()
    }
}

/// Reads `input` of a preference.
pub(super) fn preference_input(fields: &mut Map<String, Value>) -> Result<Conversation, LineProblem> {
    let mut input = match fields.shift_remove("input") {
        Some(Value::Object(input)) => input,
        Some(other) => return Err(mistyped("input", "an object with `messages`", &other)),
        None => return Err(LineProblem::Missing { path: "input".to_owned() }),
    };
    let list = messages(input.shift_remove("messages"), "input.messages")?;
    let (conversation, _) = check(list, "input.messages")?;
    Ok(Conversation { tools: message::tools(&mut input, "input.")?, trained: Vec::new(), ..conversation })
}

/// Reads one of the two answers of a preference.
pub(super) fn preference_output(
    fields: &mut Map<String, Value>,
    name: &'static str,
) -> Result<Value, LineProblem> {
    let mut list = messages(fields.shift_remove(name), name)?;
    let (Some(only), true) = (list.pop(), list.is_empty()) else {
        return Err(LineProblem::BadOutput { path: name });
    };
    match message::check(only, &format!("{name}[0]"))? {
        Message { role: Role::Assistant, value, .. } => Ok(value),
        _ => Err(LineProblem::BadOutput { path: name }),
    }
}

fn messages(value: Option<Value>, path: &str) -> Result<Vec<Value>, LineProblem> {
    match value {
        Some(Value::Array(list)) if list.is_empty() => Err(LineProblem::Empty { path: path.to_owned() }),
        Some(Value::Array(list)) => Ok(list),
        None | Some(Value::Null) => Err(LineProblem::Missing { path: path.to_owned() }),
        Some(other) => Err(mistyped(path, "an array of messages", &other)),
    }
}

/// Checks every message, and that somebody asks. Returns how many answers there are, too.
fn check(list: Vec<Value>, path: &'static str) -> Result<(Conversation, usize), LineProblem> {
    let mut conversation =
        Conversation { messages: Vec::with_capacity(list.len()), trained: Vec::new(), tools: None };
    let (mut users, mut answers, mut called) = (0, 0, false);
    for (index, value) in list.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let message = message::check(value, &path)?;
        match message.role {
            Role::User => users += 1,
            Role::Assistant => answers += 1,
            Role::Tool if !called => return Err(LineProblem::UncalledTool { path }),
            Role::Tool | Role::System => {}
        }
        called |= message.calls_tools;
        if message.trained {
            conversation.trained.push(index);
        }
        conversation.messages.push(message.value);
    }
    if users == 0 {
        return Err(LineProblem::NoUser { path });
    }
    Ok((conversation, answers))
}
