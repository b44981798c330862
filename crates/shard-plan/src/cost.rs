//! Seconds of one stage and of one step: the larger of reading bytes and computing, plus what the links add.

use crate::layout::Prediction;
use crate::ledger::Piece;
use crate::position::Position;
use crate::request::{DeviceReport, Links, PlanRequest};
use crate::shares::Shares;
use ashlar_vocabulary::{LayerRange, NodeId};

/// Bytes of one element on the wire, but for activations from stage to stage.
const BYTES_PER_ACTIVATION: f64 = 4.0;

/// Sequences of the decode step that cuts are balanced for and throughput is predicted for.
pub const BATCH: usize = 16;

/// Prompt length for which the time to the first token is predicted.
const PROMPT: usize = 512;

/// Bytes of a step's result (sampled tokens) on its way back to the scheduler.
const RESULT_BYTES: f64 = 1024.0;

/// The ranks of one stage: as many nodes as the tensor-parallel size.
pub type Group<'a> = Vec<&'a DeviceReport>;

/// Tokens that one step computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepLoad {
    /// Tokens computed.
    pub tokens: usize,
    /// Sequences that they belong to (each reads its own KV cache once and is sampled once).
    pub sequences: usize,
    /// Tokens of context that each sequence reads.
    pub context: usize,
}

impl StepLoad {
    /// One new token for each of `sequences`, at half of the longest context.
    pub fn decode(sequences: usize, request: &PlanRequest) -> StepLoad {
        StepLoad { tokens: sequences, sequences, context: request.max_context_tokens.div_ceil(2) }
    }

    /// The longest chunk of a prompt that times are predicted for.
    pub fn chunk(request: &PlanRequest) -> StepLoad {
        StepLoad::prefill(PROMPT.min(request.max_num_batched_tokens).max(1))
    }

    /// A chunk of one prompt.
    pub fn prefill(tokens: usize) -> StepLoad {
        StepLoad { tokens, sequences: 1, context: tokens.div_ceil(2) }
    }
}

/// What one rank reads and computes, and how fast it does.
#[derive(Debug, Clone, Copy, PartialEq)]
struct RankWork {
    /// Bytes of weights that every step reads.
    product_bytes: u64,
    /// Bytes of KV cache that each token of context has.
    kv_bytes_per_token: usize,
    /// Weights that each token is multiplied with as floats.
    plain_weights: u64,
    /// The same as integers.
    quantized_weights: u64,
    /// Weights of the head, which each sequence is multiplied with.
    head_weights: usize,
    head_is_quantized: bool,
    /// Values of all layers' queries: each token has them attend to its context.
    attention_values: usize,
    bandwidth_bytes_per_s: f64,
    flops_per_s: f64,
    quantized_flops_per_s: f64,
}

impl RankWork {
    /// max(bytes / bandwidth, operations / speed).
    fn seconds(&self, load: StepLoad) -> f64 {
        let kv_bytes = (load.sequences * load.context * self.kv_bytes_per_token) as f64;
        let bytes = self.product_bytes as f64 + kv_bytes;
        let (mut plain, mut quantized) = (self.plain_weights as f64, self.quantized_weights as f64);
        (plain, quantized) = (plain * load.tokens as f64, quantized * load.tokens as f64);
        let head = (self.head_weights * load.sequences) as f64;
        *if self.head_is_quantized { &mut quantized } else { &mut plain } += head;
        let attention = 4.0 * (load.tokens * load.context * self.attention_values) as f64;
        let computing =
            (2.0 * plain + attention) / self.flops_per_s + 2.0 * quantized / self.quantized_flops_per_s;
        (bytes / self.bandwidth_bytes_per_s).max(computing)
    }
}

/// The work of one stage's ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct StageWork {
    ranks: Vec<RankWork>,
    /// Seconds of the collectives of a step without tokens, and what each token adds.
    collective_s: f64,
    collective_s_per_token: f64,
}

