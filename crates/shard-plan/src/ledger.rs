//! The memory of one rank, line by line. Nothing may be resident that is not in it.

use crate::request::PlanRequest;
use crate::shares::Shares;
use ashlar_vocabulary::{AttentionMemory, Bytes, FloatType, HeadSlice, LayerRange, ModelShape};
use serde::{Deserialize, Serialize};

/// Activations that are computed with, and logits, are f32.
const BYTES_PER_ACTIVATION: usize = 4;

/// Logits are computed for at most this many rows at a time.
const LOGIT_ROWS: usize = 32;

/// Values that each rank of a tensor-parallel group on one host shares with the others, to exchange through memory.
const GROUP_VALUES: usize = 2 * (32 << 10);

/// Bytes that one rank holds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLedger {
    /// Weights of its layers.
    pub weights: Bytes,
    /// The embedding: whole on every rank of the first stage, nowhere else.
    pub embedding: Bytes,
    /// The head: a vocabulary slice on every rank of the last stage, or of all stages where it is spread. Where it is tied
    /// and one rank holds all of it and the embedding, this line has the bytes of both.
    pub head: Bytes,
    /// KV blocks.
    pub kv_cache: Bytes,
    /// What was handed on to the next stage, beside the KV blocks of the same tokens.
    pub boundary_log: Bytes,
    /// Buffers of the largest step.
    pub activations: Bytes,
    /// Sum of the lines above.
    pub total: Bytes,
    /// What the node offers.
    pub capacity: Bytes,
    /// What remains.
    pub free: Bytes,
}

/// One line of a [`MemoryLedger`], for printing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LedgerRow {
    /// What the bytes are for.
    pub name: &'static str,
    /// How many.
    pub bytes: Bytes,
}

impl MemoryLedger {
    /// The lines that add up to the total, in reading order.
    pub fn rows(&self) -> [LedgerRow; 6] {
        [
            LedgerRow { name: "weights", bytes: self.weights },
            LedgerRow { name: "embedding", bytes: self.embedding },
            LedgerRow { name: "head", bytes: self.head },
            LedgerRow { name: "activations", bytes: self.activations },
            LedgerRow { name: "kv_cache", bytes: self.kv_cache },
            LedgerRow { name: "boundary_log", bytes: self.boundary_log },
        ]
    }

    /// The same with so much for a boundary log.
    pub fn with_boundary_log(self, boundary_log: Bytes) -> MemoryLedger {
        let total = self.without_log() + boundary_log;
        MemoryLedger { boundary_log, total, free: self.capacity.saturating_sub(total), ..self }
    }

    /// What the rank cannot do without.
    pub fn without_log(&self) -> Bytes {
        self.total - self.boundary_log
    }

    /// Whether the total is within the capacity.
    pub fn fits(&self) -> bool {
        self.total <= self.capacity
    }

    /// The line at which the running sum passes the capacity, with the bytes missing there; `None` if all fits.
    pub fn first_missing(&self) -> Option<(LedgerRow, Bytes)> {
        let mut sum = Bytes(0);
        self.rows().into_iter().find_map(|row| {
            sum += row.bytes;
            (sum > self.capacity).then(|| (row, sum - self.capacity))
        })
    }
}

/// Which piece of the model a rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Its layers.
    pub layers: LayerRange,
    /// Whether the stage is the first (holds the embedding).
    pub first: bool,
    /// Whether the stage is the last (ends the model).
    pub last: bool,
    /// The rank within the stage.
    pub rank: usize,
    /// Ranks of the stage: 1, 2, 4 or 8.
    pub tensor_parallel_size: usize,
    /// Its rows of the head, if it has any.
    pub head: Option<HeadSlice>,
}

impl Piece {
    /// Bytes that one step reads of this rank's products: its layers and its rows of the head.
    pub fn product_bytes(&self, shares: &Shares<'_>) -> u64 {
        shares.of(self.rank, self.layers).bytes + self.head_bytes(shares) as u64
    }

    /// Bytes of its rows of the head.
    fn head_bytes(&self, shares: &Shares<'_>) -> usize {
        self.head.map_or(0, |head| shares.head_bytes(head))
    }

    /// Weight elements that the head multiplies with on this rank.
    pub fn head_weights(&self, shape: &ModelShape) -> usize {
        self.head_rows(shape) * shape.hidden_size
    }

    fn head_rows(&self, shape: &ModelShape) -> usize {
        self.head.map_or(0, |head| head.rows(shape).len())
    }

    /// Bytes of KV cache per token of context on this rank, all of its layers.
    pub fn kv_bytes_per_token(&self, shape: &ModelShape) -> usize {
        let kv = shape.key_cut().rank(self.rank, self.tensor_parallel_size).len();
        self.layers.len() * 2 * kv * shape.kv_cache.bytes()
    }

    /// Bytes of the boundary log per token of context on this rank: a row as the next stage is sent it.
    pub fn log_bytes_per_token(&self, shape: &ModelShape) -> usize {
        if self.last { 0 } else { shape.hidden_size * shape.activations.bytes() }
    }

    /// Whether one copy of a tied table serves as embedding and head: one stage of one rank.
    pub(crate) fn shares_table(&self, shape: &ModelShape) -> bool {
        shape.tied_head && self.first && self.head == Some(HeadSlice { index: 0, of: 1 })
    }

