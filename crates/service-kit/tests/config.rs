//! Errors of configuration files name file, line and key, and never a value.

use ashlar_service_kit::config::{ConfigError, load, parse};
use serde::Deserialize;
use std::path::Path;

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Node {
    name: String,
    port: u16,
    #[serde(default)]
    limits: Limits,
    mode: Option<Mode>,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Limits {
    memory_bytes: Option<u64>,
    key: Option<u64>,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Fast,
    Exact,
}

fn refusal(text: &str) -> String {
    parse::<Node>(Path::new("configs/node.toml"), text).expect_err("refused").to_string()
}

#[test]
fn a_good_file_is_read() {
    let file = tempfile::NamedTempFile::new().expect("file");
    let text = "name = \"a\"\nport = 7\nmode = \"exact\"\n[limits]\nmemory_bytes = 5\n";
    std::fs::write(file.path(), text).expect("written");
    let node: Node = load(file.path()).expect("read");
    assert_eq!((node.name.as_str(), node.limits.memory_bytes, node.mode), ("a", Some(5), Some(Mode::Exact)));
}

#[test]
fn an_unknown_key_is_named_with_line_and_alternatives() {
    assert_eq!(
        refusal("name = \"a\"\nport = 1\nfoo = 2\n"),
        "unknown key `foo` in configs/node.toml line 3; known keys: name, port, limits, mode"
    );
    assert_eq!(
        refusal("name = \"a\"\nport = 1\n\n[limits]\nmemory = 2\n"),
        "unknown key `memory` in configs/node.toml line 5; known keys: memory_bytes, key"
    );
}

#[test]
fn a_missing_key_and_a_wrong_value_are_named() {
    assert!(refusal("name = \"a\"\n").starts_with("missing key `port` in configs/node.toml"));
    assert_eq!(
        refusal("name = \"a\"\nport = \"planted-secret\"\n"),
        "key `port` in configs/node.toml line 2: expected u16, found string"
    );
    assert_eq!(
        refusal("name = \"a\"\nport = 70000\n"),
        "key `port` in configs/node.toml line 2: expected u16, found integer"
    );
    let variant = refusal("name = \"a\"\nport = 1\nmode = \"planted-secret\"\n");
    assert!(variant.contains("`mode`") && variant.contains("line 3"), "{variant}");
    assert!(variant.contains("expected `fast` or `exact`") && !variant.contains("planted"), "{variant}");
}

#[test]
fn no_error_repeats_a_value() {
    for text in [
        "name = planted-secret\nport = 1\n",
        "name = \"planted-secret\nport = 1\n",
        "name = \"a\"\nport = 1\nlimits = \"planted-secret\"\n",
        "name = \"a\"\nport = 1\nlimits = { key = \"planted-secret\" }\n",
        "name = [\"planted-secret\"]\nport = 1\n",
        "name = \"a\"\nname = \"planted-secret\"\nport = 1\n",
        "name = \"a\"\nport = \"plan\\\"ted-secret\"\n",
        "port = 1\nname = 1979-05-27planted-secret\n",
    ] {
        let error = refusal(text);
        assert!(!error.contains("ted-secret"), "{error}");
        assert!(error.contains("configs/node.toml") && error.contains("line"), "{error}");
    }
}

#[test]
fn what_is_no_toml_is_placed() {
    let error = parse::<Node>(Path::new("x.toml"), "name = \"a\"\nport 7\n").expect_err("refused");
    assert!(matches!(error, ConfigError::Syntax { line: 2, .. }), "{error}");
}

#[test]
fn a_file_that_is_not_there_or_too_large_is_named() {
    let error = load::<Node>(Path::new("/nowhere/node.toml")).expect_err("refused").to_string();
    assert!(error.contains("/nowhere/node.toml"), "{error}");
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), "#".repeat(2 << 20)).expect("written");
    assert!(load::<Node>(file.path()).expect_err("refused").to_string().contains("at most"));
}
