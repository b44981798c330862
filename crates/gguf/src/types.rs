//! Element types of tensors: their numbers in a file, their names, and the size of their blocks.
//!
//! **Invariant:** a [`TensorType`] is one that this crate decodes. Every other number is an [`UnsupportedType`], which
//! knows the names of the types that exist elsewhere, so that errors can say what was met.

use std::fmt;
use std::str::FromStr;

/// Values in a block of a K-quant, called a superblock elsewhere.
pub const SUPERBLOCK_LEN: usize = 256;

/// How the values of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// Brain float.
    Bf16,
    /// 8 bits, a scale for every 32 values.
    Q8_0,
    /// 4 bits, a scale for every 32 values.
    Q4_0,
    /// 4 bits, a scale and a minimum for every 32 values.
    Q4_1,
    /// 5 bits, a scale for every 32 values.
    Q5_0,
    /// 5 bits, a scale and a minimum for every 32 values.
    Q5_1,
    /// 4 bits, blocks of 256 values with 6-bit scales and minima for every 32.
    Q4K,
    /// 5 bits, blocks of 256 values with 6-bit scales and minima for every 32.
    Q5K,
    /// 6 bits, blocks of 256 values with signed 8-bit scales for every 16.
    Q6K,
}

impl TensorType {
    /// Every supported type.
    pub const ALL: [TensorType; 11] = [
        TensorType::F32,
        TensorType::F16,
        TensorType::Bf16,
        TensorType::Q8_0,
        TensorType::Q4_0,
        TensorType::Q4_1,
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q4K,
        TensorType::Q5K,
        TensorType::Q6K,
    ];

    /// The type that a file calls `id`.
    pub fn from_id(id: u32) -> Result<TensorType, UnsupportedType> {
        TensorType::ALL.into_iter().find(|tensor_type| tensor_type.id() == id).ok_or(UnsupportedType { id })
    }

    /// The number by which files and ggml name the type.
    pub const fn id(self) -> u32 {
        match self {
            TensorType::F32 => 0,
            TensorType::F16 => 1,
            TensorType::Q4_0 => 2,
            TensorType::Q4_1 => 3,
            TensorType::Q5_0 => 6,
            TensorType::Q5_1 => 7,
            TensorType::Q8_0 => 8,
            TensorType::Q4K => 12,
            TensorType::Q5K => 13,
            TensorType::Q6K => 14,
            TensorType::Bf16 => 30,
        }
    }

