//! Models: configurations, weight files and the one forward pass that every architecture shares.
//!
//! * [`config`]: a Hugging Face `config.json` becomes a [`ModelConfig`]; differences between architectures are *data*
//!   there (biases, head norms, windows, RoPE scaling), never a second forward pass.
//! * [`gguf`]: the same from GGUF files.
//! * [`hub`]: a directory or hub id becomes a local directory.
//! * [`weights`]: safetensors files, read by position; a rank reads only its slice.
//! * [`partial`]: files of which only a slice's bytes are here: which these are, and a journal of what there is.
//! * [`digest`]: what identifies a model's bits.
//! * [`slice`]: which rows and columns of which tensor belong to a rank.
//! * `source`: where a stage's weights come from; `pack`: from tensors, which become packed products, quantised where
//!   asked for; [`cache`]: from the packed copy of an earlier start.
//! * [`stage`]: a rank's packed weights; [`block`]: one transformer block; [`kv`]: its KV cache.
//! * [`collective`]: the seam to the other ranks of the group; [`head`]: to the ranks of earlier stages that hold slices of
//!   the head.
//! * [`adapter`]: low-rank adapters on a rank's layers; [`peft`]: their files; `stage::training`: a stage's backward pass.
//! * [`tensors`]: what trains, as named tensors of a rank; [`trained`]: which these are for an adapter and for a whole model.
//! * [`synth`]: random weights of a real shape.
//! * [`export`]: a model becomes one GGUF file, quantised.
//!
//! **Invariants:** no network except the hub client; no socket, clock or thread of its own; no `unsafe` (files are read
//! by position, not mapped: a file truncated under a running node is an error, not a SIGBUS, and no source page counts
//! as resident). Serving allocates its workspaces once.
#![forbid(unsafe_code)]

pub mod adapter;
pub mod block;
pub mod cache;
pub mod collective;
pub mod config;
pub mod digest;
pub mod export;
pub mod gguf;
pub mod head;
pub mod hub;
pub mod kv;
mod pack;
pub mod partial;
pub mod peft;
pub mod slice;
mod source;
pub mod stage;
pub mod synth;
pub mod tensors;
pub mod trained;
pub mod weights;

pub use cache::{CachePlace, CopyReadError, CopyWriteError, Origin, PackedCopy};
pub use collective::{Collective, CollectiveError, SingleRank};
pub use config::{ConfigError, ModelConfig};
pub use export::{Export, ExportError};
pub use head::{HeadError, HeadRanks, LogitColumns, NoHeadRanks};
pub use kv::KvCache;
pub use slice::RankSlice;
pub use stage::{ForwardError, LoadError, StageInput, StageModel, Workspace};
pub use tensors::{TensorId, TensorLayout, TensorShare, Tensors};
pub use trained::Trained;
pub use weights::{WeightError, WeightFiles};
