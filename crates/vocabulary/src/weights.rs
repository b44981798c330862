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

/// The types of one layer's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerWeightTypes {
    /// Query projection.
    pub query: WeightType,
    /// Key projection.
    pub key: WeightType,
    /// Value projection.
    pub value: WeightType,
    /// Projection back to the residual stream.
    pub output: WeightType,
    /// Gate of the feed-forward.
    pub gate: WeightType,
    /// Its other half.
    pub up: WeightType,
    /// Its way back.
    pub down: WeightType,
}

impl LayerWeightTypes {
    /// All alike.
    pub const fn uniform(kind: WeightType) -> LayerWeightTypes {
        LayerWeightTypes {
            query: kind,
            key: kind,
            value: kind,
            output: kind,
            gate: kind,
            up: kind,
            down: kind,
        }
    }
}

/// The types in which a model's matrices are held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightTypes {
    /// Of the embedding, which is only looked up.
    pub embedding: WeightType,
    /// Of the head.
    pub head: WeightType,
    /// Of each layer.
    pub layers: Vec<LayerWeightTypes>,
}

impl WeightTypes {
    /// All alike.
    pub fn uniform(kind: WeightType, layers: usize) -> WeightTypes {
        WeightTypes { embedding: kind, head: kind, layers: vec![LayerWeightTypes::uniform(kind); layers] }
    }
}

/// How a model is quantised: which type for which matrix. The mixtures are those that llama.cpp writes under the same
/// names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Quantization {
    /// One type for all, but for the head, which a type of fewer than eight bits leaves to q6_k.
    Type(WeightType),
    /// q4_k with some values and ways back in q5_k.
    Q4KS,
    /// q4_k with half of the values and ways back in q6_k.
    Q4KM,
    /// q5_k with half of the values and ways back in q6_k.
    Q5KM,
}

impl Quantization {
    /// The types of a model of `layers` layers whose products have inputs of `hidden`, `attention` (heads × head size) and
    /// `feed_forward`. A superblock needs inputs that are a multiple of 256, a block of 32: others fall back to the
    /// next larger type that fits.
    pub fn types(
        self,
        layers: usize,
        hidden: usize,
        attention: usize,
        feed_forward: usize,
        tied: bool,
    ) -> WeightTypes {
        let base = self.base();
        let head = match base {
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 | WeightType::Q8_0 => base,
            _ => WeightType::Q6K,
        };
        let layer = |index: usize| {
            let more_bits = index < layers / 8 || index >= 7 * layers / 8 || (index - layers / 8) % 3 == 2;
            let (value, down) = match self {
                Quantization::Type(kind) => (kind, kind),
                Quantization::Q4KS => {
                    let better = |yes: bool| if yes { WeightType::Q5K } else { base };
                    (better(index < 4), better(index < layers / 8))
                }
                Quantization::Q4KM | Quantization::Q5KM => {
                    let kind = if more_bits { WeightType::Q6K } else { base };
                    (kind, kind)
                }
            };
            LayerWeightTypes {
                query: base.fitting(hidden),
                key: base.fitting(hidden),
                value: value.fitting(hidden),
                output: base.fitting(attention),
                gate: base.fitting(hidden),
                up: base.fitting(hidden),
                down: down.fitting(feed_forward),
            }
        };
        WeightTypes {
            embedding: if tied { head } else { base }.fitting(hidden),
            head: head.fitting(hidden),
            layers: (0..layers).map(layer).collect(),
        }
    }

    /// The type of most matrices.
    pub const fn base(self) -> WeightType {
        match self {
            Quantization::Type(kind) => kind,
            Quantization::Q4KS | Quantization::Q4KM => WeightType::Q4K,
            Quantization::Q5KM => WeightType::Q5K,
        }
    }

    /// The name, as commands write it.
    pub const fn name(self) -> &'static str {
        match self {
            Quantization::Type(kind) => kind.name(),
            Quantization::Q4KS => "q4_k_s",
            Quantization::Q4KM => "q4_k_m",
            Quantization::Q5KM => "q5_k_m",
        }
    }
}

impl WeightType {
    /// This type, or the next larger one whose blocks tile `inputs`.
    fn fitting(self, inputs: usize) -> WeightType {
        let fits = |kind: WeightType| inputs.is_multiple_of(kind.block_len());
        if fits(self) {
            return self;
        }
        let smaller_blocks = match self {
            WeightType::Q4K => WeightType::Q5_0,
            WeightType::Q5K => WeightType::Q5_1,
            WeightType::Q6K => WeightType::Q8_0,
            _ => WeightType::F16,
        };
        if fits(smaller_blocks) { smaller_blocks } else { WeightType::F16 }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Quantization {
    type Err = UnknownQuantization;

    fn from_str(text: &str) -> Result<Quantization, UnknownQuantization> {
        match text.to_ascii_lowercase().as_str() {
            "q4_k_s" => Ok(Quantization::Q4KS),
            "q4_k_m" => Ok(Quantization::Q4KM),
            "q5_k_m" => Ok(Quantization::Q5KM),
            // What llama.cpp calls a mixture has nothing mixed in.
            "q5_k_s" => Ok(Quantization::Type(WeightType::Q5K)),
            other => other
                .parse()
                .map(Quantization::Type)
                .map_err(|_: UnknownWeightType| UnknownQuantization(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Quantization {
    type Error = UnknownQuantization;

    fn try_from(text: String) -> Result<Quantization, UnknownQuantization> {
        text.parse()
    }
}

impl From<Quantization> for String {
    fn from(quantization: Quantization) -> String {
        quantization.name().to_owned()
    }
}

/// The text names no quantisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownQuantization(String);

impl fmt::Display for UnknownQuantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = WeightType::ALL.iter().map(|t| t.name()).collect();
        write!(
            f,
            "unknown quantization {:?}: use one of {}, q4_k_s, q4_k_m, q5_k_m",
            self.0,
            names.join(", ")
        )
    }
}

impl std::error::Error for UnknownQuantization {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
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

    #[test]
    fn mixtures_give_some_matrices_more_bits_and_fall_back_where_blocks_do_not_fit() {
        let types = "Q4_K_M".parse::<Quantization>().unwrap().types(16, 2048, 2048, 8192, true);
        let values: Vec<_> = types.layers.iter().map(|layer| layer.value == WeightType::Q6K).collect();
        assert_eq!(values.iter().filter(|more| **more).count(), 8);
        assert!(values[0] && values[1] && !values[2] && values[4] && values[15]);
        assert_eq!((types.head, types.embedding), (WeightType::Q6K, WeightType::Q6K));
        // Qwen2.5 0.5B: 896 is no multiple of 256.
        let small = Quantization::Q4KM.types(24, 896, 896, 4864, false);
        assert_eq!((small.layers[3].query, small.layers[0].value), (WeightType::Q5_0, WeightType::Q8_0));
        assert_eq!((small.layers[3].down, small.embedding), (WeightType::Q4K, WeightType::Q5_0));
        assert_eq!(
            Quantization::Type(WeightType::Q8_0).types(1, 64, 64, 172, true).layers[0].down,
            WeightType::F16
        );
        for name in ["q4_k_m", "q8_0", "bf16"] {
            assert_eq!(name.parse::<Quantization>().unwrap().to_string(), name);
        }
        assert!("q3_k_m".parse::<Quantization>().is_err());
    }
}