impl StageWork {
    /// Seconds of a step: the slowest rank plus the collectives.
    pub fn seconds(&self, load: StepLoad) -> f64 {
        let slowest = self.ranks.iter().map(|rank| rank.seconds(load)).fold(0.0, f64::max);
        slowest + self.collective_s + self.collective_s_per_token * load.tokens as f64
    }
}

/// Predicts times for one model, one network and one request.
#[derive(Debug, Clone, Copy)]
pub struct CostModel<'a> {
    /// The model, cut for groups of as many ranks as stages have.
    pub shares: &'a Shares<'a>,
    /// The network.
    pub links: &'a Links,
    /// Precision and limits.
    pub request: &'a PlanRequest,
    /// Whether the head is spread over all stages.
    pub spread_head: bool,
}

impl CostModel<'_> {
    /// What rank work of `piece` comes to on `device`.
    fn rank_work(&self, piece: &Piece, device: &DeviceReport) -> RankWork {
        let shape = self.shares.shape;
        let layers = self.shares.of(piece.rank, piece.layers);
        let query = shape.attention_cut().rank(piece.rank, piece.tensor_parallel_size).len();
        RankWork {
            product_bytes: piece.product_bytes(self.shares),
            kv_bytes_per_token: piece.kv_bytes_per_token(shape),
            plain_weights: layers.plain_weights,
            quantized_weights: layers.quantized_weights,
            head_weights: piece.head_weights(shape),
            head_is_quantized: shape.weights.head.is_quantized(),
            attention_values: piece.layers.len() * query,
            bandwidth_bytes_per_s: device.bandwidth_bytes_per_s,
            flops_per_s: device.flops_per_s,
            quantized_flops_per_s: device.quantized_flops_per_s,
        }
    }

    /// Seconds that the collectives of one stage add: two per layer, each a tree of log₂(ranks) hops over its
    /// slowest link.
    fn collective_seconds(&self, group: &Group<'_>, layers: usize, load: StepLoad) -> f64 {
        let bytes = (load.tokens * self.shares.shape.hidden_size) as f64 * BYTES_PER_ACTIVATION;
        let hop = group
            .iter()
            .skip(1)
            .map(|rank| self.links.seconds(&group[0].node, &rank.node, bytes))
            .fold(0.0, f64::max);
        2.0 * layers as f64 * f64::from(group.len().ilog2()) * hop
    }

    /// Seconds that rank 0 of the last stage, `sampler`, adds to compute a spread head with `count` ranks of earlier stages,
    /// as if each of them were the farthest of `ranks`: rows go out, slices of their logits come back through its one link.
    pub fn head_exchange_seconds<'n>(
        &self,
        sampler: &NodeId,
        ranks: impl Iterator<Item = &'n NodeId>,
        (count, slices): (usize, usize),
        load: StepLoad,
    ) -> f64 {
        let row_values = self.shares.shape.hidden_size + self.shares.shape.vocab_size.div_ceil(slices.max(1));
        let bytes = (load.sequences * row_values) as f64 * BYTES_PER_ACTIVATION;
        let (trip, transfer) = ranks.fold((0.0f64, 0.0f64), |(trip, transfer), rank| {
            let one_way = self.links.seconds(sampler, rank, 0.0);
            let bytes = self.links.seconds(sampler, rank, bytes) - one_way;
            (trip.max(2.0 * one_way), transfer.max(bytes))
        });
        trip + count as f64 * transfer
    }

    /// Seconds of one stage without the hop that leads to it and without the exchange for a spread head: its slowest rank
    /// plus its collectives.
    pub fn stage_seconds(
        &self,
        group: &Group<'_>,
        layers: LayerRange,
        position: Position,
        load: StepLoad,
    ) -> f64 {
        let slowest = group
            .iter()
            .enumerate()
            .map(|(rank, device)| {
                self.rank_work(&position.piece(layers, rank, group.len()), device).seconds(load)
            })
            .fold(0.0, f64::max);
        slowest + self.collective_seconds(group, layers.len(), load)
    }

    /// What [`stage_seconds`](Self::stage_seconds) works with, for whoever asks for the times of one stage again and again.
    pub fn stage_work(&self, group: &Group<'_>, layers: LayerRange, position: Position) -> StageWork {
        let work = |(rank, device): (usize, &&DeviceReport)| {
            self.rank_work(&position.piece(layers, rank, group.len()), device)
        };
        // A link's time is a straight line: two loads tell it.
        let collective = |tokens| self.collective_seconds(group, layers.len(), StepLoad::prefill(tokens));
        StageWork {
            ranks: group.iter().enumerate().map(work).collect(),
            collective_s: collective(0),
            collective_s_per_token: collective(1) - collective(0),
        }
    }

    /// Seconds of the hop from one stage's rank 0 to the next one's.
    pub fn hop_seconds(&self, from: &NodeId, to: &NodeId, load: StepLoad) -> f64 {
        let bytes = load.tokens * self.shares.shape.hidden_size * self.shares.shape.activations.bytes();
        self.links.seconds(from, to, bytes as f64)
    }

    /// Seconds per stage (each with the hop that leads to it, the last with the exchange for a spread head) of one step over a
    /// whole replica.
    pub fn step(&self, stages: &[(Group<'_>, LayerRange)], load: StepLoad) -> Vec<f64> {
        (0..stages.len())
            .map(|index| {
                let (group, layers) = &stages[index];
                let position = Position { stage: index, stages: stages.len(), spread_head: self.spread_head };
                let mut seconds = self.stage_seconds(group, *layers, position, load);
                if self.spread_head && position.is_last() {
                    let earlier = stages[..index].iter().flat_map(|(group, _)| group);
                    let counts = (index * group.len(), stages.len() * group.len());
                    let nodes = earlier.map(|device| &device.node);
                    seconds += self.head_exchange_seconds(&group[0].node, nodes, counts, load);
                }
                match index.checked_sub(1) {
                    Some(before) => {
                        seconds + self.hop_seconds(&stages[before].0[0].node, &group[0].node, load)
                    }
                    None => seconds,
                }
            })
            .collect()
    }

    /// Predicts a replica's speed.
    pub fn predict(&self, stages: &[(Group<'_>, LayerRange)]) -> Prediction {
        // The plan goes out to every rank and the result comes back: one round trip at the default link.
        let control = self.links.round_trip_s + RESULT_BYTES / self.links.bytes_per_s;
        let latency = |load| self.step(stages, load).iter().sum::<f64>() + control;
        let slowest = |load| self.step(stages, load).into_iter().fold(0.0, f64::max);

        let prefill = StepLoad::chunk(self.request);
        let chunks = PROMPT.div_ceil(prefill.tokens);
        let seconds_to_first_token = latency(prefill) + (chunks - 1) as f64 * slowest(prefill);

        // With m micro-batches in flight a cycle lasts as long as one of them takes from end to end, or as the
        // slowest stage needs for all of them.
        let cycle = (1..=stages.len().min(BATCH))
            .map(|microbatches| {
                let load = StepLoad::decode(BATCH.div_ceil(microbatches), self.request);
                latency(load).max(microbatches as f64 * slowest(load))
            })
            .fold(f64::INFINITY, f64::min);

        let batch = self.step(stages, StepLoad::decode(BATCH, self.request));
        let slowest_stage_s = batch.iter().copied().fold(0.0, f64::max);
        Prediction {
            seconds_per_token: latency(StepLoad::decode(1, self.request)),
            seconds_to_first_token,
            tokens_per_s_batch_16: BATCH as f64 / cycle,
            slowest_stage: batch.iter().position(|&s| s == slowest_stage_s).unwrap_or(0),
            slowest_stage_s,
        }
    }
}
