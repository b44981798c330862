//! What a node is told before it starts.

use ashlar_model::CachePlace;
use ashlar_protocol::data::LinkFaults;
use ashlar_service_kit::Addresses;
use ashlar_service_kit::config::Schema;
use ashlar_vocabulary::{LayerRange, NodeId};
use schemars::{JsonSchema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Configuration of `ashlar node`. Unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// This node's name, unique in the cluster and stable over restarts; default: the machine's.
    #[schemars(with = "String")]
    pub name: NodeId,
    /// Where the scheduler listens for nodes, `host:port`, or each of several, of which one leads.
    pub scheduler: Addresses,
    /// Where to listen for other ranks, `host:port`; port 0 picks a free one.
    #[serde(default = "default_listen")]
    pub listen: String,
    /// The host other ranks should use to reach this node; default: the host of `listen`, or, where that is every address of the machine
    /// (0.0.0.0), the machine's address on the way to the scheduler.
    #[serde(default)]
    pub advertise_host: Option<String>,
    /// The directory of this node's identity, which `ashlar node --join` or `ashlar identity` makes; with it every connection is
    /// encrypted and mutual. Default: in the clear, on this machine only.
    #[serde(default)]
    pub identity: Option<PathBuf>,
    /// Whether to listen for other machines without an identity, on a network that only the cluster is on.
    #[serde(default)]
    pub allow_plaintext: bool,
    /// Where this node keeps its fencing term.
    #[serde(default = "default_state")]
    pub state: PathBuf,
    /// Directory or hub id of the model, if it differs from what the scheduler names.
    #[serde(default)]
    pub model: Option<String>,
    /// Whether to fetch the files of a model that is not on this machine: what the slice takes of them, from other nodes or the hub.
    #[serde(default)]
    pub fetch: FetchPolicy,
    /// Where fetched files are kept; default: `models` in `state`. Nodes of one machine may share it.
    #[serde(default)]
    pub models: Option<PathBuf>,
    /// Where files, adapters and the states of fine-tuning jobs are: a directory or `s3://…`, the same for every role; default:
    /// nowhere, and there are none.
    #[serde(default)]
    pub blobs: Option<String>,
    /// Whether, or where, to keep a packed copy of the weights, so that the next start reads it; default: not.
    #[serde(default)]
    pub cache: Option<CacheConfig>,
    /// Memory to offer in bytes; default: nine tenths of what is available.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Compute threads; default: all available.
    #[serde(default)]
    pub threads: Option<usize>,
    /// Whether each compute thread stays on a core of its own, and on which.
    #[serde(default)]
    pub pin: Pin,
    /// Instruction set: `avx512`, `avx2` or `portable`; default: the best this machine has. The bits are the same.
    #[serde(default)]
    pub isa: Option<String>,
    /// Layers this node insists on, `{ start = 0, end = 8 }`.
    #[serde(default)]
    #[schemars(schema_with = "layer_range")]
    pub layers: Option<LayerRange>,
    /// How long after SIGTERM this node waits until others have taken its place, in milliseconds.
    #[serde(default = "default_drain_grace_ms")]
    pub drain_grace_ms: u64,
    /// Where to send traces (OTLP over HTTP), for example `http://127.0.0.1:4318`. Off by default.
    #[serde(default)]
    pub otlp_endpoint: Option<String>,
    /// How this node exchanges with other ranks.
    #[serde(default)]
    pub links: LinkConfig,
    /// Deliberate trouble on this node's data links, for tests and drills.
    #[serde(default)]
    pub link_faults: LinkFaults,
    /// Deliberate trouble in what this node computes, for tests and drills.
    #[serde(default)]
    pub compute_faults: ComputeFaults,
}

impl NodeConfig {
    /// Every key, for files, environment and flags. Whoever starts a node finds a `name` for it where none is set.
    pub fn schema() -> Schema {
        Schema::of::<NodeConfig>("node").supplying("name")
    }
}

