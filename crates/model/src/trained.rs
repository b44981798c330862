//! What a job trains: an adapter's pairs, or every weight of the model; and which shares of that a rank holds.

use crate::adapter::{LoraSpec, Target};
use crate::config::ModelConfig;
use crate::pack::locate;
use crate::slice::RankSlice;
use crate::source::{MatrixSource, VectorSource, WeightSource};
use crate::tensors::{AdapterHalf, Cut, LayerTensor, TensorId, TensorLayout, TensorShare, Tensors};
use ashlar_kernels::{Kernels, PackedMatrix};
use ashlar_vocabulary::{HeadSlice, ModelShape, PARTS, WeightType};
use std::ops::Range;
use std::sync::Arc;

/// What a job trains.
#[derive(Debug, Clone, PartialEq)]
pub enum Trained {
    /// A low-rank adapter; the model stays as it is.
    Adapter(LoraSpec),
    /// All weights of a private copy of the model.
    Model,
}

impl Trained {
    /// The adapter, if it is one.
    pub fn adapter(&self) -> Option<&LoraSpec> {
        match self {
            Trained::Adapter(spec) => Some(spec),
            Trained::Model => None,
        }
    }

    /// The weights that a rank holds and moves. Canonical order: the table, layer by layer, the last norm, the head.
    pub fn weights(&self, shape: &ModelShape, slice: &RankSlice) -> Arc<TensorLayout> {
        Arc::new(TensorLayout::new(match self {
            Trained::Adapter(spec) => adapter_shares(spec, shape, slice),
            Trained::Model => model_shares(shape, slice),
        }))
    }

