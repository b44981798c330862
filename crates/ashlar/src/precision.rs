//! Options that say in which precision a model is served, the same for every command.

use ashlar_vocabulary::{FloatType, Precision, Quantization};
use clap::Args;

/// Precision of weights, cache and activations.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct PrecisionArgs {
    /// Quantise the weights while they are loaded: q8_0, q6_k, q5_k_m, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0.
    #[arg(long, value_name = "TYPE")]
    pub(crate) quantize: Option<Quantization>,
    /// Element type of the KV cache: f32 (exact), or bf16 or f16 in half the memory.
    #[arg(long, value_name = "TYPE", default_value_t)]
    pub(crate) kv_cache_type: FloatType,
    /// Element type of activations between layers, and so between stages: f32 (exact), or bf16 or f16 in half the bytes.
    #[arg(long, value_name = "TYPE", default_value_t)]
    pub(crate) activation_type: FloatType,
}

impl PrecisionArgs {
    /// What was chosen.
    pub(crate) fn precision(&self) -> Precision {
        Precision {
            quantization: self.quantize,
            kv_cache: self.kv_cache_type,
            activations: self.activation_type,
        }
    }
}
