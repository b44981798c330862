//! What is wrong with a configuration, and where. Values are not repeated, for they may be secrets.

use std::fmt;
use std::path::PathBuf;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nobody has set it.
    Default,
    /// The role has found it out itself; this says how.
    Found(String),
    /// A file.
    File {
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// An environment variable.
    Variable(String),
    /// A file that an environment variable names.
    VariableFile {
        /// The variable.
        variable: String,
        /// The file.
        file: PathBuf,
    },
    /// `--set` on the command line.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::Found(how) => f.write_str(how),
            Origin::File { file, line } => write!(f, "{}:{line}", file.display()),
            Origin::Variable(name) => f.write_str(name),
            Origin::VariableFile { variable, file } => write!(f, "{variable} ({})", file.display()),
            Origin::Flag => f.write_str("--set"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// A key that nobody knows.
    UnknownKey {
        /// The key, or the variable.
        key: String,
        /// Where it stands.
        origin: Origin,
        /// What was probably meant.
        nearest: Option<String>,
        /// Whose configuration it is.
        role: &'static str,
    },
    /// A key that is not there.
    MissingKey {
        /// The key.
        key: String,
        /// The variable that sets it.
        variable: String,
        /// The file that lacks it, if there is one.
        file: Option<PathBuf>,
    },
    /// A value that does not go with its key.
    Value {
        /// The key.
        key: String,
        /// Where it stands.
        origin: Origin,
        /// What is expected.
        reason: String,
    },
    /// A variable that is set together with its `_FILE`.
    Twice {
        /// The variable.
        variable: String,
    },
    /// Something else about an environment variable or a flag.
    Other {
        /// Where.
        place: String,
        /// What, and what to do.
        reason: String,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::UnknownKey { key, origin, nearest, role } => {
                match origin {
                    Origin::Variable(name) | Origin::VariableFile { variable: name, .. } if name == key => {
                        write!(f, "{name}: this variable sets no key of the {role}")?;
                    }
                    _ => write!(f, "{origin}: unknown key `{key}`")?,
                }
                match nearest {
                    Some(nearest) => write!(f, "; did you mean `{nearest}`?"),
                    None => write!(f, "; `ashlar config schema {role}` lists all"),
                }
            }
            Problem::MissingKey { key, variable, file } => {
                let place = file.as_ref().map_or_else(String::new, |file| format!("{}: ", file.display()));
                write!(
                    f,
                    "{place}`{key}` is missing: set it in a file, with {variable}, or with --set {key}=…"
                )
            }
            Problem::Value { key, origin, reason } => write!(f, "{origin}: `{key}`: {reason}"),
            Problem::Twice { variable } => {
                write!(f, "{variable} and {variable}_FILE are both set: leave one of them out")
            }
            Problem::Other { place, reason } => write!(f, "{place}: {reason}"),
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {file}: {reason}")]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// No TOML.
    #[error("{file}:{line}: this is not TOML: {reason}")]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// Keys and values that are wrong; at least one.
    #[error("{}", joined(.0))]
    Problems(Vec<Problem>),
}

fn joined(problems: &[Problem]) -> String {
    let lines: Vec<_> = problems.iter().map(Problem::to_string).collect();
    match lines.as_slice() {
        [one] => one.clone(),
        several => format!("the configuration has {} problems\n  {}", several.len(), several.join("\n  ")),
    }
}

/// `invalid type: string "hunter2", expected u16` → `expected u16, found a string`; other messages lose what stands
/// between quotation marks.
pub(super) fn without_values(message: &str) -> String {
    let detail = ["invalid type: ", "invalid value: ", "invalid length: "]
        .iter()
        .find_map(|p| message.strip_prefix(p));
    if let Some((found, expected)) = detail.and_then(|detail| detail.rsplit_once(", expected ")) {
        let kind = found.split(['"', '`']).next().unwrap_or_default().trim();
        return format!(
            "expected {expected}, found {}",
            if kind.is_empty() { "something else" } else { kind }
        );
    }
    let mut parts = message.split('"');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for (index, part) in parts.enumerate() {
        text.push_str(if index % 2 == 0 { "\"…\"" } else { part });
    }
    if let Some(rest) = text.strip_prefix("unknown variant `")
        && let Some((_, expected)) = rest.split_once("`, ")
    {
        return expected.to_owned();
    }
    text.lines().next().unwrap_or_default().to_owned()
}
