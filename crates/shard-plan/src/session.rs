//! The memory that a fine-tuning session takes on one rank beside what serves, by shape: what the scheduler reserves before it
//! opens one, what the rank then says that it has, and what `ashlar plan` shows.
//!
//! It is exact where memory lies for longer than a moment, so that nothing is promised in vain; of what is there for a moment, and
//! of what a thread works in, it has the most that this can be.

use crate::ledger::{LedgerRow, Piece};
use crate::shares::Shares;
use ashlar_vocabulary::gradient::loss_rows;
use ashlar_vocabulary::packed::matrix_bytes;
use ashlar_vocabulary::{Bytes, GradientMemory, HeadSlice, ModelShape, PARTS, WeightType};
use serde::Serialize;

/// Gradients that are in memory at a time: of the run being computed and of open subtrees of a batch.
const GRADIENTS: usize = 4;
/// Forms of what trains beside gradients and what is packed: weights and two moments.
const KINDS: usize = 3;
/// Copies of a tied table that its two ends exchange: what goes, what comes, and what is queued.
const END_TABLES: usize = 3;
/// The same on a stage between them: what passes, and what is queued.
const BETWEEN_TABLES: usize = 2;
/// Copies of a whole adapter while its root puts it together: weights and squares as they were found, and as pairs.
const RESULT_COPIES: usize = 4;
/// Most messages that wait for a stage beside.
const QUEUE: usize = 16;
/// Tokens of a KV block.
const BLOCK_TOKENS: usize = 16;

/// What decides how much memory a session takes, the same on every rank.
#[derive(Debug, Clone, Copy)]
pub struct SessionRequest<'a> {
    /// What trains.
    pub weights: SessionWeights<'a>,
    /// Most rows of a micro-batch.
    pub micro_batch_rows: usize,
    /// Whether blocks keep their activations for the backward pass instead of computing them again.
    pub keep_activations: bool,
    /// Replicas that train together.
    pub replicas: usize,
    /// Whether adapters do not see all of their inputs.
    pub dropout: bool,
}

/// What trains in a session.
#[derive(Debug, Clone, Copy)]
pub enum SessionWeights<'a> {
    /// An adapter on the weights that serve.
    Adapter {
        /// Rows of its A.
        rank: usize,
        /// The modules that it changes, as Hugging Face names them; those that no block has take nothing.
        modules: &'a [String],
    },
    /// All weights of a private copy. The shares must be those of [`ModelShape::in_f32`].
    Model,
}

/// Bytes that a session takes on one rank.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SessionMemory {
    /// What trains in all its forms: weights, moments, gradients, and what passes multiply with.
    pub weights: Bytes,
    /// What forward passes leave for backward ones, of every micro-batch in flight.
    pub tapes: Bytes,
    /// What both passes and the loss work in.
    pub buffers: Bytes,
    /// Rows and gradients on their way from and to other stages.
    pub links: Bytes,
    /// Rows of the head that the last stage loads for itself where serving has spread them over all stages.
    pub head: Bytes,
    /// What is there for a moment between two passes: what is packed anew beside its former self, what ranks exchange at the end of a
    /// batch, and on the root what comes of the job while it is put together.
    pub passing: Bytes,
}

impl SessionMemory {
    /// The lines that add up to the total, in reading order.
    pub fn rows(&self) -> [LedgerRow; 6] {
        [
            LedgerRow { name: "weights and optimizer", bytes: self.weights },
            LedgerRow { name: "activations", bytes: self.tapes },
            LedgerRow { name: "buffers", bytes: self.buffers },
            LedgerRow { name: "links", bytes: self.links },
            LedgerRow { name: "head", bytes: self.head },
            LedgerRow { name: "steps and results", bytes: self.passing },
        ]
    }

    /// Everything.
    pub fn total(&self) -> Bytes {
        self.rows().into_iter().map(|row| row.bytes).sum()
    }
}

/// A linear layer of a block that an adapter changes, with its inputs and outputs on a rank.
#[derive(Debug, Clone, Copy)]
struct Linear {
    /// Whether a rank has some of its inputs and all of its outputs.
    row_parallel: bool,
    /// Whether it shares its inputs with queries, or with gates.
    of_queries: bool,
    outputs: usize,
    inputs: usize,
}

