//! Which byte is missing: the message of a model that does not fit.

use crate::cut::best_cut;
use crate::error::PlanError;
use crate::ledger::MemoryLedger;
use crate::plan::Planner;

/// Above this many groups only the cut over all of them is looked at.
const EVERY_COUNT_MAX: usize = 16;

/// The refusal for the cut whose worst rank lacks least, over every number of stages that `stages` allows and every choice
/// for the head that the request does.
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
    let best = |(stages, spread): (usize, bool)| {
        let planner = planner.with_spread_head(spread);
        // What a stage holds of a spread head depends on how many there are.
        let worst_rank = planner
            .by_position(stages, blocks, |_, _, _, ledgers| ledgers.iter().map(lacks).reduce(f64::max));
        let (value, cut) = best_cut(stages, groups, layers, |c| worst_rank.of(c), f64::max)?;
        Some((value, planner, cut))
    };
    let choices = counts
        .flat_map(|stages| planner.head_choices(stages).into_iter().map(move |spread| (stages, spread)));
    let Some((_, planner, cut)) = choices.filter_map(best).reduce(|a, b| if b.0 < a.0 { b } else { a })
    else {
        return PlanError::NoNodes;
    };
    let worst = cut.iter().enumerate().flat_map(|(stage, s)| {
        let ledgers = planner.ledgers(s.group, s.layers, planner.position(stage, cut.len()), blocks);
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
