//! The norm of a gradient whose tensors lie on several ranks.
//!
//! Per tensor, Σ g² of each of its eight parts, where it is cut, and the tree over them; then tensors in their canonical order,
//! one chain over all layers. In `f64`.

use ashlar_kernels::Kernels;
use ashlar_model::RankSlice;
use ashlar_model::adapter::{AdapterWeights, Target};
use ashlar_vocabulary::{ModelShape, PARTS};
use std::ops::Range;

/// A rank's terms: per tensor in canonical order, one per part that it holds, or a single one of a tensor that every rank of
/// the group holds.
#[derive(Debug, Clone, PartialEq)]
pub struct NormTerms(pub Vec<Vec<f64>>);

impl NormTerms {
    /// Those of a rank's gradient.
    pub fn of(
        gradient: &AdapterWeights,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) -> NormTerms {
        let mut terms = Vec::new();
        for pairs in &gradient.layers {
            for (&target, pair) in pairs {
                let rank = gradient.spec.rank;
                if target.is_row_parallel() {
                    let inputs = target.inputs(shape, slice).len();
                    let part = |part: &Range<usize>| {
                        let rows = pair.a.chunks_exact(inputs.max(1));
                        rows.map(|row| kernels.sum_of_squares(&row[part.clone()])).sum()
                    };
                    terms.push(parts(target, shape, slice).iter().map(part).collect());
                    terms.push(vec![kernels.sum_of_squares(&pair.b)]);
                } else {
                    terms.push(vec![kernels.sum_of_squares(&pair.a)]);
                    let part = |part: &Range<usize>| {
                        kernels.sum_of_squares(&pair.b[part.start * rank..part.end * rank])
                    };
                    terms.push(parts(target, shape, slice).iter().map(part).collect());
                }
            }
        }
        NormTerms(terms)
    }
}

/// The parts of a target's cut axis that a rank holds, counted from its first element.
fn parts(target: Target, shape: &ModelShape, slice: &RankSlice) -> Vec<Range<usize>> {
    let cut = match target {
        Target::Query | Target::Output => shape.attention_cut(),
        Target::Key | Target::Value => shape.key_cut(),
        Target::Gate | Target::Up | Target::Down => shape.feed_forward_cut(),
    };
    cut.rank_parts(slice.tensor_rank, slice.tensor_parallel_size)
}

/// The norm of the whole gradient, from all stages in order and in each its ranks in order.
pub fn gradient_norm(stages: &[Vec<NormTerms>]) -> f64 {
    let mut sum = 0.0;
    for ranks in stages {
        let Some(first) = ranks.first() else { continue };
        for (tensor, terms) in first.0.iter().enumerate() {
            sum += if terms.len() * ranks.len() == PARTS {
                let all: Vec<f64> = ranks.iter().flat_map(|rank| &rank.0[tensor]).copied().collect();
                tree(&all)
            } else {
                terms.iter().sum::<f64>()
            };
        }
    }
    sum.sqrt()
}

fn tree(terms: &[f64]) -> f64 {
    match terms {
        [term] => *term,
        _ => {
            let (left, right) = terms.split_at(terms.len() / 2);
            tree(left) + tree(right)
        }
    }
}
