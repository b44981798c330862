//! What is still there of the KV cache when a replica comes up again: blocks that every rank has kept, and blocks that only a few
//! stages have lost.
//!
//! A stage that has lost its cache computes it again alone where all others have kept theirs: the first stage from the tokens, any
//! other from what the one before it has handed on and kept.

use super::place::{Node, Replica};
use crate::engine::LostBlocks;
use ashlar_protocol::prefix::BlockHash;
use ashlar_protocol::step::StageRange;
use ashlar_vocabulary::{BlockId, NodeId, StageIndex};
use std::collections::{BTreeMap, BTreeSet};

type Blocks = BTreeSet<(BlockId, BlockHash)>;

/// Blocks that all ranks have, and those that some stages have to be filled again with.
pub(super) fn of(
    replica: &Replica,
    nodes: &BTreeMap<NodeId, Node>,
) -> (Vec<(BlockId, BlockHash)>, Option<LostBlocks>) {
    let stages: Vec<Blocks> =
        (0..replica.num_stages).map(|stage| kept_by_stage(replica, stage, nodes)).collect();
    let kept = common(stages.iter());
    let lost = lost(&stages).filter(|stages| has_handed_on(replica, *stages, nodes)).and_then(|lost| {
        let number = |stage: usize| StageIndex(stage as u32);
        let others = stages.iter().enumerate().filter(|(stage, _)| !lost.contains(number(*stage)));
        let blocks: Vec<_> = common(others.map(|(_, blocks)| blocks)).difference(&kept).copied().collect();
        (!blocks.is_empty()).then_some(LostBlocks { stages: lost, blocks })
    });
    (kept.into_iter().collect(), lost)
}

fn kept_by_stage(replica: &Replica, stage: usize, nodes: &BTreeMap<NodeId, Node>) -> Blocks {
    let ranks: Vec<&Blocks> =
        replica.stage(stage).filter_map(|seat| nodes.get(&seat.node)).map(|node| &node.kept).collect();
    common(ranks.into_iter())
}

fn common<'a>(mut sets: impl Iterator<Item = &'a Blocks>) -> Blocks {
    let Some(first) = sets.next() else { return Blocks::new() };
    sets.fold(first.clone(), |common, set| common.intersection(set).copied().collect())
}

/// The stages that have less than half of what others have, and all between them; `None` if there are none, or no others.
fn lost(stages: &[Blocks]) -> Option<StageRange> {
    let most = stages.iter().map(Blocks::len).max()?;
    let is_lost = |blocks: &Blocks| 2 * blocks.len() < most;
    let (first, last) = (stages.iter().position(is_lost)?, stages.iter().rposition(is_lost)?);
    let range = StageRange { first: StageIndex(first as u32), last: StageIndex(last as u32) };
    (first > 0 || last + 1 < stages.len()).then_some(range)
}

/// Whether the stage before these, if there is one, can send them what they had been given.
fn has_handed_on(replica: &Replica, lost: StageRange, nodes: &BTreeMap<NodeId, Node>) -> bool {
    let Some(before) = lost.first.0.checked_sub(1) else { return true };
    replica.stage(before as usize).all(|seat| nodes.get(&seat.node).is_some_and(|node| node.logged))
}
