//! In which precision a model's numbers are held: its weights, and its cache.

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
    /// Element type of the KV cache.
    #[serde(default)]
    pub kv_cache: KvCacheType,
}

impl From<Option<Quantization>> for Precision {
    fn from(quantization: Option<Quantization>) -> Precision {
        Precision { quantization, ..Precision::default() }
    }
}

/// Element type of the KV cache. Keys and values are rounded to it when they are written, before anyone reads them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheType {
    /// IEEE binary32: nothing is rounded.
    #[default]
    F32,
    /// The upper half of a binary32: its range, eight bits of precision.
    Bf16,
    /// IEEE binary16: eleven bits of precision up to ±65504; larger values become that.
    F16,
}

impl KvCacheType {
    /// All of them.
    pub const ALL: [KvCacheType; 3] = [KvCacheType::F32, KvCacheType::Bf16, KvCacheType::F16];

    /// Size of an element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            KvCacheType::F32 => 4,
            KvCacheType::Bf16 | KvCacheType::F16 => 2,
        }
    }

    /// The name in configuration files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            KvCacheType::F32 => "f32",
            KvCacheType::Bf16 => "bf16",
            KvCacheType::F16 => "f16",
        }
    }
}

impl fmt::Display for KvCacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The name of no type of KV cache.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown KV cache type `{0}`: f32, bf16 or f16")]
pub struct UnknownKvCacheType(String);

impl FromStr for KvCacheType {
    type Err = UnknownKvCacheType;

    fn from_str(name: &str) -> Result<KvCacheType, UnknownKvCacheType> {
        let found = KvCacheType::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| UnknownKvCacheType(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for kind in KvCacheType::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!(
            "fp8".parse::<KvCacheType>().expect_err("no such type").to_string().contains("f32, bf16 or f16")
        );
    }
}
