//! What can be wrong with one line of a file.

use crate::example::{Format, Method};
use ashlar_tokenizer::{TemplateError, TokenizerError};

/// Why a line cannot be used. Messages name fields, and show nothing of what the line says.
#[derive(Debug, thiserror::Error)]
pub enum LineProblem {
    /// More bytes than a line may have.
    #[error("the line is longer than {bytes_max} bytes: split the example")]
    TooLong {
        /// The bound.
        bytes_max: usize,
    },
    /// Not UTF-8.
    #[error("the line is not UTF-8 (byte {at} of it is the first that is wrong): save the file as UTF-8")]
    NotUtf8 {
        /// 0-based byte within the line.
        at: usize,
    },
    /// Not JSON.
    #[error("the line is not valid JSON ({what} at column {column}): each line must be one JSON object")]
    NotJson {
        /// What the parser met.
        what: &'static str,
        /// 1-based column.
        column: usize,
    },
    /// More JSON values than an example needs.
    #[error("the line has more than {values_max} values: split the example")]
    TooManyValues {
        /// The bound.
        values_max: usize,
    },
    /// JSON, but no object.
    #[error("the line is {found}: each line must be one JSON object")]
    NotAnObject {
        /// JSON's name of what it is.
        found: &'static str,
    },
    /// None of the formats.
    #[error(
        "the example has none of `messages`, `prompt` with `completion`, `text`, or `input` with `preferred_output` and \
         `non_preferred_output`"
    )]
    UnknownFormat,
    /// Another format than the first example's.
    #[error("the example is {found}, but line {line} is {first}: a file must keep to one format")]
    MixedFormats {
        /// Of this line.
        found: Format,
        /// Of the first good line.
        first: Format,
        /// The first good line.
        line: u64,
    },
    /// A format that the job's method does not take.
    #[error("the example is {found}, which the method `{method}` does not take")]
    WrongMethod {
        /// Of this line.
        found: Format,
        /// The job's.
        method: Method,
    },
    /// A required field is absent or null.
    #[error("`{path}` is missing")]
    Missing {
        /// The field.
        path: String,
    },
    /// A field has the wrong type.
    #[error("`{path}` must be {expected}, not {found}")]
    Mistyped {
        /// The field.
        path: String,
        /// What it must be.
        expected: &'static str,
        /// JSON's name of what it is.
        found: &'static str,
    },
    /// A field that says nothing.
    #[error("`{path}` is empty: give it some text, or leave the example out")]
    Empty {
        /// The field.
        path: String,
    },
    /// A role that there is not.
    #[error("`{path}` must be system, developer, user, assistant or tool")]
    UnknownRole {
        /// The field.
        path: String,
    },
    /// A field of an older format.
    #[error("`{path}` is no longer supported: use `{instead}`")]
    Outdated {
        /// The field.
        path: String,
        /// Its successor.
        instead: &'static str,
    },
    /// A part of a content that is no text.
    #[error("`{path}` must be a part of type `text` with a string: other kinds cannot be trained")]
    UnsupportedPart {
        /// The part.
        path: String,
    },
    /// A weight that is neither 0 nor 1.
    #[error("`{path}` must be 0 or 1")]
    BadWeight {
        /// The field.
        path: String,
    },
    /// A weight where nothing is trained.
    #[error("`{path}` is only allowed in an assistant message")]
    WeightNotAllowed {
        /// The field.
        path: String,
    },
    /// A tool's answer that nobody asked for.
    #[error("`{path}` is a tool's answer, but no assistant message before it calls a tool")]
    UncalledTool {
        /// The message.
        path: String,
    },
    /// No user message.
    #[error("`{path}` has no user message: an example needs at least one")]
    NoUser {
        /// The list.
        path: &'static str,
    },
    /// No assistant message.
    #[error("`messages` has no assistant message: an example needs an answer to learn")]
    NoAssistant,
    /// No assistant message that carries loss.
    #[error("every assistant message has weight 0: at least one must be trained")]
    NothingWeighted,
    /// An output that is not one assistant message.
    #[error("`{path}` must be a list of exactly one assistant message")]
    BadOutput {
        /// The list.
        path: &'static str,
    },
    /// The model has no chat template.
    #[error("the model has no chat template: use `prompt` with `completion`, or `text`")]
    NoTemplate,
    /// The template refuses the conversation up to an answer.
    #[error("up to {turn}: {source}; give that message `weight` 0 if it is not to be trained")]
    Template {
        /// The answer.
        turn: Turn,
        /// What the template says.
        source: TemplateError,
    },
    /// Nothing in the rendered text is the answer.
    #[error(
        "the model's chat template does not show where {turn} begins after the prompt, so it cannot be trained: give it `weight` \
         0, or use `prompt` with `completion`"
    )]
    AnswerNotFound {
        /// The answer.
        turn: Turn,
    },
    /// The prompt begins the reasoning, the answer does not end it.
    #[error(
        "the model's chat template opens the reasoning in the prompt and leaves it out of {turn}: switch reasoning off with \
         the template's arguments, or use `prompt` with `completion`"
    )]
    ReasoningLeftOut {
        /// The answer.
        turn: Turn,
    },
    /// Rendering every turn would take too much.
    #[error("rendering each turn takes more than {bytes_max} bytes of text: split the conversation")]
    TooManyTurns {
        /// The bound.
        bytes_max: usize,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Encode(TokenizerError),
    /// Nothing to learn is left.
    #[error(
        "no token to learn is left of the example's {tokens} within {max_seq_len}: shorten what stands before the answer, or \
         raise max_seq_len"
    )]
    NoTargetLeft {
        /// Before truncation.
        tokens: usize,
        /// The bound.
        max_seq_len: usize,
    },
}

/// Which answer of an example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// A message, by its index.
    Message(usize),
    /// `preferred_output`.
    Preferred,
    /// `non_preferred_output`.
    NonPreferred,
}

impl std::fmt::Display for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Turn::Message(index) => write!(f, "messages[{index}]"),
            Turn::Preferred => f.write_str("preferred_output"),
            Turn::NonPreferred => f.write_str("non_preferred_output"),
        }
    }
}
