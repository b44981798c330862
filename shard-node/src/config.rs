//! What a node is told before it starts.

use ashlar_protocol::data::LinkFaults;
use ashlar_vocabulary::{LayerRange, NodeId};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Configuration of `ashlar node`. Unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// This node's name, unique in the cluster and stable over restarts.
    pub name: NodeId,
    /// Where the scheduler listens for nodes, `host:port`.
    pub scheduler: String,
    /// Where to listen for other ranks, `host:port`; port 0 picks a free one.
    #[serde(default = "default_listen")]
    pub listen: String,
    /// The host other ranks should use to reach this node; default: the host of `listen`.
    #[serde(default)]
    pub advertise_host: Option<String>,
    /// Where this node keeps its fencing term.
    #[serde(default = "default_state")]
    pub state: PathBuf,
    /// Directory or hub id of the model, if it differs from what the scheduler names.
    #[serde(default)]
    pub model: Option<String>,
    /// Memory to offer in bytes; default: nine tenths of what is available.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Compute threads; default: all available.
    #[serde(default)]
    pub threads: Option<usize>,
    /// Instruction set: `avx512`, `avx2` or `portable`; default: the best this machine has. The bits are the same.
    #[serde(default)]
    pub isa: Option<String>,
    /// Layers this node insists on, `{ start = 0, end = 8 }`.
    #[serde(default)]
    pub layers: Option<LayerRange>,
    /// Where to send traces (OTLP over HTTP), for example `http://127.0.0.1:4318`. Off by default.
    #[serde(default)]
    pub otlp_endpoint: Option<String>,
    /// Deliberate trouble on this node's data links, for tests and drills.
    #[serde(default)]
    pub link_faults: LinkFaults,
}

fn default_listen() -> String {
    "127.0.0.1:0".into()
}

fn default_state() -> PathBuf {
    PathBuf::from(".ashlar")
}
