//! In which precision a model's numbers are held: its weights, its cache, and its activations between layers.

use crate::weights::Quantization;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// In which precision a model is served: what its owner chose, apart from what its files hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Precision {
    /// To which types weights are quantised while they are loaded; `None` leaves them as they are stored.
    #[serde(default)]
    pub quantization: Option<Quantization>,
    /// Element type of the KV cache. Keys and values are rounded to it when they are written, before anyone reads them.
    #[serde(default)]
    pub kv_cache: FloatType,
    /// Element type of the residual stream between layers, on one stage or across several, and so of rows on their way from
    /// one stage to the next.
    #[serde(default)]
    pub activations: FloatType,
}

impl From<Option<Quantization>> for Precision {
    fn from(quantization: Option<Quantization>) -> Precision {
        Precision { quantization, ..Precision::default() }
    }
}

/// Type of numbers that are stored or sent while a model computes; products themselves are in `f32` whatever it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// IEEE binary32: nothing is rounded.
    #[default]
    F32,
    /// The upper half of a binary32: its range, eight bits of precision.
    Bf16,
    /// IEEE binary16: eleven bits of precision up to ±65504; larger values become that.
    F16,
}

impl FloatType {
    /// All of them.
    pub const ALL: [FloatType; 3] = [FloatType::F32, FloatType::Bf16, FloatType::F16];

    /// Size of an element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::Bf16 | FloatType::F16 => 2,
        }
    }

    /// The name in configuration files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            FloatType::F32 => "f32",
            FloatType::Bf16 => "bf16",
            FloatType::F16 => "f16",
        }
    }
}

impl fmt::Display for FloatType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text names no such type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown type `{0}`: f32, bf16 or f16")]
pub struct UnknownFloatType(String);

impl FromStr for FloatType {
    type Err = UnknownFloatType;

    fn from_str(name: &str) -> Result<FloatType, UnknownFloatType> {
        let found = FloatType::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| UnknownFloatType(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for kind in FloatType::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!(
            "fp8".parse::<FloatType>().expect_err("no such type").to_string().contains("f32, bf16 or f16")
        );
    }
}
