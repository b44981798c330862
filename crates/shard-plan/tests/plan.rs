//! Layouts of whole models: what is chosen, what is respected, what is refused.

use ashlar_shard_plan::{
    DeviceReport, Layout, LinkReport, Links, PlanError, PlanRequest, plan, survivable_losses,
};
use ashlar_vocabulary::{
    Bytes, FloatType, LayerRange, LayerVectors, ModelShape, NodeId, Quantization, WeightType, WeightTypes,
};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

/// Llama 3.2 1B.
fn llama_1b() -> ModelShape {
    ModelShape {
        hidden_size: 2048,
        intermediate_size: 8192,
        num_layers: 16,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 64,
        vocab_size: 128_256,
        max_position_embeddings: 131_072,
        tied_head: true,
        weights: WeightTypes { embedding: WeightType::Bf16, ..WeightTypes::uniform(WeightType::F32, 16) },
        kv_cache: FloatType::F32,
        activations: FloatType::F32,
        vectors: LayerVectors::default(),
    }
}

fn small(num_layers: usize, tied_head: bool) -> ModelShape {
    ModelShape {
        hidden_size: 64,
        intermediate_size: 172,
        num_layers,
        num_heads: 8,
        num_kv_heads: 4,
        head_dim: 8,
        vocab_size: 1000,
        max_position_embeddings: 512,
        tied_head,
        weights: WeightTypes::uniform(WeightType::F32, num_layers),
        kv_cache: FloatType::F32,
        activations: FloatType::F32,
        vectors: LayerVectors::default(),
    }
}

fn device(name: &str, memory: u64) -> DeviceReport {
    DeviceReport {
        node: NodeId(name.into()),
        memory: Bytes(memory),
        bandwidth_bytes_per_s: 20e9,
        flops_per_s: 100e9,
        quantized_flops_per_s: 100e9,
        threads: 2,
        layers: None,
    }
}

fn devices(count: usize, memory: u64) -> Vec<DeviceReport> {
    (0..count).map(|index| device(&format!("n{index}"), memory)).collect()
}

fn refusal(shape: &ModelShape, devices: &[DeviceReport], request: &PlanRequest) -> PlanError {
    plan(shape, devices, &Links::default(), request).expect_err("refused")
}

#[test]
fn one_node_with_room_holds_all_and_shares_tied_weights() {
    let layout =
        plan(&llama_1b(), &devices(1, 8 * GIB), &Links::default(), &PlanRequest::default()).expect("planned");
    let stage = &layout.replicas[0].stages[0];
    assert_eq!(stage.layers, LayerRange { start: 0, end: 16 });
    let ledger = stage.ledgers[0];
    // 128,256 × 2,048 × 4 bytes, once: tokens are looked up in the head.
    assert_eq!((ledger.embedding, ledger.head), (Bytes(0), Bytes(1_050_673_152)));
    // 1,235,814,400 weights in all, as the model card counts them.
    assert_eq!(ledger.weights + ledger.head, Bytes(1_235_814_400 * 4));
    // 512 blocks × 16 tokens × 16 layers × 2 × 8 heads × 64 × 4 bytes.
    assert_eq!(layout.replicas[0].kv_blocks, 512);
    assert_eq!(ledger.kv_cache, Bytes(512 * 16 * 16 * 2 * 8 * 64 * 4));
    assert_eq!(ledger.rows().iter().map(|row| row.bytes).sum::<Bytes>(), ledger.total);
    assert_eq!(ledger.total + ledger.free, ledger.capacity);
}

#[test]
fn a_narrower_cache_takes_half_the_memory() {
    let plan_with = |kv_cache| {
        let shape = ModelShape { kv_cache, ..llama_1b() };
        let layout = plan(&shape, &devices(1, 8 * GIB), &Links::default(), &PlanRequest::default());
        layout.expect("planned").replicas[0].stages[0].ledgers[0].kv_cache
    };
    assert_eq!(plan_with(FloatType::Bf16).0 * 2, plan_with(FloatType::F32).0);
    assert_eq!(plan_with(FloatType::F16), plan_with(FloatType::Bf16));
}