fn layer_range(_: &mut SchemaGenerator) -> schemars::Schema {
    json_schema!({
        "type": ["object", "null"],
        "properties": {
            "start": { "type": "integer", "minimum": 0, "description": "The first of the layers this node insists on." },
            "end": { "type": "integer", "minimum": 0, "description": "One past the last of them." },
        },
        "required": ["start", "end"],
        "additionalProperties": false,
    })
}

/// Deliberate trouble in what a node computes: as from memory that does not keep its bits.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ComputeFaults {
    /// Flip the lowest bit of one value of every row in each n-th step (0: never).
    pub flip_bit_every: u64,
    /// On this node only, where several are configured alike.
    #[schemars(with = "Option<String>")]
    pub node: Option<NodeId>,
}

impl ComputeFaults {
    /// Whether there is trouble in the `number`-th step that node `name` computes.
    pub fn hit(&self, name: &NodeId, number: u64) -> bool {
        let here = self.node.as_ref().is_none_or(|node| node == name);
        here && self.flip_bit_every > 0 && number.is_multiple_of(self.flip_bit_every)
    }
}

/// When a node fetches its model.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FetchPolicy {
    /// Where this machine does not have it.
    #[default]
    Missing,
    /// Whatever this machine has.
    Always,
    /// Not from other nodes; from a hub whole, as every tool does.
    Never,
}

/// Whether compute threads are kept on cores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "`pin` is true, false or a list of cores")]
pub enum Pin {
    /// On the first cores that this process may use, or not at all.
    Each(bool),
    /// On these, one thread on each.
    Cores(Vec<usize>),
}

impl Default for Pin {
    fn default() -> Pin {
        Pin::Each(false)
    }
}

/// Whether, or where, a node keeps packed copies of its weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "true (beside the model), false, or a directory")]
pub enum CacheConfig {
    /// Beside the model, or not at all.
    Beside(bool),
    /// In this directory.
    Directory(PathBuf),
}

impl CacheConfig {
    /// Where copies are kept, if they are.
    pub fn place(&self) -> Option<CachePlace> {
        match self {
            CacheConfig::Beside(beside) => beside.then_some(CachePlace::BesideModel),
            CacheConfig::Directory(directory) => Some(CachePlace::Directory(directory.clone())),
        }
    }
}

impl From<CachePlace> for CacheConfig {
    fn from(place: CachePlace) -> CacheConfig {
        match place {
            CachePlace::BesideModel => CacheConfig::Beside(true),
            CachePlace::Directory(directory) => CacheConfig::Directory(directory),
        }
    }
}

/// How a node exchanges with the other ranks of its tensor-parallel group, and slices of the logits with ranks of other stages.
/// Unknown keys are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LinkConfig {
    /// Whether to exchange through shared memory where the ranks run on one host, as one user.
    pub shared_memory: bool,
    /// How long a rank that waits for another spins before it sleeps, in microseconds; default: by the cores there are.
    pub spin_us: Option<u64>,
}

impl Default for LinkConfig {
    fn default() -> LinkConfig {
        LinkConfig { shared_memory: true, spin_us: None }
    }
}

impl LinkConfig {
    /// Longer than it takes to wake a sleeper, and most of the difference between two ranks that have cores of their own.
    const SPIN: Duration = Duration::from_micros(200);
    /// A few looks: somebody else has use for the core.
    const SPIN_CROWDED: Duration = Duration::from_micros(5);

    /// How long to spin in a group of `ranks` ranks with `threads` threads each. Spinning helps only while every thread of
    /// the group has a core of its own.
    pub fn spin(&self, ranks: usize, threads: usize) -> Duration {
        let crowded = ranks.saturating_mul(threads) > ashlar_kernels::available_threads();
        let default = if crowded { LinkConfig::SPIN_CROWDED } else { LinkConfig::SPIN };
        self.spin_us.map_or(default, Duration::from_micros)
    }
}

fn default_drain_grace_ms() -> u64 {
    10_000
}

