//! Sets of bytes of one file.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of bytes, as ranges that neither overlap nor touch.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct RangeSet {
    /// Ends by starts.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds the bytes of `range`; an empty one adds nothing.
    pub fn insert(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        // Whatever begins up to its end and does not end before its start becomes a part of it.
        while let Some((&other, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ranges.remove(&other);
            (start, end) = (start.min(other), end.max(other_end));
        }
        self.ranges.insert(start, end);
    }

    /// Whether all bytes of `range` are in the set; of an empty one they are.
    pub fn covers(&self, range: &Range<u64>) -> bool {
        let before = self.ranges.range(..=range.start).next_back();
        range.start >= range.end || before.is_some_and(|(_, &end)| end >= range.end)
    }

    /// The bytes of this set that are not in `other`.
    pub fn without(&self, other: &RangeSet) -> RangeSet {
        let mut left = RangeSet::default();
        for Range { mut start, end } in self.iter() {
            let first = other.ranges.range(..=start).next_back().map_or(start, |(&start, _)| start);
            for (&other_start, &other_end) in other.ranges.range(first..end) {
                left.insert(start..other_start.max(start));
                start = start.max(other_end);
            }
            left.insert(start..end);
        }
        left
    }

    /// The bytes that are in both sets.
    pub fn common(&self, other: &RangeSet) -> RangeSet {
        self.without(&self.without(other))
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.ranges.iter().map(|(&start, &end)| start..end)
    }

    /// How many ranges there are.
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|range| range.end - range.start).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

impl Extend<Range<u64>> for RangeSet {
    fn extend<I: IntoIterator<Item = Range<u64>>>(&mut self, ranges: I) {
        ranges.into_iter().for_each(|range| self.insert(range));
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> RangeSet {
        let mut set = RangeSet::default();
        set.extend(ranges);
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same with one truth value for each byte.
    fn naive(ranges: &[Range<u64>]) -> [bool; 40] {
        std::array::from_fn(|at| ranges.iter().any(|range| range.contains(&(at as u64))))
    }

    fn runs(set: &RangeSet) -> Vec<Range<u64>> {
        set.iter().collect()
    }

    #[test]
    fn ranges_that_overlap_or_touch_become_one() {
        let set: RangeSet = [10..20, 30..40, 0..5, 20..25, 5..5, 24..30].into_iter().collect();
        assert_eq!(runs(&set), [0..5, 10..40]);
        assert_eq!((set.bytes(), set.count()), (35, 2));
    }

    #[test]
    fn sets_agree_with_one_truth_value_for_each_byte() {
        // A fixed sequence without any order.
        let mut state = 7u64;
        let mut next = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..500 {
            let mut some = || -> Vec<Range<u64>> {
                let count = next(6);
                (0..count)
                    .map(|_| {
                        let start = next(36);
                        start..start + next(9).min(40 - start)
                    })
                    .collect()
            };
            let (ours, theirs) = (some(), some());
            let (set, other): (RangeSet, RangeSet) =
                (ours.iter().cloned().collect(), theirs.iter().cloned().collect());
            let (has, lacks) = (naive(&ours), naive(&theirs));
            assert_eq!(naive(&runs(&set)), has);
            let left: [bool; 40] = std::array::from_fn(|at| has[at] && !lacks[at]);
            assert_eq!(naive(&runs(&set.without(&other))), left, "{ours:?} without {theirs:?}");
            let common: [bool; 40] = std::array::from_fn(|at| has[at] && lacks[at]);
            assert_eq!(naive(&runs(&set.common(&other))), common, "{ours:?} and {theirs:?}");
            let start = next(40);
            let asked = start..start + next(8).min(40 - start);
            let all = asked.clone().all(|at| has[at as usize]);
            assert_eq!(set.covers(&asked), all, "{ours:?} {asked:?}");
        }
    }
}