#[test]
fn two_nodes_hold_the_tied_matrix_at_both_ends() {
    let request = PlanRequest { spread_head: Some(false), ..PlanRequest::default() };
    let layout = plan(&llama_1b(), &devices(2, 4 * GIB), &Links::default(), &request).expect("planned");
    let stages = &layout.replicas[0].stages;
    assert_eq!(stages.len(), 2);
    let ends = [&stages[0].ledgers[0], &stages[1].ledgers[0]];
    // The embedding is only looked up and stays in the file's two bytes per weight.
    assert_eq!(ends.map(|l| l.embedding), [Bytes(525_336_576), Bytes(0)]);
    assert_eq!(ends.map(|l| l.head), [Bytes(0), Bytes(1_050_673_152)]);
    // The head is work, the embedding is not: the last stage has fewer layers.
    assert!(stages[1].layers.len() < stages[0].layers.len(), "{stages:?}");
}

/// Weights of all ledgers together, in bytes.
fn held(layout: &Layout) -> Bytes {
    let ledgers = layout.replicas[0].stages.iter().flat_map(|stage| &stage.ledgers);
    ledgers.map(|ledger| ledger.weights + ledger.embedding + ledger.head).sum()
}

#[test]
fn equal_nodes_share_head_and_layers_evenly() {
    let request = |spread_head| PlanRequest {
        stages: Some(2),
        replicas: Some(1),
        spread_head,
        ..PlanRequest::default()
    };
    let planned = |spread_head| {
        plan(&llama_1b(), &devices(2, 4 * GIB), &Links::default(), &request(spread_head)).expect("planned")
    };
    let (alone, shared) = (planned(Some(false)), planned(None));
    assert_eq!(shared, planned(Some(true)), "sharing is found to be faster");
    let layers =
        |layout: &Layout| layout.replicas[0].stages.iter().map(|s| s.layers.len()).collect::<Vec<_>>();
    assert_eq!((layers(&alone), layers(&shared)), (vec![10, 6], vec![8, 8]));
    assert_eq!((alone.replicas[0].spread_head, shared.replicas[0].spread_head), (false, true));
    let heads: Vec<Bytes> = shared.replicas[0].stages.iter().map(|stage| stage.ledgers[0].head).collect();
    assert_eq!(heads, [Bytes(1_050_673_152 / 2); 2]);
    assert_eq!(held(&alone), held(&shared));
}

#[test]
fn slices_of_a_shared_head_add_up_to_the_whole() {
    for (stages, ranks) in [(2, 1), (2, 2), (4, 1), (2, 4), (4, 2)] {
        let nodes = devices(stages * ranks, 8 * GIB);
        let planned = |spread| {
            let request = PlanRequest {
                stages: Some(stages),
                tensor_parallel_size: Some(ranks),
                replicas: Some(1),
                spread_head: Some(spread),
                ..PlanRequest::default()
            };
            plan(&llama_1b(), &nodes, &Links::default(), &request).expect("planned")
        };
        let shared = planned(true);
        assert!(shared.replicas[0].spread_head);
        let ledgers = || shared.replicas[0].stages.iter().flat_map(|stage| &stage.ledgers);
        assert!(ledgers().all(|ledger| ledger.head > Bytes(0)), "{stages} × {ranks}");
        let sum =
            |layout: &Layout| layout.replicas[0].stages.iter().flat_map(|s| &s.ledgers).map(|l| l.head).sum();
        let (together, whole): (Bytes, Bytes) = (sum(&shared), sum(&planned(false)));
        assert_eq!(together, whole, "{stages} × {ranks}");
    }
}

#[test]
fn a_head_that_cannot_be_shared_or_is_far_away_stays_with_the_last_stage() {
    let three =
        PlanRequest { stages: Some(3), replicas: Some(1), spread_head: Some(true), ..PlanRequest::default() };
    let layout = plan(&llama_1b(), &devices(3, 4 * GIB), &Links::default(), &three).expect("planned");
    assert!(!layout.replicas[0].spread_head, "three ranks cut no axis of eight parts");
    let slow = Links { bytes_per_s: 10e6, ..Links::default() };
    let two = PlanRequest { stages: Some(2), replicas: Some(1), ..PlanRequest::default() };
    let layout = plan(&llama_1b(), &devices(2, 4 * GIB), &slow, &two).expect("planned");
    assert!(!layout.replicas[0].spread_head, "logits would take longer than the head");
}

