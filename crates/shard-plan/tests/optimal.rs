//! Whole plans against every layout of a few small nodes, priced by the public ledger and cost model.

use ashlar_shard_plan::cost::{BATCH, CostModel, StepLoad};
use ashlar_shard_plan::speeds::evened;
use ashlar_shard_plan::{DeviceReport, Links, PlanError, PlanRequest, Position, Shares, plan};
use ashlar_vocabulary::{
    Bytes, FloatType, LayerRange, LayerVectors, ModelShape, NodeId, Quantization, WeightType, WeightTypes,
};
use proptest::prelude::*;
use std::cell::Cell;

/// Every way to write `layers` as a sum of `stages` positive numbers.
fn compositions(layers: usize, stages: usize) -> Vec<Vec<usize>> {
    if stages == 1 {
        return if layers > 0 { vec![vec![layers]] } else { Vec::new() };
    }
    let with_first = |first: usize| {
        compositions(layers - first, stages - 1).into_iter().map(move |rest| {
            let mut all = vec![first];
            all.extend(rest);
            all
        })
    };
    (1..layers).flat_map(with_first).collect()
}

/// Consecutive layers of these numbers.
fn ranges(cut: &[usize]) -> Vec<LayerRange> {
    let range =
        |index: usize| LayerRange { start: cut[..index].iter().sum(), end: cut[..=index].iter().sum() };
    (0..cut.len()).map(range).collect()
}

/// Every sub-sequence of `stages` devices of this order.
fn choices<'a>(order: &[&'a DeviceReport], stages: usize) -> Vec<Vec<&'a DeviceReport>> {
    (0u32..1 << order.len())
        .filter(|mask| mask.count_ones() as usize == stages)
        .map(|mask| (0..order.len()).filter(|i| mask >> i & 1 == 1).map(|i| order[i]).collect())
        .collect()
}

#[test]
fn a_plan_has_the_fewest_stages_and_the_fastest_slowest_stage() {
    let (planned, refused) = (Cell::new(0), Cell::new(0));
    let node = (400_000u64..2_500_000, 1.0f64..20.0, 1.0f64..50.0);
    let nodes = prop::collection::vec(node, 1..5);
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(layers in 1usize..8, tied in any::<bool>(), mixed in any::<bool>(), round_trip_s in 0.0f64..1e-3, nodes in nodes)| {
        let shape = ModelShape {
            hidden_size: 64,
            intermediate_size: 172,
            num_layers: layers,
            num_heads: 8,
            num_kv_heads: 4,
            head_dim: 8,
            vocab_size: 1000,
            max_position_embeddings: 512,
            tied_head: tied,
            weights: match mixed {
                true => "q4_k_m".parse::<Quantization>().expect("a mixture").types(layers, 64, 64, 172, tied),
                false => WeightTypes::uniform(WeightType::F32, layers),
            },
            kv_cache: FloatType::F32,
            activations: FloatType::F32,
            vectors: LayerVectors::default(),
        };
        let measured: Vec<DeviceReport> = nodes.iter().enumerate().map(|(index, (memory, gb, gflop))| DeviceReport {
            node: NodeId(format!("n{index}")),
            memory: Bytes(*memory),
            bandwidth_bytes_per_s: gb * 1e9,
            flops_per_s: gflop * 1e9,
            quantized_flops_per_s: gflop * 1e9,
            threads: 1,
            layers: None,
        }).collect();
        let devices = evened(&measured);
        let links = Links { round_trip_s, ..Links::default() };
        // Wished for and least are the same, so that one pass decides.
        let request = PlanRequest {
            replicas: Some(1),
            spread_head: Some(false),
            max_context_tokens: 64,
            kv_tokens_wanted: 64,
            max_num_batched_tokens: 32,
            ..PlanRequest::default()
        };
        let shares = Shares::new(&shape, 1);
        let model = CostModel { shares: &shares, links: &links, request: &request, spread_head: false };
        let slowest = |chosen: &[&DeviceReport], cut: &[usize]| {
            let stages: Vec<_> = chosen.iter().zip(ranges(cut)).map(|(device, range)| (vec![*device], range)).collect();
            model.step(&stages, StepLoad::decode(BATCH, &request)).into_iter().fold(0.0, f64::max)
        };
        let fits = |chosen: &[&DeviceReport], cut: &[usize]| (0..cut.len()).all(|index| {
            let position = Position { stage: index, stages: cut.len(), spread_head: false };
            position.piece(ranges(cut)[index], 0, 1).ledger(&shares, &request, 4, chosen[index].memory, 1).fits()
        });
        let orders = (0..devices.len()).map(|last| {
            let mut order: Vec<&DeviceReport> = devices.iter().collect();
            let moved = order.remove(last);
            order.push(moved);
            order
        });
        let orders: Vec<Vec<&DeviceReport>> = orders.collect();
        let best = (1..=devices.len()).find_map(|stages| {
            let cuts = compositions(layers, stages);
            let chosen = orders.iter().flat_map(|order| choices(order, stages));
            let all = chosen.flat_map(|chosen| cuts.iter().map(move |cut| (chosen.clone(), cut)));
            all.filter(|(chosen, cut)| fits(chosen, cut))
                .map(|(chosen, cut)| slowest(&chosen, cut))
                .reduce(f64::min)
                .map(|seconds| (stages, seconds))
        });
        match plan(&shape, &measured, &links, &request) {
            Ok(layout) => {
                planned.set(planned.get() + 1);
                let replica = &layout.replicas[0];
                prop_assert_eq!(Some((replica.stages.len(), replica.prediction.slowest_stage_s)), best);
            }
            Err(error) => {
                refused.set(refused.get() + 1);
                let does_not_fit = matches!(error, PlanError::DoesNotFit { .. });
                prop_assert!(does_not_fit, "{}", error);
                prop_assert_eq!(best, None);
            }
        }
    });
    assert!(planned.get() > 60 && refused.get() > 20, "{planned:?} {refused:?}");
}
