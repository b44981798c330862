//! What is written from other files in `docker/` is as it would be written now. What containers do is tested by `tests/compose/run`.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::Command;

/// `Ok` with what a script says of its output, or `None` where this machine has no Python that could run it.
fn check(script: &str, needs: &str) -> Option<Result<(), String>> {
    let python = Command::new("python3").args(["-c", &format!("import {needs}")]).output().ok()?;
    if !python.status.success() {
        eprintln!("skipped: there is no Python 3 with {needs}");
        return None;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let output =
        Command::new("python3").arg(root.join("scripts").join(script)).arg("--check").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Some(if output.status.success() { Ok(()) } else { Err(said) })
}

#[test]
fn kubernetes_manifests_are_as_compose_and_the_configuration_say() {
    assert_eq!(check("kubernetes", "yaml").unwrap_or(Ok(())), Ok(()));
}

#[test]
fn dashboards_are_as_their_script_writes_them() {
    assert_eq!(check("dashboards", "json").unwrap_or(Ok(())), Ok(()));
}
