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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ashlar_kernels::Isa;
    use ashlar_model::Trained;
    use ashlar_model::adapter::{LoraSpec, Target};
    use ashlar_vocabulary::{
        FloatType, HeadSlice, LayerRange, LayerVectors, ModelShape, WeightType, WeightTypes,
    };
    use std::convert::Infallible;

    fn shape() -> ModelShape {
        ModelShape {
            hidden_size: 16,
            intermediate_size: 40,
            num_layers: 2,
            num_heads: 8,
            num_kv_heads: 8,
            head_dim: 4,
            vocab_size: 64,
            max_position_embeddings: 16,
            tied_head: true,
            weights: WeightTypes::uniform(WeightType::F32, 2),
            kv_cache: FloatType::F32,
            activations: FloatType::F32,
            vectors: LayerVectors {
                qkv_bias: true,
                output_bias: true,
                feed_forward_bias: true,
                head_norms: true,
            },
        }
    }

    /// The norm of one and the same gradient, cut for a grid.
    fn norm(trained: &Trained, stages: usize, ranks: usize) -> f64 {
        let (shape, kernels) = (shape(), Kernels::new(Isa::best(), 1));
        let of_rank = |stage: usize, rank: usize| {
            let slice = RankSlice {
                layers: LayerRange {
                    start: stage * shape.num_layers / stages,
                    end: (stage + 1) * shape.num_layers / stages,
                },
                first: stage == 0,
                last: stage + 1 == stages,
                tensor_rank: rank,
                tensor_parallel_size: ranks,
                head: HeadSlice::of_rank(false, (stage, stages), (rank, ranks)),
            };
            let whole = |share: &TensorShare| {
                let base = share.name.bytes().fold(7, |sum, byte| (sum * 31 + usize::from(byte)) % 9973);
                let number = |i: usize| ((base + i * 37) % 101) as f32 / 64.0 - 0.8;
                Ok::<_, Infallible>((0..share.shape[0] * share.shape[1]).map(number).collect())
            };
            let gradient = Tensors::cut(&trained.weights(&shape, &slice), whole).unwrap();
            NormTerms::of(&gradient, &slice, &kernels)
        };
        let stages: Vec<Vec<NormTerms>> =
            (0..stages).map(|stage| (0..ranks).map(|rank| of_rank(stage, rank)).collect()).collect();
        gradient_norm(&stages)
    }

    #[test]
    fn the_norm_has_the_same_bits_on_every_grid_up_to_a_rank_per_part() {
        let spec = LoraSpec { rank: 3, alpha: 6.0, rank_stabilized: false, targets: Target::ALL.to_vec() };
        for trained in [Trained::Adapter(spec), Trained::Model] {
            let expected = norm(&trained, 1, 1);
            assert!(expected > 1.0);
            for (stages, ranks) in [(2, 1), (1, 2), (2, 4), (1, 8), (2, 8)] {
                let found = norm(&trained, stages, ranks);
                assert_eq!(found.to_bits(), expected.to_bits(), "{trained:?} over {stages} × {ranks}");
            }
        }
    }
}
