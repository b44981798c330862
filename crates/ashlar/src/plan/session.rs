//! What a fine-tuning session would take on every rank of a layout, beside what serves: the formula by which the scheduler finds
//! room for one.

use super::parse_bytes;
use anyhow::{Result, bail};
use ashlar_shard_plan::{
    DeviceReport, Layout, Position, SessionMemory, SessionRequest, SessionWeights, Shares,
};
use ashlar_vocabulary::{Bytes, ModelShape, NodeId};
use clap::Args;
use serde::Serialize;

/// Modules of a block that an adapter can change.
const MODULES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
/// Largest rank of an adapter.
const RANK_MAX: i64 = 4096;
/// Largest micro-batch: more would gain nothing.
const ROWS_MAX: i64 = 1 << 20;

/// Options that describe a fine-tuning session.
#[derive(Debug, Clone, Args)]
pub(super) struct SessionArgs {
    /// Of a fine-tuning session: rank of its adapter.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=RANK_MAX))]
    lora_rank: u32,
    /// Modules that its adapter changes; default: all seven of a block.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    lora_targets: Vec<String>,
    /// Its adapter has dropout, which takes some memory.
    #[arg(long)]
    lora_dropout: bool,
    /// It trains all weights instead of an adapter.
    #[arg(long, conflicts_with_all = ["lora_rank", "lora_targets", "lora_dropout"])]
    full: bool,
    /// Rows of its micro-batches: tokens that go through the stages together, at least those of the longest sample.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=ROWS_MAX))]
    micro_batch_rows: u32,
    /// Memory that may be set aside for adapters, as the scheduler's `adapter_memory_bytes`; of what is free at most half.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_bytes)]
    adapter_memory: Bytes,
}

/// What a session would take.
#[derive(Debug, Serialize)]
pub(super) struct SessionPlan {
    /// `adapter` or `model`.
    trains: &'static str,
    /// Of the adapter.
    lora_rank: Option<u32>,
    /// What it changes.
    lora_targets: Vec<String>,
    micro_batch_rows: u32,
    /// Replica by replica, stage by stage.
    ranks: Vec<RankSession>,
}

/// The same on one rank.
#[derive(Debug, Serialize)]
struct RankSession {
    replica: usize,
    stage: usize,
    rank: usize,
    node: NodeId,
    /// Where blocks keep their activations.
    kept: Taken,
    /// Where they compute them again.
    recomputed: Taken,
    /// What is left for it beside what serves and what is set aside for adapters.
    left: Bytes,
}

#[derive(Debug, Serialize)]
struct Taken {
    #[serde(flatten)]
    memory: SessionMemory,
    total: Bytes,
}

/// What the scheduler would do with a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Kept,
    Recomputed,
    Never,
}

impl SessionArgs {
    /// What such a session would take on every rank of a layout of the model.
    pub(super) fn plan(
        &self,
        shape: &ModelShape,
        layout: &Layout,
        devices: &[DeviceReport],
    ) -> Result<SessionPlan> {
        let targets = self.targets()?;
        let copy = self.full.then(|| shape.in_f32());
        let shares = Shares::new(copy.as_ref().unwrap_or(shape), layout.tensor_parallel_size);
        let weights = match self.full {
            true => SessionWeights::Model,
            false => SessionWeights::Adapter { rank: self.lora_rank as usize, modules: &targets },
        };
        let request = |keep_activations| SessionRequest {
            weights,
            micro_batch_rows: self.micro_batch_rows as usize,
            keep_activations,
            replicas: layout.replicas.len(),
            dropout: self.lora_dropout,
        };
        let mut ranks = Vec::new();
        for (replica, of_replica) in layout.replicas.iter().enumerate() {
            let stages = of_replica.stages.len();
            for (stage, of_stage) in of_replica.stages.iter().enumerate() {
                let position = Position { stage, stages, spread_head: of_replica.spread_head };
                for (rank, (node, ledger)) in of_stage.ranks.iter().zip(&of_stage.ledgers).enumerate() {
                    let piece = position.piece(of_stage.layers, rank, layout.tensor_parallel_size);
                    let device = devices.iter().find(|device| device.node == *node);
                    let threads = device.map_or(1, |device| device.threads);
                    let taken = |keep| {
                        let memory = piece.session(&shares, stages - stage - 1, threads, &request(keep));
                        Taken { memory, total: memory.total() }
                    };
                    let aside = self.adapter_memory.min(Bytes(ledger.free.0 / 2));
                    ranks.push(RankSession {
                        replica,
                        stage,
                        rank,
                        node: node.clone(),
                        kept: taken(true),
                        recomputed: taken(false),
                        left: ledger.free.saturating_sub(aside),
                    });
                }
            }
        }
        Ok(SessionPlan {
            trains: if self.full { "model" } else { "adapter" },
            lora_rank: (!self.full).then_some(self.lora_rank),
            lora_targets: if self.full { Vec::new() } else { targets },
            micro_batch_rows: self.micro_batch_rows,
            ranks,
        })
    }

