//! A rank's share of the model: its layers, and embedding or head where it has them.

use crate::adapter::{AdaptedRows, Adapter, AdapterStep, AdapterWork};
use crate::block::Block;
use crate::collective::{Collective, CollectiveError};
use crate::config::{ConfigError, ModelConfig, RopeScaling};
use crate::gguf;
use crate::head::{HeadError, HeadRanks, LogitColumns};
use crate::kv::KvCache;
use crate::pack::FileSource;
use crate::slice::RankSlice;
use crate::source::{Content, MatrixSource, VectorSource, WeightSource};
use crate::tensors::Tensors;
use crate::trained::{MissingTensor, TrainedSource};
use crate::weights::{WeightError, WeightFiles, widen};
use ashlar_gguf::BlockError;
use ashlar_kernels::{
    Kernels, KvLayout, Llama3Scaling, PackedMatrix, RowContext, inv_freq, scale_inv_freq_linear,
    scale_inv_freq_llama3,
};
use ashlar_vocabulary::{Bytes, HeadSlice, ModelShape, Precision, TokenId, WeightType};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

mod training;

pub use training::{BatchLoss, ExactSum, MicroBatch, StageTape, StageTrainer, TargetRow, TargetScore};

/// Rows whose logits are computed together; bounds the logits workspace.
pub const LOGIT_ROWS_MAX: usize = 32;

/// Names of what lies outside of the layers.
const EMBEDDING: &str = "embedding";
const HEAD: &str = "head";
const HEAD_NORM: &str = "head_norm";

/// Why a rank could not load its share.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The cut.
    #[error("{0}")]
    Slice(String),
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// A peer was lost.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A rank that holds a slice of the head was lost.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// A token outside the vocabulary.
    #[error("token {0} is outside the vocabulary")]
    Token(TokenId),
    /// An embedding that cannot be read.
    #[error("the embedding table is unusable: {0}")]
    Embedding(BlockError),
    /// The caller wants no more of it.
    #[error("it was stopped")]
    Stopped,
}