fn default_listen() -> String {
    "127.0.0.1:0".into()
}

fn default_state() -> PathBuf {
    PathBuf::from(".ashlar")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const EXAMPLE: &str = include_str!("../../configs/node.toml");

    /// The example's keys that are commented out, as if they were not.
    fn uncommented(section: &str) -> String {
        let lines = EXAMPLE.lines().skip_while(|line| *line != format!("# [{section}]"));
        lines
            .take_while(|line| !line.is_empty() && !line.starts_with("# On this node"))
            .map(|line| line.trim_start_matches("# ").to_owned() + "\n")
            .collect()
    }

    #[test]
    fn the_example_is_valid_and_shows_the_defaults() {
        let config: NodeConfig = toml::from_str(EXAMPLE).unwrap();
        assert_eq!((config.links, config.link_faults), Default::default());
        let config: NodeConfig =
            toml::from_str(&[EXAMPLE, &uncommented("links"), &uncommented("link_faults")].concat()).unwrap();
        assert_eq!(config.links, LinkConfig { shared_memory: true, spin_us: Some(200) });
        assert_eq!(config.link_faults, LinkFaults::default());
        let config: NodeConfig = toml::from_str(&[EXAMPLE, &uncommented("compute_faults")].concat()).unwrap();
        assert_eq!(config.compute_faults, ComputeFaults::default());
    }

    #[test]
    fn pins_are_a_choice_or_a_list() {
        let with = |pin: &str| toml::from_str::<NodeConfig>(&format!("pin = {pin}\n{EXAMPLE}"));
        assert_eq!(toml::from_str::<NodeConfig>(EXAMPLE).unwrap().pin, Pin::Each(false));
        assert_eq!(with("true").unwrap().pin, Pin::Each(true));
        let listed = with("[4, 5]").unwrap();
        assert_eq!(listed.pin, Pin::Cores(vec![4, 5]));
        assert_eq!(toml::from_str::<NodeConfig>(&toml::to_string(&listed).unwrap()).unwrap(), listed);
        assert!(with("\"all\"").unwrap_err().to_string().contains("a list of cores"));
    }

    #[test]
    fn copies_are_kept_beside_the_model_or_in_a_directory_or_not() {
        let place = |line: &str| {
            let config: NodeConfig = toml::from_str(&format!("{line}\n{EXAMPLE}")).unwrap();
            config.cache.as_ref().and_then(CacheConfig::place)
        };
        assert_eq!((place(""), place("cache = false")), (None, None));
        assert_eq!(place("cache = true"), Some(CachePlace::BesideModel));
        assert_eq!(place("cache = \"/c\""), Some(CachePlace::Directory("/c".into())));
        let error = toml::from_str::<NodeConfig>(&format!("cache = 7\n{EXAMPLE}")).unwrap_err().to_string();
        assert!(error.contains("true (beside the model), false, or a directory"), "{error}");
    }

    #[test]
    fn a_model_is_fetched_where_it_is_missing_unless_told_otherwise() {
        let fetch = |line: &str| {
            toml::from_str::<NodeConfig>(&format!("{line}\n{EXAMPLE}")).map(|config| config.fetch)
        };
        assert_eq!(fetch("").unwrap(), FetchPolicy::Missing);
        assert_eq!(fetch("fetch = \"always\"").unwrap(), FetchPolicy::Always);
        assert_eq!(fetch("fetch = \"never\"").unwrap(), FetchPolicy::Never);
        assert!(fetch("fetch = \"perhaps\"").unwrap_err().to_string().contains("missing"));
    }

    #[test]
    fn spinning_is_for_threads_that_have_cores() {
        let config = LinkConfig::default();
        assert_eq!(config.spin(1, 1), LinkConfig::SPIN);
        assert_eq!(config.spin(8, usize::MAX), LinkConfig::SPIN_CROWDED);
        assert_eq!(LinkConfig { spin_us: Some(7), ..config }.spin(8, 64), Duration::from_micros(7));
    }
}
