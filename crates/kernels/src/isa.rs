//! Which vector instructions run the kernels; chosen at run time, without effect on any bit of a result.

use std::fmt;
use std::str::FromStr;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AVX-512 F, BW and VNNI: sixteen lanes are one register, bytes multiply four at a time.
    Avx512,
    /// The same without VNNI: bytes multiply two at a time.
    Avx512Bw,
    /// x86-64 with AVX2, FMA and F16C: sixteen lanes are two registers.
    Avx2,
    /// Plain Rust. Fast where the target has fused multiply-add by default (AArch64), correct everywhere.
    Portable,
}

impl Isa {
    /// Every instruction set, fastest first.
    pub const ALL: [Isa; 4] = [Isa::Avx512, Isa::Avx512Bw, Isa::Avx2, Isa::Portable];

    /// The fastest instruction set of this machine.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    /// Every instruction set that this machine can run, fastest first; [`Isa::Portable`] is always among them.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => is_x86_feature_detected!("avx512vnni") && Isa::Avx512Bw.is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bw => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && Isa::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512 | Isa::Avx512Bw | Isa::Avx2 => false,
            Isa::Portable => true,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Isa::Avx512 => "avx512",
            Isa::Avx512Bw => "avx512bw",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        })
    }
}

/// The text names no instruction set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownIsa(String);

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown instruction set {:?}: use avx512, avx512bw, avx2 or portable", self.0)
    }
}

impl std::error::Error for UnknownIsa {}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(text: &str) -> Result<Isa, UnknownIsa> {
        let found = Isa::ALL.into_iter().find(|isa| isa.to_string() == text);
        found.ok_or_else(|| UnknownIsa(text.to_owned()))
    }
}
