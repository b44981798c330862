#![allow(clippy::unwrap_used)]
use super::*;
use ashlar_kernels::Isa;
use ashlar_vocabulary::{FloatType, HeadSlice, LayerRange, LayerVectors, WeightType, WeightTypes};

fn shape() -> ModelShape {
    ModelShape {
        hidden_size: 16,
        intermediate_size: 40,
        num_layers: 3,
        num_heads: 4,
        num_kv_heads: 4,
        head_dim: 4,
        vocab_size: 64,
        max_position_embeddings: 16,
        tied_head: true,
        weights: WeightTypes::uniform(WeightType::F32, 3),
        kv_cache: FloatType::F32,
        activations: FloatType::F32,
        vectors: LayerVectors::default(),
    }
}

fn spec() -> LoraSpec {
    let targets = vec![Target::Down, Target::Query, Target::Output];
    LoraSpec { rank: 3, alpha: 6.0, rank_stabilized: false, targets }
}

const AT: Position = Position { job: JobId(77), steps: 5 };

fn slices(stages: usize, ranks: usize) -> Vec<RankSlice> {
    let layers = shape().num_layers;
    let slice = |stage: usize, rank: usize| RankSlice {
        layers: LayerRange { start: stage * layers / stages, end: (stage + 1) * layers / stages },
        first: stage == 0,
        last: stage + 1 == stages,
        tensor_rank: rank,
        tensor_parallel_size: ranks,
        head: HeadSlice::of_rank(false, (stage, stages), (rank, ranks)),
    };
    (0..stages).flat_map(|stage| (0..ranks).map(move |rank| slice(stage, rank))).collect()
}

/// A whole state in which every number tells its kind and place, cut for `slice`.
fn state(slice: &RankSlice, kernels: &Kernels) -> AdapterState {
    let kind = |kind: usize| {
        let whole = |layer: usize, target: Target| {
            let (outputs, inputs) = target.dimensions(&shape());
            let base = ((kind * 10 + layer) * 10 + target as usize) * 10_000;
            let numbers = |count: usize, half: usize| {
                (0..count).map(|i| (base + half * 5_000 + i) as f32 + 1.0).collect::<Vec<f32>>()
            };
            Ok::<_, std::convert::Infallible>(LoraPair {
                a: numbers(3 * inputs, 0),
                b: numbers(outputs * 3, 1),
            })
        };
        AdapterWeights::cut(&spec(), &shape(), slice, whole).unwrap()
    };
    AdapterState::restored(kind(0), kind(1), kind(2), 4, &shape(), slice, kernels)
}

fn shards(stages: usize, ranks: usize, kernels: &Kernels) -> Vec<Vec<u8>> {
    let slices = slices(stages, ranks);
    slices.iter().map(|slice| write(&state(slice, kernels), AT, &shape(), slice)).collect()
}

#[test]
fn a_state_comes_back_on_any_other_layout() {
    let kernels = Kernels::new(Isa::best(), 1);
    for (from, to) in [((1, 1), (3, 4)), ((3, 4), (1, 1)), ((2, 2), (3, 1)), ((1, 4), (2, 2))] {
        let shards = shards(from.0, from.1, &kernels);
        for slice in slices(to.0, to.1) {
            let mut restore = Restore::new(&spec(), &shape(), &slice, AT);
            shards.iter().for_each(|bytes| restore.take(&Shard::parse(bytes).unwrap()).unwrap());
            let (found, expected) =
                (restore.state(&shape(), &slice, &kernels).unwrap(), state(&slice, &kernels));
            assert_eq!(found.weights(), expected.weights(), "{from:?} {to:?}");
            assert_eq!((found.moments(), found.steps()), (expected.moments(), 4));
        }
    }
}

#[test]
fn shards_of_something_else_and_too_few_are_refused() {
    let kernels = Kernels::new(Isa::best(), 1);
    let shards = shards(2, 2, &kernels);
    let whole = RankSlice::whole(&shape());
    for (spec, at, what) in [
        (spec(), Position { job: JobId(78), ..AT }, "job"),
        (spec(), Position { steps: 6, ..AT }, "step"),
        (LoraSpec { alpha: 7.0, ..spec() }, AT, "adapter"),
    ] {
        let mut restore = Restore::new(&spec, &shape(), &whole, at);
        let refused = restore.take(&Shard::parse(&shards[0]).unwrap());
        assert!(matches!(refused, Err(CheckpointError::Mismatch(found)) if found == what), "{what}");
    }
    let mut restore = Restore::new(&spec(), &shape(), &whole, AT);
    shards[1..].iter().for_each(|bytes| restore.take(&Shard::parse(bytes).unwrap()).unwrap());
    let missing = restore.state(&shape(), &whole, &kernels).unwrap_err();
    assert!(matches!(missing, CheckpointError::Missing { layer: 0, .. }), "{missing}");
}

#[test]
fn damaged_bytes_are_refused_and_allocate_nothing() {
    let kernels = Kernels::new(Isa::best(), 1);
    let bytes = shards(1, 1, &kernels).remove(0);
    for length in [0, 15, 16, 100, bytes.len() - 1] {
        assert!(Shard::parse(&bytes[..length]).is_err(), "{length} bytes");
    }
    let mut long = bytes.clone();
    long.push(0);
    assert!(matches!(Shard::parse(&long), Err(CheckpointError::Damaged("its length"))));
    let mut other = bytes.clone();
    other[8] = 2;
    assert!(matches!(Shard::parse(&other), Err(CheckpointError::Version)));
    let mut huge = bytes;
    huge[12..16].fill(0xff);
    assert!(Shard::parse(&huge).is_err());
}

#[test]
fn an_adapter_is_usable_if_it_is_finite_and_every_tensor_had_a_gradient() {
    let kernels = Kernels::new(Isa::best(), 1);
    let whole = RankSlice::whole(&shape());
    let check = |change: &dyn Fn(&mut AdapterWeights, &mut AdapterWeights), steps| {
        let state = state(&whole, &kernels);
        let (mut weights, mut squares) = (state.weights().clone(), state.moments().1.clone());
        change(&mut weights, &mut squares);
        usable(&weights, &squares, steps).err()
    };
    let said = |found: Option<String>, text: &str| assert!(found.unwrap().contains(text));
    assert_eq!(check(&|_, _| {}, 9), None);
    said(check(&|weights, _| weights.tensors_mut().last().unwrap()[0] = f32::NAN, 9), "no number");
    let no_b = |weights: &mut AdapterWeights, _: &mut AdapterWeights| {
        weights.layers.iter_mut().flat_map(BTreeMap::values_mut).for_each(|pair| pair.b.fill(0.0));
    };
    said(check(&no_b, 9), "every B is zero");
    let no_a = |_: &mut AdapterWeights, squares: &mut AdapterWeights| {
        squares.layers[1].get_mut(&Target::Output).unwrap().a.fill(0.0);
    };
    said(check(&no_a, 2), "o_proj of layer 1 never had a gradient");
    assert_eq!(check(&no_a, 1), None, "A has no gradient in the first step");
}
