//! Flags go before the environment, that before a file; what is wrong is told with its place; what the real binary says of it.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_tests::cluster::binary;
use serde_json::Value;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

/// Runs a command that starts nothing, without whatever environment the tests have.
fn ashlar(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(binary());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ASHLAR_")) {
        command.env_remove(name);
    }
    command.args(args).envs(environment.iter().copied()).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn shown(args: &[&str], environment: &[(&str, &str)], key: &str) -> (Value, String) {
    let output = ashlar(&[&["config", "show"], args, &["--json"]].concat(), environment);
    assert!(output.status.success(), "{}", said(&output));
    let keys: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let found = keys.into_iter().find(|shown| shown["key"] == key).unwrap();
    (found["value"].clone(), found["origin"].as_str().unwrap().to_owned())
}

#[test]
fn flags_go_before_the_environment_before_the_file_before_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("gateway.toml");
    std::fs::write(&file, "model = \"m\"\n\nlisten = \"127.0.0.1:1\"\n").unwrap();
    let file = file.to_str().unwrap();
    let with_file = ["gateway", "--config", file];
    let variable = ("ASHLAR_GATEWAY__LISTEN", "0.0.0.0:2");
    let minimal = ["gateway", "--set", "model=m"];
    assert_eq!(shown(&minimal, &[], "listen"), ("127.0.0.1:8080".into(), "default".into()));
    assert_eq!(shown(&with_file, &[], "listen"), ("127.0.0.1:1".into(), format!("{file}:3")));
    assert_eq!(shown(&with_file, &[variable], "listen"), ("0.0.0.0:2".into(), variable.0.into()));
    let flags = [&with_file[..], &["--set", "listen=0.0.0.0:3"]].concat();
    assert_eq!(shown(&flags, &[variable], "listen"), ("0.0.0.0:3".into(), "--set".into()));
}

#[test]
fn secrets_come_from_files_and_are_not_shown() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("store");
    std::fs::write(&secret, "redis://:planted@redis:6379/0\n").unwrap();
    let variable = ("ASHLAR_SCHEDULER__STORE_FILE", secret.to_str().unwrap());
    let (value, origin) = shown(&["scheduler", "--set", "model=m"], &[variable], "store");
    assert_eq!(value, "redis://:***@redis:6379/0");
    assert!(origin.contains("ASHLAR_SCHEDULER__STORE_FILE"), "{origin}");
    let both = [variable, ("ASHLAR_SCHEDULER__STORE", "redb:x")];
    let output = ashlar(&["config", "show", "scheduler", "--set", "model=m"], &both);
    assert!(!output.status.success() && said(&output).contains("both set"), "{}", said(&output));
}

#[test]
fn a_node_needs_no_file_and_finds_out_who_it_is() {
    let environment = [("ASHLAR_NODE__SCHEDULER", "127.0.0.1:1"), ("ASHLAR_NODE__LISTEN", "0.0.0.0:7410")];
    let (name, origin) = shown(&["node"], &environment, "name");
    assert!(!name.as_str().unwrap().is_empty() && origin == "this machine's name", "{name} {origin}");
    let (host, _) = shown(&["node"], &environment, "advertise_host");
    assert_eq!(host, "127.0.0.1");
}

#[test]
fn roles_refuse_unknown_keys_and_variables_with_the_nearest_one() {
    for (role, mistake) in [("gateway", "lisen"), ("scheduler", "lisen_nodes"), ("node", "lisen")] {
        let upper = role.to_uppercase();
        let setting = format!("{mistake}=x");
        let output = ashlar(&[role, "--set", &setting], &[(&format!("ASHLAR_{upper}__MODLE"), "m")]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("--set: unknown key `{mistake}`; did you mean `listen")), "{said}");
        assert!(said.contains(&format!("did you mean `ASHLAR_{upper}__MODEL`?")), "{said}");
    }
}

#[test]
fn the_examples_are_checked_and_a_mistake_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("own.toml");
    std::fs::write(&file, "scheduler = \"127.0.0.1:7401\"\nthreds = 2\n").unwrap();
    let output = ashlar(&["config", "check", file.to_str().unwrap()], &[]);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("own.toml (node)"), "{text}");
    assert!(text.contains("own.toml:2: unknown key `threds`; did you mean `threads`?"), "{text}");
    std::fs::write(&file, "scheduler = \"127.0.0.1:7401\"\nthreads = 1\n").unwrap();
    let output = ashlar(&["config", "check", file.to_str().unwrap()], &[]);
    assert!(output.status.success(), "{}", said(&output));
    // Keys and values hold; models and identities that the examples name are not on this machine.
    for role in ["gateway", "scheduler", "node"] {
        let example = repository().join("configs").join(format!("{role}.toml"));
        let text = said(&ashlar(&["config", "check", example.to_str().unwrap()], &[]));
        assert!(text.contains(&format!("({role})")) && !text.contains("unknown key"), "{text}");
        assert!(text.contains("`identity`"), "{text}");
    }
}

#[test]
fn the_schema_names_every_key_for_people_and_for_editors() {
    for role in ["gateway", "scheduler", "node", "enrolment"] {
        let output = ashlar(&["config", "schema", role, "--json"], &[]);
        let schema: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = said(&ashlar(&["config", "schema", role], &[]));
        for (key, property) in schema["properties"].as_object().unwrap() {
            assert!(property["description"].is_string(), "{role}: {key} has no description");
            assert!(text.contains(&format!("\n{key}")), "{role}: {key} is not listed");
        }
        assert_eq!(schema["additionalProperties"], false);
    }
}

#[test]
fn health_finds_the_address_of_a_role_in_its_environment() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let environment = [("ASHLAR_SCHEDULER__LISTEN_GATEWAYS", address.as_str())];
    let output = ashlar(&["health", "--role", "scheduler"], &environment);
    assert!(output.status.success() && said(&output).contains("listens"), "{}", said(&output));
    drop(listener);
    assert_eq!(ashlar(&["health", "--role", "scheduler"], &environment).status.code(), Some(1));
}

#[test]
fn the_doctor_says_what_to_do_and_fails_where_something_does_not_work() {
    let output = ashlar(&["doctor", "--machine", "--json"], &[]);
    let parts: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(parts[0]["findings"].as_array().unwrap().len() > 5, "{parts}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let output = ashlar(&["doctor", "--link", &address], &[]);
    assert!(output.status.success() && said(&output).contains("✓"), "{}", said(&output));
    drop(listener);
    let output = ashlar(&["doctor", "--link", &address, "--model", "/nowhere/model"], &[]);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("✗") && text.contains("refuses") && text.contains("there is no model"), "{text}");
    assert!(!text.contains('\x1b'), "{text}");
}
