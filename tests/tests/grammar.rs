//! Answers under a grammar end where the grammar ends.

use ashlar_tests::Cluster;
use serde_json::{Value, json};

#[test]
fn an_answer_that_its_grammar_completes_ends_there_whatever_length_was_asked_for() {
    let cluster = Cluster::demo();
    let schema = json!({
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": false,
    });
    for with in [json!({"ignore_eos": true}), json!({"min_tokens": 150}), json!({})] {
        let mut body = json!({
            "messages": [{"role": "user", "content": "Is Rome the capital of France?"}],
            "temperature": 0, "max_tokens": 200,
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        });
        body.as_object_mut().expect("an object").extend(with.as_object().expect("an object").clone());
        let answer = cluster.post("/v1/chat/completions", &body).ok();
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{with}: {choice}");
        let text = choice["message"]["content"].as_str().expect("a text");
        let parsed: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(parsed["ok"].is_boolean(), "{with}: {text}");
    }
}