impl Linear {
    /// Numbers of a pair of matrices of this rank on it.
    fn pair(self, rank: usize) -> usize {
        rank * (self.outputs + self.inputs)
    }

    /// The same, packed for products: to whole vectors of outputs.
    fn packed(self, rank: usize) -> usize {
        let matrix = |outputs: usize, inputs: usize| matrix_bytes(WeightType::F32, outputs, 0, &[0..inputs]);
        matrix(rank, self.inputs) + matrix(self.outputs, rank)
    }

    /// What the pair's gradients have turned around.
    fn turned_words(self, rank: usize, rows: usize) -> usize {
        let of = |sides| GradientMemory::turned_words(rows, sides);
        of((self.outputs, rank)).max(of((rank, self.inputs)))
    }
}

/// A rank's widths: what its products have as inputs and outputs.
#[derive(Debug, Clone, Copy)]
struct Widths {
    hidden: usize,
    query: usize,
    key: usize,
    wide: usize,
    /// Queries and keys before their norms, where heads have norms.
    before_norms: usize,
}

impl Widths {
    fn of(piece: &Piece, shape: &ModelShape) -> Widths {
        let slice = |cut: ashlar_vocabulary::AxisCut| cut.rank(piece.rank, piece.tensor_parallel_size).len();
        let (query, key) = (slice(shape.attention_cut()), slice(shape.key_cut()));
        let before_norms = if shape.vectors.head_norms { query + key } else { 0 };
        Widths { hidden: shape.hidden_size, query, key, wide: slice(shape.feed_forward_cut()), before_norms }
    }

    /// Those of the whole model.
    fn whole(shape: &ModelShape) -> Widths {
        Widths {
            hidden: shape.hidden_size,
            query: shape.num_heads * shape.head_dim,
            key: shape.num_kv_heads * shape.head_dim,
            wide: shape.intermediate_size,
            before_norms: 0,
        }
    }

    /// A module of a block; `None` for what no block has.
    fn linear(self, module: &str) -> Option<Linear> {
        let Widths { hidden, query, key, wide, .. } = self;
        let column =
            |of_queries, outputs| Linear { row_parallel: false, of_queries, outputs, inputs: hidden };
        let row = |inputs| Linear { row_parallel: true, of_queries: false, outputs: hidden, inputs };
        Some(match module {
            "q_proj" => column(true, query),
            "k_proj" | "v_proj" => column(true, key),
            "gate_proj" | "up_proj" => column(false, wide),
            "o_proj" => row(query),
            "down_proj" => row(wide),
            _ => return None,
        })
    }

    /// The modules that an adapter changes, each once.
    fn linears(self, modules: &[String]) -> Vec<Linear> {
        let mut modules: Vec<&str> = modules.iter().map(String::as_str).collect();
        modules.sort_unstable();
        modules.dedup();
        modules.into_iter().filter_map(|module| self.linear(module)).collect()
    }

    /// Every linear layer of a block.
    fn block(self) -> impl Iterator<Item = Linear> {
        let modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        modules.into_iter().filter_map(move |module| self.linear(module))
    }

    /// What a block's forward pass leaves of a row: its input and the stream between attention and feed-forward, queries and
    /// keys before their norms, rotated ones and values, attended heads, gate and up.
    fn taped(self) -> usize {
        2 * self.hidden + self.before_norms + (self.query + 2 * self.key) + self.query + 2 * self.wide
    }
}

/// An adapter as a rank's block has it; without modules where a whole model trains.
#[derive(Debug, Clone)]
struct Pairs {
    rank: usize,
    linears: Vec<Linear>,
}

impl Pairs {
    fn of(weights: SessionWeights<'_>, widths: Widths) -> Pairs {
        match weights {
            SessionWeights::Adapter { rank, modules } => Pairs { rank, linears: widths.linears(modules) },
            SessionWeights::Model => Pairs { rank: 0, linears: Vec::new() },
        }
    }

    fn numbers(&self) -> usize {
        self.linears.iter().map(|linear| linear.pair(self.rank)).sum()
    }

    fn packed(&self) -> usize {
        self.linears.iter().map(|linear| linear.packed(self.rank)).sum()
    }

    fn any_row_parallel(&self) -> bool {
        self.linears.iter().any(|linear| linear.row_parallel)
    }

