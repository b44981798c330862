//! The adapters of a rank: what is loaded, under which load, and which sequences have it.

use crate::durable::{Answer, Refusal};
use crate::weights::Content;
use ashlar_protocol::membership::AdapterRefusal;
use ashlar_vocabulary::{AdapterId, Bytes, SequenceId};
use std::collections::{BTreeMap, BTreeSet};

/// Adapters within one layout.
#[derive(Default)]
pub(crate) struct Shelf {
    loading: BTreeMap<AdapterId, u64>,
    /// With what each comes to.
    loaded: BTreeMap<AdapterId, u64>,
    /// Whatever has been loaded, and may have been forgotten again.
    seen: BTreeSet<AdapterId>,
    bound: BTreeMap<SequenceId, u64>,
}

impl Shelf {
    pub(crate) fn begin(&mut self, adapter: AdapterId, load: u64) {
        self.loading.insert(adapter, load);
    }

    /// The end of a load, if it is still wanted.
    pub(crate) fn finish(
        &mut self,
        adapter: AdapterId,
        load: u64,
        answer: Result<Answer, Refusal>,
    ) -> Option<Result<Bytes, AdapterRefusal>> {
        if self.loading.get(&adapter) != Some(&load) {
            return None;
        }
        self.loading.remove(&adapter);
        let refused = |message: &str, retry| AdapterRefusal { message: message.to_owned(), retry };
        Some(match answer {
            Ok(Answer::Content(Content::Manifest { useless: true, .. })) => {
                Err(refused("the adapter has no effect", false))
            }
            Ok(Answer::Content(Content::Manifest { digest, .. })) => {
                self.loaded.insert(adapter, digest);
                self.seen.insert(adapter);
                Ok(Bytes(1 << 10))
            }
            Ok(_) | Err(Refusal::NotFound) => Err(refused("a file of the adapter is missing", false)),
            Err(_) => Err(refused("the blob store is unavailable", true)),
        })
    }

    pub(crate) fn unload(&mut self, adapter: AdapterId) {
        self.loading.remove(&adapter);
        self.loaded.remove(&adapter);
    }

    pub(crate) fn has(&self, adapter: AdapterId) -> bool {
        self.loaded.contains_key(&adapter)
    }

    /// Whether it has ever been here in this layout.
    pub(crate) fn has_had(&self, adapter: AdapterId) -> bool {
        self.seen.contains(&adapter)
    }

    /// Gives a sequence its adapter; `false` if that is not here.
    pub(crate) fn bind(&mut self, sequence: SequenceId, adapter: AdapterId) -> bool {
        let digest = self.loaded.get(&adapter).copied();
        digest.is_some_and(|digest| {
            self.bound.insert(sequence, digest);
            true
        })
    }

    pub(crate) fn unbind(&mut self, sequence: SequenceId) {
        self.bound.remove(&sequence);
    }

    /// What a sequence's adapter comes to.
    pub(crate) fn of(&self, sequence: SequenceId) -> Option<u64> {
        self.bound.get(&sequence).copied()
    }
}
