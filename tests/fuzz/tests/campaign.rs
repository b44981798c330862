//! Every target for a short while, and what a campaign notices.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;

/// Seconds for all targets together.
const SECONDS: f64 = 60.0;

/// Runs the program; whether it found nothing, and what it said.
fn campaign(args: &[&str]) -> (bool, String) {
    let failures = tempfile::tempdir().unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_ashlar-fuzz"));
    let output = program.args(args).arg("--failures").arg(failures.path()).output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), said)
}

#[test]
fn no_input_breaks_anything_within_a_minute() {
    let each = format!("{:.2}", SECONDS / ashlar_fuzz::targets::ALL.len() as f64);
    let (good, said) = campaign(&["--time", &each, "--seed", "20"]);
    println!("{said}");
    assert!(good, "{said}");
}

#[test]
fn a_campaign_notices_panics_caught_ones_too_and_memory_and_dead_processes() {
    let (good, said) = campaign(&["--target", "self-test", "--inputs", "6", "--jobs", "1"]);
    assert!(!good, "{said}");
    for part in
        ["6 inputs", "4 findings", "panicked: out loud", "panicked: in secret", "held 8", "ended the process"]
    {
        assert!(said.contains(part), "no `{part}`: {said}");
    }
    let again = ["--target", "self-test", "--seed", "1", "--from", "1", "--inputs", "1"];
    let (good, said) = campaign(&again);
    assert!(!good && said.contains("1 findings"), "{said}");
}
