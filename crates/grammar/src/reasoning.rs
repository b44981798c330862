//! Generated text split into reasoning and answer.

use crate::tool_parser::partial_marker;
use ashlar_tokenizer::ReasoningMarkers;

/// A piece of generated text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReasoningEvent {
    /// Part of the reasoning, without its markers.
    Reasoning(String),
    /// Part of the answer.
    Content(String),
}

/// Splits a stream of text at the reasoning markers. Everything but the markers comes out again, in order; a marker
/// that is cut between two pushes is recognised all the same.
#[derive(Debug, Clone)]
pub struct ReasoningParser {
    markers: ReasoningMarkers,
    state: State,
    /// Text that may turn out to be part of a marker.
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Only white space so far: a start marker may follow.
    Start,
    Reasoning,
    Answer,
}

impl ReasoningParser {
    /// A parser at the start of an answer. `opened`: the prompt has written the start marker already
    /// ([`ReasoningMarkers::opened_by`]).
    pub fn new(markers: ReasoningMarkers, opened: bool) -> ReasoningParser {
        let state = if opened { State::Reasoning } else { State::Start };
        ReasoningParser { markers, state, held: String::new() }
    }

    /// Takes generated text and gives what is decided.
    pub fn push(&mut self, text: &str) -> Vec<ReasoningEvent> {
        self.held.push_str(text);
        let mut events = Vec::new();
        if self.state == State::Start {
            let begun = self.held.trim_start();
            if let Some(rest) = begun.strip_prefix(self.markers.start.as_str()) {
                self.held = rest.to_string();
                self.state = State::Reasoning;
            } else if self.markers.start.starts_with(begun) {
                return events;
            } else {
                self.state = State::Answer;
            }
        }
        if self.state == State::Reasoning {
            if let Some(at) = self.held.find(&self.markers.end) {
                let rest = self.held.split_off(at + self.markers.end.len());
                self.held.truncate(at);
                self.flush(&mut events);
                self.held = rest;
                self.state = State::Answer;
            } else {
                let keep = partial_marker(&self.held, &self.markers.end);
                let tail = self.held.split_off(self.held.len() - keep);
                self.flush(&mut events);
                self.held = tail;
            }
        }
        if self.state == State::Answer {
            self.flush(&mut events);
        }
        events
    }

    /// Takes the end of the text and gives what was held back.
    pub fn finish(&mut self) -> Vec<ReasoningEvent> {
        let mut events = Vec::new();
        self.flush(&mut events);
        events
    }

    /// Whether the text so far ends inside the reasoning.
    pub fn in_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    fn flush(&mut self, events: &mut Vec<ReasoningEvent>) {
        let text = std::mem::take(&mut self.held);
        if !text.is_empty() {
            events.push(match self.state {
                State::Reasoning => ReasoningEvent::Reasoning(text),
                State::Start | State::Answer => ReasoningEvent::Content(text),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str, opened: bool, step: usize) -> (String, String) {
        let markers = ReasoningMarkers { start: "<think>".into(), end: "</think>".into() };
        let mut parser = ReasoningParser::new(markers, opened);
        let chars: Vec<char> = text.chars().collect();
        let mut events = Vec::new();
        for chunk in chars.chunks(step) {
            events.extend(parser.push(&chunk.iter().collect::<String>()));
        }
        events.extend(parser.finish());
        let mut halves = (String::new(), String::new());
        for event in events {
            match event {
                ReasoningEvent::Reasoning(text) => halves.0.push_str(&text),
                ReasoningEvent::Content(text) => halves.1.push_str(&text),
            }
        }
        halves
    }

    #[test]
    fn reasoning_is_split_off_at_any_step() {
        for step in [1, 2, 5, 100] {
            for (text, opened, reasoning, content) in [
                ("<think>\na < b</think>\n\n4", false, "\na < b", "\n\n4"),
                (" \n<think>x</think>y", false, "x", "y"),
                ("a</think>b", true, "a", "b"),
                ("no marks <think>", false, "", "no marks <think>"),
                ("<thin", false, "", "<thin"),
                ("<think>unfinished </thi", false, "unfinished </thi", ""),
                ("  ", false, "", "  "),
            ] {
                assert_eq!(
                    split(text, opened, step),
                    (reasoning.into(), content.into()),
                    "{text:?} by {step}"
                );
            }
        }
    }
}
