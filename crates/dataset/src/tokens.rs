//! Texts as token sequences in which some tokens are targets.
//!
//! A text is tokenised once, as a whole. A token is a target if it begins inside a stretch of text that is learnt, so of a
//! token that spans the border only the side where it begins counts.

use crate::chat::MarkedText;
use crate::sample::TokenSequence;
use ashlar_tokenizer::{EncodedText, Tokenizer, TokenizerError};
use std::ops::Range;

/// A sequence, and what had to be cut off to make it fit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) sequence: TokenSequence,
    /// Tokens before the cut.
    pub(crate) tokens: usize,
    /// Tokens that were cut off.
    pub(crate) tokens_lost: usize,
    /// Targets among them.
    pub(crate) targets_lost: usize,
}

/// A rendered chat. Its template has written every special token.
pub(crate) fn encode_chat(
    tokenizer: &Tokenizer,
    marked: &MarkedText,
    max_seq_len: usize,
) -> Result<Encoded, TokenizerError> {
    let encoded = tokenizer.encode_with_starts(&marked.text, false)?;
    Ok(sequence(encoded, &marked.targets, max_seq_len))
}

/// A text of which everything from byte `begin` on is learnt, with the tokenizer's special tokens around it. The token that
/// closes a text is learnt, too.
pub(crate) fn encode_text(
    tokenizer: &Tokenizer,
    text: &str,
    begin: usize,
    max_seq_len: usize,
) -> Result<Encoded, TokenizerError> {
    let mut encoded = tokenizer.encode_with_starts(text, true)?;
    if let Some(end) = tokenizer.end_token_id()
        && encoded.ids.last() != Some(&end)
    {
        encoded.ids.push(end);
        encoded.starts.push(text.len());
    }
    Ok(sequence(encoded, std::slice::from_ref(&(begin..text.len() + 1)), max_seq_len))
}

/// Marks the tokens that begin in `targets`, cuts off what no target sees, and then what is too long.
fn sequence(encoded: EncodedText, targets: &[Range<usize>], max_seq_len: usize) -> Encoded {
    let EncodedText { ids: mut tokens, starts } = encoded;
    let is_target = |start: usize| {
        let next = targets.partition_point(|range| range.end <= start);
        targets.get(next).is_some_and(|range| range.contains(&start))
    };
    let mut ranges: Vec<Range<u32>> = Vec::new();
    // Token 0 is predicted by nothing.
    for (at, &start) in (0_u32..).zip(&starts).skip(1) {
        if is_target(start) {
            match ranges.last_mut() {
                Some(range) if range.end == at => range.end += 1,
                _ => ranges.push(at..at + 1),
            }
        }
    }
    tokens.truncate(ranges.last().map_or(0, |range| range.end as usize));
    let before = tokens.len();
    let targets = |ranges: &[Range<u32>]| ranges.iter().map(ExactSizeIterator::len).sum::<usize>();
    let targets_before = targets(&ranges);
    if before > max_seq_len {
        tokens.truncate(max_seq_len);
        let end = max_seq_len as u32;
        ranges.retain(|range| range.start < end);
        if let Some(last) = ranges.last_mut() {
            last.end = last.end.min(end);
        }
        // What no target sees goes, too.
        tokens.truncate(ranges.last().map_or(0, |range| range.end as usize));
    }
    let lost = (before - tokens.len(), targets_before - targets(&ranges));
    // The ranges were made in order, so they are always accepted.
    let sequence = TokenSequence::new(tokens, ranges).unwrap_or_else(TokenSequence::empty);
    Encoded { sequence, tokens: before, tokens_lost: lost.0, targets_lost: lost.1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(starts: &[usize]) -> EncodedText {
        EncodedText { ids: (0..starts.len() as u32).collect(), starts: starts.to_vec() }
    }

    fn check(
        starts: &[usize],
        targets: &[Range<usize>],
        max: usize,
        expected: (&[Range<u32>], usize),
    ) -> Encoded {
        let got = sequence(encoded(starts), targets, max);
        assert_eq!((got.sequence.targets(), got.sequence.tokens().len()), expected);
        got
    }

    #[test]
    fn a_token_is_a_target_where_it_begins_in_one() {
        // The token at 3 spans the border at 4; the one at 6 spans the one at 7.
        check(&[0, 3, 5, 6, 8, 9], &[4..7], 99, (&[2..4], 4));
        check(&[0, 1, 2, 3, 4, 5], &[1..2, 2..3, 4..5], 99, (&[1..3, 4..5], 5));
    }

    #[test]
    fn the_first_token_is_no_target() {
        check(&[0, 0, 1], &[0..2], 99, (&[1..3], 3));
        check(&[0], &[0..2], 99, (&[], 0));
        check(&[], &[0..2], 99, (&[], 0));
    }

    #[test]
    fn what_is_cut_off_is_counted() {
        let starts: Vec<usize> = (0..10).collect();
        let got = check(&starts, &[2..4, 6..9], 7, (&[2..4, 6..7], 7));
        assert_eq!((got.tokens, got.tokens_lost, got.targets_lost), (9, 2, 2));
        let got = check(&starts, &[2..4, 6..9], 6, (&[2..4], 4));
        assert_eq!((got.tokens, got.tokens_lost, got.targets_lost), (9, 5, 3));
        let got = check(&starts, &[6..9], 6, (&[], 0));
        assert_eq!((got.tokens, got.tokens_lost, got.targets_lost), (9, 9, 3));
    }
}
