//! Which byte is missing: the message of a model that does not fit.

use crate::cut::best_cut;
use crate::error::PlanError;
use crate::ledger::MemoryLedger;
use crate::plan::Planner;

/// The refusal for the cut whose worst rank lacks least, with the number of stages that `stages` allows or, by
/// default, with as many as there are groups.
pub(crate) fn does_not_fit(planner: &Planner<'_>, stages: Option<usize>) -> PlanError {
    let layers = planner.shape.num_layers;
    let most = planner.groups.len().min(layers);
    let stages = stages.unwrap_or(most).min(most);
    let blocks = planner.blocks_needed(planner.request.max_context_tokens);
    let lacks = |ledger: &MemoryLedger| ledger.total.0 as f64 - ledger.capacity.0 as f64;
    let cut = best_cut(
        stages,
        planner.groups.len(),
        layers,
        |c| {
            let ledgers = planner.ledgers(c.group, c.layers, c.before.is_none(), c.last, blocks);
            ledgers.iter().map(lacks).reduce(f64::max)
        },
        f64::max,
    );
    let worst = cut.into_iter().flat_map(|(_, cut)| cut).enumerate().flat_map(|(stage, s)| {
        let ledgers = planner.ledgers(s.group, s.layers.len(), stage == 0, stage + 1 == stages, blocks);
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