#[test]
fn the_fewest_stages_then_replicas_then_standbys() {
    let layout =
        plan(&llama_1b(), &devices(5, 4 * GIB), &Links::default(), &PlanRequest::default()).expect("planned");
    assert_eq!(layout.replicas.iter().map(|r| r.stages.len()).collect::<Vec<_>>(), [2, 2]);
    assert_eq!(layout.standbys, [NodeId("n4".into())]);
    let all = devices(5, 4 * GIB);
    let losses = survivable_losses(&llama_1b(), &all, &Links::default(), &PlanRequest::default(), &layout);
    assert_eq!(losses.len(), 4);
    let two = devices(2, 4 * GIB);
    let layout = plan(&llama_1b(), &two, &Links::default(), &PlanRequest::default()).expect("planned");
    let losses = survivable_losses(&llama_1b(), &two, &Links::default(), &PlanRequest::default(), &layout);
    assert_eq!(losses, []);
}

#[test]
fn explicit_numbers_are_kept() {
    let request = PlanRequest {
        stages: Some(3),
        tensor_parallel_size: Some(2),
        replicas: Some(1),
        ..PlanRequest::default()
    };
    let layout = plan(&llama_1b(), &devices(8, 8 * GIB), &Links::default(), &request).expect("planned");
    assert_eq!(layout.tensor_parallel_size, 2);
    assert_eq!(layout.replicas.len(), 1);
    assert_eq!(layout.replicas[0].stages.len(), 3);
    assert!(layout.replicas[0].stages.iter().all(|stage| stage.ranks.len() == 2 && stage.ledgers.len() == 2));
    assert_eq!(layout.standbys.len(), 2);
}

#[test]
fn replicas_share_out_unequal_nodes_when_asked_for() {
    let memories = [("a", 4 * GIB), ("b", 4 * GIB), ("c", 5 * GIB / 2), ("d", 5 * GIB / 2)];
    let nodes: Vec<DeviceReport> = memories.iter().map(|(name, memory)| device(name, *memory)).collect();
    let request = PlanRequest { replicas: Some(2), ..PlanRequest::default() };
    let layout = plan(&llama_1b(), &nodes, &Links::default(), &request).expect("planned");
    assert_eq!(layout.replicas.len(), 2);
    for replica in &layout.replicas {
        let memory: u64 = replica.stages.iter().flat_map(|s| &s.ledgers).map(|l| l.capacity.0).sum();
        assert_eq!(memory, 13 * GIB / 2);
    }
}

#[test]
fn a_slow_node_gets_fewer_layers_and_a_far_one_none() {
    let mut nodes = devices(3, 4 * GIB);
    nodes[0].bandwidth_bytes_per_s = 5e9;
    let request = PlanRequest { stages: Some(2), replicas: Some(1), ..PlanRequest::default() };
    let far = |b: &str| LinkReport {
        a: NodeId("n2".into()),
        b: NodeId(b.into()),
        round_trip_s: 4.0,
        bytes_per_s: 1e6,
    };
    let links = Links { pairs: vec![far("n0"), far("n1")], ..Links::default() };
    let layout = plan(&llama_1b(), &nodes, &links, &request).expect("planned");
    let slow = layout.replicas[0].stages.iter().find(|s| s.ranks[0].0 == "n0").expect("n2 is too far");
    assert!(slow.layers.len() < 8, "{slow:?}");
    assert_eq!(layout.standbys, [NodeId("n2".into())]);
}

