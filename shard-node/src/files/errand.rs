//! What the model's files are wanted for, and for how long.

use super::fetch::Goal;
use super::locate::{Locator, Progress, Wanted};
use super::peer::PeerLinks;
use super::shelf::Shelf;
use crate::beat::Beat;
use crate::config::NodeConfig;
use crate::links::{LinkBreaker, Wish};
use ashlar_identity::Transport;
use ashlar_model::RankSlice;
use ashlar_model::trained::trained_slice;
use ashlar_protocol::membership::Assignment;
use ashlar_vocabulary::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What files are wanted for.
#[derive(Debug)]
pub(crate) enum Errand<'a> {
    /// To serve: the compute thread waits, and says that it lives.
    Serve {
        /// Its sign of life.
        beat: &'a Beat,
        /// What ends a wait at once.
        breaker: &'a LinkBreaker,
        /// What the scheduler wants.
        wish: Wish,
    },
    /// For a place to come, beside serving.
    Prepare {
        /// Whether it is still wanted.
        wanted: &'a AtomicBool,
    },
}

impl Errand<'_> {
    /// Says that the compute thread lives, if it is that one which waits.
    pub(crate) fn beat(&self) {
        if let Errand::Serve { beat, .. } = self {
            // A beat cannot fail: its queue being full means that others speak.
            let _ = beat.tick();
        }
    }

    /// Whether it is still wanted.
    pub(crate) fn is_wanted(&self) -> bool {
        match self {
            Errand::Serve { breaker, wish, .. } => breaker.is_current(*wish),
            Errand::Prepare { wanted } => wanted.load(Ordering::Relaxed),
        }
    }

    fn breaker(&self) -> Option<LinkBreaker> {
        match self {
            Errand::Serve { breaker, .. } => Some((*breaker).clone()),
            Errand::Prepare { .. } => None,
        }
    }
}

/// Finds the model's files, and hands on what was found. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    locator: Arc<Locator>,
    shelf: Shelf,
    transport: Transport,
}

impl Files {
    /// As the node's configuration says.
    pub(crate) fn new(config: &NodeConfig, shelf: Shelf, transport: Transport) -> Files {
        Files { locator: Arc::new(Locator::new(config)), shelf, transport }
    }

    /// A directory with the assignment's model, or with what the slice takes of it, and what a fine-tuning session takes where this node
    /// `trains`. `progress` hears bytes fetched, and how many it will be.
    ///
    /// # Errors
    /// Where it was looked for, and what was said there.
    pub(crate) fn locate(
        &self,
        assignment: &Assignment,
        slice: &RankSlice,
        trains: bool,
        errand: &Errand<'_>,
        progress: &mut dyn FnMut(Bytes, Bytes),
    ) -> Result<PathBuf, String> {
        let mut slices = vec![slice.clone()];
        // A session takes its weights from the same files, and its last stage has the whole head.
        slices.extend(trains.then(|| trained_slice(slice)).filter(|other| other != slice));
        let wanted = Wanted {
            name: assignment.model.clone(),
            goal: Goal { model: assignment.model_digest, precision: assignment.precision, slices },
            peers: assignment.sources.clone(),
            links: PeerLinks {
                transport: self.transport.clone(),
                breaker: errand.breaker(),
                term: assignment.term,
                revision: assignment.revision,
            },
        };
        let mut reported = None;
        let mut waiting = |now: Option<Progress>| {
            errand.beat();
            if let Some(now) = now.filter(|now| reported != Some(*now)) {
                progress(Bytes(now.ready), Bytes(now.total));
                reported = Some(now);
            }
            errand.is_wanted()
        };
        let directory = self.locator.locate(&wanted, &mut waiting).map_err(|error| error.to_string())?;
        self.shelf.offer(assignment.model_digest, &directory);
        Ok(directory)
    }
}
