//! The way from a file to samples, once per file.

use crate::chat::{ChatRenderer, MarkedText};
use crate::example::{Conversation, Example, Method};
use crate::file::{DatasetError, DatasetWriter};
use crate::lines::{LINE_BYTES_MAX, Line, Lines};
use crate::problem::{LineProblem, Turn};
use crate::report::Report;
use crate::sample::{Sample, TokenSequence};
use crate::tokens::{Encoded, encode_chat, encode_text};
use ashlar_tokenizer::{TemplateTime, Tokenizer};
use serde_json::{Map, Value};
use std::io::{self, BufRead, Write};

/// What a file is read for.
#[derive(Debug, Clone)]
pub struct Options {
    /// How the job learns.
    pub method: Method,
    /// Longer sequences are cut off, in tokens.
    pub max_seq_len: usize,
    /// Extra arguments of the chat template, as in a request (`enable_thinking`, …).
    pub template_kwargs: Map<String, Value>,
    /// The time that a chat template shows.
    pub now: TemplateTime,
    /// Longer lines are refused, in bytes.
    pub line_bytes_max: usize,
}

impl Options {
    /// With no extra arguments, the time 0 and lines up to [`LINE_BYTES_MAX`].
    pub fn new(method: Method, max_seq_len: usize) -> Options {
        Options {
            method,
            max_seq_len,
            template_kwargs: Map::new(),
            now: TemplateTime::default(),
            line_bytes_max: LINE_BYTES_MAX,
        }
    }
}

/// Why a file could not be read to its end. What is wrong with its lines is in the [`Report`] instead.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Reading failed.
    #[error("cannot read the training file: {0}")]
    Read(io::Error),
    /// Writing samples failed.
    #[error(transparent)]
    Write(#[from] DatasetError),
}

/// Checks and tokenises a whole file. Good examples are written as they come; whether the file as a whole can be used is
/// what [`Report::verdict`] says, and samples of a refused one are to be thrown away.
pub fn prepare<R: BufRead, W: Write>(
    file: R,
    tokenizer: &Tokenizer,
    options: &Options,
    writer: &mut DatasetWriter<W>,
) -> Result<Report, PrepareError> {
    let tokeniser = Tokeniser::new(tokenizer, options);
    let mut lines = Lines::new(file, options.line_bytes_max);
    let mut report = Report::default();
    while let Some((number, line)) = lines.next().map_err(PrepareError::Read)? {
        let made = match line {
            Line::TooLong => Err(LineProblem::TooLong { bytes_max: options.line_bytes_max }),
            Line::Bytes(bytes) => Example::parse(bytes).and_then(|example| {
                report.expect_format(number, example.format(), options.method)?;
                tokeniser.tokenise(example)
            }),
        };
        match made {
            Ok(example) => {
                // The writer refuses more samples than a number has room for, and every example has one.
                let index = report.examples as u32;
                report.add(number, &example);
                for sequences in example.samples {
                    writer.push(&Sample { example: index, sequences })?;
                }
            }
            Err(problem) => report.problems.add(number, problem),
        }
    }
    Ok(report)
}

/// What one example became.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenisedExample {
    /// The sequences of each sample; never empty.
    pub samples: Vec<Vec<TokenSequence>>,
    /// Tokens before truncation.
    pub tokens: usize,
    /// Tokens of the longest sequence before truncation.
    pub tokens_longest: usize,
    /// Tokens that were cut off.
    pub tokens_lost: usize,
    /// Targets that were cut off.
    pub targets_lost: usize,
    /// Answers after which the model will not stop, as no token that ends a generation follows.
    pub unterminated: u64,
}

impl TokenisedExample {
    /// Whether anything was cut off.
    pub fn is_truncated(&self) -> bool {
        self.tokens_lost > 0
    }

