//! What a step computes: rows of sequences whose blocks lie one after the other.
//!
//! Tokens and cached keys are pseudo-random: speed does not depend on them. No sampling takes place.

use ashlar_kernels::{BLOCK_TOKENS, RowContext};
use ashlar_model::KvCache;
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_vocabulary::{BlockId, Bytes, ModelShape, TokenId};

/// One step of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// One token for each of `rows` sequences, all at `position`; a row of logits each.
    Decode {
        /// The first sequence.
        first: usize,
        /// How many sequences.
        rows: usize,
        /// Position of the new token: so many tokens are in the cache before it.
        position: usize,
    },
    /// `rows` tokens of one sequence from `start`; logits of the last row, if at all.
    Prefill {
        /// The sequence.
        sequence: usize,
        /// Position of the first token.
        start: usize,
        /// How many tokens.
        rows: usize,
        /// Whether the prompt ends here.
        logits: bool,
    },
}

impl Work {
    /// Rows that the layers compute.
    pub(crate) fn rows(&self) -> usize {
        match *self {
            Work::Decode { rows, .. } | Work::Prefill { rows, .. } => rows,
        }
    }

    /// Rows that the head computes.
    pub(crate) fn logit_rows(&self) -> Vec<usize> {
        match *self {
            Work::Decode { rows, .. } => (0..rows).collect(),
            Work::Prefill { rows, logits, .. } => {
                if logits { rows.checked_sub(1) } else { None }.into_iter().collect()
            }
        }
    }

    /// Sequence and position of every row.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let work = *self;
        (0..work.rows()).map(move |row| match work {
            Work::Decode { first, position, .. } => (first + row, position),
            Work::Prefill { sequence, start, .. } => (sequence, start + row),
        })
    }
}

/// Block tables of all sequences of a run.
#[derive(Debug, Clone)]
pub(crate) struct Sequences {
    tables: Vec<Vec<BlockId>>,
}

impl Sequences {
    /// A sequence of up to so many tokens per entry.
    pub(crate) fn new(tokens: impl IntoIterator<Item = usize>) -> Sequences {
        let mut next = 0u32;
        let mut table = |tokens: usize| {
            let start = next;
            next += tokens.div_ceil(BLOCK_TOKENS) as u32;
            (start..next).map(BlockId).collect()
        };
        Sequences { tables: tokens.into_iter().map(&mut table).collect() }
    }

    /// Blocks of all sequences together.
    pub(crate) fn blocks(&self) -> usize {
        self.tables.iter().map(Vec::len).sum()
    }

    /// The rows of a step and their tokens.
    pub(crate) fn rows(&self, work: &Work, shape: &ModelShape) -> (Vec<RowContext<'_>>, Vec<TokenId>) {
        work.places()
            .map(|(sequence, position)| {
                let row = RowContext { position: position as u32, block_table: &self.tables[sequence] };
                let token = (sequence * 7919 + position * 104_729 + 17) % shape.vocab_size;
                (row, token as TokenId)
            })
            .unzip()
    }
}

/// Bytes of keys and values of one token, all layers and heads.
pub(crate) fn kv_bytes_per_token(shape: &ModelShape) -> usize {
    2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * shape.kv_cache.bytes()
}

/// An upper bound of a rank's step buffers, for the memory check.
pub(crate) fn workspace_bytes(shape: &ModelShape, rows: usize) -> Bytes {
    let wide = 2 * shape.intermediate_size + shape.num_heads * shape.head_dim;
    let per_row = 5 * shape.hidden_size + 2 * wide;
    Bytes((4 * (rows * per_row + 3 * LOGIT_ROWS_MAX * shape.vocab_size)) as u64)
}

/// Writes small values everywhere, so that every page is a page of its own, as after real prefills.
pub(crate) fn fill_cache(cache: &mut KvCache, layers: usize) {
    for layer in 0..layers {
        let layer = cache.layer_mut(layer);
        for values in [&mut layer.keys, &mut layer.values] {
            values.fill(0.25);
        }
    }
}

/// The shape of Llama 3.2 1B, for tests.
#[cfg(test)]
pub(crate) fn llama_1b() -> ModelShape {
    ModelShape {
        hidden_size: 2048,
        intermediate_size: 8192,
        num_layers: 16,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 64,
        vocab_size: 128_256,
        max_position_embeddings: 131_072,
        tied_head: true,
        weights: ashlar_vocabulary::WeightTypes::uniform(ashlar_vocabulary::WeightType::F32, 16),
        kv_cache: ashlar_vocabulary::FloatType::F32,
        activations: ashlar_vocabulary::FloatType::F32,
        vectors: ashlar_vocabulary::LayerVectors::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_rows_belong_to_neighbouring_sequences_at_one_position() {
        let sequences = Sequences::new([20; 4]);
        let work = Work::Decode { first: 2, rows: 2, position: 19 };
        let (rows, tokens) = sequences.rows(&work, &llama_1b());
        assert_eq!(rows.iter().map(|row| row.position).collect::<Vec<_>>(), [19, 19]);
        assert_eq!(rows[1].block_table, [BlockId(6), BlockId(7)]);
        assert!(tokens.iter().all(|&token| token < 128_256));
        assert_eq!((sequences.blocks(), work.logit_rows()), (8, vec![0, 1]));
    }

    #[test]
    fn a_prompt_gets_logits_at_its_end_only() {
        let chunk = |logits| Work::Prefill { sequence: 0, start: 16, rows: 5, logits };
        assert_eq!((chunk(false).logit_rows(), chunk(true).logit_rows()), (vec![], vec![4]));
        let sequences = Sequences::new([32]);
        let (rows, _) = sequences.rows(&chunk(true), &llama_1b());
        assert_eq!(rows.iter().map(|row| row.position).collect::<Vec<_>>(), [16, 17, 18, 19, 20]);
    }
}