    /// The modules in one order, whatever the owner's, and each once.
    fn targets(&self) -> Result<Vec<String>> {
        if let Some(unknown) = self.lora_targets.iter().find(|name| !MODULES.contains(&name.as_str())) {
            bail!("--lora-targets: no block has a module `{unknown}`: choose among {}", MODULES.join(", "));
        }
        let named = |module: &&str| {
            self.lora_targets.is_empty() || self.lora_targets.iter().any(|name| name == module)
        };
        Ok(MODULES.into_iter().filter(named).map(str::to_owned).collect())
    }
}

impl SessionPlan {
    /// What the scheduler would do with such a job: all ranks keep their activations, or none does.
    fn verdict(&self) -> Verdict {
        let fits = |taken: fn(&RankSession) -> Bytes| self.ranks.iter().all(|rank| taken(rank) <= rank.left);
        if fits(|rank| rank.kept.total) {
            Verdict::Kept
        } else if fits(|rank| rank.recomputed.total) {
            Verdict::Recomputed
        } else {
            Verdict::Never
        }
    }

    /// Prints it as a table.
    pub(super) fn print(&self) {
        let what = match self.lora_rank {
            Some(rank) => format!("LoRA of rank {rank} on {}", self.lora_targets.join(", ")),
            None => "all weights".to_owned(),
        };
        println!(
            "\na fine-tuning session ({what}; micro-batches of {} rows) takes beside that:",
            self.micro_batch_rows
        );
        println!(
            "  {:<7} {:<5} {:<4} {:<10} {:>23} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}",
            "replica",
            "stage",
            "rank",
            "node",
            "weights and optimizer",
            "kept",
            "recomputed",
            "others",
            "total kept",
            "recomputed",
            "left"
        );
        for rank in &self.ranks {
            let memory = &rank.kept.memory;
            println!(
                "  {:<7} {:<5} {:<4} {:<10} {:>23} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}",
                rank.replica,
                rank.stage,
                rank.rank,
                rank.node,
                memory.weights,
                memory.tapes,
                rank.recomputed.memory.tapes,
                memory.total().saturating_sub(memory.weights + memory.tapes),
                rank.kept.total,
                rank.recomputed.total,
                rank.left
            );
        }
        println!(
            "  {}",
            match self.verdict() {
                Verdict::Kept => "it fits, and keeps its activations",
                Verdict::Recomputed => "it fits if it computes its activations again",
                Verdict::Never =>
                    "it does not fit: smaller micro-batches, a smaller adapter, more nodes, or a smaller KV cache help",
            }
        );
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::PlanArgs;
    use super::*;
    use ashlar_shard_plan::{Links, PlanRequest, plan};
    use ashlar_vocabulary::{FloatType, LayerVectors, WeightType, WeightTypes};
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        plan: PlanArgs,
    }