    /// Adds a sample, unless an answer lost all its targets.
    fn push(&mut self, sequences: Vec<Encoded>) {
        for encoded in &sequences {
            self.tokens += encoded.tokens;
            self.tokens_longest = self.tokens_longest.max(encoded.tokens);
        }
        let usable = sequences.iter().all(|encoded| encoded.sequence.target_count() > 0);
        for encoded in &sequences {
            let (tokens, targets) =
                (encoded.sequence.tokens().len(), encoded.sequence.target_count() as usize);
            self.tokens_lost += encoded.tokens_lost + if usable { 0 } else { tokens };
            self.targets_lost += encoded.targets_lost + if usable { 0 } else { targets };
        }
        if usable {
            self.samples.push(sequences.into_iter().map(|encoded| encoded.sequence).collect());
        }
    }
}

/// Makes token sequences of examples, for one model.
#[derive(Debug)]
pub struct Tokeniser<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a Options,
    /// Texts of the tokens that end a generation.
    ends: Vec<String>,
}

impl<'a> Tokeniser<'a> {
    /// A tokeniser for the model to which the tokenizer belongs.
    pub fn new(tokenizer: &'a Tokenizer, options: &'a Options) -> Tokeniser<'a> {
        let text = |&id: &u32| String::from_utf8(tokenizer.token_bytes(id).to_vec()).ok();
        let ends =
            tokenizer.eos_token_ids().iter().filter_map(text).filter(|text| !text.is_empty()).collect();
        Tokeniser { tokenizer, options, ends }
    }

    /// The samples of an example.
    pub fn tokenise(&self, example: Example) -> Result<TokenisedExample, LineProblem> {
        let mut tokenised = TokenisedExample::default();
        match example {
            Example::Chat(conversation) => self.chat(conversation, &mut tokenised)?,
            Example::Completion { prompt, completion } => {
                let begin = prompt.len();
                tokenised.push(vec![self.text(&(prompt + &completion), begin)?]);
            }
            Example::Text(text) => tokenised.push(vec![self.text(&text, 0)?]),
            Example::Preference { mut input, preferred, non_preferred } => {
                let renderer = self.renderer()?;
                let mut pair = Vec::with_capacity(2);
                for (answer, turn) in [(preferred, Turn::Preferred), (non_preferred, Turn::NonPreferred)] {
                    let (marked, terminated) = renderer.preference(&mut input, answer, turn)?;
                    tokenised.unterminated += u64::from(!terminated);
                    pair.push(self.encode(&marked)?);
                }
                tokenised.push(pair);
            }
        }
        if tokenised.samples.is_empty() {
            let (tokens, max_seq_len) = (tokenised.tokens_longest, self.options.max_seq_len);
            return Err(LineProblem::NoTargetLeft { tokens, max_seq_len });
        }
        Ok(tokenised)
    }

    fn chat(&self, conversation: Conversation, into: &mut TokenisedExample) -> Result<(), LineProblem> {
        let rendered = self.renderer()?.chat(conversation)?;
        into.unterminated = rendered.unterminated;
        for marked in &rendered.texts {
            into.push(vec![self.encode(marked)?]);
        }
        Ok(())
    }

    fn renderer(&self) -> Result<ChatRenderer<'_>, LineProblem> {
        Ok(ChatRenderer {
            template: self.tokenizer.chat_template().ok_or(LineProblem::NoTemplate)?,
            reasoning: self.tokenizer.reasoning(),
            ends: &self.ends,
            kwargs: &self.options.template_kwargs,
            now: self.options.now,
        })
    }

    fn encode(&self, marked: &MarkedText) -> Result<Encoded, LineProblem> {
        encode_chat(self.tokenizer, marked, self.options.max_seq_len).map_err(LineProblem::Encode)
    }

    fn text(&self, text: &str, begin: usize) -> Result<Encoded, LineProblem> {
        encode_text(self.tokenizer, text, begin, self.options.max_seq_len).map_err(LineProblem::Encode)
    }
}
