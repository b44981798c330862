//! What training computes: token sequences in which some tokens are targets.

use std::ops::Range;

/// What a step takes or leaves as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// 0-based number of the example that it was made from. Several samples share one where a chat template writes an earlier answer
    /// differently once the conversation goes on.
    pub example: u32,
    /// One sequence; of a preference two, the preferred one first.
    pub sequences: Vec<TokenSequence>,
}

/// Tokens of one text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSequence {
    tokens: Vec<u32>,
    targets: Vec<Range<u32>>,
}

impl TokenSequence {
    /// A sequence whose tokens in `targets` are to be predicted, each from the position before it. `None` unless the ranges are
    /// not empty, ascending, disjoint, within the tokens, and begin after token 0, which nothing comes before.
    pub fn new(tokens: Vec<u32>, targets: Vec<Range<u32>>) -> Option<TokenSequence> {
        u32::try_from(tokens.len()).ok()?;
        let mut end = 1;
        for range in &targets {
            if range.start < end || range.end <= range.start || range.end as usize > tokens.len() {
                return None;
            }
            end = range.end;
        }
        Some(TokenSequence { tokens, targets })
    }

    pub(crate) fn empty() -> TokenSequence {
        TokenSequence { tokens: Vec::new(), targets: Vec::new() }
    }

    /// Token ids.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Which tokens are targets, as ascending ranges. Token `i` is predicted by the row of position `i − 1`.
    pub fn targets(&self) -> &[Range<u32>] {
        &self.targets
    }

    /// Number of targets.
    pub fn target_count(&self) -> u32 {
        self.targets.iter().map(|range| range.end - range.start).sum()
    }

    /// Positions that a forward pass computes: all but the last token's, which predicts nothing.
    pub fn rows(&self) -> u32 {
        (self.tokens.len() as u32).saturating_sub(1)
    }

    /// The rows that carry loss, ascending, each with the token that it is to predict.
    pub fn labels(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let positions = self.targets.iter().cloned().flatten();
        positions.filter_map(|at| Some((at - 1, *self.tokens.get(at as usize)?)))
    }
}

impl Sample {
    /// Positions that a forward pass computes.
    pub fn rows(&self) -> u64 {
        self.sequences.iter().map(|sequence| u64::from(sequence.rows())).sum()
    }

    /// Number of targets.
    pub fn target_count(&self) -> u64 {
        self.sequences.iter().map(|sequence| u64::from(sequence.target_count())).sum()
    }

    /// Number of tokens.
    pub fn token_count(&self) -> u64 {
        self.sequences.iter().map(|sequence| sequence.tokens.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::reversed_empty_ranges)]
    use super::*;

    #[test]
    fn a_target_is_predicted_by_the_row_before_it() {
        let sequence = TokenSequence::new(vec![10, 11, 12, 13, 14], vec![1..2, 3..5]).unwrap();
        assert_eq!(sequence.labels().collect::<Vec<_>>(), [(0, 11), (2, 13), (3, 14)]);
        assert_eq!((sequence.rows(), sequence.target_count()), (4, 3));
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        for bad in [vec![0..1], vec![1..1], vec![1..4], vec![2..3, 1..2], vec![1..3, 2..3], vec![2..1]] {
            assert_eq!(TokenSequence::new(vec![1, 2, 3], bad.clone()), None, "{bad:?}");
        }
        assert!(TokenSequence::new(vec![], vec![]).is_some());
    }
}
