//! The memory that a fine-tuning session takes on one rank beside what serves, by shape: what the scheduler reserves before it
//! opens one, and never less than what the rank then says.

use crate::ledger::{LOGIT_ROWS, LedgerRow, Piece};
use crate::shares::Shares;
use ashlar_vocabulary::gradient::loss_rows;
use ashlar_vocabulary::{Bytes, GradientMemory, HeadSlice, ModelShape, PARTS};

/// Gradients that are in memory at a time: of the run being computed and of open subtrees of a batch.
const GRADIENTS: usize = 4;
/// Copies of a rank's share of an adapter: weights and two moments, their packed form, room to put them together from shards, and
/// gradients.
const ADAPTER_COPIES: usize = 1 + 2 + 1 + 1 + GRADIENTS;
/// Copies of a rank's share of a whole model, beside its packed form: weights, two moments and gradients.
const MODEL_COPIES: usize = 1 + 2 + GRADIENTS;
/// Copies of a tied table that its two ends exchange: what goes, what comes, and what is queued.
const TABLE_COPIES: usize = 3;
/// Copies of a tensor that the root puts together for a model's files: weights and moments, which of them were found, and bytes on
/// their way.
const EXPORT_COPIES: usize = 3 + 1 + 1;

/// What decides how much memory a session takes, the same on every rank.
#[derive(Debug, Clone, Copy)]
pub struct SessionRequest<'a> {
    /// What trains.
    pub weights: SessionWeights<'a>,
    /// Most rows of a micro-batch.
    pub micro_batch_rows: usize,
    /// Whether blocks keep their activations for the backward pass instead of computing them again.
    pub keep_activations: bool,
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

impl SessionWeights<'_> {
    /// Rows of the adapter's A.
    fn rank(self) -> usize {
        match self {
            SessionWeights::Adapter { rank, .. } => rank,
            SessionWeights::Model => 0,
        }
    }

    /// The adapter's modules, each once.
    fn modules(&self) -> Vec<&str> {
        let SessionWeights::Adapter { modules, .. } = self else { return Vec::new() };
        let mut modules: Vec<&str> = modules.iter().map(String::as_str).collect();
        modules.sort_unstable();
        modules.dedup();
        modules
    }
}

/// Bytes that a session takes on one rank.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct SessionMemory {
    /// What trains in all its forms: weights, moments, gradients.
    pub weights: Bytes,
    /// What forward passes leave for backward ones, of every micro-batch in flight.
    pub tapes: Bytes,
    /// What both passes and the loss work in.
    pub buffers: Bytes,
    /// Rows of the head that the last stage loads for itself where serving has spread them over all stages.
    pub head: Bytes,
}

impl SessionMemory {
    /// The lines that add up to the total, in reading order.
    pub fn rows(&self) -> [LedgerRow; 4] {
        [
            LedgerRow { name: "weights and optimizer", bytes: self.weights },
            LedgerRow { name: "activations", bytes: self.tapes },
            LedgerRow { name: "buffers", bytes: self.buffers },
            LedgerRow { name: "head", bytes: self.head },
        ]
    }

    /// Everything.
    pub fn total(&self) -> Bytes {
        self.rows().into_iter().map(|row| row.bytes).sum()
    }
}

/// A rank's widths: what its products have as inputs and outputs.
#[derive(Debug, Clone, Copy)]
struct Widths {
    hidden: usize,
    query: usize,
    key: usize,
    wide: usize,
}

impl Widths {
    fn of(piece: &Piece, shape: &ModelShape) -> Widths {
        let slice = |cut: ashlar_vocabulary::AxisCut| cut.rank(piece.rank, piece.tensor_parallel_size).len();
        Widths {
            hidden: shape.hidden_size,
            query: slice(shape.attention_cut()),
            key: slice(shape.key_cut()),
            wide: slice(shape.feed_forward_cut()),
        }
    }

    /// Inputs and outputs of a module, together.
    fn of_module(self, module: &str) -> usize {
        match module {
            "q_proj" | "o_proj" => self.hidden + self.query,
            "k_proj" | "v_proj" => self.hidden + self.key,
            "gate_proj" | "up_proj" | "down_proj" => self.hidden + self.wide,
            _ => 0,
        }
    }

