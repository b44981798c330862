//! The norm of a gradient whose tensors lie on several ranks.
//!
//! Per tensor, Σ g² of each of its eight parts, where it is cut, and the tree over them; then tensors in their canonical order,
//! one chain over all layers. In `f64`.

use ashlar_kernels::Kernels;
use ashlar_model::tensors::{Cut, TensorShare};
use ashlar_model::{RankSlice, Tensors};
use ashlar_vocabulary::PARTS;

/// A rank's terms: per tensor in canonical order, one for each of its parts. Of a tensor that every rank of the group has, the first
/// rank has the one term; all others are −0, which changes no sum.
#[derive(Debug, Clone, PartialEq)]
pub struct NormTerms(pub Vec<Vec<f64>>);

impl NormTerms {
    /// Those of a rank's gradient.
    pub fn of(gradient: &Tensors, slice: &RankSlice, kernels: &Kernels) -> NormTerms {
        let terms = |(share, numbers): (&TensorShare, &[f32])| {
            let nothing = || vec![-0.0; PARTS / slice.tensor_parallel_size];
            let width = share.columns.len().max(1);
            match &share.cut {
                _ if share.is_copy => nothing(),
                Cut::Whole => {
                    let mut terms = nothing();
                    if slice.tensor_rank == 0 {
                        terms[0] = kernels.sum_of_squares(numbers);
                    }
                    terms
                }
                Cut::Rows(parts) => parts
                    .iter()
                    .map(|part| kernels.sum_of_squares(&numbers[part.start * width..part.end * width]))
                    .collect(),
                Cut::Columns(parts) => parts
                    .iter()
                    .map(|part| {
                        let rows = numbers.chunks_exact(width);
                        rows.map(|row| kernels.sum_of_squares(&row[part.clone()])).sum()
                    })
                    .collect(),
            }
        };
        NormTerms(gradient.iter().map(terms).collect())
    }
}

/// The norm of the whole gradient, from all stages in order and in each its ranks in order.
pub fn gradient_norm(stages: &[Vec<NormTerms>]) -> f64 {
    let mut sum = 0.0;
    for ranks in stages {
        let Some(first) = ranks.first() else { continue };
        for tensor in 0..first.0.len() {
            let all: Vec<f64> =
                ranks.iter().filter_map(|rank| rank.0.get(tensor)).flatten().copied().collect();
            sum += tree(&all);
        }
    }
    sum.sqrt()
}

fn tree(terms: &[f64]) -> f64 {
    match terms {
        [] => -0.0,
        [term] => *term,
        _ => {
            let (left, right) = terms.split_at(terms.len() / 2);
            tree(left) + tree(right)
        }
    }
}