    /// The name in lower case, such as `q4_k`.
    pub const fn name(self) -> &'static str {
        match self {
            TensorType::F32 => "f32",
            TensorType::F16 => "f16",
            TensorType::Bf16 => "bf16",
            TensorType::Q8_0 => "q8_0",
            TensorType::Q4_0 => "q4_0",
            TensorType::Q4_1 => "q4_1",
            TensorType::Q5_0 => "q5_0",
            TensorType::Q5_1 => "q5_1",
            TensorType::Q4K => "q4_k",
            TensorType::Q5K => "q5_k",
            TensorType::Q6K => "q6_k",
        }
    }

    /// Values of one block; 1 for floats.
    pub const fn block_len(self) -> usize {
        match self {
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 => 1,
            TensorType::Q8_0 | TensorType::Q4_0 | TensorType::Q4_1 | TensorType::Q5_0 | TensorType::Q5_1 => {
                32
            }
            TensorType::Q4K | TensorType::Q5K | TensorType::Q6K => SUPERBLOCK_LEN,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            TensorType::F32 => 4,
            TensorType::F16 | TensorType::Bf16 => 2,
            TensorType::Q8_0 => 2 + 32,
            TensorType::Q4_0 => 2 + 16,
            TensorType::Q4_1 => 4 + 16,
            TensorType::Q5_0 => 2 + 4 + 16,
            TensorType::Q5_1 => 4 + 4 + 16,
            TensorType::Q4K => 4 + 12 + 128,
            TensorType::Q5K => 4 + 12 + 32 + 128,
            TensorType::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// Whether values are stored as integers with a scale.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// What a stored integer must be lowered by to get the value's sign right, as
    /// [`UnpackedBlock`](crate::blocks::UnpackedBlock) stores it; 0 for types with a minimum and for floats.
    pub const fn zero_point(self) -> u8 {
        match self {
            TensorType::Q8_0 => 128,
            TensorType::Q4_0 => 8,
            TensorType::Q5_0 => 16,
            TensorType::Q6K => 32,
            TensorType::F32
            | TensorType::F16
            | TensorType::Bf16
            | TensorType::Q4_1
            | TensorType::Q5_1
            | TensorType::Q4K
            | TensorType::Q5K => 0,
        }
    }

    /// The largest stored integer; 0 for floats.
    pub const fn quant_max(self) -> u8 {
        match self {
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 => 0,
            TensorType::Q8_0 => 255,
            TensorType::Q4_0 | TensorType::Q4_1 | TensorType::Q4K => 15,
            TensorType::Q5_0 | TensorType::Q5_1 | TensorType::Q5K => 31,
            TensorType::Q6K => 63,
        }
    }

    /// How many neighbouring values share a scale; 1 for floats.
    pub const fn scale_group(self) -> usize {
        match self {
            TensorType::Q6K => 16,
            TensorType::Q4K | TensorType::Q5K => 32,
            _ => self.block_len(),
        }
    }

    /// Bytes of `elements` values that lie next to each other; `None` if they are no whole number of blocks or the
    /// bytes exceed 64 bits.
    pub fn bytes_of(self, elements: u64) -> Option<u64> {
        let block_len = self.block_len() as u64;
        if !elements.is_multiple_of(block_len) {
            return None;
        }
        (elements / block_len).checked_mul(self.block_bytes() as u64)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name is not that of a supported type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown tensor type `{name}`: use one of {}", supported())]
pub struct UnknownTypeName {
    /// What was given.
    pub name: String,
}

impl FromStr for TensorType {
    type Err = UnknownTypeName;

    /// Accepts names in any case.
    fn from_str(name: &str) -> Result<TensorType, UnknownTypeName> {
        TensorType::ALL
            .into_iter()
            .find(|tensor_type| tensor_type.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| UnknownTypeName { name: name.to_owned() })
    }
}

/// A type that ggml may know, but this crate does not decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}: supported are {}", self.name(), supported())]
pub struct UnsupportedType {
    /// The number in the file.
    pub id: u32,
}

impl UnsupportedType {
    /// ggml's name of the type, or its number if ggml is not known to use it.
    pub fn name(self) -> String {
        let name = match self.id {
            4 => "Q4_2 (removed from ggml)",
            5 => "Q4_3 (removed from ggml)",
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            31 => "Q4_0_4_4 (removed from ggml)",
            32 => "Q4_0_4_8 (removed from ggml)",
            33 => "Q4_0_8_8 (removed from ggml)",
            34 => "TQ1_0",
            35 => "TQ2_0",
            36 => "IQ4_NL_4_4 (removed from ggml)",
            37 => "IQ4_NL_4_8 (removed from ggml)",
            38 => "IQ4_NL_8_8 (removed from ggml)",
            39 => "MXFP4",
            40 => "NVFP4",
            other => return format!("of unknown type {other}"),
        };
        name.to_owned()
    }
}

fn supported() -> String {
    TensorType::ALL.map(TensorType::name).join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_lead_back_to_their_type() {
        for tensor_type in TensorType::ALL {
            assert_eq!(TensorType::from_id(tensor_type.id()), Ok(tensor_type));
            assert_eq!(tensor_type.to_string().parse(), Ok(tensor_type));
            assert_eq!(tensor_type.name().to_uppercase().parse(), Ok(tensor_type));
        }
    }

    #[test]
    fn an_unsupported_type_is_called_by_its_name() {
        let error = TensorType::from_id(17).unwrap_err().to_string();
        assert!(error.starts_with("IQ2_XS: supported are f32, f16"), "{error}");
        let error = TensorType::from_id(4_000_000_000).unwrap_err().to_string();
        assert!(error.starts_with("of unknown type 4000000000: "), "{error}");
        assert!("q3_k".parse::<TensorType>().unwrap_err().to_string().contains("q4_k, q5_k, q6_k"));
    }

    #[test]
    fn bytes_need_whole_blocks() {
        assert_eq!(TensorType::Q4K.bytes_of(512), Some(288));
        assert_eq!(TensorType::Q4K.bytes_of(32), None);
        assert_eq!(TensorType::Q8_0.bytes_of(64), Some(68));
        assert_eq!(TensorType::F32.bytes_of(u64::MAX), None);
    }
}
