//! The model that schedulers of tests serve: small, and of eight layers, so that it can be cut.

use ashlar_scheduler::ModelCard;
use ashlar_vocabulary::{
    FloatType, LayerVectors, ModelDigest, ModelShape, Precision, WeightType, WeightTypes,
};

pub(crate) const DIGEST: ModelDigest = ModelDigest([1; 32]);
pub(crate) const CONTEXT_TOKENS: u32 = 512;

pub(crate) fn shape() -> ModelShape {
    ModelShape {
        hidden_size: 64,
        intermediate_size: 256,
        num_layers: 8,
        num_heads: 8,
        num_kv_heads: 8,
        head_dim: 8,
        vocab_size: 1024,
        max_position_embeddings: CONTEXT_TOKENS as usize,
        tied_head: true,
        weights: WeightTypes::uniform(WeightType::F32, 8),
        kv_cache: FloatType::F32,
        activations: FloatType::F32,
        vectors: LayerVectors::default(),
    }
}

pub(crate) fn card_of(source: &str, digest: ModelDigest) -> ModelCard {
    ModelCard {
        source: source.into(),
        precision: Precision::default(),
        digest,
        shape: shape(),
        max_context_tokens: CONTEXT_TOKENS,
    }
}

pub(crate) fn card() -> ModelCard {
    card_of("demo", DIGEST)
}
