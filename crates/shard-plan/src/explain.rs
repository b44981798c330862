//! Which byte is missing: the message of a model that does not fit.

use crate::cut::best_cut;
use crate::error::PlanError;
use crate::ledger::MemoryLedger;
use crate::plan::Planner;
use crate::position::Position;

/// Above this many groups only the cut over all of them is looked at.
const EVERY_COUNT_MAX: usize = 16;

/// The refusal for the cut whose worst rank lacks least, over every number of stages that `stages` allows, with the head on
/// the last stage (`planner` does not spread it).
pub(crate) fn does_not_fit(planner: &Planner<'_>, stages: Option<usize>) -> PlanError {
    let (groups, layers) = (planner.groups.len(), planner.shape.num_layers);
    let most = groups.min(layers);
    let counts = match stages {
        Some(stages) => stages..=stages,
        None if groups <= EVERY_COUNT_MAX => 1..=most,
        None => most..=most,
    };
    let blocks = planner.blocks_needed(planner.request.max_context_tokens);
    let lacks = |ledger: &MemoryLedger| ledger.total.0 as f64 - ledger.capacity.0 as f64;
    let worst_rank =
        planner.by_position(most, blocks, |_, _, _, ledgers| ledgers.iter().map(lacks).reduce(f64::max));
    let cut = counts
        .filter_map(|stages| best_cut(stages, groups, layers, |c| worst_rank.of(c), f64::max))
        .reduce(|a, b| if b.0 < a.0 { b } else { a });
    let stages = cut.as_ref().map_or(0, |(_, cut)| cut.len());
    let worst = cut.into_iter().flat_map(|(_, cut)| cut).enumerate().flat_map(|(stage, s)| {
        let position = Position { stage, stages, spread_head: false };
        let ledgers = planner.ledgers(s.group, s.layers, position, blocks);
        let nodes = planner.groups[s.group].iter().map(|device| device.node.clone());
        ledgers.into_iter().zip(nodes).map(move |(ledger, node)| (stage, node, ledger)).collect::<Vec<_>>()
    });
    let worst = worst.reduce(|a, b| if lacks(&b.2) > lacks(&a.2) { b } else { a });
    match worst.and_then(|(stage, node, ledger)| Some((stage, node, ledger, ledger.first_missing()?))) {
        Some((stage, node, ledger, (row, missing))) => PlanError::DoesNotFit {
            stage,
            node,
            line: row.name,
            needs: ledger.total,
            has: ledger.capacity,
            missing,
        },
        None => PlanError::NoNodes,
    }
}