    /// What a block's forward pass leaves of a row: its input and the stream between attention and feed-forward, queries and
    /// keys before their norms, rotated ones and values, attended heads, gate and up.
    fn taped(self) -> usize {
        2 * self.hidden + (self.query + self.key) + (self.query + 2 * self.key) + self.query + 2 * self.wide
    }
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
        let (rank, modules) = (request.weights.rank(), request.weights.modules());
        let of_modules: usize = modules.iter().map(|module| widths.of_module(module)).sum();
        // A micro-batch is in flight here for every stage from this one on.
        let in_flight = stages_behind + 1;
        let whole = widths.taped() + rank * modules.len();
        let tapes = match request.keep_activations {
            true => in_flight * layers * rows * whole,
            // One block's at a time is computed again.
            false => in_flight * layers * rows * widths.hidden + rows * whole,
        };
        // Rows and gradients on their way from and to other stages.
        let on_their_way = 2 * rows * widths.hidden;
        let words = |words: usize| Bytes((size_of::<f32>() * words) as u64);
        let loads_head = self.last && self.head.is_some_and(|head| head.of > self.tensor_parallel_size);
        let head = if loads_head { shape.head_bytes(self.stage_head()) } else { 0 };
        let weights = match request.weights {
            SessionWeights::Adapter { .. } => words(ADAPTER_COPIES * layers * rank * of_modules),
            SessionWeights::Model => Bytes(self.copy_bytes(shape) as u64),
        };
        SessionMemory {
            weights,
            tapes: words(tapes + on_their_way),
            buffers: Bytes(self.session_buffers(shares, threads as usize, request) as u64),
            head: Bytes(head as u64),
        }
    }

    /// A private copy of this rank's share of the model in all its forms. Packed matrices are never smaller than their numbers.
    fn copy_bytes(&self, shape: &ModelShape) -> usize {
        let (rank, size) = (self.rank, self.tensor_parallel_size);
        let of_layer = |layer| shape.layer_bytes(layer, rank, size);
        let layers = self.layers.start..self.layers.end;
        let (largest, layers) =
            layers.map(of_layer).fold((0, 0), |(most, all), bytes| (bytes.max(most), all + bytes));
        let (table, head) =
            (shape.table_bytes(rank, size), self.head.map_or(0, |head| shape.head_bytes(head)));
        let ends =
            if self.first { table } else { 0 } + head + if self.last { shape.head_norm_bytes() } else { 0 };
        let own = layers + ends;
        // Of the norms of heads each part has a gradient of its own.
        let parts = 2 * shape.head_dim * PARTS * self.layers.len() * size_of::<f32>();
        let exchanged =
            if shape.tied_head && self.first != self.last { TABLE_COPIES * table.max(head) } else { 0 };
        let whole_table = shape.vocab_size * shape.hidden_size;
        let whole_matrix = shape.hidden_size * shape.intermediate_size.max(shape.num_heads * shape.head_dim);
        let exported =
            if self.first && rank == 0 { whole_table.max(whole_matrix) * size_of::<f32>() } else { 0 };
        // While a block is packed anew, the former one is there, too.
        (MODEL_COPIES + 1) * own + largest + GRADIENTS * parts + exchanged + EXPORT_COPIES * exported
    }

    /// This rank's rows where its stage has the whole head.
    fn stage_head(&self) -> HeadSlice {
        HeadSlice { index: self.rank, of: self.tensor_parallel_size }
    }

    /// What a trainer allocates for passes of `rows` rows: its workspace, one layer's keys and values, what the backward pass
    /// and the loss need, and what the kernels work in.
    fn session_buffers(&self, shares: &Shares<'_>, threads: usize, request: &SessionRequest<'_>) -> usize {
        let (shape, widths) = (shares.shape, Widths::of(self, shares.shape));
        let (rows, rank, size) =
            (request.micro_batch_rows, request.weights.rank(), self.tensor_parallel_size);
        let Widths { hidden, query, key, wide } = widths;
        let of_group = |elements: usize| if size > 1 { size * elements } else { 0 };
        // The gradient, the backward pass of the widest product, what ranks exchange, and angles.
        let exchange = hidden + 3 * rank;
        let per_row = hidden
            + 2 * hidden
            + (2 * wide).max(query + 2 * key)
            + wide.max(query)
            + wide
            + exchange
            + of_group(exchange)
            + rank
            + of_group(rank)
            + 2 * (shape.head_dim / 2);
        let head = if self.last { Some(self.stage_head()) } else { self.head };
        let loss = head.map_or(0, |head| {
            let rows = loss_rows(shape.vocab_size, head.of).min(rows);
            rows * (2 * hidden + of_group(hidden) + head.rows(shape).len() + shares.head_row_words())
        });
        let gradients = GradientMemory { threads: threads.max(1) };
        // The shorter side of what a weight gradient multiplies is turned around.
        let side = match request.weights {
            SessionWeights::Adapter { rank, .. } => rank,
            SessionWeights::Model => hidden,
        };
        let of_kernels = gradients.products_bytes(side) + gradients.attention_bytes(rows, shape.head_dim);
        // Every sequence may leave all but one slot of its last block empty.
        let cache = 2 * key * rows * BLOCK_TOKENS * shape.kv_cache.bytes();
        size_of::<f32>() * (rows * per_row + loss + self.logit_workspace(shape))
            + self.workspace_bytes(shares, rows, threads)
            + of_kernels
            + cache
    }

    /// Values that a workspace has for a chunk of logits.
    fn logit_workspace(&self, shape: &ModelShape) -> usize {
        let Some(head) = self.head.filter(|_| self.last) else { return 0 };
        let own = if head.of > 1 { head.rows(shape).len() } else { 0 };
        let whole = if self.rank == 0 { shape.vocab_size } else { 0 };
        let gathers = self.rank == 0 && self.tensor_parallel_size > 1;
        let of_group = head.all_rows(shape).skip(head.of - self.tensor_parallel_size);
        let group = if gathers { of_group.map(|rows| rows.len()).sum() } else { 0 };
        LOGIT_ROWS * (2 * shape.hidden_size + own + whole + group)
    }
}

/// Tokens of a KV block.
const BLOCK_TOKENS: usize = 16;

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
            let request = SessionRequest { weights, micro_batch_rows, keep_activations };
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
            let request = SessionRequest { weights, micro_batch_rows: 1, keep_activations: false };
            piece(8).session(&shares, 0, 1, &request).weights
        };
        assert_eq!(adapter(&twice), adapter(&modules), "named twice is held once");
        assert_eq!(adapter(&modules), Bytes((9 * 8 * 8 * (512 + 768) * 4) as u64));
    }
}