#[test]
fn a_thousand_equal_nodes_are_cut_as_a_few_are() {
    let request = PlanRequest { stages: Some(4), ..PlanRequest::default() };
    let shape = small(16, true);
    let few = plan(&shape, &devices(9, GIB), &Links::default(), &request).expect("planned");
    let many = plan(&shape, &devices(1_001, GIB), &Links::default(), &request).expect("planned");
    assert_eq!((few.replicas.len(), many.replicas.len()), (2, 250));
    assert_eq!((few.standbys.len(), many.standbys.len()), (1, 1));
    let cut = |layout: &Layout, replica: usize| -> Vec<LayerRange> {
        layout.replicas[replica].stages.iter().map(|stage| stage.layers).collect()
    };
    assert!((0..250).all(|replica| cut(&many, replica) == cut(&few, 0)));
}

#[test]
fn uneven_slices_of_every_axis_add_up_to_the_whole() {
    // 172 and 1000 do not divide by 8 × 32.
    let shape = small(4, false);
    let request = |ranks| PlanRequest {
        tensor_parallel_size: Some(ranks),
        stages: Some(1),
        max_context_tokens: 64,
        kv_tokens_wanted: 64,
        ..PlanRequest::default()
    };
    let whole = plan(&shape, &devices(1, GIB), &Links::default(), &request(1)).expect("planned");
    let whole = whole.replicas[0].stages[0].ledgers[0];
    for ranks in [2, 4] {
        let layout = plan(&shape, &devices(ranks, GIB), &Links::default(), &request(ranks)).expect("planned");
        let ledgers = &layout.replicas[0].stages[0].ledgers;
        // Norms (two per layer and the final one) are whole on every rank.
        let norms = ((ranks - 1) * (4 * 2 + 1) * 64 * 4) as u64;
        // Slices are padded to sixteen outputs: two matrices per layer (query, key and value; gate and up), and the head.
        let padding = |matrices: usize| (ranks * matrices * 15 * 64 * 4) as u64;
        let sum =
            |line: fn(&ashlar_shard_plan::MemoryLedger) -> Bytes| ledgers.iter().map(line).sum::<Bytes>().0;
        assert!(sum(|l| l.weights).abs_diff(whole.weights.0 + norms) <= padding(2 * 4));
        assert!(sum(|l| l.head).abs_diff(whole.head.0) <= padding(1));
        assert_eq!(ledgers.iter().map(|l| l.kv_cache).sum::<Bytes>(), whole.kv_cache);
        assert_eq!(ledgers.iter().map(|l| l.embedding).sum::<Bytes>(), whole.embedding);
    }
}

#[test]
fn less_kv_cache_than_wished_is_taken_where_memory_is_short() {
    let request =
        PlanRequest { kv_tokens_wanted: 1 << 20, max_context_tokens: 1024, ..PlanRequest::default() };
    let layout = plan(&llama_1b(), &devices(1, 6 * GIB), &Links::default(), &request).expect("planned");
    let replica = &layout.replicas[0];
    assert!(replica.kv_blocks >= 64 && replica.kv_blocks < 65_536, "{}", replica.kv_blocks);
    let ledger = replica.stages[0].ledgers[0];
    let block = 16 * 16 * 2 * 8 * 64 * 4;
    assert!(ledger.fits() && ledger.free < Bytes(block), "all of it is used: {ledger:?}");
}

#[test]
fn what_is_handed_on_is_kept_where_there_is_room_beside_all_else_and_costs_no_kv_block() {
    let request = |boundary_log| PlanRequest {
        stages: Some(2),
        replicas: Some(1),
        boundary_log,
        ..PlanRequest::default()
    };
    let planned = |memory, boundary_log| {
        let layout = plan(&llama_1b(), &devices(2, memory), &Links::default(), &request(boundary_log));
        layout.expect("planned").replicas.remove(0)
    };
    let roomy = planned(8 * GIB, true);
    assert!(roomy.boundary_log && !planned(8 * GIB, false).boundary_log);
    let [first, last] = [0, 1].map(|stage: usize| roomy.stages[stage].ledgers[0]);
    // 512 blocks × 16 tokens × 2,048 × 4 bytes; and the rows of a step, once as they are kept and once as they are sent.
    assert_eq!(first.boundary_log, Bytes((512 * 16 + 2 * 512) * 2048 * 4));
    assert_eq!(last.boundary_log, Bytes(0));
    assert_eq!(first.rows().iter().map(|row| row.bytes).sum::<Bytes>(), first.total);
    assert_eq!(first.total + first.free, first.capacity);
    // So much that all fits but that.
    let memory = first.without_log().0.max(last.total.0) + (1 << 20);
    let tight = planned(memory, true);
    assert!(!tight.boundary_log);
    assert_eq!((tight.kv_blocks, tight), (roomy.kv_blocks, planned(memory, false)));
}