    /// Bytes of what passes of at most `rows` rows work in on this rank, without what stands around the head and what products have
    /// their activations in: the residual stream and its copy, the widest and the narrowest product of a layer, rotation angles,
    /// the group's contributions, and what attention works in.
    pub(crate) fn pass_bytes(&self, shape: &ModelShape, rows: usize, threads: usize) -> usize {
        let slice = |cut: ashlar_vocabulary::AxisCut| cut.rank(self.rank, self.tensor_parallel_size).len();
        let (q, kv) = (slice(shape.attention_cut()), slice(shape.key_cut()));
        let ff = slice(shape.feed_forward_cut());
        let gathered = if self.tensor_parallel_size > 1 { self.tensor_parallel_size } else { 0 };
        let per_row =
            (2 + gathered) * shape.hidden_size + (q + 2 * kv).max(2 * ff) + q.max(ff) + shape.head_dim;
        let attention = AttentionMemory {
            threads: threads.max(1),
            query_heads: q / shape.head_dim,
            kv_heads: kv / shape.head_dim,
            head_dim: shape.head_dim,
        };
        rows * per_row * BYTES_PER_ACTIVATION + attention.bytes(rows)
    }

    /// The same with what products have their activations in.
    fn workspace_bytes(&self, shares: &Shares<'_>, rows: usize, threads: usize) -> usize {
        // Products of a layer for all rows, those of the head for a chunk of them, take their activations in one place.
        let products = (rows * shares.row_words(self.rank, self.layers))
            .max(self.head.map_or(0, |_| LOGIT_ROWS * shares.head_row_words()));
        self.pass_bytes(shares.shape, rows, threads) + products * BYTES_PER_ACTIVATION
    }

    /// Bytes of the buffers that the largest step needs on this rank: its workspace, activations received and waiting to be
    /// sent, where there is a head a chunk of logits, and memory shared with other ranks on the one that makes it: whether they
    /// will be on one host is not known here.
    fn activation_bytes(&self, shares: &Shares<'_>, request: &PlanRequest, threads: u32) -> usize {
        let (shape, rows, size) = (shares.shape, request.max_num_batched_tokens, self.tensor_parallel_size);
        let of_head: usize = self.head.map_or(0, |head| self.logit_values(shape, head));
        let exchanged = if size > 1 && self.rank == 0 { size * GROUP_VALUES } else { 0 };
        let received = if self.first { 0 } else { rows * shape.hidden_size };
        // Rows on their way from or to another stage; narrower ones are widened, from a buffer of their own.
        let narrow = usize::from(shape.activations != FloatType::F32);
        let in_transit = (narrow * usize::from(!self.first) + 2 * usize::from(!self.last))
            * shape.hidden_size
            * shape.activations.bytes();
        (received + of_head + exchanged) * BYTES_PER_ACTIVATION
            + rows * in_transit
            + self.workspace_bytes(shares, rows, threads as usize)
    }

    /// Values that a chunk of rows needs around the head.
    fn logit_values(&self, shape: &ModelShape, head: HeadSlice) -> usize {
        let own = self.head_rows(shape);
        let earlier = head.of.saturating_sub(self.tensor_parallel_size);
        let row = match (self.last, self.rank) {
            // Rows arriving and in work; the slice computed, and on its way where it goes over a socket.
            (false, _) => 2 * shape.hidden_size + 2 * own,
            (true, 0) if head.of == 1 => 2 * shape.hidden_size + shape.vocab_size,
            // Its own slice, those of its group, those of earlier stages (shared, or one after the other), and all in rows.
            (true, 0) => {
                let slices: Vec<usize> = head.all_rows(shape).map(|rows| rows.len()).collect();
                let (of_earlier, of_group) = slices.split_at(earlier);
                let group = if self.tensor_parallel_size > 1 { of_group.iter().sum() } else { 0 };
                let shared: usize = of_earlier.iter().map(|slice| slice.next_multiple_of(4)).sum();
                2 * shape.hidden_size + own + group + shared + shape.vocab_size
            }
            (true, _) => 2 * shape.hidden_size + own,
        };
        LOGIT_ROWS * row
    }

    /// The ledger of this piece on a node with `capacity` and `threads`, with `kv_blocks` blocks. `shares` must be those for
    /// as many ranks as the piece has beside it.
    pub fn ledger(
        &self,
        shares: &Shares<'_>,
        request: &PlanRequest,
        kv_blocks: usize,
        capacity: Bytes,
        threads: u32,
    ) -> MemoryLedger {
        let shape = shares.shape;
        let final_norm = if self.last { shape.head_norm_bytes() } else { 0 };
        let weights = Bytes(shares.of(self.rank, self.layers).bytes + final_norm as u64);
        // The embedding is only looked up, never multiplied with: it stays in the file's type, a slice per rank.
        let has_table = self.first && !self.shares_table(shape);
        let table = if has_table { shape.table_bytes(self.rank, self.tensor_parallel_size) } else { 0 };
        let embedding = Bytes(table as u64);
        let head = Bytes(self.head_bytes(shares) as u64);
        let kv_cache = Bytes((kv_blocks * request.block_tokens * self.kv_bytes_per_token(shape)) as u64);
        let activations = Bytes(self.activation_bytes(shares, request, threads) as u64);
        let total = weights + embedding + head + kv_cache + activations;
        MemoryLedger {
            weights,
            embedding,
            head,
            kv_cache,
            boundary_log: Bytes(0),
            activations,
            total,
            capacity,
            free: capacity.saturating_sub(total),
        }
    }
}
