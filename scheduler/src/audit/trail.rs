//! What one computation of a sequence has left behind: digests of its rows, by where and which.

use ashlar_protocol::step::{Boundary, RowDigests};
use std::collections::BTreeMap;

/// Positions of a sequence that are remembered; later ones are not compared.
const POSITIONS_MAX: u32 = 16_384;

/// Digests of one computation's rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Trail(BTreeMap<Boundary, BTreeMap<u32, u64>>);

/// How two trails compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    /// They have no row in common.
    Apart,
    /// All rows that both have are the same.
    Same,
    /// The first boundary with a row that is not the same in both, after so many layers where all still are.
    Differ { boundary: Boundary, same_until_layer: u32, position: u32 },
}

impl Trail {
    pub(super) fn take(&mut self, rows: &RowDigests) {
        let known = self.0.entry(rows.boundary).or_default();
        let positions = (rows.start..POSITIONS_MAX).zip(&rows.digests);
        // Rows that were computed again after a preemption are what the later ones rest on.
        known.extend(positions.map(|(position, digest)| (position, *digest)));
    }

    pub(super) fn compare(&self, other: &Trail) -> Comparison {
        let (mut in_common, mut same_until_layer) = (false, 0);
        for (boundary, own) in &self.0 {
            let Some(theirs) = other.0.get(boundary) else { continue };
            let mut both =
                own.iter().filter_map(|(at, digest)| Some((*at, digest, theirs.get(at)?))).peekable();
            in_common |= both.peek().is_some();
            if let Some((position, ..)) = both.find(|(_, one, other)| one != other) {
                return Comparison::Differ { boundary: *boundary, same_until_layer, position };
            }
            if let Boundary::Layers(layers) = boundary {
                same_until_layer = *layers;
            }
        }
        if in_common { Comparison::Same } else { Comparison::Apart }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_vocabulary::SequenceId;

    fn trail(rows: &[(Boundary, u32, &[u64])]) -> Trail {
        let mut trail = Trail::default();
        for (boundary, start, digests) in rows {
            let digests = digests.to_vec();
            trail.take(&RowDigests { id: SequenceId(1), boundary: *boundary, start: *start, digests });
        }
        trail
    }

    #[test]
    fn only_rows_that_both_have_are_compared_whatever_the_layouts() {
        let four = Boundary::Layers(4);
        let cut = trail(&[(Boundary::Layers(2), 0, &[1, 2, 3]), (four, 0, &[7, 8, 9])]);
        let whole = trail(&[(four, 1, &[8, 9, 10])]);
        assert_eq!(cut.compare(&whole), Comparison::Same);
        assert_eq!(cut.compare(&trail(&[(four, 3, &[1])])), Comparison::Apart);
        assert_eq!(cut.compare(&Trail::default()), Comparison::Apart);
    }

    #[test]
    fn the_first_boundary_that_differs_anywhere_says_where_it_began() {
        let (two, four) = (Boundary::Layers(2), Boundary::Layers(4));
        let one = trail(&[(two, 0, &[1, 2, 3]), (four, 0, &[4, 5, 6]), (Boundary::Logits, 2, &[7])]);
        // A wrong key in the second stage shows first where it is looked at, and from then on everywhere above.
        let other = trail(&[(two, 0, &[1, 2, 3]), (four, 0, &[4, 5, 0]), (Boundary::Logits, 2, &[0])]);
        let expected = Comparison::Differ { boundary: four, same_until_layer: 2, position: 2 };
        assert_eq!(one.compare(&other), expected);
        assert_eq!(other.compare(&one), expected);
        let head = trail(&[(two, 0, &[1, 2, 3]), (four, 0, &[4, 5, 6]), (Boundary::Logits, 2, &[0])]);
        let expected = Comparison::Differ { boundary: Boundary::Logits, same_until_layer: 4, position: 2 };
        assert_eq!(one.compare(&head), expected);
    }

    #[test]
    fn what_was_computed_again_counts_as_it_was_last() {
        let mut one = trail(&[(Boundary::Layers(2), 0, &[1, 2, 3])]);
        one.take(&RowDigests {
            id: SequenceId(1),
            boundary: Boundary::Layers(2),
            start: 1,
            digests: vec![5],
        });
        assert_eq!(one.compare(&trail(&[(Boundary::Layers(2), 0, &[1, 5, 3])])), Comparison::Same);
    }
}