#[test]
fn ranges_fixed_by_hand_decide_alone() {
    let mut nodes = devices(4, 8 * GIB);
    nodes[2].layers = Some(LayerRange { start: 0, end: 5 });
    nodes[0].layers = Some(LayerRange { start: 5, end: 16 });
    let layout = plan(&llama_1b(), &nodes, &Links::default(), &PlanRequest::default()).expect("planned");
    let stages = &layout.replicas[0].stages;
    assert_eq!(stages.iter().map(|s| s.ranks[0].0.as_str()).collect::<Vec<_>>(), ["n2", "n0"]);
    assert_eq!(stages[1].layers, LayerRange { start: 5, end: 16 });
    assert_eq!(layout.standbys.len(), 2);
}

#[test]
fn ranges_that_make_no_layout_are_refused_with_the_layers_named() {
    let with = |ranges: &[(usize, usize)]| {
        let mut nodes = devices(ranges.len(), 8 * GIB);
        for (node, (start, end)) in nodes.iter_mut().zip(ranges) {
            node.layers = Some(LayerRange { start: *start, end: *end });
        }
        refusal(&llama_1b(), &nodes, &PlanRequest::default()).to_string()
    };
    assert!(with(&[(0, 5), (7, 16)]).contains("layers 5..7 are on no node"));
    assert!(with(&[(0, 9), (7, 16)]).contains("layers 7..9 are in two ranges"));
    assert!(with(&[(0, 9), (9, 15)]).contains("end at layer 15, the model has 16"));
    assert!(with(&[(0, 16), (16, 16)]).contains("no layer"));
    assert!(with(&[(0, 9), (9, 16), (9, 16)]).contains("2 node(s)"));
}

#[test]
fn measurements_of_equal_machines_make_equal_cuts() {
    let request = PlanRequest { stages: Some(2), ..PlanRequest::default() };
    let plan_with = |speeds: [f64; 2]| {
        let mut nodes = devices(2, 8 * GIB);
        for (node, speed) in nodes.iter_mut().zip(speeds) {
            node.bandwidth_bytes_per_s *= speed;
            node.flops_per_s /= speed;
        }
        plan(&llama_1b(), &nodes, &Links::default(), &request).expect("planned")
    };
    let layers = |layout: &Layout| layout.replicas[0].stages.iter().map(|s| s.layers).collect::<Vec<_>>();
    let even = layers(&plan_with([1.0, 1.0]));
    for speeds in [[1.0, 1.04], [1.04, 1.0], [0.97, 1.03], [1.03, 0.96]] {
        assert_eq!(layers(&plan_with(speeds)), even, "{speeds:?}");
    }
    assert_ne!(layers(&plan_with([1.0, 1.5])), even, "a faster machine gets more");
}

#[test]
fn a_model_that_nearly_fits_with_its_head_on_every_stage_is_refused_for_what_is_missing_then() {
    // A head as large as the layers: on the last stage alone it lacks far more than spread.
    let weights = WeightTypes { embedding: WeightType::Bf16, ..WeightTypes::uniform(WeightType::F32, 4) };
    let shape = ModelShape { vocab_size: 8192, hidden_size: 512, weights, ..small(4, false) };
    let ask = |spread_head, memory| {
        let request = PlanRequest {
            stages: Some(4),
            spread_head,
            max_context_tokens: 64,
            kv_tokens_wanted: 64,
            ..PlanRequest::default()
        };
        plan(&shape, &devices(4, memory), &Links::default(), &request)
    };
    // The least with which the head fits when it is spread.
    let mut memory = 64 << 20;
    while ask(None, memory).is_ok() {
        memory -= 16 << 10;
    }
    let missing = |spread_head| match ask(spread_head, memory) {
        Err(PlanError::DoesNotFit { missing, .. }) => missing,
        other => panic!("{other:?}"),
    };
    assert!(missing(None) <= Bytes(16 << 10), "{:?}", missing(None));
    assert_eq!(missing(None), missing(Some(true)));
    assert!(missing(None) < missing(Some(false)));
}