    /// Most of its low-rank inputs that are exchanged together: those of queries, keys and values, or of gates and ups.
    fn exchanged(&self) -> usize {
        let of = |of_queries: bool| {
            let together = |linear: &&Linear| !linear.row_parallel && linear.of_queries == of_queries;
            self.linears.iter().filter(together).count()
        };
        self.rank * of(true).max(of(false))
    }
}

fn words(words: usize) -> usize {
    size_of::<f32>() * words
}

impl Piece {
    /// What a session takes on this rank, with `stages_behind` stages after its own and `threads` threads. `shares` must be
    /// those for as many ranks as the piece has beside it.
    pub fn session(
        &self,
        shares: &Shares<'_>,
        stages_behind: usize,
        threads: u32,
        request: &SessionRequest<'_>,
    ) -> SessionMemory {
        let piece = match request.weights {
            SessionWeights::Adapter { .. } => *self,
            // A private copy has the head where the last layers are, wherever serving has spread it.
            SessionWeights::Model => Piece { head: self.last.then(|| self.stage_head()), ..*self },
        };
        piece.session_of_copy(shares, stages_behind, threads, request)
    }

    fn session_of_copy(
        &self,
        shares: &Shares<'_>,
        stages_behind: usize,
        threads: u32,
        request: &SessionRequest<'_>,
    ) -> SessionMemory {
        let (shape, widths) = (shares.shape, Widths::of(self, shares.shape));
        let (layers, rows) = (self.layers.len(), request.micro_batch_rows);
        let pairs = Pairs::of(request.weights, widths);
        // A micro-batch is in flight here for every stage from this one on.
        let in_flight = stages_behind + 1;
        let whole = widths.taped() + pairs.rank * pairs.linears.len();
        let tapes = match request.keep_activations {
            true => in_flight * layers * rows * whole,
            // One block's at a time is computed again.
            false => in_flight * layers * rows * widths.hidden + rows * whole,
        };
        // What arrives or is about to leave, and what waits for a stage beside that is busy.
        let queued = in_flight.min(QUEUE);
        let queues = usize::from(!self.first) * queued + usize::from(!self.last) * queued;
        let links = (1 + queues) * rows * widths.hidden;
        let loads_head = self.last && self.head.is_some_and(|head| head.of > self.tensor_parallel_size);
        let head = if loads_head { shape.head_bytes(self.stage_head()) } else { 0 };
        let (weights, passing) = match request.weights {
            SessionWeights::Adapter { modules, .. } => {
                let own = layers * (words((KINDS + GRADIENTS) * pairs.numbers()) + pairs.packed());
                let largest =
                    pairs.linears.iter().map(|linear| pairs.rank * linear.outputs.max(linear.inputs));
                let theirs = if request.replicas > 1 { words(largest.max().unwrap_or(0)) } else { 0 };
                (own + theirs, (layers * pairs.packed()).max(self.adapter_result(shape, pairs.rank, modules)))
            }
            SessionWeights::Model => self.copy_bytes(shape, request.replicas),
        };
        let bytes = |bytes: usize| Bytes(bytes as u64);
        SessionMemory {
            weights: bytes(weights),
            tapes: bytes(words(tapes)),
            buffers: bytes(self.session_buffers(shares, threads as usize, request)),
            links: bytes(words(links)),
            head: bytes(head),
            passing: bytes(passing),
        }
    }

    /// Whether this rank puts together what comes of a job.
    fn is_root(&self) -> bool {
        self.first && self.rank == 0
    }

    /// What the root takes to put an adapter together: it is the whole model's.
    fn adapter_result(&self, shape: &ModelShape, rank: usize, modules: &[String]) -> usize {
        if !self.is_root() {
            return 0;
        }
        let linears = Widths::whole(shape).linears(modules);
        let whole: usize = linears.into_iter().map(|linear| linear.pair(rank)).sum();
        words(RESULT_COPIES * shape.num_layers * whole)
    }

