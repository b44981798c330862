//! What this machine can do: measured once, and remembered until it is started again, so that a node that died is back the sooner.

use ashlar_kernels::Kernels;
use ashlar_kernels::measure::{self, QuantizedProduct, Reader};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Speeds, all threads together.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Speeds {
    pub(crate) bytes_per_s: f64,
    pub(crate) flops_per_s: f64,
    pub(crate) quantized_flops_per_s: f64,
}

/// Under which circumstances they were measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Circumstances {
    /// Changes with every start of the machine.
    boot: String,
    version: String,
    isa: String,
    threads: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    under: Circumstances,
    speeds: Speeds,
}

impl Circumstances {
    /// The present ones; `None` on systems that do not say when they were started.
    fn now(kernels: &Kernels) -> Option<Circumstances> {
        Some(Circumstances {
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            isa: kernels.isa().to_string(),
            threads: kernels.threads(),
        })
    }
}

/// The speeds that `file` remembers from the same circumstances, else measured ones, which it will. Without it (it cannot be written)
/// they are measured each time.
pub(crate) fn of_machine(kernels: &Kernels, working_set_bytes: usize, file: &Path) -> Speeds {
    let under = Circumstances::now(kernels);
    let remembered = fs::read_to_string(file).ok().and_then(|text| toml::from_str::<Remembered>(&text).ok());
    if let Some(remembered) = remembered.filter(|remembered| Some(&remembered.under) == under.as_ref()) {
        return remembered.speeds;
    }
    let speeds = measure_machine(kernels, working_set_bytes);
    if let Some(under) = under
        && let Ok(text) = toml::to_string(&Remembered { under, speeds })
    {
        // Whole or not at all: a part of it is not read as another.
        let new = file.with_extension("new");
        let _ = fs::write(&new, text).and_then(|()| fs::rename(&new, file));
    }
    speeds
}

/// Read bandwidth, and the rates of multiply-adds and of products with quantised weights, each the best of many looks that
/// are shorter than a time slice: other processes that start at the same moment (a scheduler that hashes the weights) spoil
/// some of them, and nothing makes one too fast.
fn measure_machine(kernels: &Kernels, working_set_bytes: usize) -> Speeds {
    const LOOKS: usize = 50;
    let _on_core = kernels.pool().pin_caller();
    let reader = Reader::new(kernels, working_set_bytes);
    let mut product = QuantizedProduct::new(kernels, QuantizedProduct::TYPICAL);
    let mut best = Speeds::default();
    for _ in 0..LOOKS {
        let bytes_per_s = reader.bytes_per_s(kernels, Duration::from_millis(3));
        let flops_per_s = measure::fma_flops_per_s(kernels, Duration::from_millis(2));
        let quantized_flops_per_s = product.flops_per_s(kernels, Duration::from_millis(1));
        best = Speeds {
            bytes_per_s: best.bytes_per_s.max(bytes_per_s),
            flops_per_s: best.flops_per_s.max(flops_per_s),
            quantized_flops_per_s: best.quantized_flops_per_s.max(quantized_flops_per_s),
        };
    }
    best
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ashlar_kernels::Isa;

    #[test]
    fn speeds_are_remembered_under_the_same_circumstances_alone() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("node.speeds.toml");
        let one = Kernels::new(Isa::best(), 1);
        let speeds = of_machine(&one, 1 << 20, &file);
        assert!(speeds.bytes_per_s > 0.0 && speeds.flops_per_s > 0.0 && speeds.quantized_flops_per_s > 0.0);
        assert_eq!(of_machine(&one, 1 << 20, &file), speeds, "nobody measures the same twice");
        // Made up, so that it shows who is believed.
        let text = fs::read_to_string(&file).unwrap();
        let mut remembered: Remembered = toml::from_str(&text).unwrap();
        remembered.speeds.bytes_per_s = 1.0;
        fs::write(&file, toml::to_string(&remembered).unwrap()).unwrap();
        assert_eq!(of_machine(&one, 1 << 20, &file).bytes_per_s, 1.0);
        assert!(of_machine(&Kernels::new(Isa::best(), 2), 1 << 20, &file).bytes_per_s > 1.0);
        fs::write(&file, "not toml [").unwrap();
        assert!(of_machine(&one, 1 << 20, &file).bytes_per_s > 1.0);
    }
}
