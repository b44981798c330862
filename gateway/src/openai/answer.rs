//! From a choice's text to what a chat message is made of: reasoning, content, tool calls.

use ashlar_grammar::{ReasoningEvent, ReasoningParser, ToolCallParser, ToolEvent};
use ashlar_tokenizer::{ReasoningMarkers, ToolFormat};
use ashlar_vocabulary::RequestId;
use ashlar_vocabulary::random::{Purpose, random_bits};

/// A piece of an assistant's message, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Text between the reasoning markers.
    Reasoning(String),
    /// Text for the user.
    Content(String),
    /// A tool call begins; calls are numbered from 0.
    ToolCall { index: usize, id: String, name: String },
    /// More of a tool call's arguments.
    Arguments { index: usize, text: String },
}

/// How a request's answers are to be read.
#[derive(Debug, Clone, Default)]
pub(crate) struct AnswerGrammar {
    /// The model's reasoning markers, and whether the prompt has opened them.
    pub(crate) reasoning: Option<(ReasoningMarkers, bool)>,
    /// The format of tool calls and the names that count.
    pub(crate) tools: Option<(ToolFormat, Vec<String>)>,
}

/// Splits one choice's text as it arrives.
#[derive(Debug)]
pub(crate) struct AnswerParser {
    reasoning: Option<ReasoningParser>,
    tools: Option<ToolCallParser>,
    format: Option<ToolFormat>,
    /// Whose answer it is: request and choice.
    owner: (RequestId, usize),
}

impl AnswerParser {
    /// A parser for one choice of a request. Calls are named after these, so that the same answer names them the same.
    pub(crate) fn new(grammar: &AnswerGrammar, request: RequestId, choice: usize) -> AnswerParser {
        let reasoning =
            grammar.reasoning.clone().map(|(markers, opened)| ReasoningParser::new(markers, opened));
        let tools = grammar.tools.clone().map(|(format, names)| ToolCallParser::new(format, names));
        let format = grammar.tools.as_ref().map(|(format, _)| *format);
        AnswerParser { reasoning, tools, format, owner: (request, choice) }
    }

    /// Takes more text.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        match &mut self.reasoning {
            None => self.answer(text, &mut pieces),
            Some(reasoning) => {
                let events = reasoning.push(text);
                self.reasoned(events, &mut pieces);
            }
        }
        pieces
    }

    /// The text has ended.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        if let Some(reasoning) = &mut self.reasoning {
            let events = reasoning.finish();
            self.reasoned(events, &mut pieces);
        }
        if let Some(tools) = &mut self.tools {
            let events = tools.finish();
            self.called(events, &mut pieces);
        }
        pieces
    }

    /// Whether the answer contains a tool call so far.
    pub(crate) fn has_tool_calls(&self) -> bool {
        self.tools.as_ref().is_some_and(|tools| tools.calls() > 0)
    }

    fn reasoned(&mut self, events: Vec<ReasoningEvent>, pieces: &mut Vec<Piece>) {
        for event in events {
            match event {
                ReasoningEvent::Reasoning(text) => pieces.push(Piece::Reasoning(text)),
                ReasoningEvent::Content(text) => self.answer(&text, pieces),
            }
        }
    }

    fn answer(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        match &mut self.tools {
            None if text.is_empty() => {}
            None => pieces.push(Piece::Content(text.to_owned())),
            Some(tools) => {
                let events = tools.push(text);
                self.called(events, pieces);
            }
        }
    }

    /// The tool parser decides character by character; what it says of one push is put together again.
    fn called(&mut self, events: Vec<ToolEvent>, pieces: &mut Vec<Piece>) {
        for event in events {
            match (event, pieces.last_mut()) {
                (ToolEvent::Content(more), Some(Piece::Content(text))) => text.push_str(&more),
                (ToolEvent::Content(text), _) => pieces.push(Piece::Content(text)),
                (
                    ToolEvent::Arguments { index, text: more },
                    Some(Piece::Arguments { index: last, text }),
                ) if *last == index => {
                    text.push_str(&more);
                }
                (ToolEvent::Arguments { index, text }, _) => pieces.push(Piece::Arguments { index, text }),
                (ToolEvent::Call { index, name }, _) => {
                    pieces.push(Piece::ToolCall { index, id: self.call_id(index), name });
                }
            }
        }
    }

    fn call_id(&self, index: usize) -> String {
        let (RequestId(request), choice) = self.owner;
        let bits = |seed| random_bits(seed, Purpose::Names, [choice as u32, index as u32]);
        let digits = format!("{:016x}{:016x}", bits(request as u64), bits((request >> 64) as u64));
        match self.format {
            // Mistral's templates refuse ids that are not nine letters and digits.
            Some(ToolFormat::Mistral) => digits[..9].to_owned(),
            _ => format!("call_{}", &digits[..24]),
        }
    }
}
