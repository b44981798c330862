//! Grammars for tool calls in the model's own format, and for answers after reasoning.

use crate::compiler::{arguments_options, response_options, with_options};
use crate::lark::{Marker, escape_regex, literal};
use ashlar_tokenizer::{ReasoningMarkers, Tokenizer, ToolFormat};
use ashlar_vocabulary::sampling::GrammarSpec;
use serde_json::{Value, json};
use std::fmt::Write;

/// A tool that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolSpec {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments; `null` means no arguments are described.
    pub parameters: Value,
}

/// Whether and which tools must be called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// Text or calls; calls are held to the schemas once the model begins one.
    Auto,
    /// At least one call, and no text.
    Required,
    /// One call of this tool, and no text.
    Named(String),
}

/// A schema as a constraint on the whole answer.
pub fn schema_grammar(schema: &Value) -> GrammarSpec {
    GrammarSpec::JsonSchema(schema.to_string())
}

/// The grammar of answers that call `tools` as `choice` says, in the format that the model was trained to write.
/// `parallel` allows several calls. `None` when no tool is left to call (none given, or the named one is missing).
///
/// Schemas of tools are hints to the model, so keywords that cannot be enforced are ignored here, unlike in
/// [`schema_grammar`].
pub fn tool_grammar(
    tools: &[ToolSpec],
    choice: &ToolChoice,
    format: ToolFormat,
    parallel: bool,
    tokenizer: &Tokenizer,
) -> Option<GrammarSpec> {
    let tools: Vec<&ToolSpec> = tools
        .iter()
        .filter(|tool| !matches!(choice, ToolChoice::Named(name) if *name != tool.name))
        .collect();
    if tools.is_empty() {
        return None;
    }
    let auto = *choice == ToolChoice::Auto;
    let parallel = parallel && !matches!(choice, ToolChoice::Named(_));
    let mut rules = match format {
        ToolFormat::Hermes => hermes(auto, parallel, tokenizer),
        ToolFormat::Llama3Json => llama3(auto, parallel, tokenizer),
        ToolFormat::Mistral => mistral(auto, parallel, tokenizer),
    };
    let arguments = if format == ToolFormat::Llama3Json { "parameters" } else { "arguments" };
    let names: Vec<String> = (0..tools.len()).map(|index| format!("tool_{index}")).collect();
    let _ = writeln!(rules, "object: {}", names.join(" | "));
    for (index, tool) in tools.iter().enumerate() {
        let head = format!("{{\"name\": {}, \"{arguments}\": ", Value::from(tool.name.as_str()));
        let _ = writeln!(rules, "tool_{index}: {} args_{index} \"}}\"", literal(&head));
        let _ = writeln!(rules, "args_{index}: %json {}", arguments_schema(&tool.parameters));
    }
    Some(GrammarSpec::Lark(rules))
}

/// An answer to `spec` that may be preceded by reasoning, as thinking models write it. `opened`: the prompt has
/// written the start marker already ([`ReasoningMarkers::opened_by`]).
pub fn after_reasoning(
    spec: &GrammarSpec,
    markers: &ReasoningMarkers,
    opened: bool,
    tokenizer: &Tokenizer,
) -> GrammarSpec {
    let start = Marker::of(tokenizer, &markers.start).lark();
    let thought = up_to("thought", &Marker::of(tokenizer, &markers.end));
    let head = if opened { "thought".to_string() } else { format!("({start} thought)?") };
    let answer = match spec {
        GrammarSpec::JsonObject => {
            format!("answer: %json {}\n", with_options(json!({"type": "object"}), &response_options()))
        }
        GrammarSpec::JsonSchema(source) => {
            let schema = serde_json::from_str(source).unwrap_or(Value::Null);
            format!("answer: %json {}\n", with_options(schema, &response_options()))
        }
        GrammarSpec::Lark(source) => {
            let renamed = source.strip_prefix("start:").map(|rest| format!("answer:{rest}"));
            renamed.unwrap_or_else(|| source.replace("\nstart:", "\nanswer:"))
        }
    };
    GrammarSpec::Lark(format!("start: {head} /\\s{{0,4}}/ answer\n{thought}{answer}"))
}

