//! Models that this node hands out: those whose digest it has checked.

use ashlar_model::partial::ModelFiles;
use ashlar_vocabulary::ModelDigest;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tracing::debug;

/// Models that are handed out at a time; the one offered longest ago gives way.
const OFFERS_MAX: usize = 4;

/// One of them.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) model: ModelDigest,
    pub(crate) files: ModelFiles,
}

/// What is handed out. Clones share it.
#[derive(Debug, Default, Clone)]
pub(crate) struct Shelf(Arc<Mutex<VecDeque<Arc<Offer>>>>);

impl Shelf {
    /// Hands out the model in `directory`, which has this digest.
    pub(crate) fn offer(&self, model: ModelDigest, directory: &Path) {
        let files = match ModelFiles::of(directory) {
            Ok(files) => files,
            // It serves all the same; others find their model elsewhere.
            Err(error) => return debug!("the model's files are not handed out to other nodes: {error}"),
        };
        let mut offers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        offers.retain(|offer| offer.model != model);
        offers.truncate(OFFERS_MAX - 1);
        offers.push_front(Arc::new(Offer { model, files }));
    }

    /// The model with this digest, if it is handed out.
    pub(crate) fn find(&self, model: ModelDigest) -> Option<Arc<Offer>> {
        let offers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        offers.iter().find(|offer| offer.model == model).cloned()
    }
}