#[test]
fn a_model_that_does_not_fit_says_what_is_missing_where() {
    let nodes = [device("a", 3 * GIB), device("b", GIB)];
    let error = refusal(&llama_1b(), &nodes, &PlanRequest::default());
    let PlanError::DoesNotFit { needs, has, missing, .. } = &error else { panic!("{error}") };
    assert!(*needs > *has && *missing > Bytes(0));
    let text = error.to_string();
    assert!(text.contains("does not fit: needs") && text.contains("add a node"), "{text}");
    assert!(matches!(
        refusal(&llama_1b(), &devices(1, GIB / 2), &PlanRequest::default()),
        PlanError::DoesNotFit { stage: 0, line: "weights", .. }
    ));
}

#[test]
fn refusals_are_typed_and_say_why() {
    let (shape, default) = (llama_1b(), PlanRequest::default());
    assert_eq!(refusal(&shape, &[], &default), PlanError::NoNodes);
    let three = PlanRequest { tensor_parallel_size: Some(3), ..default.clone() };
    assert!(refusal(&shape, &devices(3, GIB), &three).to_string().contains("can be cut over 1, 2, 4, 8"));
    let eight = PlanRequest { tensor_parallel_size: Some(8), ..default.clone() };
    let text = refusal(&small(4, true), &devices(8, GIB), &eight).to_string();
    assert!(text.contains("4 KV heads") && text.contains("1, 2, 4"), "{text}");
    let many = PlanRequest { stages: Some(17), ..default.clone() };
    assert!(matches!(refusal(&shape, &devices(20, GIB), &many), PlanError::TooManyStages { .. }));
    let few = PlanRequest { stages: Some(2), replicas: Some(2), ..default.clone() };
    assert!(matches!(refusal(&shape, &devices(3, GIB), &few), PlanError::TooFewNodes { needed: 4, .. }));
    let replicas = PlanRequest { replicas: Some(3), ..default.clone() };
    assert!(matches!(
        refusal(&shape, &devices(4, 4 * GIB), &replicas),
        PlanError::TooFewReplicas { wanted: 3, possible: 2 }
    ));
    let zero = PlanRequest { block_tokens: 0, ..default.clone() };
    assert!(matches!(refusal(&shape, &devices(1, GIB), &zero), PlanError::Invalid(_)));
    let twice = [device("a", GIB), device("a", GIB)];
    assert!(refusal(&shape, &twice, &default).to_string().contains("node a is listed twice"));
    let mut still = devices(1, GIB);
    still[0].bandwidth_bytes_per_s = f64::NAN;
    assert!(refusal(&shape, &still, &default).to_string().contains("node n0"));
}

#[test]
fn predictions_follow_the_slowest_resource() {
    let speed = |bandwidth: f64, flops: f64| {
        let mut nodes = devices(1, 8 * GIB);
        (nodes[0].bandwidth_bytes_per_s, nodes[0].flops_per_s) = (bandwidth, flops);
        plan(&llama_1b(), &nodes, &Links::default(), &PlanRequest::default()).expect("planned").replicas[0]
            .prediction
    };
    let (slow, fast) = (speed(10e9, 1e12), speed(20e9, 1e12));
    // All weights once, at 10 GB/s, and a little KV cache.
    assert!((0.494..0.53).contains(&slow.seconds_per_token), "{slow:?}");
    assert!((1.9..2.1).contains(&(slow.seconds_per_token / fast.seconds_per_token)));
    assert!(slow.tokens_per_s_batch_16 > 10.0 / slow.seconds_per_token);
    let weak = speed(20e9, 50e9);
    assert!(weak.seconds_to_first_token > 10.0 * fast.seconds_to_first_token, "{weak:?} {fast:?}");
}