    fn shape() -> ModelShape {
        ModelShape {
            hidden_size: 512,
            intermediate_size: 1024,
            num_layers: 8,
            num_heads: 8,
            num_kv_heads: 4,
            head_dim: 64,
            vocab_size: 1000,
            max_position_embeddings: 512,
            tied_head: true,
            weights: WeightTypes::uniform(WeightType::Bf16, 8),
            kv_cache: FloatType::F32,
            activations: FloatType::F32,
            vectors: LayerVectors::default(),
        }
    }

    fn args(more: &[&str]) -> SessionArgs {
        let words = [&["plan", "--model", "none"][..], more].concat();
        Command::parse_from(words).plan.session
    }

    fn planned(memory: Bytes, more: &[&str]) -> SessionPlan {
        let device = |name: &str| DeviceReport {
            node: NodeId(name.into()),
            memory,
            bandwidth_bytes_per_s: 1e10,
            flops_per_s: 1e11,
            quantized_flops_per_s: 2e11,
            threads: 2,
            layers: None,
        };
        let (shape, devices) = (shape(), [device("a"), device("b")]);
        let request = PlanRequest { stages: Some(2), max_context_tokens: 512, ..PlanRequest::default() };
        let layout = plan(&shape, &devices, &Links::default(), &request).unwrap();
        args(more).plan(&shape, &layout, &devices).unwrap()
    }

    fn total(plan: &SessionPlan) -> Bytes {
        plan.ranks.iter().map(|rank| rank.kept.total).sum()
    }

    #[test]
    fn what_is_chosen_shows_on_every_rank() {
        let plenty = Bytes(8 << 30);
        let usual = planned(plenty, &[]);
        let nodes: Vec<(usize, &str)> =
            usual.ranks.iter().map(|rank| (rank.stage, rank.node.0.as_str())).collect();
        assert_eq!(nodes, [(0, "a"), (1, "b")]);
        assert!(usual.ranks.iter().all(|rank| rank.recomputed.total < rank.kept.total));
        assert_eq!(usual.lora_targets, MODULES);
        let smaller = [
            planned(plenty, &["--lora-rank", "8"]),
            planned(plenty, &["--lora-targets", "v_proj,q_proj,v_proj"]),
            planned(plenty, &["--micro-batch-rows", "256"]),
        ];
        assert!(smaller.iter().all(|smaller| total(smaller) < total(&usual)));
        assert_eq!(smaller[1].lora_targets, ["q_proj", "v_proj"]);
        let full = planned(plenty, &["--full"]);
        assert_eq!((full.trains, full.lora_rank), ("model", None));
        let weights = |plan: &SessionPlan| plan.ranks[0].kept.memory.weights;
        assert!(weights(&full) > weights(&usual) * 4);
    }

    #[test]
    fn the_verdict_is_the_schedulers() {
        let plenty = planned(Bytes(8 << 30), &[]);
        assert_eq!(plenty.verdict(), Verdict::Kept);
        let served = Bytes(8 << 30) - plenty.ranks[0].left - Bytes(1 << 30);
        let none = ["--adapter-memory", "1"];
        let most = |taken: fn(&RankSession) -> Bytes| plenty.ranks.iter().map(taken).max().unwrap();
        let room = |bytes: Bytes| planned(served + bytes + Bytes(64 << 20), &none).verdict();
        assert_eq!(room(most(|rank| rank.kept.total)), Verdict::Kept);
        assert_eq!(planned(served + Bytes(8 << 20), &none).verdict(), Verdict::Never);
    }

    #[test]
    fn a_module_that_no_block_has_is_refused() {
        let error = args(&["--lora-targets", "q_proj,lm_head"]).targets().unwrap_err().to_string();
        assert!(error.contains("lm_head") && error.contains("down_proj"), "{error}");
        let both = Command::try_parse_from(["plan", "--model", "m", "--full", "--lora-rank", "4"]);
        assert!(both.is_err(), "all weights have no rank");
    }
}
