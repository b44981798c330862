//! What an answer to a chat request may look like: the constraint for the sampler, and how the answer is read.

use super::answer::AnswerGrammar;
use super::chat_request::ChatRequest;
use super::chat_tools::{ToolChoice, Tools};
use super::error::ApiError;
use crate::text::ModelText;
use ashlar_grammar::{ToolSpec, after_reasoning, calls_or, tool_grammar};
use ashlar_tokenizer::ToolFormat;
use ashlar_vocabulary::GrammarSpec;
use serde_json::Value;

/// Derives both from a request and its rendered prompt, and checks that the constraint can be used.
pub(crate) fn answer_grammar(
    request: &ChatRequest,
    rendered_prompt: &str,
    text: &ModelText,
) -> Result<(Option<GrammarSpec>, AnswerGrammar), ApiError> {
    let tokenizer = &text.tokenizer;
    let mut reading = AnswerGrammar::default();
    if let Some(markers) = tokenizer.reasoning() {
        reading.reasoning = Some((markers.clone(), markers.opened_by(rendered_prompt)));
    }
    let format = tool_format(&request.tools, tokenizer.tool_format());
    if let Some(format) = format {
        reading.tools = Some((format, called_names(&request.tools)));
    }
    let (constraint, param) = match (&request.grammar, format) {
        (Some(asked), Some(format)) if request.tools.choice == ToolChoice::Auto => {
            text.check_grammar(asked, "response_format")?;
            let calls = tools_constraint(&request.tools, &ToolChoice::Required, format, text);
            let either = calls.and_then(|calls| calls_or(&calls, asked));
            (either.or_else(|| Some(asked.clone())), "tools")
        }
        (Some(asked), None) => (Some(asked.clone()), "response_format"),
        (_, Some(format)) => (tools_constraint(&request.tools, &request.tools.choice, format, text), "tools"),
        (None, None) => (None, ""),
    };
    let Some(mut constraint) = constraint else { return Ok((None, reading)) };
    // The client's part is checked by itself, so that errors are about what the client wrote.
    text.check_grammar(&constraint, param)?;
    if let Some((markers, opened)) = &reading.reasoning {
        constraint = after_reasoning(&constraint, markers, *opened, tokenizer);
        text.check_grammar(&constraint, param)?;
    }
    Ok((Some(constraint), reading))
}

/// The format in which calls are written; a model that knows none can still be held to one.
fn tool_format(tools: &Tools, known: Option<ToolFormat>) -> Option<ToolFormat> {
    match tools.choice {
        ToolChoice::None => None,
        ToolChoice::Auto => known,
        ToolChoice::Required | ToolChoice::Function(_) => known.or(Some(ToolFormat::Hermes)),
    }
}

fn tools_constraint(
    tools: &Tools,
    choice: &ToolChoice,
    format: ToolFormat,
    text: &ModelText,
) -> Option<GrammarSpec> {
    let specs: Vec<ToolSpec> = functions(tools)
        .map(|function| ToolSpec {
            name: function["name"].as_str().unwrap_or_default().to_owned(),
            parameters: function["parameters"].clone(),
        })
        .collect();
    let choice = match choice {
        ToolChoice::None => return None,
        ToolChoice::Auto => ashlar_grammar::ToolChoice::Auto,
        ToolChoice::Required => ashlar_grammar::ToolChoice::Required,
        ToolChoice::Function(name) => ashlar_grammar::ToolChoice::Named(name.clone()),
    };
    tool_grammar(&specs, &choice, format, tools.parallel, &text.tokenizer)
}

fn called_names(tools: &Tools) -> Vec<String> {
    match &tools.choice {
        ToolChoice::Function(name) => vec![name.clone()],
        _ => functions(tools).filter_map(|function| function["name"].as_str().map(str::to_owned)).collect(),
    }
}

fn functions(tools: &Tools) -> impl Iterator<Item = &Value> {
    tools.offered.iter().filter_map(Value::as_array).flatten().map(|tool| &tool["function"])
}