#[test]
fn sixty_four_nodes_and_eighty_layers_are_planned_in_seconds() {
    let shape = ModelShape {
        hidden_size: 8192,
        intermediate_size: 28_672,
        num_layers: 80,
        weights: WeightTypes::uniform(WeightType::F32, 80),
        num_heads: 64,
        head_dim: 128,
        tied_head: false,
        ..llama_1b()
    };
    let start = std::time::Instant::now();
    let layout =
        plan(&shape, &devices(64, 40 * GIB), &Links::default(), &PlanRequest::default()).expect("planned");
    assert!(layout.replicas.len() >= 7, "{}", layout.replicas.len());
    refusal(&shape, &devices(64, 4 * GIB), &PlanRequest::default());
    // Where layers differ, more ranges have a price of their own.
    let mixture = "q4_k_m".parse::<Quantization>().expect("a mixture");
    let mixed = ModelShape { weights: mixture.types(80, 8192, 8192, 28_672, false), ..shape };
    plan(&mixed, &devices(64, 8 * GIB), &Links::default(), &PlanRequest::default()).expect("planned");
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_layout_tiles_the_model_within_memory_and_uses_each_node_once(
        layers in 1usize..12,
        tied in any::<bool>(),
        ranks in prop::sample::select(vec![1usize, 2, 4]),
        memories in prop::collection::vec(300_000u64..4_000_000, 1..9),
        replicas in prop::option::of(1usize..4),
        stages in prop::option::of(1usize..4),
    ) {
        let shape = small(layers, tied);
        let nodes: Vec<DeviceReport> =
            memories.iter().enumerate().map(|(index, memory)| device(&format!("n{index}"), *memory)).collect();
        let request = PlanRequest {
            stages,
            replicas,
            tensor_parallel_size: Some(ranks),
            max_context_tokens: 64,
            kv_tokens_wanted: 256,
            max_num_batched_tokens: 32,
            ..PlanRequest::default()
        };
        let answer = plan(&shape, &nodes, &Links::default(), &request);
        prop_assert_eq!(&answer, &plan(&shape, &nodes, &Links::default(), &request));
        let layout = match answer {
            Ok(layout) => layout,
            Err(error) => {
                prop_assert!(!matches!(error, PlanError::NoNodes | PlanError::Invalid(_)), "{}", error);
                return Ok(());
            }
        };
        let mut used: Vec<&NodeId> = layout.nodes().chain(&layout.standbys).collect();
        used.sort();
        let mut all: Vec<&NodeId> = nodes.iter().map(|device| &device.node).collect();
        all.sort();
        prop_assert_eq!(used, all);
        if let Some(replicas) = replicas {
            prop_assert_eq!(layout.replicas.len(), replicas);
        }
        for replica in &layout.replicas {
            if let Some(stages) = stages {
                prop_assert_eq!(replica.stages.len(), stages);
            }
            prop_assert!((4..=16).contains(&replica.kv_blocks));
            let mut next = 0;
            for stage in &replica.stages {
                prop_assert_eq!(stage.layers.start, next);
                prop_assert!(!stage.layers.is_empty());
                next = stage.layers.end;
                prop_assert_eq!((stage.ranks.len(), stage.ledgers.len()), (ranks, ranks));
                for (node, ledger) in stage.ranks.iter().zip(&stage.ledgers) {
                    let device = nodes.iter().find(|device| &device.node == node).expect("known");
                    prop_assert_eq!(ledger.capacity, device.memory);
                    prop_assert!(ledger.fits());
                }
            }
            prop_assert_eq!(next, layers);
        }
    }
}