/// Calls (`calls`: a grammar of [`tool_grammar`] that requires them), or else an answer to `spec`, which must be JSON.
pub fn calls_or(calls: &GrammarSpec, spec: &GrammarSpec) -> Option<GrammarSpec> {
    let GrammarSpec::Lark(calls) = calls else { return None };
    let schema = match spec {
        GrammarSpec::JsonObject => json!({"type": "object"}),
        GrammarSpec::JsonSchema(source) => serde_json::from_str(source).ok()?,
        GrammarSpec::Lark(_) => return None,
    };
    let calls = calls.replacen("start:", "calls_only:", 1);
    let json = with_options(schema, &response_options());
    Some(GrammarSpec::Lark(format!("start: calls_only | json_answer\n{calls}json_answer: %json {json}\n")))
}

/// Arguments are an object, whatever else the schema says.
fn arguments_schema(parameters: &Value) -> Value {
    let schema = match parameters {
        Value::Object(object) if object.contains_key("type") || object.contains_key("$ref") => {
            Value::Object(object.clone())
        }
        Value::Object(object) => {
            let mut object = object.clone();
            object.insert("type".into(), "object".into());
            Value::Object(object)
        }
        _ => json!({"type": "object"}),
    };
    with_options(schema, &arguments_options())
}

/// A rule that takes any text up to and including a marker.
fn up_to(rule: &str, marker: &Marker) -> String {
    match marker {
        Marker::Token(_) => format!("{rule}: /(.|\\n)*/ {}\n", marker.lark()),
        Marker::Text(_) => format!("{rule}[lazy]: /(.|\\n)*/ {}\n", marker.lark()),
    }
}

/// A terminal for text that does not contain a marker.
fn prose(marker: &Marker) -> String {
    match marker {
        Marker::Token(_) => "PROSE: /(.|\\n)*/\n".to_string(),
        Marker::Text(text) => {
            format!("PROSE: /(.|\\n)*/ & ~/(.|\\n)*{}(.|\\n)*/\n", escape_regex(text))
        }
    }
}

fn hermes(auto: bool, parallel: bool, tokenizer: &Tokenizer) -> String {
    let [open, close] = ["<tool_call>", "</tool_call>"].map(|text| Marker::of(tokenizer, text));
    let more = if parallel { " (\"\\n\" call)*" } else { "" };
    let body = format!("body: \"\\n\" object \"\\n\" {}\ncall: {} body\n", close.lark(), open.lark());
    if auto {
        format!("start: PROSE | trigger body{more}\n{}{}{body}", prose(&open), up_to("trigger", &open))
    } else {
        format!("start: call{more}\n{body}")
    }
}

fn mistral(auto: bool, parallel: bool, tokenizer: &Tokenizer) -> String {
    let open = Marker::of(tokenizer, "[TOOL_CALLS]");
    let more = if parallel { " (\",\" \" \"? object)*" } else { "" };
    let body = format!("body: \" \"? \"[\" object{more} \"]\"\n");
    if auto {
        format!("start: PROSE | trigger body\n{}{}{body}", prose(&open), up_to("trigger", &open))
    } else {
        format!("start: {} body\n{body}", open.lark())
    }
}

fn llama3(auto: bool, parallel: bool, tokenizer: &Tokenizer) -> String {
    let python_tag = match Marker::of(tokenizer, "<|python_tag|>") {
        Marker::Token(id) => format!("<[{id}]>? "),
        Marker::Text(_) => String::new(),
    };
    let more = if parallel { " (\"; \" object)*" } else { "" };
    let calls = format!("calls: {python_tag}object{more}\n");
    if auto {
        // A text that begins with a brace is a call; this is how the format tells them apart.
        format!("start: PROSE? | calls\nPROSE: /[^{{](.|\\n)*/\n{calls}")
    } else {
        format!("start: calls\n{calls}")
    }
}
