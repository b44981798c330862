//! What a model looks like without its weights: enough to plan, to reserve memory and to predict time.

use crate::parts::AxisCut;
use crate::precision::FloatType;
use crate::weights::{WeightType, WeightTypes};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Dimensions of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of transformer layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence, prompt and answer together.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding, transposed.
    pub tied_head: bool,
    /// The types in which matrices are held.
    pub weights: WeightTypes,
    /// The type in which keys and values are held.
    #[serde(default)]
    pub kv_cache: FloatType,
    /// The type of the residual stream between layers.
    #[serde(default)]
    pub activations: FloatType,
    /// Which vectors layers have beside their two norms.
    #[serde(default)]
    pub vectors: LayerVectors,
}

/// Vectors that layers of some architectures have. Every layer has two norms over the hidden axis.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerVectors {
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    /// Biases of the feed-forward projections.
    pub feed_forward_bias: bool,
    /// RMSNorm over each query and key head before the rotation.
    pub head_norms: bool,
}

impl ModelShape {
    /// The same model with everything in `f32`, as a copy is that trains whole.
    pub fn in_f32(&self) -> ModelShape {
        ModelShape {
            weights: WeightTypes::uniform(WeightType::F32, self.num_layers),
            kv_cache: FloatType::F32,
            activations: FloatType::F32,
            ..self.clone()
        }
    }

    /// The attention axis in query elements: one granule per KV-head group.
    pub fn attention_cut(&self) -> AxisCut {
        AxisCut::grouped(self.num_kv_heads, self.num_heads / self.num_kv_heads * self.head_dim)
    }

    /// The attention axis in key (or value) elements.
    pub fn key_cut(&self) -> AxisCut {
        AxisCut::grouped(self.num_kv_heads, self.head_dim)
    }

    /// The feed-forward axis.
    pub fn feed_forward_cut(&self) -> AxisCut {
        AxisCut::wide(self.intermediate_size)
    }

    /// The vocabulary axis.
    pub fn vocab_cut(&self) -> AxisCut {
        AxisCut::wide(self.vocab_size)
    }

    /// Weight elements of one layer, all ranks together (norms included, biases neglected).
    pub fn layer_weights(&self) -> usize {
        let q = self.num_heads * self.head_dim;
        let kv = self.num_kv_heads * self.head_dim;
        self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size + 2)
    }

    /// Weight elements of the embedding, and of the head where it is not tied.
    pub fn embedding_weights(&self) -> usize {
        self.vocab_size * self.hidden_size
    }
}

/// A run of consecutive layers, `start..end`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LayerRange {
    /// First layer.
    pub start: usize,
    /// One past the last layer.
    pub end: usize,
}

impl LayerRange {
    /// Number of layers.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether there is no layer.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}..{}", self.start, self.end))
    }
}
