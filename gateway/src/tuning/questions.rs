//! Samples as questions with one right answer each, and an answer that is judged as it comes.

use ashlar_dataset::TokenSequence;

/// What stands before an answer, and the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// As serving would be asked: the tokens before the answer, earlier right answers among them.
    pub(super) prompt: Vec<u32>,
    /// The answer's text, without what ends it.
    pub(super) expected: Vec<u8>,
    /// Whether the answer has to end there; not where the example was cut off, or nothing ends the model's answers.
    ends: bool,
}

/// The questions of a sample: one for each stretch of targets. `bytes` are a token's, `is_end` tells those that end an answer.
pub(super) fn questions<'t>(
    sample: &TokenSequence,
    bytes: impl Fn(u32) -> &'t [u8],
    is_end: impl Fn(u32) -> bool,
) -> Vec<Question> {
    let question = |range: &std::ops::Range<u32>| {
        let tokens = sample.tokens();
        let prompt = tokens.get(..range.start as usize)?;
        let answer = tokens.get(range.start as usize..range.end as usize)?;
        let (answer, ends) = match answer.split_last() {
            Some((last, before)) if is_end(*last) => (before, true),
            _ => (answer, false),
        };
        let expected = answer.iter().flat_map(|&token| bytes(token)).copied().collect();
        Some(Question { prompt: prompt.to_vec(), expected, ends })
    };
    sample.targets().iter().filter_map(question).collect()
}

/// An answer as far as it has come.
#[derive(Debug)]
pub(super) struct Answer<'q> {
    question: &'q Question,
    /// Bytes that were right.
    matched: usize,
    /// Tokens so far.
    tokens: u32,
}

impl Answer<'_> {
    pub(super) fn new(question: &Question) -> Answer<'_> {
        Answer { question, matched: 0, tokens: 0 }
    }

    /// Takes the next token; whether the answer is right, once that is known. Texts are compared, not tokens: the same text may be
    /// made of others.
    pub(super) fn token(&mut self, index: u32, bytes: &[u8], is_end: bool) -> Option<bool> {
        if index < self.tokens {
            return None;
        }
        self.tokens = index + 1;
        let left = self.question.expected.get(self.matched..).unwrap_or_default();
        if is_end {
            return Some(left.is_empty());
        }
        if left.starts_with(bytes) {
            self.matched += bytes.len();
            let whole = self.matched == self.question.expected.len();
            return (whole && !self.question.ends).then_some(true);
        }
        // A token may go on beyond where the example was cut off.
        Some(!self.question.ends && bytes.starts_with(left))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const END: u32 = 0;

    /// Each token is a letter; `a` is token 1.
    fn letter(token: u32) -> &'static [u8] {
        const LETTERS: &[u8] = b"\0abcdefgh";
        LETTERS.get(token as usize..token as usize + 1).unwrap_or_default()
    }

    fn asked(tokens: &[u32], targets: &[std::ops::Range<u32>]) -> Vec<Question> {
        let sample = TokenSequence::new(tokens.to_vec(), targets.to_vec()).unwrap();
        questions(&sample, letter, |token| token == END)
    }

    /// What is known after each token.
    fn judged(question: &Question, tokens: &[u32]) -> Option<bool> {
        let mut answer = Answer::new(question);
        (0..).zip(tokens).find_map(|(index, &token)| answer.token(index, letter(token), token == END))
    }

    #[test]
    fn every_answer_of_a_sample_is_a_question_that_shows_what_stood_before_it() {
        let asked = asked(&[5, 1, 2, END, 6, 3, END], &[1..4, 5..7]);
        let question = |prompt: &[u32], expected: &[u8]| Question {
            prompt: prompt.to_vec(),
            expected: expected.to_vec(),
            ends: true,
        };
        assert_eq!(asked, [question(&[5], b"ab"), question(&[5, 1, 2, END, 6], b"c")]);
    }

    #[test]
    fn an_answer_is_right_only_if_it_ends_where_it_should() {
        let question = &asked(&[5, 1, 2, END], &[1..4])[0];
        assert_eq!(judged(question, &[1, 2, END]), Some(true));
        assert_eq!(judged(question, &[1, END]), Some(false));
        assert_eq!(judged(question, &[1, 3]), Some(false), "known at once");
        assert_eq!(judged(question, &[1, 2, 3]), Some(false));
        assert_eq!(judged(question, &[1, 2]), None);
    }

    #[test]
    fn an_answer_that_was_cut_off_is_right_as_far_as_it_goes() {
        let question = &asked(&[5, 1, 2], &[1..3])[0];
        assert_eq!(judged(question, &[1, 2]), Some(true));
        assert_eq!(judged(question, &[1, END]), Some(false));
        let mut answer = Answer::new(question);
        assert_eq!(answer.token(0, b"abc", false), Some(true), "a token of several letters");
    }

    #[test]
    fn a_token_that_comes_twice_counts_once() {
        let question = &asked(&[5, 1, 1, END], &[1..4])[0];
        let mut answer = Answer::new(question);
        assert_eq!((answer.token(0, b"a", false), answer.token(0, b"a", false)), (None, None));
        assert_eq!(answer.token(1, b"a", false), None);
        assert_eq!(answer.token(2, b"", true), Some(true));
    }
}
