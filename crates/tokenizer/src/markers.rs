//! How a model writes tool calls and reasoning, told from its chat template.

/// The text form of a tool call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ToolFormat {
    /// `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`, one block per call (Hermes, Qwen 2.5 and 3).
    Hermes,
    /// `{"name": …, "parameters": {…}}` as the whole answer, optionally after `<|python_tag|>`; calls are separated
    /// by `; ` (Llama 3.1 to 3.3).
    Llama3Json,
    /// `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]` (Mistral up to tokenizer version 7).
    Mistral,
}

impl ToolFormat {
    /// The format that a template's text gives away; `None` for formats that are not known here.
    pub fn detect(template: &str) -> Option<ToolFormat> {
        if template.contains("[TOOL_CALLS]") {
            Some(ToolFormat::Mistral)
        } else if template.contains("<tool_call>") {
            // Qwen3-Coder writes `<function=name>` inside, which is no JSON.
            (!template.contains("<function=")).then_some(ToolFormat::Hermes)
        } else if template.contains("<|python_tag|>")
            || (template.contains("<|eot_id|>") && template.contains("\"parameters\""))
        {
            Some(ToolFormat::Llama3Json)
        } else {
            None
        }
    }

    /// The texts that begin and end calls; each may be one token of the vocabulary.
    pub fn markers(self) -> &'static [&'static str] {
        match self {
            ToolFormat::Hermes => &["<tool_call>", "</tool_call>"],
            ToolFormat::Llama3Json => &["<|python_tag|>"],
            ToolFormat::Mistral => &["[TOOL_CALLS]"],
        }
    }
}

/// The texts around a model's reasoning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReasoningMarkers {
    /// Before it, usually `<think>`.
    pub start: String,
    /// After it, usually `</think>`.
    pub end: String,
}

impl ReasoningMarkers {
    /// The markers that a template's text gives away.
    pub fn detect(template: &str) -> Option<ReasoningMarkers> {
        [("<think>", "</think>"), ("[THINK]", "[/THINK]")]
            .into_iter()
            .find(|(start, end)| template.contains(end) || template.contains(start))
            .map(|(start, end)| ReasoningMarkers { start: start.into(), end: end.into() })
    }

    /// Whether a rendered prompt has opened the reasoning itself, so that the answer begins inside it.
    pub fn opened_by(&self, rendered_prompt: &str) -> bool {
        rendered_prompt.trim_end().ends_with(&self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_from_what_templates_write() {
        assert_eq!(ToolFormat::detect("{{ '<tool_call>\\n' }}"), Some(ToolFormat::Hermes));
        assert_eq!(ToolFormat::detect("<tool_call><function=f>"), None);
        assert_eq!(ToolFormat::detect("[TOOL_CALLS]"), Some(ToolFormat::Mistral));
        assert_eq!(ToolFormat::detect("'\"parameters\": ' <|eot_id|>"), Some(ToolFormat::Llama3Json));
        assert_eq!(ToolFormat::detect("{{ messages }}"), None);
    }

    #[test]
    fn a_prompt_that_ends_in_the_start_marker_has_opened_the_reasoning() {
        let markers = ReasoningMarkers { start: "<think>".into(), end: "</think>".into() };
        assert!(markers.opened_by("<|Assistant|><think>\n"));
        assert!(!markers.opened_by("<|Assistant|><think>\n\n</think>\n\n"));
    }
}
