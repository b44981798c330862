//! Where values come from, before they are put together.

use std::ffi::OsString;
use std::path::PathBuf;

/// Everything that a role is configured by; what comes later in this list goes before what comes earlier: file, environment, flags.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file (TOML).
    pub file: Option<PathBuf>,
    /// Environment variables; those of others are passed over.
    pub environment: Vec<(OsString, OsString)>,
    /// What was said with `--set`, as `key=value`.
    pub settings: Vec<String>,
}

impl Sources {
    /// A file alone.
    pub fn file(file: impl Into<PathBuf>) -> Sources {
        Sources { file: Some(file.into()), ..Sources::default() }
    }

    /// With this process's environment.
    pub fn with_environment(self) -> Sources {
        Sources { environment: std::env::vars_os().collect(), ..self }
    }
}
