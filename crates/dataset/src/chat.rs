//! Where in the rendered text of a chat the assistant's answers stand.
//!
//! Templates do not say which text is whose, so it is found from what serving would do. For an answer, *prompt* is the
//! conversation before it, rendered with the generation prompt: what the model will be served. *Full* is the conversation up to and
//! with it. Where full begins with prompt, the rest is the answer; it is learnt up to and with the first token that ends
//! a generation, because serving stops there (templates often write a line break after it, or the token that ends a text).
//!
//! Answers of one conversation share a text as long as one text shows each of them, and what stands before it, byte for byte as
//! it would be served. Many templates do not: they leave out earlier reasoning (Qwen 3), mark the last answer differently (gpt-oss)
//! or move the system prompt to the last question (Mistral). Then the example becomes several samples: every answer is learnt
//! exactly once, after exactly the text that it will be asked with. The price is that the shared beginning is computed more than once.
//!
//! Some templates write into the prompt what they later leave out of the history (R1 opens and closes its reasoning; Mistral Nemo
//! shows the system prompt only while the question is the last message). There the answer is found where the template puts a plain
//! answer, and is joined to the prompt.

use crate::example::Conversation;
use crate::problem::{LineProblem, Turn};
use ashlar_tokenizer::{ChatTemplate, ReasoningMarkers, RenderInput, TemplateError, TemplateTime};
use serde_json::{Map, Value, json};
use std::ops::Range;

/// What all renderings of one example may take together, in bytes of text.
const RENDERED_BYTES_MAX: usize = 64 << 20;

/// A noncharacter, which no text has in earnest: stands for an answer in a rendering that only looks for its header.
const PROBE: &str = "\u{fdd5}";

/// A text and the bytes of it that are learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MarkedText {
    pub(crate) text: String,
    /// Ascending, disjoint, not empty.
    pub(crate) targets: Vec<Range<usize>>,
}

/// What an example's texts are.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RenderedChat {
    /// In the order of the last answer of each.
    pub(crate) texts: Vec<MarkedText>,
    /// Answers that end without a token that ends a generation.
    pub(crate) unterminated: u64,
}

/// A model's chat template, with what it is rendered with.
#[derive(Debug)]
pub(crate) struct ChatRenderer<'a> {
    pub(crate) template: &'a ChatTemplate,
    pub(crate) reasoning: Option<&'a ReasoningMarkers>,
    /// Texts of the tokens that end a generation; none of them empty.
    pub(crate) ends: &'a [String],
    pub(crate) kwargs: &'a Map<String, Value>,
    pub(crate) now: TemplateTime,
}

/// One answer after its prompt.
#[derive(Debug)]
struct Answered {
    text: String,
    /// Where the prompt ends.
    begin: usize,
    /// Where what is learnt ends.
    end: usize,
    terminated: bool,
}

impl ChatRenderer<'_> {
    /// The texts from which the answers that are to be learnt can be learnt.
    pub(crate) fn chat(&self, conversation: Conversation) -> Result<RenderedChat, LineProblem> {
        let Conversation { mut messages, trained, tools } = conversation;
        let mut budget = RENDERED_BYTES_MAX;
        let mut chat = RenderedChat::default();
        // From the last answer on: the longest texts come first, and earlier answers are looked for in them.
        for &index in trained.iter().rev() {
            messages.truncate(index + 1);
            let Some(answer) = messages.pop() else { continue };
            let answered =
                self.answer(&mut messages, answer, tools.as_ref(), Turn::Message(index), &mut budget)?;
            chat.unterminated += u64::from(!answered.terminated);
            let learnt = &answered.text[..answered.end];
            let home = chat.texts.iter_mut().find(|marked| {
                // What is learnt in a text only ever begins after what is yet to come.
                marked.text.starts_with(learnt)
                    && marked.targets.last().is_some_and(|range| answered.end <= range.start)
            });
            match home {
                Some(marked) => marked.targets.push(answered.begin..answered.end),
                None => {
                    let mut text = answered.text;
                    // Nothing that is learnt sees what stands after it.
                    text.truncate(answered.end);
                    let target = answered.begin..answered.end;
                    chat.texts.push(MarkedText { text, targets: vec![target] });
                }
            }
        }
        chat.texts.reverse();
        chat.texts.iter_mut().for_each(|marked| marked.targets.reverse());
        Ok(chat)
    }

    /// The text of one of the two answers of a preference; whether it is terminated, too.
    pub(crate) fn preference(
        &self,
        input: &mut Conversation,
        answer: Value,
        turn: Turn,
    ) -> Result<(MarkedText, bool), LineProblem> {
        let mut budget = RENDERED_BYTES_MAX;
        let Answered { mut text, begin, end, terminated } =
            self.answer(&mut input.messages, answer, input.tools.as_ref(), turn, &mut budget)?;
        text.truncate(end);
        Ok((MarkedText { text, targets: std::iter::once(begin..end).collect() }, terminated))
    }

    /// Renders `answer` after `before`, which is left as it was.
    fn answer(
        &self,
        before: &mut Vec<Value>,
        answer: Value,
        tools: Option<&Value>,
        turn: Turn,
        budget: &mut usize,
    ) -> Result<Answered, LineProblem> {
        let mut render = |messages: &mut Vec<Value>, add_generation_prompt: bool| {
            // A list of messages becomes a JSON value for the moment, so that it need not be copied.
            let list = Value::Array(std::mem::take(messages));
            let rendered = self.render(&list, tools, add_generation_prompt);
            if let Value::Array(list) = list {
                *messages = list;
            }
            let text = rendered.map_err(|source| LineProblem::Template { turn, source })?;
            *budget = budget
                .checked_sub(text.len())
                .ok_or(LineProblem::TooManyTurns { bytes_max: RENDERED_BYTES_MAX })?;
            Ok(text)
        };
        let prompt = render(before, true)?;
        before.push(answer);
        let full = render(before, false)?;
        before.pop();
        let begin = prompt.len();
        let text = if full.starts_with(&prompt) {
            full
        } else {
            if self.reasoning.is_some_and(|markers| markers.opened_by(&prompt)) {
                return Err(LineProblem::ReasoningLeftOut { turn });
            }
            before.push(json!({"role": "assistant", "content": PROBE}));
            let probe = render(before, false);
            before.pop();
            let answer =
                behind_header(&full, &probe?, &prompt).ok_or(LineProblem::AnswerNotFound { turn })?;
            prompt + answer
        };
        let answer = text.get(begin..).unwrap_or_default();
        if answer.is_empty() {
            return Err(LineProblem::AnswerNotFound { turn });
        }
        let stop = self.ends.iter().filter_map(|end| Some(answer.find(end.as_str())? + end.len())).min();
        let end = begin + stop.unwrap_or(answer.len());
        Ok(Answered { text, begin, end, terminated: stop.is_some() })
    }

    fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let (kwargs, now) = (self.kwargs, self.now);
        self.template.render(&RenderInput { messages, tools, add_generation_prompt, kwargs, now })
    }
}

/// The answer in `full`: what stands where `probe` has its plain answer, after the same beginning. A space that both have before
/// it is the model's to write, as part of its first word, unless the prompt ends with one.
fn behind_header<'t>(full: &'t str, probe: &str, prompt: &str) -> Option<&'t str> {
    let header = &probe[..probe.find(PROBE)?];
    let header = match header.strip_suffix(' ') {
        Some(shorter) if !prompt.ends_with(char::is_whitespace) => shorter,
        _ => header,
    };
    full.strip_prefix(header)
}

#[cfg(test)]
mod tests;
