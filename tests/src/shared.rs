//! Data that lies beside the repository rather than in it: real models with their reference outputs.

use std::path::{Path, PathBuf};

/// The directory of shared data: `ASHLAR_SHARED_DATA`, else `../shared/data` beside the repository. Where there is none,
/// says so and returns `None`: the test is to return.
pub fn data(test: &str) -> Option<PathBuf> {
    let directory = match std::env::var_os("ASHLAR_SHARED_DATA") {
        Some(directory) => PathBuf::from(directory),
        None => workspace().join("../shared/data"),
    };
    if directory.is_dir() {
        return Some(directory);
    }
    eprintln!("SKIPPED {test}: there is no {} (set ASHLAR_SHARED_DATA)", directory.display());
    None
}

/// The repository's root.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// Parses a JSON file.
#[track_caller]
pub fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
