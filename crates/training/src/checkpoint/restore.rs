//! Shares of any layout put together.

use super::{CheckpointError, KINDS, Position, Shard, StoredShare};
use crate::state::TrainingState;
use ashlar_kernels::Kernels;
use ashlar_model::adapter::LoraPair;
use ashlar_model::adapter::Target;
use ashlar_model::peft::PeftAdapter;
use ashlar_model::tensors::{LayerTensor, TensorLayout, TensorShare};
use ashlar_model::{RankSlice, TensorId, Tensors, Trained};
use ashlar_vocabulary::ModelShape;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{Read, Seek};
use std::ops::Range;
use std::sync::Arc;

/// A share of a tensor being put together: weights and both moments.
#[derive(Debug)]
struct Pieces {
    share: StoredShare,
    kinds: [Vec<f32>; KINDS],
    found: Vec<bool>,
    missing: usize,
}

impl Pieces {
    fn new(share: &TensorShare) -> Pieces {
        let size = share.numbers();
        let kinds = std::array::from_fn(|_| vec![0.0; size]);
        Pieces { share: share.into(), kinds, found: vec![false; size], missing: size }
    }

    /// Takes what of a shard belongs here.
    fn take<R: Read + Seek>(&mut self, shard: &mut Shard<R>) -> Result<(), CheckpointError> {
        // Of what every rank has, one copy is enough.
        let Some((share, first)) = shard.find(&self.share.name).filter(|_| self.missing > 0) else {
            return Ok(());
        };
        let own = self.share.clone();
        let overlap = |a: &Range<usize>, b: &Range<usize>| {
            a.start.max(b.start)..a.end.min(b.end).max(a.start.max(b.start))
        };
        let (rows, columns) = (overlap(&own.rows, &share.rows), overlap(&own.columns, &share.columns));
        if rows.is_empty() || columns.is_empty() {
            return Ok(());
        }
        // Rows that are whole on both sides lie side by side.
        let at_once = if columns == own.columns && columns == share.columns { rows.len() } else { 1 };
        for row in rows.step_by(at_once) {
            let at = |of: &StoredShare| {
                (row - of.rows.start) * of.columns.len() + columns.start - of.columns.start
            };
            let (to, from, length) = (at(&own), at(&share), at_once * columns.len());
            for (kind, numbers) in self.kinds.iter_mut().enumerate() {
                let from = first + kind * share.numbers() + from;
                shard.read(from..from + length, &mut numbers[to..to + length])?;
            }
            for found in &mut self.found[to..to + length] {
                self.missing -= usize::from(!*found);
                *found = true;
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), CheckpointError> {
        if self.missing > 0 { Err(CheckpointError::Missing(self.share.name.clone())) } else { Ok(()) }
    }
}

/// A rank's share, put together from the shards of any layout.
#[derive(Debug)]
pub struct Restore {
    at: Position,
    trained: Trained,
    layout: Arc<TensorLayout>,
    optimizer_steps: Option<u32>,
    tensors: Vec<Pieces>,
}

impl Restore {
    /// Begins; nothing has been found yet.
    pub fn new(trained: &Trained, shape: &ModelShape, slice: &RankSlice, at: Position) -> Restore {
        let layout = trained.weights(shape, slice);
        let tensors = layout.shares().iter().map(Pieces::new).collect();
        Restore { at, trained: trained.clone(), layout, optimizer_steps: None, tensors }
    }

    /// Takes what is of use from a shard.
    ///
    /// # Errors
    /// [`CheckpointError::Mismatch`] for a shard of something else, [`CheckpointError::Read`].
    pub fn take<R: Read + Seek>(&mut self, shard: &mut Shard<R>) -> Result<(), CheckpointError> {
        shard.check(&self.trained, self.at)?;
        let steps = shard.header.optimizer_steps;
        if *self.optimizer_steps.get_or_insert(steps) != steps {
            return Err(CheckpointError::Mismatch("step"));
        }
        self.tensors.iter_mut().try_for_each(|pieces| pieces.take(shard))
    }

    /// The weights, the moments and the optimiser's steps, once every shard has been taken.
    fn finish(mut self) -> Result<([Tensors; KINDS], u32), CheckpointError> {
        self.tensors.iter().try_for_each(Pieces::check)?;
        let kinds = std::array::from_fn(|kind| {
            let mut pieces = self.tensors.iter_mut();
            let numbers = |_: &TensorShare| {
                Ok::<_, Infallible>(
                    pieces.next().map(|own| std::mem::take(&mut own.kinds[kind])).unwrap_or_default(),
                )
            };
            match Tensors::build(&self.layout, numbers) {
                Ok(tensors) => tensors,
                Err(never) => match never {},
            }
        });
        Ok((kinds, self.optimizer_steps.unwrap_or(0)))
    }

    /// The state, once every shard has been taken.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] where the shards do not have everything.
    pub fn state(
        self,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) -> Result<TrainingState, CheckpointError> {
        let trained = self.trained.clone();
        let (kinds, steps) = self.finish()?;
        Ok(TrainingState::restored(&trained, kinds, steps, shape, slice, kernels))
    }

    /// The adapter, once every shard has been taken by a restore of the whole model; and what makes it useless, if anything
    /// does.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] where the shards do not have everything, [`CheckpointError::Mismatch`] where no adapter trains.
    pub fn adapter(self, shape: &ModelShape) -> Result<(PeftAdapter, Result<(), String>), CheckpointError> {
        let spec = self.trained.adapter().cloned().ok_or(CheckpointError::Mismatch("adapter"))?;
        let ([weights, _, second], steps) = self.finish()?;
        let adapter = PeftAdapter::join(&spec, shape, [&weights]);
        let squares = PeftAdapter::join(&spec, shape, [&second]).pairs;
        let usable = usable(&adapter.pairs, &squares, steps);
        Ok((adapter, usable))
    }
}

pub(super) type Pairs = BTreeMap<(usize, Target), LoraPair>;

/// Why an adapter would be of no use, from its weights and the mean squares of its gradients.
pub(super) fn usable(weights: &Pairs, squares: &Pairs, steps: u32) -> Result<(), String> {
    if weights.values().flat_map(|pair| pair.a.iter().chain(&pair.b)).any(|x| !x.is_finite()) {
        return Err("a weight of the adapter is no number: lower the learning rate".into());
    }
    if weights.values().all(|pair| is_still(&pair.b)) {
        return Err(
            "the adapter changes nothing (every B is zero): train more steps, or raise the learning rate"
                .into(),
        );
    }
    for ((layer, target), pair) in squares {
        // As long as B is zero, which it is in the first step, A has no gradient.
        if is_still(&pair.b) || (steps > 1 && is_still(&pair.a)) {
            let module = target.module();
            return Err(format!(
                "{module} of layer {layer} never had a gradient: the training data does not reach it"
            ));
        }
    }
    Ok(())
}

fn is_still(tensor: &[f32]) -> bool {
    tensor.iter().all(|&x| x == 0.0)
}

/// A whole tensor of a model that trains (a share of [`RankSlice::whole`]) from the shards of a step; and what makes the model
/// useless, if anything of this tensor does.
///
/// # Errors
/// [`CheckpointError::Missing`] where the shards do not have all of it, [`CheckpointError::Mismatch`] for shards of something else,
/// [`CheckpointError::Read`].
pub fn model_tensor<R: Read + Seek>(
    share: &TensorShare,
    at: Position,
    shards: &mut [Shard<R>],
) -> Result<(Vec<f32>, Result<(), String>), CheckpointError> {
    let mut pieces = Pieces::new(share);
    for shard in shards {
        shard.check(&Trained::Model, at)?;
        pieces.take(shard)?;
    }
    pieces.check()?;
    let [weights, _, squares] = pieces.kinds;
    let name = &share.name;
    // Adding the same to all keys changes no softmax, so the gradient of their bias is nothing but what rounding leaves.
    let moves = !matches!(share.id, TensorId::Layer(_, LayerTensor::Bias(Target::Key)));
    let usable = if weights.iter().any(|x| !x.is_finite()) {
        Err(format!("a weight of {name} is no number: lower the learning rate"))
    } else if moves && is_still(&squares) {
        Err(format!("{name} never had a gradient: the training data does not reach it"))
    } else {
        Ok(())
    };
    Ok((weights, usable))
}
