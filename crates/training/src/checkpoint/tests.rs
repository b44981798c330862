#![allow(clippy::unwrap_used)]
use super::restore::{Pairs, usable};
use super::*;
use ashlar_kernels::{Isa, Kernels};
use ashlar_model::RankSlice;
use ashlar_model::adapter::{LoraSpec, Target};
use ashlar_model::peft::PeftAdapter;
use ashlar_vocabulary::{
    FloatType, HeadSlice, LayerRange, LayerVectors, ModelShape, WeightType, WeightTypes,
};
use std::io::Cursor;

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
fn state(trained: &Trained, slice: &RankSlice, kernels: &Kernels) -> TrainingState {
    let layout = trained.weights(&shape(), slice);
    let kind = |kind: usize| {
        let whole = |share: &TensorShare| {
            let base = share.name.bytes().fold(kind * 997, |sum, byte| (sum * 31 + byte as usize) % 9973);
            let count = share.shape[0] * share.shape[1];
            Ok::<_, std::convert::Infallible>((0..count).map(|i| (base * 1000 + i) as f32 + 1.0).collect())
        };
        Tensors::cut(&layout, whole).unwrap()
    };
    TrainingState::restored(trained, [kind(0), kind(1), kind(2)], 4, &shape(), slice, kernels)
}

fn adapter() -> Trained {
    Trained::Adapter(spec())
}

fn shards(trained: &Trained, stages: usize, ranks: usize, kernels: &Kernels) -> Vec<Vec<u8>> {
    let bytes = |slice: &RankSlice| {
        let mut bytes = Vec::new();
        let mut put = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok::<_, std::convert::Infallible>(())
        };
        write(&state(trained, slice, kernels), AT, &mut put).unwrap();
        bytes
    };
    slices(stages, ranks).iter().map(bytes).collect()
}

fn open(bytes: &[u8]) -> Result<Shard<Cursor<&[u8]>>, CheckpointError> {
    Shard::open(Cursor::new(bytes))
}

#[test]
fn a_state_comes_back_on_any_other_layout() {
    let kernels = Kernels::new(Isa::best(), 1);
    for trained in [adapter(), Trained::Model] {
        for (from, to) in [((1, 1), (3, 4)), ((3, 4), (1, 1)), ((2, 2), (3, 1)), ((1, 4), (2, 2))] {
            let shards = shards(&trained, from.0, from.1, &kernels);
            for slice in slices(to.0, to.1) {
                let mut restore = Restore::new(&trained, &shape(), &slice, AT);
                shards.iter().for_each(|bytes| restore.take(&mut open(bytes).unwrap()).unwrap());
                let found = restore.state(&shape(), &slice, &kernels).unwrap();
                let expected = state(&trained, &slice, &kernels);
                assert_eq!(found.weights(), expected.weights(), "{from:?} {to:?}");
                assert_eq!((found.moments(), found.steps()), (expected.moments(), 4));
            }
        }
    }
}

#[test]
fn whole_tensors_of_a_model_come_from_the_shards_of_any_layout() {
    let kernels = Kernels::new(Isa::best(), 1);
    let whole = RankSlice::whole(&shape());
    let expected = state(&Trained::Model, &whole, &kernels);
    for (stages, ranks) in [(1, 1), (2, 2), (3, 4)] {
        let bytes = shards(&Trained::Model, stages, ranks, &kernels);
        let mut opened: Vec<_> = bytes.iter().map(|bytes| open(bytes).unwrap()).collect();
        for (share, numbers) in expected.weights().iter() {
            let (found, usable) = model_tensor(share, AT, &mut opened).unwrap();
            assert!(found == numbers && usable.is_ok(), "{} of {stages} × {ranks}", share.name);
        }
        // The embedding is on the first stage alone, whose copy on the last one is not stored.
        let table = &expected.weights().layout().shares()[0];
        if stages > 1 {
            let missing = model_tensor(table, AT, &mut opened[ranks..]).unwrap_err();
            assert!(matches!(&missing, CheckpointError::Missing(name) if name == &table.name), "{missing}");
        }
    }
}

#[test]
fn shards_of_something_else_and_too_few_are_refused() {
    let kernels = Kernels::new(Isa::best(), 1);
    let shards = shards(&adapter(), 2, 2, &kernels);
    let whole = RankSlice::whole(&shape());
    let other = Trained::Adapter(LoraSpec { alpha: 7.0, ..spec() });
    for (trained, at, what) in [
        (adapter(), Position { job: JobId(78), ..AT }, "job"),
        (adapter(), Position { steps: 6, ..AT }, "step"),
        (other, AT, "adapter"),
        (Trained::Model, AT, "adapter"),
    ] {
        let mut restore = Restore::new(&trained, &shape(), &whole, at);
        let refused = restore.take(&mut open(&shards[0]).unwrap());
        assert!(matches!(refused, Err(CheckpointError::Mismatch(found)) if found == what), "{what}");
    }
    let mut restore = Restore::new(&adapter(), &shape(), &whole, AT);
    shards[1..].iter().for_each(|bytes| restore.take(&mut open(bytes).unwrap()).unwrap());
    let missing = restore.state(&shape(), &whole, &kernels).unwrap_err();
    assert!(matches!(&missing, CheckpointError::Missing(name) if name.contains("layers.0.")), "{missing}");
}

#[test]
fn damaged_bytes_are_refused_and_allocate_nothing() {
    let kernels = Kernels::new(Isa::best(), 1);
    let bytes = shards(&adapter(), 1, 1, &kernels).remove(0);
    for length in [0, 15, 16, 100, bytes.len() - 1] {
        assert!(open(&bytes[..length]).is_err(), "{length} bytes");
    }
    let mut long = bytes.clone();
    long.push(0);
    assert!(matches!(open(&long), Err(CheckpointError::Damaged("its length"))));
    let mut other = bytes.clone();
    other[8] = 1;
    assert!(matches!(open(&other), Err(CheckpointError::Version)));
    let mut huge = bytes;
    huge[12..16].fill(0xff);
    assert!(open(&huge).is_err());
}

#[test]
fn an_adapter_is_usable_if_it_is_finite_and_every_tensor_had_a_gradient() {
    let kernels = Kernels::new(Isa::best(), 1);
    let whole = RankSlice::whole(&shape());
    let check = |change: &dyn Fn(&mut Pairs, &mut Pairs), steps| {
        let state = state(&adapter(), &whole, &kernels);
        let pairs = |of: &Tensors| PeftAdapter::join(&spec(), &shape(), [of]).pairs;
        let (mut weights, mut squares) = (pairs(state.weights()), pairs(state.moments().1));
        change(&mut weights, &mut squares);
        usable(&weights, &squares, steps).err()
    };
    let said = |found: Option<String>, text: &str| assert!(found.unwrap().contains(text));
    assert_eq!(check(&|_, _| {}, 9), None);
    said(check(&|weights, _| weights.values_mut().last().unwrap().a[0] = f32::NAN, 9), "no number");
    let no_b = |weights: &mut Pairs, _: &mut Pairs| {
        weights.values_mut().for_each(|pair| pair.b.fill(0.0));
    };
    said(check(&no_b, 9), "every B is zero");
    let no_a = |_: &mut Pairs, squares: &mut Pairs| {
        squares.get_mut(&(1, Target::Output)).unwrap().a.fill(0.0);
    };
    said(check(&no_a, 2), "o_proj of layer 1 never had a gradient");
    assert_eq!(check(&no_a, 1), None, "A has no gradient in the first step");
}