    /// A private copy of this rank's share of the model in all its forms; and what is there for a moment.
    fn copy_bytes(&self, shape: &ModelShape, replicas: usize) -> (usize, usize) {
        let (rank, size) = (self.rank, self.tensor_parallel_size);
        let numbers_of_layer = shape.layer_numbers(rank, size);
        let table =
            if self.first { words(shape.vocab_cut().rank(rank, size).len() * shape.hidden_size) } else { 0 };
        let head = self.head.map_or(0, |head| words(head.rows(shape).len() * shape.hidden_size));
        // A tied table trains once where one stage is both ends, but has gradients as both.
        let (both_ends, between) = (self.first && self.last, !self.first && !self.last);
        let own_head = if shape.tied_head && both_ends { 0 } else { head };
        let norm = if self.last { shape.head_norm_bytes() } else { 0 };
        let state = words(self.layers.len() * numbers_of_layer) + table + own_head + norm;
        // Of the norms of heads each part has a gradient of its own.
        let of_parts = if shape.vectors.head_norms { 2 * shape.head_dim * (PARTS / size - 1) } else { 0 };
        let gradient = state - own_head + head + words(self.layers.len() * of_parts);
        // Packed for products, the embedding's rows as files have them.
        let of_layer = |layer| shape.layer_bytes(layer, rank, size);
        let (largest, packed) = (self.layers.start..self.layers.end)
            .map(of_layer)
            .fold((0, 0), |(most, all), bytes| (bytes.max(most), all + bytes));
        let packed_head = self.head.map_or(0, |head| shape.head_bytes(head));
        let packed_table = if self.shares_table(shape) { 0 } else { table };
        let packed = packed + packed_head + packed_table + norm;
        // The largest tensor of this rank's share arrives from other replicas.
        let (hidden, widths) = (shape.hidden_size, Widths::of(self, shape));
        let matrix = widths.query.max(widths.wide).max(widths.key) * hidden;
        let theirs = if replicas > 1 { words(matrix).max(table).max(head) } else { 0 };
        // While a piece is packed anew, the former one is there, too.
        let packing = largest.max(packed_head).max(packed_table);
        let settling = match (shape.tied_head, between, both_ends) {
            (false, ..) => 0,
            (true, true, _) => {
                BETWEEN_TABLES * words(shape.vocab_cut().rank(rank, size).len() * shape.hidden_size)
            }
            (true, _, true) => head,
            (true, _, false) => END_TABLES * table.max(head),
        };
        let result = if self.is_root() {
            let whole = Widths::whole(shape);
            let largest = shape.vocab_size.max(whole.wide).max(whole.query) * hidden;
            // Weights and moments, and which of them were found.
            KINDS * words(largest) + largest
        } else {
            0
        };
        (KINDS * state + GRADIENTS * gradient + packed + theirs, packing.max(settling).max(result))
    }

    /// This rank's rows where its stage has the whole head.
    fn stage_head(&self) -> HeadSlice {
        HeadSlice { index: self.rank, of: self.tensor_parallel_size }
    }

