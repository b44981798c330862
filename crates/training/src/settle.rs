//! From the sums of a whole batch to the gradients by the weights: what adds up apart until then comes together.
//!
//! Of a head norm's weight there is one sum for each of the eight parts of the attention axis; they add up in the contract's tree,
//! over the ranks of the group, too. A tied table has one sum as embedding and one as head, which are added once.

use ashlar_kernels::Kernels;
use ashlar_model::{Collective, CollectiveError, TensorId, TensorLayout, TensorShare, Tensors};
use std::sync::Arc;

/// How the two ends of a tied model that are different stages exchange their sums for the table: replaces the rank's own by that of
/// the same rank at the other end. Stages between them, which have none, hand on what comes; there it is empty.
pub type OtherEnd<'a, E> = &'a mut dyn FnMut(&mut [f32]) -> Result<(), E>;

/// Makes gradients by `weights` of the sums of a batch over all replicas. Every rank of the replica calls it; `other_end` is there
/// where a tied table trains on several stages.
///
/// # Errors
/// Those of the exchanges.
pub fn settle<E: From<CollectiveError>>(
    mut sums: Tensors,
    weights: &Arc<TensorLayout>,
    kernels: &Kernels,
    group: &mut dyn Collective,
    other_end: Option<OtherEnd<'_, E>>,
) -> Result<Tensors, E> {
    for share in weights.shares() {
        let Some(sum) = sums.get_mut(share.id) else { continue };
        if sum.len() > share.numbers() {
            join_parts(sum, share, kernels, group)?;
        }
    }
    if let Some(other_end) = other_end {
        let own = if sums.get(TensorId::Embedding).is_some() { TensorId::Embedding } else { TensorId::Head };
        let mut theirs = sums.get(own).unwrap_or_default().to_vec();
        other_end(&mut theirs)?;
        if let Some(own) = sums.get_mut(own) {
            kernels.add(own, &theirs);
        }
    } else if weights.place(TensorId::Head).is_none() {
        // One stage is both ends.
        let head = sums.get(TensorId::Head).map(<[f32]>::to_vec);
        if let (Some(table), Some(head)) = (sums.get_mut(TensorId::Embedding), head) {
            kernels.add(table, &head);
        }
    }
    Ok(sums.shrink(weights))
}

/// Adds the sums of all parts up; the result is in the place of the first.
fn join_parts(
    sums: &mut [f32],
    share: &TensorShare,
    kernels: &Kernels,
    group: &mut dyn Collective,
) -> Result<(), CollectiveError> {
    let width = share.numbers();
    let add = |parts: &[f32]| {
        let mut sum = vec![0.0; width];
        kernels.sum_tree(&parts.chunks_exact(width).collect::<Vec<_>>(), &mut sum);
        sum
    };
    let mut sum = add(sums);
    if group.size() > 1 {
        let mut all = vec![0.0; width * group.size()];
        group.all_gather(&sum, &mut all)?;
        sum = add(&all);
    }
    sums[..width].copy_from_slice(&sum);
    Ok(())
}
