//! Generated text split into content and tool calls.
//!
//! The parser reads exactly the formats that [`tool_grammar`](crate::tool_grammar()) writes, and what models write
//! unconstrained in the same formats. What turns out not to be a call is content, character for character.

mod call_object;

use ashlar_tokenizer::ToolFormat;
use call_object::{CallObject, Step};

/// A piece of generated text, told apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolEvent {
    /// Part of the answer's text.
    Content(String),
    /// A call begins. Calls are numbered from 0 in the order in which they begin.
    Call {
        /// Number of the call.
        index: usize,
        /// Name of the tool.
        name: String,
    },
    /// Part of a call's arguments; the parts of one call concatenate to JSON as the model wrote it.
    Arguments {
        /// Number of the call.
        index: usize,
        /// The part.
        text: String,
    },
}

/// Splits a stream of text into content and calls.
///
/// White space around calls is dropped; all other text comes out once, in order, as content or as part of a call.
#[derive(Debug, Clone)]
pub struct ToolCallParser {
    format: ToolFormat,
    /// Names that count as calls; empty means any.
    names: Vec<String>,
    state: State,
    /// Text taken but not decided: a part of a marker, white space before what may be a call, or a call so far.
    held: String,
    /// Calls begun so far.
    calls: usize,
    /// Anything but white space has come out as content since the start or the last call.
    text_begun: bool,
}

#[derive(Debug, Clone)]
enum State {
    /// Content; a marker may follow.
    Text,
    /// The start of an answer that is a call if it begins with a brace (Llama 3 only).
    LlamaStart,
    /// After `[TOOL_CALLS]`, before the list.
    MistralList,
    /// Inside a call.
    Call(Box<CallObject>),
    /// After a complete call, before what separates or closes it.
    AfterCall,
    /// Everything that follows is content.
    Rest,
}

impl ToolCallParser {
    /// A parser at the start of an answer. Calls of other tools than `names` are content; with no names every call
    /// counts.
    pub fn new(format: ToolFormat, names: Vec<String>) -> ToolCallParser {
        let state = if format == ToolFormat::Llama3Json { State::LlamaStart } else { State::Text };
        ToolCallParser { format, names, state, held: String::new(), calls: 0, text_begun: false }
    }

