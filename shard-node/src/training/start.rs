//! What a session starts from: a new state or shards of an earlier one, and of a model that trains whole a private copy.

use super::error::SessionError;
use super::session::refused;
use super::storage::Storage;
use super::{Place, Resources};
use ashlar_kernels::Kernels;
use ashlar_model::stage::LoadError;
use ashlar_model::trained::{trained_config, trained_slice};
use ashlar_model::{StageModel, Tensors, Trained, WeightFiles};
use ashlar_protocol::training::{ModelStart, OpenSession, SessionStart};
use ashlar_training::checkpoint::{Position, Restore, Shard};
use ashlar_training::{TrainingState, initial_adapter, initial_model};
use std::sync::Arc;

/// What decides where a rank starts.
pub(super) struct Start<'a> {
    pub(super) open: &'a OpenSession,
    pub(super) place: &'a Place,
    pub(super) trained: &'a Trained,
    pub(super) storage: &'a Storage,
    pub(super) resources: &'a Resources,
}

impl Start<'_> {
    /// The rank's state, and how many steps are in it.
    pub(super) fn state(&self, kernels: &Kernels) -> Result<(TrainingState, u64), SessionError> {
        let Start { open, place, trained, .. } = self;
        let (shape, slice) = (&place.model.config().shape, place.model.slice());
        if **trained == Trained::Model && !place.directory.join("config.json").is_file() {
            // Its files are those of the result, too.
            return Err(refused(
                "all weights can only be trained of a model that is served from a Hugging Face directory: serve it from one",
            ));
        }
        match &open.start {
            SessionStart::New => Ok((TrainingState::new(trained, self.weights()?, shape, slice, kernels), 0)),
            SessionStart::Resume { steps, shards } => {
                let at = Position { job: open.job, steps: *steps };
                let mut restore = Restore::new(trained, shape, slice, at);
                for &shard in shards {
                    let file = self.storage.fetch(shard, &self.resources.directory)?;
                    restore.take(&mut Shard::open(file)?)?;
                }
                Ok((restore.state(shape, slice, kernels)?, *steps))
            }
        }
    }

    /// The first weights.
    fn weights(&self) -> Result<Tensors, SessionError> {
        let Start { open, place, trained, .. } = self;
        let (shape, slice, seed) = (&place.model.config().shape, place.model.slice(), open.settings.seed);
        if let Some(spec) = trained.adapter() {
            return Ok(initial_adapter(spec, shape, slice, seed).tensors);
        }
        let layout = trained.weights(shape, slice);
        match open.settings.full.map(|full| full.start) {
            Some(ModelStart::Random) => Ok(initial_model(&layout, shape.num_layers, seed)),
            Some(ModelStart::Model) | None => {
                let files = WeightFiles::open(&place.directory).map_err(LoadError::from)?;
                Ok(Tensors::read(&layout, &files).map_err(LoadError::from)?)
            }
        }
    }
}

/// A copy of the rank's share of the model, with the weights of a state.
pub(super) fn private_copy(
    place: &Place,
    state: &TrainingState,
    kernels: &Arc<Kernels>,
) -> Result<Arc<StageModel>, SessionError> {
    let (config, slice) = (trained_config(place.model.config()), trained_slice(place.model.slice()));
    Ok(Arc::new(StageModel::of_trained(config, slice, kernels.clone(), state.weights())?))
}
