//! Generated text is split into content and calls, in whatever steps it comes, and none of it is lost.

#![allow(clippy::unwrap_used)]

use ashlar_grammar::{ToolCallParser, ToolEvent};
use ashlar_tokenizer::ToolFormat::{self, Hermes, Llama3Json, Mistral};
use proptest::prelude::*;

/// A name and its arguments.
type Call = (String, String);

fn parse(format: ToolFormat, names: &[&str], text: &str, step: usize) -> (String, Vec<Call>) {
    let mut parser = ToolCallParser::new(format, names.iter().map(ToString::to_string).collect());
    let chars: Vec<char> = text.chars().collect();
    let mut events = Vec::new();
    for chunk in chars.chunks(step) {
        events.extend(parser.push(&chunk.iter().collect::<String>()));
    }
    events.extend(parser.finish());
    let mut content = String::new();
    let mut calls: Vec<Call> = Vec::new();
    for event in events {
        match event {
            ToolEvent::Content(text) => content.push_str(&text),
            ToolEvent::Call { index, name } => {
                assert_eq!(index, calls.len());
                calls.push((name, String::new()));
            }
            ToolEvent::Arguments { index, text } => {
                assert_eq!(index + 1, calls.len());
                calls[index].1.push_str(&text);
            }
        }
    }
    (content, calls)
}

#[test]
fn calls_are_read_in_every_format_at_any_step() {
    let f = |arguments: &str| ("f".to_string(), arguments.to_string());
    let cases: Vec<(ToolFormat, &str, &str, Vec<Call>)> = vec![
        (
            Hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, \"}\\\"\"]}}\n</tool_call>",
            "",
            vec![f("{\"a\": [1, \"}\\\"\"]}")],
        ),
        (
            Hermes,
            "Hm.\n<tool_call>\n{\"name\":\"f\",\"arguments\":{}}\n</tool_call>\n<tool_call>\n{\"name\":\"f\",\"arguments\":{\"b\":2}}\n</tool_call>\n",
            "Hm.\n",
            vec![f("{}"), f("{\"b\":2}")],
        ),
        (
            Hermes,
            "\n\n<tool_call>{\"arguments\": {\"a\": 1}, \"name\": \"f\", \"id\": 7}</tool_call>",
            "",
            vec![f("{\"a\": 1}")],
        ),
        (Hermes, "<tool_call>{\"name\": \"f\"}</tool_call>", "", vec![f("{}")]),
        (
            Hermes,
            "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>",
            "",
            vec![f("{\"a\": 1}")],
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"cut o",
            "",
            vec![f("{\"a\": \"cut o")],
        ),
        (
            Hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call> bye",
            " bye",
            vec![f("{}")],
        ),
        (Llama3Json, "{\"name\": \"f\", \"parameters\": {\"a\": 1}}", "", vec![f("{\"a\": 1}")]),
        (
            Llama3Json,
            "<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {}}; {\"name\": \"f\", \"parameters\": {\"b\": 2}}",
            "",
            vec![f("{}"), f("{\"b\": 2}")],
        ),
        (
            Mistral,
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"f\", \"arguments\": {}, \"id\": \"123456789\"}]",
            "",
            vec![f("{\"a\": 1}"), f("{}")],
        ),
        (Mistral, "Yes[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}]", "Yes", vec![f("{}")]),
    ];
    for (format, text, content, calls) in cases {
        for step in [1, 3, 7, 1000] {
            assert_eq!(
                parse(format, &["f"], text, step),
                (content.to_string(), calls.clone()),
                "{text} by {step}"
            );
        }
    }
}

#[test]
fn what_is_no_call_is_content() {
    for (format, text) in [
        (Hermes, "a <tool_call> b"),
        (Hermes, "<tool_call>\n{\"name\": 1}\n</tool_call>"),
        (Hermes, "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}</tool_call>"),
        (Hermes, "text <tool_"),
        (Hermes, "<tool_call>\n{\"name\": \"f\""),
        (Llama3Json, "{\"answer\": 42}"),
        (Llama3Json, "{\"name\": \"Bob\", \"age\": 3}"),
        (Llama3Json, "<|python_tag|>search.call(query=\"x\")"),
        (Llama3Json, "{\"name\": \"f\"}"),
        (Llama3Json, " plain text {\"name\": \"f\", \"parameters\": {}}"),
        (Mistral, "[TOOL_CALLS]f{\"a\": 1}"),
        (Mistral, "[TOOL_CALLS] [nonsense"),
        (Mistral, "  "),
    ] {
        for step in [1, 4, 1000] {
            assert_eq!(parse(format, &["f"], text, step), (text.to_string(), vec![]), "{text} by {step}");
        }
    }
}

#[test]
fn blanks_without_end_take_time_in_proportion_to_their_number() {
    // In time with the square of their number this takes minutes.
    let begun = std::time::Instant::now();
    for format in [Hermes, Llama3Json, Mistral] {
        for (before, after) in [("", "x"), ("", ""), ("a", "b")] {
            let text = format!("{before}{}{after}", " \n".repeat(300_000));
            assert_eq!(parse(format, &[], &text, 1000), (text, Vec::new()));
        }
    }
    assert!(begun.elapsed() < std::time::Duration::from_secs(30), "{:?}", begun.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_comes_out_the_same_in_any_steps_and_nothing_is_lost(
        parts in prop::collection::vec(prop::sample::select(vec![
            "<tool_call>", "</tool_call>", "<tool_", "[TOOL_CALLS]", "[TOOL", "<|python_tag|>", "{", "}", "[", "]", ",",
            ":", "\"name\"", "\"f\"", "\"arguments\"", "\"parameters\"", "{\"name\": \"f\", \"arguments\": {\"a\": 1}}",
            "{\"name\": \"f\", \"parameters\": {}}", "; ", " ", "\n", "é🙂", "\\", "\"", "x",
        ]), 0..14),
        step in 1usize..6,
        which in 0usize..3,
    ) {
        let format = [Hermes, Llama3Json, Mistral][which];
        let text = parts.concat();
        let (content, calls) = parse(format, &[], &text, step);
        prop_assert_eq!(&parse(format, &[], &text, 1000), &(content.clone(), calls.clone()), "{}", text);
        if calls.is_empty() {
            prop_assert_eq!(content, text);
        } else {
            // Every visible character of the content comes from the text, in its order.
            let mut rest = text.chars();
            prop_assert!(content.chars().all(|c| rest.any(|t| t == c)), "{:?} of {:?}", content, text);
        }
    }
}