    /// What the gradients by these weights add up in during a batch: the weights' layout, but for two things that only come
    /// together at its end. Weights of head norms have a sum for each part of the attention axis, and a tied table has one as
    /// embedding and one as head.
    pub fn sums(&self, shape: &ModelShape, slice: &RankSlice) -> Arc<TensorLayout> {
        let Trained::Model = self else { return self.weights(shape, slice) };
        let mut shares = model_shares(shape, slice);
        let per_rank = PARTS / slice.tensor_parallel_size;
        for share in &mut shares {
            if let TensorId::Layer(_, LayerTensor::QueryNorm | LayerTensor::KeyNorm) = share.id {
                share.shape[0] = PARTS;
                share.rows = slice.tensor_rank * per_rank..(slice.tensor_rank + 1) * per_rank;
            }
        }
        if shape.tied_head && slice.first && slice.last {
            shares.push(TensorShare { is_copy: true, ..table(TensorId::Head, EMBEDDING, shape, slice) });
        }
        Arc::new(TensorLayout::new(shares))
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";

fn adapter_shares(spec: &LoraSpec, shape: &ModelShape, slice: &RankSlice) -> Vec<TensorShare> {
    let mut targets = spec.targets.clone();
    targets.sort_unstable();
    let mut shares = Vec::new();
    for layer in slice.layers.start..slice.layers.end {
        for &target in &targets {
            let (outputs, inputs) = target.dimensions(shape);
            let (rows, columns) = (target.outputs(shape, slice), target.inputs(shape, slice));
            let parts = parts(target, shape, slice);
            let (a_cut, b_cut) = match target.is_row_parallel() {
                true => (Cut::Columns(parts), Cut::Whole),
                false => (Cut::Whole, Cut::Rows(parts)),
            };
            let share = |half, name, shape, rows, columns, cut| TensorShare {
                id: TensorId::Adapter(layer, target, half),
                name: format!("model.layers.{layer}.{}.{name}.weight", target.path()),
                shape,
                is_vector: false,
                rows,
                columns,
                cut,
                is_copy: false,
            };
            let rank = 0..spec.rank;
            shares.push(share(AdapterHalf::A, "lora_A", [spec.rank, inputs], rank.clone(), columns, a_cut));
            shares.push(share(AdapterHalf::B, "lora_B", [outputs, spec.rank], rows, rank, b_cut));
        }
    }
    shares
}

/// The parts of a target's cut axis that a rank holds, counted from its first element.
fn parts(target: Target, shape: &ModelShape, slice: &RankSlice) -> Vec<Range<usize>> {
    let cut = match target {
        Target::Query | Target::Output => shape.attention_cut(),
        Target::Key | Target::Value => shape.key_cut(),
        Target::Gate | Target::Up | Target::Down => shape.feed_forward_cut(),
    };
    cut.rank_parts(slice.tensor_rank, slice.tensor_parallel_size)
}

/// A table over the vocabulary, or the head.
fn table(id: TensorId, name: &str, shape: &ModelShape, slice: &RankSlice) -> TensorShare {
    let cut = shape.vocab_cut();
    TensorShare {
        id,
        name: name.to_owned(),
        shape: [shape.vocab_size, shape.hidden_size],
        is_vector: false,
        rows: slice.vocabulary(shape),
        columns: 0..shape.hidden_size,
        cut: Cut::Rows(cut.rank_parts(slice.tensor_rank, slice.tensor_parallel_size)),
        is_copy: false,
    }
}

/// The weight of a norm, or a bias that every rank has.
fn whole_vector(id: TensorId, name: String, length: usize) -> TensorShare {
    let (rows, columns) = (0..1, 0..length);
    let cut = Cut::Whole;
    TensorShare { id, name, shape: [1, length], is_vector: true, rows, columns, cut, is_copy: false }
}

fn model_shares(shape: &ModelShape, slice: &RankSlice) -> Vec<TensorShare> {
    let hidden = shape.hidden_size;
    let mut shares = Vec::new();
    if slice.first {
        shares.push(table(TensorId::Embedding, EMBEDDING, shape, slice));
    }
    for layer in slice.layers.start..slice.layers.end {
        layer_shares(layer, shape, slice, &mut shares);
    }
    if slice.last {
        shares.push(whole_vector(TensorId::HeadNorm, "model.norm.weight".to_owned(), hidden));
        if !shape.tied_head {
            shares.push(table(TensorId::Head, "lm_head.weight", shape, slice));
        } else if !slice.first {
            shares.push(TensorShare { is_copy: true, ..table(TensorId::Head, EMBEDDING, shape, slice) });
        }
    }
    shares
}

/// The tensors of a layer, in the order in which a block uses them.
fn layer_shares(layer: usize, shape: &ModelShape, slice: &RankSlice, shares: &mut Vec<TensorShare>) {
    let vectors = &shape.vectors;
    let norm = |which, name: &str, length| {
        whole_vector(TensorId::Layer(layer, which), format!("model.layers.{layer}.{name}.weight"), length)
    };
    let linear = |target: Target, has_bias: bool, shares: &mut Vec<TensorShare>| {
        let (outputs, inputs) = target.dimensions(shape);
        let (rows, columns) = (target.outputs(shape, slice), target.inputs(shape, slice));
        let parts = parts(target, shape, slice);
        let name = |what: &str| format!("model.layers.{layer}.{}.{what}", target.path());
        let row_parallel = target.is_row_parallel();
        shares.push(TensorShare {
            id: TensorId::Layer(layer, LayerTensor::Weight(target)),
            name: name("weight"),
            shape: [outputs, inputs],
            is_vector: false,
            rows: rows.clone(),
            columns,
            cut: if row_parallel { Cut::Columns(parts.clone()) } else { Cut::Rows(parts.clone()) },
            is_copy: false,
        });
        if has_bias {
            let id = TensorId::Layer(layer, LayerTensor::Bias(target));
            shares.push(TensorShare {
                columns: rows,
                cut: if row_parallel { Cut::Whole } else { Cut::Columns(parts) },
                ..whole_vector(id, name("bias"), outputs)
            });
        }
    };
    shares.push(norm(LayerTensor::InputNorm, "input_layernorm", shape.hidden_size));
    linear(Target::Query, vectors.qkv_bias, shares);
    linear(Target::Key, vectors.qkv_bias, shares);
    linear(Target::Value, vectors.qkv_bias, shares);
    if vectors.head_norms {
        shares.push(norm(LayerTensor::QueryNorm, "self_attn.q_norm", shape.head_dim));
        shares.push(norm(LayerTensor::KeyNorm, "self_attn.k_norm", shape.head_dim));
    }
    linear(Target::Output, vectors.output_bias, shares);
    shares.push(norm(LayerTensor::FeedForwardNorm, "post_attention_layernorm", shape.hidden_size));
    linear(Target::Gate, vectors.feed_forward_bias, shares);
    linear(Target::Up, vectors.feed_forward_bias, shares);
    linear(Target::Down, vectors.feed_forward_bias, shares);
}

/// The configuration of a copy that trains: the same model in f32 throughout.
pub fn trained_config(config: &ModelConfig) -> ModelConfig {
    ModelConfig { shape: config.shape.in_f32(), ..config.clone() }
}

/// A rank's slice of a copy that trains: serving may spread the head over the stages, here the last one has all of it.
pub fn trained_slice(slice: &RankSlice) -> RankSlice {
    let (index, of) = (slice.tensor_rank, slice.tensor_parallel_size);
    RankSlice { head: slice.last.then_some(HeadSlice { index, of }), ..slice.clone() }
}

/// A tensor of the model is not among those that train.
#[derive(Debug, thiserror::Error)]
#[error("tensor `{0}` is not among the weights that train")]
pub struct MissingTensor(pub String);

/// Weights that train, packed on the threads of `kernels`.
pub(crate) struct TrainedSource<'a> {
    pub(crate) weights: &'a Tensors,
    pub(crate) kernels: &'a Kernels,
}

impl TrainedSource<'_> {
    fn find(&self, name: &str) -> Result<&[f32], MissingTensor> {
        let mut all = self.weights.iter();
        let found = all.find(|(share, _)| share.name == name);
        found.map(|(_, numbers)| numbers).ok_or_else(|| MissingTensor(name.to_owned()))
    }
}

impl WeightSource for TrainedSource<'_> {
    type Error = MissingTensor;

    fn matrix(
        &self,
        _name: &str,
        sources: &[MatrixSource],
        parts: &[Range<usize>],
    ) -> Result<PackedMatrix, MissingTensor> {
        let found: Vec<&[f32]> =
            sources.iter().map(|source| self.find(&source.name)).collect::<Result<_, _>>()?;
        let outputs = sources.iter().map(|source| source.rows.len()).sum();
        Ok(PackedMatrix::pack(WeightType::F32, outputs, parts, self.kernels.pool(), &|output, to| {
            let (source, row) = locate(sources, output);
            let at = (row - sources[source].rows.start) * to.len();
            to.copy_from_slice(&found[source][at..at + to.len()]);
        }))
    }

    fn vector(&self, _name: &str, sources: &[VectorSource]) -> Result<Vec<f32>, MissingTensor> {
        let mut values = Vec::new();
        for source in sources {
            values.extend_from_slice(self.find(&source.name)?);
        }
        Ok(values)
    }

    fn table(&self, _name: &str, source: &MatrixSource) -> Result<Vec<u8>, MissingTensor> {
        Ok(self.find(&source.name)?.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}
