//! Several models on one cluster: what is asked for, and what is said about it. Calls travel like all of
//! [administration](crate::admin); every gateway is told of all models whenever something about them has changed.
//!
//! The model that a scheduler is configured with is its *own*; it is always there. Others are *deployed* beside it, each on
//! nodes of its own.

use crate::serving::ClusterSnapshot;
use ashlar_vocabulary::{NodeId, Quantization};
use serde::{Deserialize, Serialize};

/// A model that is to be served beside the scheduler's own one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeployModel {
    /// What clients call it. See [`check_name`].
    pub name: String,
    /// Directory, GGUF file or hub id.
    pub model: String,
    /// Nodes that it is to have for itself.
    pub nodes: u32,
    /// Pipeline stages per replica; `None`: the fewest that fit.
    pub stages: Option<u32>,
    /// Ranks per stage; `None`: 1.
    pub tensor_parallel_size: Option<u32>,
    /// Replicas; `None`: as many as its nodes can hold.
    pub replicas: Option<u32>,
    /// To which types its weights are quantised while they are loaded.
    pub quantize: Option<Quantization>,
    /// Longest sequence; `None`: as the scheduler's configuration limits it, at most what the model allows.
    pub max_context_tokens: Option<u32>,
}

/// How many nodes a model is to have from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScaleModel {
    /// Which; `None` is the scheduler's own.
    pub name: Option<String>,
    /// So many; `None`, of the scheduler's own model: all that no other one has.
    pub nodes: Option<u32>,
}

/// All models of a cluster.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelsView {
    /// How many nodes the scheduler's own model is to have at most.
    pub own_nodes: Option<u32>,
    /// The others, by name.
    pub deployed: Vec<ModelView>,
}

/// A deployed model as it is now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelView {
    /// What was asked for; `nodes` as it was asked for last.
    pub request: DeployModel,
    /// Seconds since 1970.
    pub created_at: u64,
    /// How far it is.
    pub status: ModelStatus,
    /// Its nodes, whether they have joined or not.
    pub members: Vec<NodeId>,
    /// What is missing, if something is.
    pub problem: Option<String>,
    /// Its part of the cluster.
    pub cluster: ClusterSnapshot,
}

/// How far a deployed model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelStatus {
    /// It has not served yet.
    Loading,
    /// It has served: requests for it are taken, as those for the scheduler's own model.
    Serving,
    /// It takes no request any more; those that are in progress end.
    Removing,
}

/// Longest name of a model.
pub const NAME_CHARS_MAX: usize = 64;

/// Whether a model may be called this: letters, digits, `-`, `_`, `.` and `:`, at most [`NAME_CHARS_MAX`] of them, the first a
/// letter or a digit.
///
/// # Errors
/// Why not, for whoever asked.
pub fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    let begins = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    match begins && name.len() <= NAME_CHARS_MAX && name.chars().all(allowed) {
        true => Ok(()),
        false => Err(format!(
            "a model's name is 1 to {NAME_CHARS_MAX} letters, digits, `-`, `_`, `.` and `:`, and begins with a letter or a digit: \
             choose another `name`"
        )),
    }
}
