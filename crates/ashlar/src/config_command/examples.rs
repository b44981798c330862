//! The commented examples in `configs/` say the truth.

#![allow(clippy::unwrap_used)]

use crate::settings::ConfigRole;
use ashlar_service_kit::config::Found;
use std::collections::BTreeSet;

const EXAMPLES: [(ConfigRole, &str); 3] = [
    (ConfigRole::Gateway, include_str!("../../../../configs/gateway.toml")),
    (ConfigRole::Scheduler, include_str!("../../../../configs/scheduler.toml")),
    (ConfigRole::Node, include_str!("../../../../configs/node.toml")),
];

/// A key as an example has it.
struct Line {
    path: String,
    value: toml::Value,
    commented_out: bool,
}

fn lines(text: &str) -> Vec<Line> {
    let mut table = String::new();
    let mut lines = Vec::new();
    for line in text.lines() {
        let (line, commented_out) = line.strip_prefix("# ").map_or((line, false), |line| (line, true));
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            table = format!("{name}.");
        }
        let Some((key, value)) = line.split_once(" = ") else { continue };
        let is_key = key.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        let value = format!("value = {value}")
            .parse::<toml::Table>()
            .ok()
            .and_then(|mut table| table.remove("value"));
        if let (true, Some(value)) = (is_key, value) {
            lines.push(Line { path: format!("{table}{key}"), value, commented_out });
        }
    }
    lines
}

#[test]
fn every_key_is_in_the_example_and_no_other() {
    for (role, text) in EXAMPLES {
        let schema = role.schema();
        let lines = lines(text);
        let named: BTreeSet<_> = lines.iter().map(|line| line.path.as_str()).collect();
        assert_eq!(named.len(), lines.len(), "configs/{}.toml names a key twice", role.word());
        for path in &named {
            assert!(!matches!(schema.find(path), Found::Unknown(_)), "configs/{}.toml: {path}", role.word());
        }
        for key in schema.keys() {
            let table = key.path.rsplit_once('.').map_or("", |(table, _)| table);
            let there = named.contains(key.path.as_str()) || named.contains(table);
            assert!(there, "configs/{}.toml lacks {}", role.word(), key.path);
        }
    }
}

#[test]
fn what_is_commented_out_in_an_example_stands_at_its_default() {
    for (role, text) in EXAMPLES {
        let schema = role.schema();
        for line in lines(text).into_iter().filter(|line| line.commented_out) {
            let Found::Key(key) = schema.find(&line.path) else { continue };
            if let Some(default) = &key.default {
                let default = toml::Value::try_from(default).unwrap();
                assert_eq!(line.value, default, "configs/{}.toml: {}", role.word(), line.path);
            }
        }
    }
}