/// What enters a stage.
#[derive(Debug, Clone, Copy)]
pub enum StageInput<'a> {
    /// Token ids, for the first stage.
    Tokens(&'a [TokenId]),
    /// Rows of the residual stream, for the others.
    Activations(&'a [f32]),
}

/// Buffers of one step, allocated once for the largest.
#[derive(Debug)]
pub struct Workspace {
    pub(crate) x: Vec<f32>,
    pub(crate) normed: Vec<f32>,
    pub(crate) wide: Vec<f32>,
    pub(crate) narrow: Vec<f32>,
    pub(crate) gathered: Vec<f32>,
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    pub(crate) adapters: AdapterWork,
    positions: Vec<u32>,
    head_rows: Vec<f32>,
    local_logits: Vec<f32>,
    /// Slices of the logits as the group's ranks bring them, one after the other.
    group_logits: Vec<f32>,
    logits: Vec<f32>,
    /// What the kernels hold for activations on their way into products.
    product_words: usize,
    /// What they hold for attention.
    attention_bytes: usize,
    hidden: usize,
}

impl Workspace {
    /// The residual stream after [`StageModel::forward`]: the first `rows` rows.
    pub fn activations(&self, rows: usize) -> &[f32] {
        &self.x[..rows * self.hidden]
    }

    /// [`activations`](Self::activations), to spoil them on purpose.
    pub fn activations_mut(&mut self, rows: usize) -> &mut [f32] {
        &mut self.x[..rows * self.hidden]
    }

    /// Reserved memory.
    pub fn bytes(&self) -> Bytes {
        let buffers = [
            &self.x,
            &self.normed,
            &self.wide,
            &self.narrow,
            &self.gathered,
            &self.cos,
            &self.sin,
            &self.head_rows,
            &self.local_logits,
            &self.group_logits,
            &self.logits,
        ];
        let words = buffers.iter().map(|b| b.len() as u64).sum::<u64>()
            + self.adapters.values() as u64
            + self.product_words as u64;
        Bytes(4 * words + self.attention_bytes as u64)
    }
}

/// How tokens become rows.
#[derive(Debug)]
enum Embedding {
    /// The head's packed weights serve both (one stage, one rank, tied).
    Tied,
    /// This rank's rows, in the embedding's type.
    Table { kind: WeightType, bytes: Vec<u8> },
}

/// A rank's share of one model.
#[derive(Debug)]
pub struct StageModel {
    config: ModelConfig,
    slice: RankSlice,
    kernels: Arc<Kernels>,
    embedding: Option<Embedding>,
    blocks: Vec<Block>,
    /// This rank's rows of the head.
    head: Option<PackedMatrix>,
    /// On the last stage only: rows are normed once, whoever multiplies them.
    head_norm: Option<Vec<f32>>,
    inv_freq: Vec<f32>,
}

impl StageModel {
    /// Reads the slice of the model in `directory`, and quantises it if asked to. `progress` hears (bytes ready, bytes in all).
    pub fn load(
        directory: &Path,
        precision: impl Into<Precision>,
        slice: RankSlice,
        kernels: Arc<Kernels>,
        progress: &mut dyn FnMut(Bytes, Bytes),
    ) -> Result<StageModel, LoadError> {
        let precision = precision.into();
        let (config, files) = if gguf::file_of(directory).is_some() {
            // Opened once: the header has the whole vocabulary.
            let files = WeightFiles::open(directory)?;
            (files.gguf_config(precision)?, files)
        } else {
            (ModelConfig::open(directory, precision)?, WeightFiles::open(directory)?)
        };
        if let Some(problem) = slice.problem(&config.shape) {
            return Err(LoadError::Slice(problem));
        }
        let packer = kernels.clone();
        let source = FileSource { files: &files, kernels: &packer };
        Ok(StageModel::assemble(config, slice, kernels, &source, progress)?)
    }

    /// Puts a slice that the model can be cut in together from `weights`.
    pub(crate) fn assemble<S: WeightSource>(
        config: ModelConfig,
        slice: RankSlice,
        kernels: Arc<Kernels>,
        weights: &S,
        progress: &mut dyn FnMut(Bytes, Bytes),
    ) -> Result<StageModel, S::Error> {
        let mut model = StageModel {
            inv_freq: inverse_frequencies(&config),
            blocks: Vec::with_capacity(slice.layers.len()),
            config,
            slice,
            kernels,
            embedding: None,
            head: None,
            head_norm: None,
        };
        model.fill(weights, progress)?;
        Ok(model)
    }

    /// Takes everything that the slice holds from `weights`, one piece after the other in the place of what was there.
    fn fill<S: WeightSource>(
        &mut self,
        weights: &S,
        progress: &mut dyn FnMut(Bytes, Bytes),
    ) -> Result<(), S::Error> {
        let model = self;
        let (config, slice) = (model.config.clone(), model.slice.clone());
        let shape = &config.shape;
        let (vocab, hidden) = (shape.vocab_size, shape.hidden_size);
        let total = expected_bytes(shape, &slice);
        let source = |name: &str, rows, kind| MatrixSource {
            name: name.to_owned(),
            shape: [vocab, hidden],
            rows,
            columns: 0..hidden,
            kind,
        };
        progress(Bytes(0), total);
        if slice.first {
            model.embedding = Some(if slice.shares_table(shape) {
                Embedding::Tied
            } else {
                let kind = shape.weights.embedding;
                let source = source("model.embed_tokens.weight", slice.vocabulary(shape), kind);
                Embedding::Table { kind, bytes: weights.table(EMBEDDING, &source)? }
            });
            progress(model.bytes(), total);
        }
        for layer in slice.layers.start..slice.layers.end {
            let block = Block::load(weights, &config, &slice, layer)?;
            match model.blocks.get_mut(layer - slice.layers.start) {
                Some(place) => *place = block,
                None => model.blocks.push(block),
            }
            progress(model.bytes(), total);
        }
        if let Some(head) = slice.head {
            let name = if shape.tied_head { "model.embed_tokens.weight" } else { "lm_head.weight" };
            let source = source(name, head.rows(shape), shape.weights.head);
            model.head = Some(weights.matrix(HEAD, &[source], &[0..hidden])?);
        }
        if slice.last {
            let norm = VectorSource { name: "model.norm.weight".into(), length: hidden, range: 0..hidden };
            model.head_norm = Some(weights.vector(HEAD_NORM, &[norm])?);
        }
        progress(total, total);
        Ok(())
    }

    /// A private copy that trains: of the model `config` (see [`trained_config`]) the slice (see
    /// [`trained_slice`](crate::trained::trained_slice)), with these weights.
    ///
    /// [`trained_config`]: crate::trained::trained_config
    pub fn of_trained(
        config: ModelConfig,
        slice: RankSlice,
        kernels: Arc<Kernels>,
        weights: &Tensors,
    ) -> Result<StageModel, MissingTensor> {
        let packer = kernels.clone();
        let source = TrainedSource { weights, kernels: &packer };
        StageModel::assemble(config, slice, kernels, &source, &mut |_, _| {})
    }

    /// What it holds, under the names by which [`StageModel::assemble`] asks for it.
    pub(crate) fn contents(&self) -> Vec<(String, Content<'_>)> {
        let mut contents = Vec::new();
        if let Some(Embedding::Table { kind, bytes }) = &self.embedding {
            let table = Content::Table { kind: *kind, columns: self.config.shape.hidden_size, bytes };
            contents.push((EMBEDDING.to_owned(), table));
        }
        for (layer, block) in (self.slice.layers.start..).zip(&self.blocks) {
            contents.extend(block.contents(layer));
        }
        if let Some(head) = &self.head {
            contents.push((HEAD.to_owned(), Content::Matrix(head)));
        }
        if let Some(norm) = &self.head_norm {
            contents.push((HEAD_NORM.to_owned(), Content::Vector(norm)));
        }
        contents
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// This rank's slice.
    pub fn slice(&self) -> &RankSlice {
        &self.slice
    }

    /// The same slice, computing with other kernels than those that have packed it, of the same instruction set.
    pub fn computing_with(self, kernels: Arc<Kernels>) -> StageModel {
        StageModel { kernels, ..self }
    }

    /// The kernels it computes with.
    pub fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    /// Memory of the weights.
    pub fn bytes(&self) -> Bytes {
        let embedding = match &self.embedding {
            Some(Embedding::Table { bytes, .. }) => bytes.len() as u64,
            _ => 0,
        };
        let head = self.head.as_ref().map_or(0, |head| head.bytes() as u64);
        let norm = self.head_norm.as_ref().map_or(0, |norm| 4 * norm.len() as u64);
        Bytes(embedding + head + norm) + self.blocks.iter().map(Block::bytes).sum()
    }

    /// An empty KV cache of `blocks` blocks for this slice.
    pub fn kv_cache(&self, blocks: usize) -> KvCache {
        let head_dim = self.config.shape.head_dim;
        let kv_heads = self.slice.keys(&self.config.shape).len() / head_dim;
        KvCache::new(
            KvLayout { kv_heads, head_dim },
            self.config.shape.kv_cache,
            self.slice.layers.len(),
            blocks,
        )
    }

    /// Buffers for steps of up to `rows` rows.
    pub fn workspace(&self, rows: usize) -> Workspace {
        self.workspace_for(&self.kernels, rows, LOGIT_ROWS_MAX)
    }

    /// [`StageModel::workspace`] for passes that compute with other kernels than the model's own, and for the logits of up to
    /// `logit_rows` of their rows.
    fn workspace_for(&self, kernels: &Kernels, rows: usize, logit_rows: usize) -> Workspace {
        let shape = &self.config.shape;
        let (hidden, size) = (shape.hidden_size, self.slice.tensor_parallel_size);
        let (q, kv) = (self.slice.queries(shape).len(), self.slice.keys(shape).len());
        let ff = self.slice.feed_forward(shape).len();
        let logits = if self.slice.last { logit_rows } else { 0 };
        let whole_logits = if self.slice.tensor_rank == 0 { logits * shape.vocab_size } else { 0 };
        let cut = self.slice.head.is_some_and(|head| head.of > 1);
        let own_logits = if cut { logits * self.head_width() } else { 0 };
        let group_logits = match self.slice.head {
            Some(head) if size > 1 && whole_logits > 0 => {
                logits * head.all_rows(shape).skip(head.of - size).map(|rows| rows.len()).sum::<usize>()
            }
            _ => 0,
        };
        let head_words = self.head.as_ref().map_or(0, |head| head.scratch_words(logit_rows));
        let product_words =
            self.blocks.iter().map(|block| block.scratch_words(rows)).fold(head_words, usize::max);
        kernels.reserve(product_words);
        let layout = KvLayout { kv_heads: kv / shape.head_dim, head_dim: shape.head_dim };
        let attention_bytes = kernels.reserve_attention(rows, layout, q / shape.head_dim);
        Workspace {
            product_words,
            attention_bytes,
            x: vec![0.0; rows * hidden],
            normed: vec![0.0; rows * hidden],
            wide: vec![0.0; rows * (q + 2 * kv).max(2 * ff)],
            narrow: vec![0.0; rows * q.max(ff)],
            gathered: vec![0.0; if size > 1 { rows * hidden * size } else { 0 }],
            cos: vec![0.0; rows * shape.head_dim / 2],
            sin: vec![0.0; rows * shape.head_dim / 2],
            adapters: AdapterWork::default(),
            positions: Vec::with_capacity(rows),
            head_rows: vec![0.0; 2 * logits * hidden],
            local_logits: vec![0.0; own_logits],
            group_logits: vec![0.0; group_logits],
            logits: vec![0.0; whole_logits],
            hidden,
        }
    }

    /// Makes room in a workspace of [`StageModel::workspace`] for steps of up to `rows` rows with `adapter`, so that the first of
    /// them allocates nothing. What the workspace has for other adapters serves this one, too.
    pub fn reserve_adapter(&self, adapter: &Adapter, rows: usize, work: &mut Workspace) {
        let words = work.adapters.reserve(adapter, rows, self.slice.tensor_parallel_size);
        if words > work.product_words {
            work.product_words = words;
            self.kernels.reserve(words);
        }
    }

    /// Runs this stage over `rows`; the result is in [`Workspace::activations`]. `beat` is called between layers. The residual
    /// stream between two layers is rounded to the type of activations wherever these two are, so that no cut shows.
    pub fn forward(
        &self,
        rows: &[RowContext<'_>],
        input: StageInput<'_>,
        cache: &mut KvCache,
        group: &mut dyn Collective,
        work: &mut Workspace,
        beat: &mut dyn FnMut(),
    ) -> Result<(), ForwardError> {
        self.forward_adapted(rows, input, &[], cache, group, work, beat)
    }

    /// [`StageModel::forward`] with adapters on some of the rows: `adapted` names disjoint runs of them. Every rank of the group
    /// must be given the same runs.
    #[allow(clippy::too_many_arguments)]
    pub fn forward_adapted(
        &self,
        rows: &[RowContext<'_>],
        input: StageInput<'_>,
        adapted: &[AdaptedRows<'_>],
        cache: &mut KvCache,
        group: &mut dyn Collective,
        work: &mut Workspace,
        beat: &mut dyn FnMut(),
    ) -> Result<(), ForwardError> {
        self.enter(&self.kernels, rows, input, group, work)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let step = AdapterStep { layer, adapted, dropout: None };
            block.forward(&self.kernels, rows, cache.layer_mut(layer), group, &step, None, work)?;
            self.leave(&self.kernels, layer, rows.len(), work);
            beat();
        }
        Ok(())
    }

    /// Rounds the residual stream behind the stage's block `index`, unless that is the model's last: where stages could be cut,
    /// whether they are or not.
    fn leave(&self, kernels: &Kernels, index: usize, rows: usize, work: &mut Workspace) {
        let shape = &self.config.shape;
        if self.slice.layers.start + index + 1 < shape.num_layers {
            kernels.round_to(shape.activations, &mut work.x[..rows * shape.hidden_size]);
        }
    }

    /// Takes a stage's input, and the angles of its positions.
    fn enter(
        &self,
        kernels: &Kernels,
        rows: &[RowContext<'_>],
        input: StageInput<'_>,
        group: &mut dyn Collective,
        work: &mut Workspace,
    ) -> Result<(), ForwardError> {
        let (count, hidden) = (rows.len(), self.config.shape.hidden_size);
        match input {
            StageInput::Activations(values) => work.x[..count * hidden].copy_from_slice(values),
            StageInput::Tokens(tokens) => self.embed(tokens, group, work)?,
        }
        self.angles(kernels, rows, work);
        Ok(())
    }

    /// The angles of the rows' positions.
    fn angles(&self, kernels: &Kernels, rows: &[RowContext<'_>], work: &mut Workspace) {
        work.positions.clear();
        work.positions.extend(rows.iter().map(|row| row.position));
        let size = rows.len() * self.config.shape.head_dim / 2;
        let (cos, sin) = (&mut work.cos[..size], &mut work.sin[..size]);
        kernels.rope_angles(&work.positions, &self.inv_freq, 1.0, cos, sin);
    }

    /// Logits of up to [`LOGIT_ROWS_MAX`] of the rows last computed: `rows.len() × vocabulary` values on rank 0 of the
    /// last stage, `None` on its other ranks and on every earlier stage. `others` hold the slices of a head that is spread over
    /// earlier stages, too; only rank 0 speaks with them.
    pub fn logits<'w>(
        &self,
        rows: &[usize],
        group: &mut dyn Collective,
        others: &mut dyn HeadRanks,
        work: &'w mut Workspace,
    ) -> Result<Option<&'w mut [f32]>, ForwardError> {
        let (Some(cut), Some(norm)) = (self.slice.head, &self.head_norm) else { return Ok(None) };
        let shape = &self.config.shape;
        let (hidden, vocab, count) = (shape.hidden_size, shape.vocab_size, rows.len());
        let (picked, normed) = work.head_rows.split_at_mut(LOGIT_ROWS_MAX * hidden);
        for (slot, &row) in picked.chunks_exact_mut(hidden).zip(rows) {
            slot.copy_from_slice(&work.x[row * hidden..(row + 1) * hidden]);
        }
        let (picked, normed) = (&picked[..count * hidden], &mut normed[..count * hidden]);
        self.kernels.rms_norm(count, hidden, picked, norm, self.config.rms_norm_eps, normed);
        if cut.of == 1 {
            let logits = &mut work.logits[..count * vocab];
            self.head_slice(normed, logits);
            return Ok(Some(logits));
        }
        let earlier = cut.of - group.size();
        if earlier > 0 && group.rank() == 0 {
            others.hand_out(normed)?;
        }
        let local = &mut work.local_logits[..count * self.head_width()];
        self.head_slice(normed, local);
        let ranges: Vec<Range<usize>> = cut.all_rows(shape).collect();
        let lengths: Vec<usize> = ranges[earlier..].iter().map(|range| range.len() * count).collect();
        if group.rank() > 0 {
            group.gather(local, &lengths, &mut [])?;
            return Ok(None);
        }
        // Of the group, slices arrive whole, one after the other.
        let mut slices: &[f32] = local;
        if group.size() > 1 {
            let gathered = &mut work.group_logits[..lengths.iter().sum()];
            group.gather(local, &lengths, gathered)?;
            slices = gathered;
        }
        let logits = &mut work.logits[..count * vocab];
        for (range, length) in ranges[earlier..].iter().zip(lengths) {
            let (slice, rest) = slices.split_at(length);
            LogitColumns::new(logits, vocab, range.clone()).copy_from(slice);
            slices = rest;
        }
        for (index, range) in ranges[..earlier].iter().enumerate() {
            others.collect(index, LogitColumns::new(logits, vocab, range.clone()))?;
        }
        Ok(Some(logits))
    }

    /// Reads the rows of the head that this rank would hold if its stage had the whole head, from the model in `directory`:
    /// what training needs where serving spreads the head over the stages.
    pub fn load_stage_head(
        &self,
        directory: &Path,
        kernels: &Kernels,
    ) -> Result<(HeadSlice, PackedMatrix), LoadError> {
        let shape = &self.config.shape;
        let (vocab, hidden) = (shape.vocab_size, shape.hidden_size);
        let files = WeightFiles::open(directory)?;
        let cut = HeadSlice { index: self.slice.tensor_rank, of: self.slice.tensor_parallel_size };
        let name = if shape.tied_head { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let source = MatrixSource {
            name: name.to_owned(),
            shape: [vocab, hidden],
            rows: cut.rows(shape),
            columns: 0..hidden,
            kind: shape.weights.head,
        };
        let source = FileSource { files: &files, kernels }.matrix(HEAD, &[source], &[0..hidden])?;
        Ok((cut, source))
    }

    /// Logits of this rank's slice of the head, row by row, for `rows` (normed, at most [`LOGIT_ROWS_MAX`]): what an earlier
    /// stage does for the last one. `slice` has [`StageModel::head_width`] values per row; without a head it stays as it is.
    pub fn head_slice(&self, rows: &[f32], slice: &mut [f32]) {
        let hidden = self.config.shape.hidden_size;
        if let Some(head) = &self.head {
            self.kernels.matmul(rows.len() / hidden, rows, head, &[0..hidden], None, slice);
        }
    }

    /// Rows of the head on this rank.
    pub fn head_width(&self) -> usize {
        self.head.as_ref().map_or(0, PackedMatrix::n)
    }

    fn embed(
        &self,
        tokens: &[TokenId],
        group: &mut dyn Collective,
        work: &mut Workspace,
    ) -> Result<(), ForwardError> {
        let shape = &self.config.shape;
        let hidden = shape.hidden_size;
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= shape.vocab_size) {
            return Err(ForwardError::Token(token));
        }
        let own = self.slice.vocabulary(shape);
        let size = tokens.len() * hidden;
        for (&token, row) in tokens.iter().zip(work.x.chunks_exact_mut(hidden)) {
            match (&self.embedding, &self.head) {
                (Some(Embedding::Tied), Some(head)) => head.row(token as usize, row),
                (Some(Embedding::Table { kind, bytes }), _) if own.contains(&(token as usize)) => {
                    let width = kind.bytes(hidden);
                    let at = (token as usize - own.start) * width;
                    widen(*kind, &bytes[at..at + width], row).map_err(ForwardError::Embedding)?;
                }
                _ => row.fill(0.0),
            }
        }
        if group.size() > 1 {
            let all = &mut work.gathered[..size * group.size()];
            group.all_gather(&work.x[..size], all)?;
            for (index, (&token, row)) in tokens.iter().zip(work.x.chunks_exact_mut(hidden)).enumerate() {
                let owner = (0..group.size())
                    .find(|&rank| shape.vocab_cut().rank(rank, group.size()).contains(&(token as usize)))
                    .unwrap_or(0);
                let at = owner * size + index * hidden;
                row.copy_from_slice(&all[at..at + hidden]);
            }
        }
        Ok(())
    }
}

/// The frequency of each pair of a head's elements, scaled.
pub(crate) fn inverse_frequencies(config: &ModelConfig) -> Vec<f32> {
    let mut frequencies = inv_freq(config.rope_theta, config.shape.head_dim);
    match &config.rope_scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => scale_inv_freq_linear(&mut frequencies, *factor),
        RopeScaling::Factors(factors) => {
            for (frequency, factor) in frequencies.iter_mut().zip(factors) {
                *frequency /= factor;
            }
        }
        &RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => scale_inv_freq_llama3(
            &mut frequencies,
            Llama3Scaling {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position: original_max_position_embeddings,
            },
        ),
    }
    frequencies
}

/// Weight memory of a slice by shape, to the byte: what [`StageModel::bytes`] is once it is loaded.
pub fn expected_bytes(shape: &ModelShape, slice: &RankSlice) -> Bytes {
    let (rank, size) = (slice.tensor_rank, slice.tensor_parallel_size);
    let layers: usize =
        (slice.layers.start..slice.layers.end).map(|layer| shape.layer_bytes(layer, rank, size)).sum();
    let has_table = slice.first && !slice.shares_table(shape);
    let table = if has_table { shape.table_bytes(rank, size) } else { 0 };
    let head = slice.head.map_or(0, |head| shape.head_bytes(head));
    let norm = if slice.last { shape.head_norm_bytes() } else { 0 };
    Bytes((layers + table + head + norm) as u64)
}
