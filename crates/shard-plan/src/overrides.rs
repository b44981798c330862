//! Layouts that operators have fixed: a layer range per node.

use crate::cut::CutStage;
use crate::error::PlanError;
use crate::layout::Layout;
use crate::ledger::MemoryLedger;
use crate::plan::{Planner, finish};
use crate::request::{DeviceReport, Links, PlanRequest};
use crate::shares::Shares;
use ashlar_vocabulary::{LayerRange, ModelShape};
use std::collections::BTreeMap;

/// Makes the layout that the ranges name, or says why they name none.
pub(crate) fn plan_fixed_ranges(
    shape: &ModelShape,
    devices: &[DeviceReport],
    links: &Links,
    request: &PlanRequest,
) -> Result<Layout, PlanError> {
    let refuse = |reason: String| Err(PlanError::Override(reason));
    let ranks = request.tensor_parallel_size.unwrap_or(1);
    let mut holders: BTreeMap<LayerRange, Vec<&DeviceReport>> = BTreeMap::new();
    for device in devices {
        if let Some(range) = device.layers {
            if range.start >= range.end {
                return refuse(format!("{range} on node {} has no layer", device.node));
            }
            holders.entry(range).or_default().push(device);
        }
    }
    let mut next = 0;
    for range in holders.keys() {
        if range.start > next {
            return refuse(format!("layers {next}..{} are on no node: add them to one", range.start));
        }
        if range.start < next {
            return refuse(format!("layers {}..{next} are in two ranges: let ranges meet", range.start));
        }
        next = range.end;
    }
    if next != shape.num_layers {
        return refuse(format!("ranges end at layer {next}, the model has {} layers", shape.num_layers));
    }
    if let Some(stages) = request.stages.filter(|&stages| stages != holders.len()) {
        return refuse(format!(
            "they make {} stages, {stages} are asked for: drop one of the two",
            holders.len()
        ));
    }
    let most = holders.values().map(|devices| devices.len() / ranks).min().unwrap_or(0);
    let replicas = request.replicas.unwrap_or(most);
    for (range, devices) in &holders {
        let wanted = ranks * replicas.max(1);
        if devices.len() != wanted {
            return refuse(format!(
                "layers {range} are on {} node(s), {replicas} replica(s) of {ranks} rank(s) need {wanted}",
                devices.len(),
                replicas = replicas.max(1)
            ));
        }
    }
    let shares = Shares::new(shape, ranks);
    let layouts: Result<Vec<_>, PlanError> = (0..replicas)
        .map(|replica| {
            let chosen: Vec<&DeviceReport> = holders
                .values()
                .flat_map(|devices| &devices[replica * ranks..(replica + 1) * ranks])
                .copied()
                .collect();
            let planner = Planner::new(&shares, links, request, &chosen);
            let cut: Vec<CutStage> =
                holders.keys().enumerate().map(|(group, &layers)| CutStage { group, layers }).collect();
            let choices = planner.head_choices(cut.len()).into_iter().map(|spread| {
                let planner = planner.with_spread_head(spread);
                check_memory(&planner, &cut).map(|()| planner)
            });
            // The fastest of those that fit, else why the first does not.
            let best = choices.reduce(|a, b| match (a, b) {
                (Ok(a), Ok(b)) => Ok(if b.slowness(&cut) < a.slowness(&cut) { b } else { a }),
                (a, Err(_)) => a,
                (Err(_), b) => b,
            });
            best.unwrap_or(Err(PlanError::NoNodes)).map(|planner| planner.lay_out(&cut))
        })
        .collect();
    Ok(finish(ranks, layouts?, devices))
}

/// Whether every rank of the cut has room for its part and for one longest sequence.
fn check_memory(planner: &Planner<'_>, cut: &[CutStage]) -> Result<(), PlanError> {
    let blocks = planner.blocks_needed(planner.request.max_context_tokens);
    for (index, stage) in cut.iter().enumerate() {
        let position = planner.position(index, cut.len());
        let ledgers = planner.ledgers(stage.group, stage.layers, position, blocks);
        for (ledger, device) in ledgers.iter().zip(&planner.groups[stage.group]) {
            if let Some((row, missing)) = MemoryLedger::first_missing(ledger) {
                return Err(PlanError::DoesNotFit {
                    stage: index,
                    node: device.node.clone(),
                    line: row.name,
                    needs: ledger.total,
                    has: ledger.capacity,
                    missing,
                });
            }
        }
    }
    Ok(())
}