    /// Takes generated text (with the format's markers shown) and gives what is decided.
    pub fn push(&mut self, text: &str) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        for c in text.chars() {
            self.take(c, &mut events);
        }
        events
    }

    /// Takes the end of the text and gives what was held back. A call that has begun stays a call.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        let blank = self.held.trim().is_empty();
        let announced = matches!(&self.state, State::Call(call) if call.announced);
        let closing = matches!(self.state, State::AfterCall) && self.close().starts_with(self.held.trim());
        if !announced && !closing && (self.calls == 0 || self.text_begun || !blank) {
            let held = std::mem::take(&mut self.held);
            emit(held, &mut events);
        }
        self.held.clear();
        self.state = State::Rest;
        events
    }

    /// How many calls have begun.
    pub fn calls(&self) -> usize {
        self.calls
    }

    fn take(&mut self, c: char, events: &mut Vec<ToolEvent>) {
        // Another blank after nothing but blanks decides nothing: no marker has any, so what ends in one is blank as a whole. Models
        // can write blanks for ever, and looking through all of them each time would take time with the square of their number.
        let waits = matches!(self.state, State::Text | State::LlamaStart | State::AfterCall);
        if waits && c.is_whitespace() && self.held.ends_with(char::is_whitespace) {
            self.held.push(c);
            return;
        }
        match &mut self.state {
            State::Rest => self.content(&c.to_string(), events),
            State::Text => {
                self.held.push(c);
                self.text(events);
            }
            State::LlamaStart => {
                self.held.push(c);
                let begun = self.held.trim_start();
                let marker = self.format.markers()[0];
                if begun == "{" || begun == marker {
                    let object = begun == "{";
                    self.begin_call();
                    if object {
                        self.call('{', false, events);
                    }
                } else if !marker.starts_with(begun) {
                    self.give_up(events);
                }
            }
            State::MistralList => {
                self.held.push(c);
                match c {
                    '[' => self.begin_call(),
                    c if c.is_whitespace() => {}
                    _ => self.give_up(events),
                }
            }
            State::Call(_) => self.call(c, true, events),
            State::AfterCall => {
                self.held.push(c);
                self.after_call(events);
            }
        }
    }

    /// Looks for the marker in held text, and gives what can no longer be part of it.
    fn text(&mut self, events: &mut Vec<ToolEvent>) {
        let marker = self.format.markers()[0];
        if let Some(before) = self.held.strip_suffix(marker) {
            let before = before.to_string();
            // White space alone is kept until it is known whether a call follows it.
            if !before.trim().is_empty() || self.text_begun {
                self.content(&before, events);
                self.held = marker.to_string();
            }
            match self.format {
                ToolFormat::Mistral => self.state = State::MistralList,
                ToolFormat::Hermes | ToolFormat::Llama3Json => self.begin_call(),
            }
            return;
        }
        let keep = partial_marker(&self.held, marker);
        let ready = self.held.len() - keep;
        if self.text_begun || !self.held[..ready].trim().is_empty() {
            let tail = self.held.split_off(ready);
            let text = std::mem::replace(&mut self.held, tail);
            self.content(&text, events);
        }
    }

    fn begin_call(&mut self) {
        self.state = State::Call(Box::new(CallObject::new(self.format == ToolFormat::Llama3Json)));
    }

    fn call(&mut self, c: char, hold: bool, events: &mut Vec<ToolEvent>) {
        let State::Call(call) = &mut self.state else { return };
        let names = &self.names;
        let accepts = |name: &str| names.is_empty() || names.iter().any(|known| known == name);
        let index = self.calls;
        let was_announced = call.announced;
        let step = call.push(c, index, &accepts, events);
        let announced = call.announced;
        if hold && !announced {
            self.held.push(c);
        }
        if announced && !was_announced {
            self.held.clear();
            self.text_begun = false;
        }
        match step {
            Step::More => {}
            Step::Done => {
                self.calls += 1;
                self.held.clear();
                self.state = State::AfterCall;
            }
            Step::Broken if announced => {
                // The arguments are out already; what follows them is text.
                self.calls += 1;
                self.held = c.to_string();
                self.give_up(events);
            }
            Step::Broken => self.give_up(events),
        }
    }

    /// What closes or separates calls in this format.
    fn close(&self) -> &'static str {
        match self.format {
            ToolFormat::Hermes => "</tool_call>",
            ToolFormat::Llama3Json => ";",
            ToolFormat::Mistral => "]",
        }
    }

    fn after_call(&mut self, events: &mut Vec<ToolEvent>) {
        let begun = self.held.trim_start();
        let close = self.close();
        if begun == close {
            self.held.clear();
            match self.format {
                ToolFormat::Llama3Json => self.begin_call(),
                ToolFormat::Hermes | ToolFormat::Mistral => self.state = State::Text,
            }
        } else if self.format == ToolFormat::Mistral && begun == "," {
            self.held.clear();
            self.begin_call();
        } else if !close.starts_with(begun) {
            self.give_up(events);
        }
    }

    /// What is held is no call: it is content, and may itself contain a marker further on.
    fn give_up(&mut self, events: &mut Vec<ToolEvent>) {
        let held = std::mem::take(&mut self.held);
        self.state = if self.format == ToolFormat::Llama3Json { State::Rest } else { State::Text };
        let marker = self.format.markers()[0];
        // Past the marker that began this attempt the text is read anew.
        let after_marker = held.find(marker).map_or(0, |at| at + marker.len());
        let (seen, unread) = held.split_at(after_marker);
        self.content(seen, events);
        match self.state {
            State::Rest => self.content(unread, events),
            _ => unread.chars().for_each(|c| self.take(c, events)),
        }
    }

    fn content(&mut self, text: &str, events: &mut Vec<ToolEvent>) {
        self.text_begun |= !text.trim().is_empty();
        emit(text.to_string(), events);
    }
}

fn emit(text: String, events: &mut Vec<ToolEvent>) {
    if text.is_empty() {
        return;
    }
    match events.last_mut() {
        Some(ToolEvent::Content(last)) => last.push_str(&text),
        _ => events.push(ToolEvent::Content(text)),
    }
}

/// Length of the longest end of `text` that begins `marker`.
pub(crate) fn partial_marker(text: &str, marker: &str) -> usize {
    let longest = text.len().min(marker.len().saturating_sub(1));
    (1..=longest).rev().find(|&length| text.as_bytes().ends_with(&marker.as_bytes()[..length])).unwrap_or(0)
}
