//! How weights are stored: element types and block formats, with their sizes.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The type of a matrix of weights. Names and blocks are those of GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// Brain float.
    Bf16,
    /// Blocks of 32: a scale, 8 bits each.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// Blocks of 32: a scale, 4 bits each.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// Blocks of 32: a scale and a minimum, 4 bits each.
    #[serde(rename = "q4_1")]
    Q4_1,
    /// Blocks of 32: a scale, 5 bits each.
    #[serde(rename = "q5_0")]
    Q5_0,
    /// Blocks of 32: a scale and a minimum, 5 bits each.
    #[serde(rename = "q5_1")]
    Q5_1,
    /// Superblocks of 256: two scales, a 6-bit scale and minimum per 32, 4 bits each.
    #[serde(rename = "q4_k")]
    Q4K,
    /// Superblocks of 256: two scales, a 6-bit scale and minimum per 32, 5 bits each.
    #[serde(rename = "q5_k")]
    Q5K,
    /// Superblocks of 256: a scale, an 8-bit scale per 16, 6 bits each.
    #[serde(rename = "q6_k")]
    Q6K,
}

impl WeightType {
    /// Every type.
    pub const ALL: [WeightType; 11] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::Bf16,
        WeightType::Q8_0,
        WeightType::Q4_0,
        WeightType::Q4_1,
        WeightType::Q5_0,
        WeightType::Q5_1,
        WeightType::Q4K,
        WeightType::Q5K,
        WeightType::Q6K,
    ];

    /// Weights that share a scale and cannot be stored apart: 1, 32 or 256.
    pub const fn block_len(self) -> usize {
        match self {
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 => 1,
            WeightType::Q4K | WeightType::Q5K | WeightType::Q6K => 256,
            _ => 32,
        }
    }

    /// Bytes of such a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            WeightType::F32 => 4,
            WeightType::F16 | WeightType::Bf16 => 2,
            WeightType::Q8_0 => 34,
            WeightType::Q4_0 => 18,
            WeightType::Q4_1 => 20,
            WeightType::Q5_0 => 22,
            WeightType::Q5_1 => 24,
            WeightType::Q4K => 144,
            WeightType::Q5K => 176,
            WeightType::Q6K => 210,
        }
    }

    /// Bytes of `weights` weights, whole blocks.
    pub const fn bytes(self, weights: usize) -> usize {
        weights.div_ceil(self.block_len()) * self.block_bytes()
    }

    /// Whether products quantise their activations too.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// The name, as commands and files write it.
    pub const fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "f32",
            WeightType::F16 => "f16",
            WeightType::Bf16 => "bf16",
            WeightType::Q8_0 => "q8_0",
            WeightType::Q4_0 => "q4_0",
            WeightType::Q4_1 => "q4_1",
            WeightType::Q5_0 => "q5_0",
            WeightType::Q5_1 => "q5_1",
            WeightType::Q4K => "q4_k",
            WeightType::Q5K => "q5_k",
            WeightType::Q6K => "q6_k",
        }
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text names no weight type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownWeightType(String);

impl fmt::Display for UnknownWeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = WeightType::ALL.iter().map(|t| t.name()).collect();
        write!(f, "unknown weight type {:?}: use one of {}", self.0, names.join(", "))
    }
}

impl std::error::Error for UnknownWeightType {}

impl FromStr for WeightType {
    type Err = UnknownWeightType;

    fn from_str(text: &str) -> Result<WeightType, UnknownWeightType> {
        let lower = text.to_ascii_lowercase();
        let found = WeightType::ALL.into_iter().find(|t| t.name() == lower);
        found.ok_or_else(|| UnknownWeightType(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_sizes_are_those_of_the_formats() {
        for kind in WeightType::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("q3_k".parse::<WeightType>().is_err());
        let bits = |kind: WeightType| 8.0 * kind.bytes(1024) as f64 / 1024.0;
        assert_eq!((bits(WeightType::Q8_0), bits(WeightType::Q4_0)), (8.5, 4.5));
        assert_eq!((bits(WeightType::Q5K), bits(WeightType::Q6K)), (5.5, 6.5625));
    }
}