    /// What a trainer allocates for passes of `rows` rows: its workspace, one layer's keys and values, what the backward pass
    /// and the loss need, and what the kernels work in.
    fn session_buffers(&self, shares: &Shares<'_>, threads: usize, request: &SessionRequest<'_>) -> usize {
        let (shape, widths) = (shares.shape, Widths::of(self, shares.shape));
        let (rows, size) = (request.micro_batch_rows, self.tensor_parallel_size);
        let Widths { hidden, query, key, wide, .. } = widths;
        let pairs = Pairs::of(request.weights, widths);
        let of_group = |elements: usize| if size > 1 { size * elements } else { 0 };
        let if_any = |any: bool, elements: usize| if any { elements } else { 0 };
        let angles = 2 * (shape.head_dim / 2);
        // What a backward pass has beside the tape: normed rows, the widest and the narrowest gradient, inputs of the way down, and what
        // ranks exchange.
        let exchange = hidden + pairs.exchanged();
        let low = if_any(pairs.any_row_parallel(), pairs.rank);
        // What dropout leaves of the widest inputs.
        let widest = pairs.linears.iter().map(|linear| linear.inputs).max().unwrap_or(0);
        let dropped = if_any(request.dropout, widest);
        let backward = hidden
            + (2 * wide).max(query + 2 * key)
            + wide
            + wide.max(query)
            + exchange
            + of_group(exchange)
            + low
            + dropped
            + angles;
        // What an adapter adds in a forward pass.
        let forward = if_any(!pairs.linears.is_empty(), pairs.rank) + of_group(low) + dropped;
        let gradient = if_any(self.last, hidden);
        let head = self.stage_head().rows(shape).len();
        let loss_rows = if_any(self.last, loss_rows(shape.vocab_size, size).min(rows));
        let loss = loss_rows * (2 * hidden + of_group(hidden) + head);
        // Activations on their way into products and what weight gradients turn around take turns.
        let mut scratch =
            (rows * shares.row_words(self.rank, self.layers)).max(loss_rows * shares.head_row_words());
        match request.weights {
            SessionWeights::Adapter { .. } => {
                let turned = pairs.linears.iter().map(|linear| linear.turned_words(pairs.rank, rows));
                scratch = scratch.max(turned.max().unwrap_or(0));
            }
            SessionWeights::Model => {
                let turned =
                    |linear: Linear| GradientMemory::turned_words(rows, (linear.outputs, linear.inputs));
                let of_head = GradientMemory::turned_words(loss_rows, (head, hidden));
                scratch = scratch.max(widths.block().map(turned).max().unwrap_or(0)).max(of_head);
            }
        }
        let gradients = GradientMemory { threads: threads.max(1) };
        let of_threads = gradients.products_bytes() + gradients.attention_bytes(rows, shape.head_dim);
        // Every sequence may leave all but one slot of its last block empty.
        let cache = 2 * key * rows * BLOCK_TOKENS * shape.kv_cache.bytes();
        words(rows * (backward + forward + gradient) + loss + scratch)
            + self.pass_bytes(shape, rows, threads)
            + of_threads
            + cache
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_vocabulary::{FloatType, LayerRange, LayerVectors, WeightType, WeightTypes};

    fn shape() -> ModelShape {
        ModelShape {
            hidden_size: 256,
            intermediate_size: 512,
            num_layers: 8,
            num_heads: 8,
            num_kv_heads: 4,
            head_dim: 32,
            vocab_size: 1000,
            max_position_embeddings: 512,
            tied_head: true,
            weights: WeightTypes::uniform(WeightType::F32, 8),
            kv_cache: FloatType::F32,
            activations: FloatType::F32,
            vectors: LayerVectors::default(),
        }
    }

    #[test]
    fn every_wish_that_is_smaller_takes_less() {
        let shape = shape();
        let shares = Shares::new(&shape, 1);
        let modules = ["q_proj".to_owned(), "down_proj".to_owned()];
        let piece = |end| Piece {
            layers: LayerRange { start: 0, end },
            first: true,
            last: false,
            rank: 0,
            tensor_parallel_size: 1,
            head: None,
        };
        let of = |end, stages_behind, rank, modules: &[String], micro_batch_rows, keep_activations| {
            let weights = SessionWeights::Adapter { rank, modules };
            let request =
                SessionRequest { weights, micro_batch_rows, keep_activations, replicas: 1, dropout: false };
            piece(end).session(&shares, stages_behind, 2, &request).total()
        };
        let all = of(8, 1, 8, &modules, 100, true);
        for smaller in [
            of(7, 1, 8, &modules, 100, true),
            of(8, 0, 8, &modules, 100, true),
            of(8, 1, 7, &modules, 100, true),
            of(8, 1, 8, &modules[..1], 100, true),
            of(8, 1, 8, &modules, 99, true),
            of(8, 1, 8, &modules, 100, false),
        ] {
            assert!(smaller < all, "{smaller} of {all}");
        }
        let twice = [&modules[..], &modules[..], &["lm_head".to_owned()]].concat();
        let adapter = |modules: &[String]| {
            let weights = SessionWeights::Adapter { rank: 8, modules };
            let request = SessionRequest {
                weights,
                micro_batch_rows: 1,
                keep_activations: false,
                replicas: 1,
                dropout: false,
            };
            piece(8).session(&shares, 0, 1, &request).weights
        };
        assert_eq!(adapter(&twice), adapter(&modules), "named twice is held once");
        // Weights, two moments, four gradients; of what is packed, A's eight outputs are sixteen.
        let (pairs, packed) = (8 * (512 + 768), 16 * (256 + 512) + 8 * (256 + 256));
        assert_eq!(adapter(&modules), Bytes((8 * (7 * pairs + packed) * 4) as u64));
    }
}
