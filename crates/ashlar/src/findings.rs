//! What was looked at, and how it is: shown as a list with marks, or as JSON.

use serde::Serialize;
use std::fmt::Write as _;

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mark {
    /// As it should be.
    Good,
    /// It works, but not as well as it could.
    Warning,
    /// It does not work.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// How it is.
    pub(crate) mark: Mark,
    /// What was found.
    pub(crate) what: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) todo: Option<String>,
}

impl Finding {
    /// All is well.
    pub(crate) fn good(what: impl Into<String>) -> Finding {
        Finding { mark: Mark::Good, what: what.into(), todo: None }
    }

    /// It works, but `todo`, if it is not empty, would make it better.
    pub(crate) fn warning(what: impl Into<String>, todo: impl Into<String>) -> Finding {
        Finding { mark: Mark::Warning, what: what.into(), todo: told(todo.into()) }
    }

    /// It does not work before `todo` is done, if that is not empty.
    pub(crate) fn problem(what: impl Into<String>, todo: impl Into<String>) -> Finding {
        Finding { mark: Mark::Problem, what: what.into(), todo: told(todo.into()) }
    }
}

/// Where what was found says itself what to do, nothing is added.
fn told(todo: String) -> Option<String> {
    (!todo.is_empty()).then_some(todo)
}

/// Whether something does not work.
#[cfg(test)]
pub(crate) fn any_problem(findings: &[Finding]) -> bool {
    findings.iter().any(|finding| finding.mark == Mark::Problem)
}

/// The list as people read it, a line each; what to do stands below. Colours are for terminals.
pub(crate) fn list(findings: &[Finding], coloured: bool) -> String {
    let mut text = String::new();
    for Finding { mark, what, todo } in findings {
        let (sign, colour) = match mark {
            Mark::Good => ("✓", 32),
            Mark::Warning => ("!", 33),
            Mark::Problem => ("✗", 31),
        };
        let sign = if coloured { format!("\x1b[{colour}m{sign}\x1b[0m") } else { sign.to_owned() };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{sign} {}", what.replace('\n', "\n  "));
        if let Some(todo) = todo {
            let _ = writeln!(text, "    {todo}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_says_how_things_are_and_what_to_do() {
        let findings = [Finding::good("2 cores"), Finding::problem("no disk", "Free some.")];
        assert_eq!(list(&findings, false), "✓ 2 cores\n✗ no disk\n    Free some.\n");
        assert!(list(&findings, true).starts_with("\x1b[32m✓\x1b[0m 2 cores"));
        assert!(any_problem(&findings) && !any_problem(&findings[..1]));
    }
}
