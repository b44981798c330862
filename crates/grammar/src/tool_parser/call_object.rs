//! Reading one call, `{"name": …, "arguments": {…}}`, character by character.

use super::ToolEvent;
use serde_json::Value;

/// What a character led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The object goes on.
    More,
    /// The object is complete with this character.
    Done,
    /// This is no call. The character has not been taken.
    Broken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Open,
    /// Before a key; `first` allows the object to end here.
    Key {
        first: bool,
    },
    InKey {
        escaped: bool,
    },
    Colon,
    Value,
    InValue {
        depth: u32,
        quoted: bool,
        escaped: bool,
    },
    AfterValue,
}

/// Reads one call. Nothing is announced before both the name and the beginning of the arguments are known, because
/// until then the object may turn out to be an ordinary answer.
#[derive(Debug, Clone)]
pub(super) struct CallObject {
    at: At,
    key: String,
    /// The value being read, unless it is streamed.
    value: String,
    name: Option<String>,
    /// Arguments that came before the name.
    early_arguments: Option<String>,
    /// The call has been announced.
    pub(super) announced: bool,
    /// The value being read is that of the arguments.
    streaming: bool,
    /// Extra keys make the object something other than a call.
    strict: bool,
}

impl CallObject {
    pub(super) fn new(strict: bool) -> CallObject {
        CallObject {
            at: At::Open,
            key: String::new(),
            value: String::new(),
            name: None,
            early_arguments: None,
            announced: false,
            streaming: false,
            strict,
        }
    }

    /// Takes one character. `accepts` says whether a name is that of a tool; `index` numbers the call.
    pub(super) fn push(
        &mut self,
        c: char,
        index: usize,
        accepts: &dyn Fn(&str) -> bool,
        events: &mut Vec<ToolEvent>,
    ) -> Step {
        match self.at {
            At::Open => match c {
                '{' => self.at = At::Key { first: true },
                c if c.is_ascii_whitespace() => {}
                _ => return Step::Broken,
            },
            At::Key { first } => match c {
                '"' => {
                    self.key.clear();
                    self.at = At::InKey { escaped: false };
                }
                '}' if first => return Step::Broken,
                c if c.is_ascii_whitespace() => {}
                _ => return Step::Broken,
            },
            At::InKey { escaped } => match c {
                '"' if !escaped => {
                    let known = matches!(self.key.as_str(), "name" | "arguments" | "parameters");
                    if !known && self.strict && !matches!(self.key.as_str(), "type" | "id") {
                        return Step::Broken;
                    }
                    self.at = At::Colon;
                }
                c => {
                    self.key.push(c);
                    self.at = At::InKey { escaped: c == '\\' && !escaped };
                }
            },
            At::Colon => match c {
                ':' => self.at = At::Value,
                c if c.is_ascii_whitespace() => {}
                _ => return Step::Broken,
            },
            At::Value => {
                if c.is_ascii_whitespace() {
                    return Step::More;
                }
                if matches!(c, ',' | '}' | ']' | ':') || !self.may_begin(c) {
                    return Step::Broken;
                }
                self.value.clear();
                self.streaming = self.is_arguments() && c == '{' && self.name.is_some() && !self.announced;
                if self.streaming {
                    self.announce(index, events);
                }
                self.at = At::InValue { depth: 0, quoted: false, escaped: false };
                return self.push(c, index, accepts, events);
            }
            At::InValue { depth, quoted, escaped } => {
                let scalar_ends =
                    depth == 0 && !quoted && (matches!(c, ',' | '}') || c.is_ascii_whitespace());
                if scalar_ends && !self.value.is_empty() {
                    if !self.end_value(index, accepts, events) {
                        return Step::Broken;
                    }
                    return self.push(c, index, accepts, events);
                }
                self.take(c, index, events);
                let (depth, quoted, escaped) = match c {
                    _ if escaped => (depth, quoted, false),
                    '\\' if quoted => (depth, true, true),
                    '"' => (depth, !quoted, false),
                    '{' | '[' if !quoted => (depth + 1, false, false),
                    '}' | ']' if !quoted => (depth.saturating_sub(1), false, false),
                    _ => (depth, quoted, false),
                };
                self.at = At::InValue { depth, quoted, escaped };
                let closed = matches!(c, '}' | ']') || (c == '"' && self.value.len() != 1);
                if depth == 0 && !quoted && !escaped && closed && !self.end_value(index, accepts, events) {
                    return Step::Broken;
                }
            }
            At::AfterValue => match c {
                ',' => self.at = At::Key { first: false },
                '}' => return self.end_object(index, events),
                c if c.is_ascii_whitespace() => {}
                _ => return Step::Broken,
            },
        }
        Step::More
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    fn may_begin(&self, c: char) -> bool {
        match self.key.as_str() {
            "name" => c == '"' && self.name.is_none(),
            "arguments" | "parameters" => matches!(c, '{' | '"' | 'n') && self.early_arguments.is_none(),
            _ => true,
        }
    }

    fn take(&mut self, c: char, index: usize, events: &mut Vec<ToolEvent>) {
        if !self.streaming {
            self.value.push(c);
            return;
        }
        match events.last_mut() {
            Some(ToolEvent::Arguments { index: last, text }) if *last == index => text.push(c),
            _ => events.push(ToolEvent::Arguments { index, text: c.to_string() }),
        }
    }

    /// Ends the value at hand; false if the object is no call because of it.
    fn end_value(
        &mut self,
        index: usize,
        accepts: &dyn Fn(&str) -> bool,
        events: &mut Vec<ToolEvent>,
    ) -> bool {
        self.at = At::AfterValue;
        if std::mem::take(&mut self.streaming) {
            self.early_arguments = Some(String::new());
            return true;
        }
        if self.key == "name" {
            match serde_json::from_str::<String>(&self.value) {
                Ok(name) if accepts(&name) => self.name = Some(name),
                _ => return false,
            }
        } else if self.is_arguments() {
            // Some models write the arguments as a string of JSON, or `null` for none.
            let arguments = match serde_json::from_str(&self.value) {
                Ok(Value::String(text)) => text,
                Ok(Value::Null) => "{}".to_string(),
                _ => std::mem::take(&mut self.value),
            };
            self.early_arguments = Some(arguments);
        }
        if let (Some(_), Some(arguments), false) = (&self.name, &self.early_arguments, self.announced) {
            let text = arguments.clone();
            self.announce(index, events);
            events.push(ToolEvent::Arguments { index, text });
        }
        true
    }

    fn end_object(&mut self, index: usize, events: &mut Vec<ToolEvent>) -> Step {
        if !self.announced {
            // A name alone is a call without arguments, except where any object could be an answer.
            if self.name.is_none() || self.strict {
                return Step::Broken;
            }
            self.announce(index, events);
            events.push(ToolEvent::Arguments { index, text: "{}".into() });
        }
        Step::Done
    }

    fn announce(&mut self, index: usize, events: &mut Vec<ToolEvent>) {
        self.announced = true;
        let name = self.name.clone().unwrap_or_default();
        events.push(ToolEvent::Call { index, name });
    }
}
