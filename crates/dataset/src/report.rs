//! What is said about a whole file.

use crate::EXAMPLES_MIN;
use crate::example::{Format, Method};
use crate::prepare::TokenisedExample;
use crate::problem::LineProblem;
use std::fmt;

/// The first so many problems are kept; all are counted.
pub const PROBLEMS_KEPT_MAX: usize = 100;

/// How many problems a refusal spells out.
const PROBLEMS_SHOWN_MAX: usize = 5;

/// A file's totals and problems.
#[derive(Debug, Default)]
pub struct Report {
    /// The form of its examples, with the line of the first.
    pub format: Option<(Format, u64)>,
    /// Good examples.
    pub examples: u64,
    /// What they became.
    pub samples: u64,
    /// Tokens of the samples: what one epoch trains on.
    pub tokens: u64,
    /// Targets among them.
    pub target_tokens: u64,
    /// The longest sequence.
    pub longest: Option<Longest>,
    /// What did not fit.
    pub truncated: Truncation,
    /// Examples that became several samples, because the chat template writes an earlier answer, or what stands before it, differently
    /// once the conversation goes on.
    pub split_examples: u64,
    /// Answers after which no token ends the generation: a model that learns them may not stop.
    pub unterminated_turns: u64,
    /// What is wrong.
    pub problems: Problems,
}

/// The longest sequence of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Longest {
    /// 1-based line.
    pub line: u64,
    /// Before truncation.
    pub tokens: usize,
}

/// What was cut off at the longest allowed length.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Truncation {
    /// Examples of which something was.
    pub examples: u64,
    /// Tokens.
    pub tokens: u64,
    /// Targets among them.
    pub target_tokens: u64,
}

/// Problems of lines, in the order of the file.
#[derive(Debug, Default)]
pub struct Problems {
    /// The first [`PROBLEMS_KEPT_MAX`].
    pub first: Vec<LineError>,
    /// All of them.
    pub total: u64,
}

/// A line with its problem.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct LineError {
    /// 1-based.
    pub line: u64,
    /// What is wrong with it.
    pub problem: LineProblem,
}

/// Why a file cannot be used, as a job's error says it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FileRefusal {
    /// OpenAI's word for it.
    pub code: &'static str,
    /// The job's field that names the file.
    pub param: &'static str,
    /// What is wrong.
    pub message: String,
}

impl Report {
    /// Whether the job can train on the file.
    pub fn verdict(&self) -> Result<(), FileRefusal> {
        const PARAM: &str = "training_file";
        if self.problems.total > 0 {
            return Err(FileRefusal {
                code: "invalid_training_file",
                param: PARAM,
                message: self.problems.to_string(),
            });
        }
        if self.examples < EXAMPLES_MIN {
            let message = format!(
                "Training file has {} example(s), but must have at least {EXAMPLES_MIN} examples",
                self.examples
            );
            return Err(FileRefusal { code: "invalid_n_examples", param: PARAM, message });
        }
        Ok(())
    }

    /// The same for the file that the job only measures on: one good example is enough.
    pub fn verdict_as_validation(&self) -> Result<(), FileRefusal> {
        self.verdict_as_measured("Validation file", "invalid_validation_file", "validation_file")
    }

    /// The same for the file that what a job has made is compared on with what is served.
    pub fn verdict_as_evaluation(&self) -> Result<(), FileRefusal> {
        self.verdict_as_measured("Evaluation file", "invalid_evaluation_file", "promote.file")
    }

    fn verdict_as_measured(
        &self,
        file: &str,
        code: &'static str,
        param: &'static str,
    ) -> Result<(), FileRefusal> {
        if self.problems.total > 0 {
            return Err(FileRefusal { code, param, message: self.problems.to_string() });
        }
        if self.examples == 0 {
            let message = format!("{file} has no example, but must have at least 1");
            return Err(FileRefusal { code: "invalid_n_examples", param, message });
        }
        Ok(())
    }

    /// Refuses a format that the job's method does not take, or that is not the file's.
    pub(crate) fn expect_format(
        &mut self,
        line: u64,
        found: Format,
        method: Method,
    ) -> Result<(), LineProblem> {
        if found.method() != method {
            return Err(LineProblem::WrongMethod { found, method });
        }
        let (first, first_line) = *self.format.get_or_insert((found, line));
        if found != first {
            return Err(LineProblem::MixedFormats { found, first, line: first_line });
        }
        Ok(())
    }

    pub(crate) fn add(&mut self, line: u64, example: &TokenisedExample) {
        self.examples += 1;
        self.samples += example.samples.len() as u64;
        for sequence in example.samples.iter().flatten() {
            self.tokens += sequence.tokens().len() as u64;
            self.target_tokens += u64::from(sequence.target_count());
        }
        if self.longest.is_none_or(|longest| longest.tokens < example.tokens_longest) {
            self.longest = Some(Longest { line, tokens: example.tokens_longest });
        }
        if example.is_truncated() {
            self.truncated.examples += 1;
            self.truncated.tokens += example.tokens_lost as u64;
            self.truncated.target_tokens += example.targets_lost as u64;
        }
        self.split_examples += u64::from(example.samples.len() > 1);
        self.unterminated_turns += example.unterminated;
    }
}

impl Problems {
    pub(crate) fn add(&mut self, line: u64, problem: LineProblem) {
        self.total += 1;
        if self.first.len() < PROBLEMS_KEPT_MAX {
            self.first.push(LineError { line, problem });
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line(s) cannot be used", self.total)?;
        let shown = &self.first[..self.first.len().min(PROBLEMS_SHOWN_MAX)];
        for (index, error) in shown.iter().enumerate() {
            write!(f, "{} {error}", if index == 0 { ':' } else { ';' })?;
        }
        match self.total.saturating_sub(shown.len() as u64) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}
