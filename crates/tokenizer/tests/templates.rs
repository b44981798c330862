//! Templates of a few lines: what they refuse, and how messages are shaped for them.

#![allow(clippy::unwrap_used)]

use ashlar_tokenizer::{ChatTemplate, RenderInput, TemplateError, TemplateTime, Tokenizer, TokenizerError};
use serde_json::{Map, Value, json};

fn render_with(source: &str, messages: Value, kwargs: Value) -> Result<String, TemplateError> {
    let special = json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().unwrap().clone();
    ChatTemplate::new(source, None, special)?.render(&RenderInput {
        messages: &messages,
        tools: None,
        add_generation_prompt: true,
        kwargs: kwargs.as_object().unwrap(),
        now: TemplateTime::from_unix_seconds(1_735_787_045),
    })
}

fn render(source: &str, messages: Value) -> Result<String, TemplateError> {
    render_with(source, messages, json!({}))
}

const CONTENTS: &str = "{{ bos_token }}{% for m in messages %}{{ m.content }};{% endfor %}";

#[test]
fn parts_become_a_string_where_the_template_prints_content() {
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    assert_eq!(render(CONTENTS, json!([{"role": "user", "content": parts}])).unwrap(), "<s>a\nb;");
}

#[test]
fn parts_stay_parts_where_the_template_reads_them() {
    let source = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}";
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    assert_eq!(render(source, json!([{"role": "user", "content": parts}])).unwrap(), "[a][b]");
    // Such a template cannot read a string, so a string becomes one part.
    assert_eq!(render(source, json!([{"role": "user", "content": "a"}])).unwrap(), "[a]");
}

#[test]
fn a_part_that_is_no_text_is_refused_by_its_place() {
    let parts = json!([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]);
    assert_eq!(
        render(CONTENTS, json!([{"role": "user", "content": parts}])),
        Err(TemplateError::UnsupportedPart { message: 0, part: 1, kind: "image_url".into() })
    );
    assert_eq!(render(CONTENTS, json!(["x"])), Err(TemplateError::NotAMessage { index: 0 }));
    assert_eq!(render(CONTENTS, json!({})), Err(TemplateError::NotAMessage { index: 0 }));
}

#[test]
fn arguments_given_as_a_string_print_as_the_object_they_are() {
    let source = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments|tojson }}{% endfor %}{% endfor %}";
    let call = json!({"function": {"name": "f", "arguments": "{\"b\":1,\"a\":\"é\"}"}});
    let messages = json!([{"role": "assistant", "content": null, "tool_calls": [call]}]);
    assert_eq!(render(source, messages).unwrap(), "{\"b\": 1, \"a\": \"é\"}");
}

#[test]
fn an_answer_of_calls_alone_has_no_content_or_an_empty_one_as_the_template_can_read_it() {
    let call = json!({"id": "call00001", "function": {"name": "f", "arguments": "{}"}});
    let messages = json!([
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
    ]);
    // As Qwen 3 does; Python's `in` fails on None.
    let searches =
        "{% for m in messages %}{% if '</think>' in m.content %}t{% endif %}[{{ m.content }}]{% endfor %}";
    assert_eq!(render(searches, messages.clone()).unwrap(), "[q][]");
    // As R1 does: an empty content would be one more answer.
    let asks =
        "{% for m in messages %}{% if m.content is not none %}[{{ m.content }}]{% endif %}{% endfor %}";
    assert_eq!(render(asks, messages).unwrap(), "[q]");
}

#[test]
fn a_template_refuses_in_its_own_words() {
    let source = "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}ok";
    let message = json!({"role": "user", "content": "a"});
    assert_eq!(render(source, json!([message])).unwrap(), "ok");
    assert_eq!(render(source, json!([message, message])), Err(TemplateError::Raised("one only".into())));
}

#[test]
fn endless_work_runs_out_of_fuel() {
    let source = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
    assert_eq!(render(source, json!([])), Err(TemplateError::OutOfFuel));
}

#[test]
fn extra_arguments_reach_the_template_but_not_its_own_variables() {
    let source = "{{ enable_thinking }} {{ strftime_now('%d %b %Y') }}";
    assert_eq!(
        render_with(source, json!([]), json!({"enable_thinking": false})).unwrap(),
        "False 02 Jan 2025"
    );
    for name in ["messages", "tools", "chat_template", "bos_token", "raise_exception"] {
        let mut kwargs = Map::new();
        kwargs.insert(name.into(), "x".into());
        assert_eq!(
            render_with(source, json!([]), Value::Object(kwargs)),
            Err(TemplateError::ReservedArgument(name.into()))
        );
    }
}

#[test]
fn python_habits_work() {
    let source = "{%- set ns = namespace(n=0) -%}{% generation %}{%- for k, v in messages[0].items() %}{% if loop.index > 2 %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{{ k.removeprefix('r') }}={{ v[::-1] }} {% endfor %}{% endgeneration %}{{ ns.n }}{{ none }}{{ {'a': [1, 2.0, true]} }}{{ 'a-b-c'.rsplit('-', 1) }}{{ [1, 1e-7]|tojson(indent=2) }}";
    let text = render(source, json!([{"role": "user", "content": "abc", "x": "y"}])).unwrap();
    assert_eq!(text, "ole=resu content=cba 2None{'a': [1, 2.0, True]}['a-b', 'c'][\n  1,\n  1e-07\n]");
}

#[test]
fn a_missing_or_broken_file_is_named() {
    let dir = std::env::temp_dir().join(format!("ashlar-tokenizer-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let missing = Tokenizer::from_dir(&dir).unwrap_err();
    assert!(
        matches!(missing, TokenizerError::Missing { .. }) && missing.to_string().contains("tokenizer.json")
    );
    std::fs::write(dir.join("tokenizer_config.json"), "{").unwrap();
    let broken = Tokenizer::from_dir(&dir).unwrap_err();
    assert!(broken.to_string().contains("tokenizer_config.json"), "{broken}");
    std::fs::remove_dir_all(&dir).unwrap();
}
