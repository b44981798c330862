//! One model with an empty cache, a chunk at a time.

use crate::bench::rows::{kv_bytes_per_token, workspace_bytes};
use crate::bench::{LOADING, progress_bar};
use anyhow::{Context, Result, bail};
use ashlar_kernels::{BLOCK_TOKENS, Kernels, RowContext};
use ashlar_model::stage::expected_bytes;
use ashlar_model::{
    KvCache, ModelConfig, NoHeadRanks, RankSlice, SingleRank, StageInput, StageModel, Workspace,
};
use ashlar_vocabulary::{BlockId, Bytes, ModelShape, Precision, TokenId};
use std::path::PathBuf;
use std::sync::Arc;

/// Rows that go through the layers together; bounds the step's buffers.
pub(super) const STEP_ROWS_MAX: usize = 512;

/// A model that can be loaded.
#[derive(Debug, Clone)]
pub(super) struct Source {
    /// What reports call it.
    pub(super) name: String,
    /// Its directory or GGUF file.
    pub(super) path: PathBuf,
    /// In which precision it is held.
    pub(super) precision: Precision,
    /// What it is then.
    pub(super) config: ModelConfig,
}

impl Source {
    /// Reads the configuration.
    pub(super) fn open(name: String, path: PathBuf, precision: Precision) -> Result<Source> {
        let config = ModelConfig::open(&path, precision).with_context(|| format!("cannot use {name}"))?;
        Ok(Source { name, path, precision, config })
    }

    fn shape(&self) -> &ModelShape {
        &self.config.shape
    }

    /// Memory of its weights.
    pub(super) fn weight_bytes(&self) -> Bytes {
        expected_bytes(self.shape(), &RankSlice::whole(self.shape()))
    }

    /// Memory that evaluating chunks of `chunk` tokens takes.
    pub(super) fn memory(&self, chunk: usize) -> Bytes {
        let kv = chunk.next_multiple_of(BLOCK_TOKENS) * kv_bytes_per_token(self.shape());
        self.weight_bytes() + Bytes(kv as u64) + workspace_bytes(self.shape(), chunk.min(STEP_ROWS_MAX))
    }

    /// Bits per weight as they are held in memory, norms included.
    pub(super) fn bits_per_weight(&self) -> f64 {
        let shape = self.shape();
        let tables = if shape.tied_head { 1 } else { 2 };
        let weights =
            shape.num_layers * shape.layer_weights() + tables * shape.embedding_weights() + shape.hidden_size;
        8.0 * self.weight_bytes().0 as f64 / weights as f64
    }

    /// An error where chunks of `chunk` tokens are too long for it.
    pub(super) fn require_context(&self, chunk: usize) -> Result<()> {
        let longest = self.shape().max_position_embeddings;
        if chunk > longest {
            bail!("{} ends at {longest} tokens and a chunk has {chunk}: choose a shorter --chunk", self.name);
        }
        Ok(())
    }

    /// Loads it.
    pub(super) fn load(&self, chunk: usize, kernels: &Arc<Kernels>) -> Result<Evaluator> {
        let bar = progress_bar(0, LOADING).with_message(format!("loading {}", self.name));
        let slice = RankSlice::whole(self.shape());
        let mut progress = |loaded: Bytes, total: Bytes| {
            bar.set_length(total.0);
            bar.set_position(loaded.0);
        };
        let model = StageModel::load(&self.path, self.precision, slice, Arc::clone(kernels), &mut progress)
            .with_context(|| format!("cannot load {}", self.name))?;
        bar.finish_and_clear();
        let blocks = chunk.div_ceil(BLOCK_TOKENS);
        Ok(Evaluator {
            cache: model.kv_cache(blocks),
            work: model.workspace(chunk.min(STEP_ROWS_MAX)),
            table: (0..blocks as u32).map(BlockId).collect(),
            model,
        })
    }
}

/// A loaded model and its buffers.
#[derive(Debug)]
pub(super) struct Evaluator {
    model: StageModel,
    cache: KvCache,
    work: Workspace,
    table: Vec<BlockId>,
}

impl Evaluator {
    /// Computes up to [`STEP_ROWS_MAX`] tokens at `start` and after. What lay in the cache from there on is overwritten.
    pub(super) fn forward(&mut self, tokens: &[TokenId], start: usize) -> Result<()> {
        let row = |index| RowContext { position: (start + index) as u32, block_table: &self.table };
        let rows: Vec<RowContext<'_>> = (0..tokens.len()).map(row).collect();
        let input = StageInput::Tokens(tokens);
        self.model.forward(&rows, input, &mut self.cache, &mut SingleRank, &mut self.work, &mut || ())?;
        Ok(())
    }

    /// Logits of these rows of the last [`Evaluator::forward`], one row after the other.
    pub(super) fn logits(&mut self, rows: &[usize]) -> Result<&[f32]> {
        let logits = self.model.logits(rows, &mut SingleRank, &mut NoHeadRanks, &mut self.work)?;
        logits.map(|logits| &*logits).context("a whole model has logits")
    }
}
