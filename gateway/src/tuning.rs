//! Fine-tuning, as far as it is a gateway's: files become blobs, and a job's files become samples.
//!
//! Layout: [`settings`] (what a client chose, and what follows from it and from the files), [`validate`] (the work on a
//! job's files), [`compare`] (a finished adapter and what is served), `questions` (samples with one right answer), `blob_io` (blobs
//! as files of the standard library). Endpoints are in `openai/tuning`.

mod blob_io;
pub(crate) mod compare;
mod questions;
pub(crate) mod settings;
pub(crate) mod validate;

use ashlar_store::blobs::Blobs;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Uploads at once. Each holds a few blocks of memory.
const UPLOADS_MAX: usize = 16;
/// Clients that follow a job's events at once. Each asks the scheduler a few times per second at most.
const FOLLOWERS_MAX: usize = 64;

/// What fine-tuning needs of a gateway.
#[derive(Clone)]
pub(crate) struct Tuning {
    /// Where files and samples lie.
    pub(crate) blobs: Blobs,
    /// Places of uploads.
    pub(crate) uploads: Arc<Semaphore>,
    /// Places of followers.
    pub(crate) followers: Arc<Semaphore>,
}

impl Tuning {
    pub(crate) fn new(blobs: Blobs) -> Tuning {
        Tuning {
            blobs,
            uploads: Arc::new(Semaphore::new(UPLOADS_MAX)),
            followers: Arc::new(Semaphore::new(FOLLOWERS_MAX)),
        }
    }
}

impl std::fmt::Debug for Tuning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tuning")
    }
}