#[test]
fn narrower_activations_halve_what_a_hop_carries() {
    let slow = Links { bytes_per_s: 50e6, ..Links::default() };
    let request = PlanRequest { stages: Some(2), replicas: Some(1), ..PlanRequest::default() };
    let planned = |activations| {
        let shape = ModelShape { activations, ..llama_1b() };
        let layout = plan(&shape, &devices(2, 4 * GIB), &slow, &request).expect("planned");
        layout.replicas[0].clone()
    };
    let (wide, narrow) = (planned(FloatType::F32), planned(FloatType::Bf16));
    // 512 rows of 2,048 values, once from stage to stage: two bytes each, at 50 MB/s.
    let gained = wide.prediction.seconds_to_first_token - narrow.prediction.seconds_to_first_token;
    assert!((gained - 512.0 * 2048.0 * 2.0 / 50e6).abs() < 1e-6, "{gained}");
    // The first stage has two such buffers waiting to be sent; the last one holds what arrives twice.
    let activations = |replica: &ashlar_shard_plan::ReplicaLayout, stage: usize| {
        replica.stages[stage].ledgers[0].activations.0 as i64
    };
    let rows = 512 * 2048;
    assert_eq!(activations(&wide, 0) - activations(&narrow, 0), 2 * 2 * rows);
    assert_eq!(activations(&wide, 1) - activations(&narrow, 1), -2 * rows);
}

#[test]
fn layers_of_a_mixture_count_what_they_weigh() {
    // The last layers of this made-up mixture weigh twice as much as the others.
    let mut shape = ModelShape { vocab_size: 512, tied_head: false, ..llama_1b() };
    for layer in &mut shape.weights.layers[..12] {
        *layer = ashlar_vocabulary::LayerWeightTypes::uniform(WeightType::Bf16);
    }
    // Reading weights decides.
    let request = PlanRequest {
        stages: Some(2),
        replicas: Some(1),
        spread_head: Some(false),
        max_context_tokens: 64,
        ..PlanRequest::default()
    };
    let mut nodes = devices(2, 8 * GIB);
    nodes.iter_mut().for_each(|node| node.flops_per_s = 1e13);
    let layout = plan(&shape, &nodes, &Links::default(), &request).expect("planned");
    let layers: Vec<usize> = layout.replicas[0].stages.iter().map(|stage| stage.layers.len()).collect();
    assert_eq!(layers, [10, 6], "10 + 0 and 2 + 2 × 4 layers of bf16");
    let weights: Vec<u64> =
        layout.replicas[0].stages.iter().map(|stage| stage.ledgers[0].weights.0).collect();
    let layer = (2048 * (2 * 2048 + 2 * 512 + 3 * 8192)) as u64;
    let norms = 2 * 4 * 2048;
    assert_eq!(weights, [10 * (2 * layer + norms), 10 * 2 * layer + 6 * norms + 4 * 2048]);
}

#[test]
fn a_node_that_multiplies_integers_faster_gets_more_layers_of_a_quantised_model_only() {
    // Slow at computing, so that this is what decides.
    let mut nodes = devices(2, 8 * GIB);
    for node in &mut nodes {
        (node.flops_per_s, node.quantized_flops_per_s) = (20e9, 20e9);
    }
    nodes[1].quantized_flops_per_s = 60e9;
    let request = PlanRequest { stages: Some(2), replicas: Some(1), ..PlanRequest::default() };
    let layers = |kind| {
        let shape = ModelShape {
            weights: WeightTypes { head: WeightType::F32, ..WeightTypes::uniform(kind, 16) },
            vocab_size: 512,
            ..llama_1b()
        };
        let layout = plan(&shape, &nodes, &Links::default(), &request).expect("planned");
        let stage = |stage: &ashlar_shard_plan::StageLayout| (stage.ranks[0].0.clone(), stage.layers.len());
        layout.replicas[0].stages.iter().map(stage).collect::<Vec<_>>()
    };
    let of =
        |found: &[(String, usize)], node: &str| found.iter().find(|(name, _)| name == node).map(|(_, n)| *n);
    let (plain, quantized) = (layers(WeightType::F32), layers(WeightType::Q8_0));
    assert_eq!(of(&plain, "n1"), Some(8));
    assert!(of(&quantized, "n1") >= Some(10), "{quantized:?}");
}

#[test]
fn a_shape_that_lacks_types_of_layers_is_refused() {
    let mut shape = llama_1b();
    shape.weights.layers.pop();
    let refused = refusal(&shape, &devices(1, 8 * GIB), &PlanRequest::default());
    assert!(refused.to_string().contains("types are known of 15 layers"), "{refused}");
}
