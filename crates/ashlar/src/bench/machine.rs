//! The machine's limits, measured in between so that they drift with what they are compared to.

use super::stats::median;
use super::table::figure;
use ashlar_kernels::Kernels;
use ashlar_kernels::measure::{Reader, fma_flops_per_s};
use ashlar_vocabulary::Bytes;
use serde::Serialize;
use std::time::Duration;

/// Several times the largest last-level cache that a rank can count on.
const WORKING_SET: usize = 256 << 20;
/// How long one reading takes.
const DURATION: Duration = Duration::from_millis(120);

/// One reading of both limits, all threads together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Read bandwidth of memory.
    pub(crate) bytes_per_s: f64,
    /// Fused multiply-adds, two operations each.
    pub(crate) flops_per_s: f64,
}

/// Takes readings and remembers them.
#[derive(Debug)]
pub(crate) struct Machine {
    reader: Reader,
    readings: Vec<Limits>,
}

/// The medians of all readings, for reports.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct MachineReport {
    /// Threads that took part.
    threads: usize,
    /// Instruction set.
    isa: String,
    /// Median read bandwidth.
    bytes_per_s: f64,
    /// Lowest and highest reading.
    bytes_per_s_range: (f64, f64),
    /// Median multiply-add rate.
    flops_per_s: f64,
    /// Lowest and highest reading.
    flops_per_s_range: (f64, f64),
    /// How often both were measured during the run.
    readings: usize,
}

impl Limits {
    /// Of two readings around a measurement: what the machine could do meanwhile, as far as it tells.
    pub(crate) fn between(before: Limits, after: Limits) -> Limits {
        Limits {
            bytes_per_s: (before.bytes_per_s + after.bytes_per_s) / 2.0,
            flops_per_s: (before.flops_per_s + after.flops_per_s) / 2.0,
        }
    }
}

impl Machine {
    /// Memory that measuring takes.
    pub(crate) const BYTES: Bytes = Bytes(WORKING_SET as u64);

    /// Fills the working set.
    pub(crate) fn new(kernels: &Kernels) -> Machine {
        Machine { reader: Reader::new(kernels, WORKING_SET), readings: Vec::new() }
    }

    /// Measures both limits now, with all threads of `kernels`.
    pub(crate) fn read(&mut self, kernels: &Kernels) -> Limits {
        let limits = Limits {
            bytes_per_s: self.reader.bytes_per_s(kernels, DURATION),
            flops_per_s: fma_flops_per_s(kernels, DURATION / 2),
        };
        self.readings.push(limits);
        limits
    }

    /// All readings in short.
    pub(crate) fn report(&self, kernels: &Kernels) -> MachineReport {
        let of = |value: fn(&Limits) -> f64| -> (f64, (f64, f64)) {
            let values: Vec<f64> = self.readings.iter().map(value).collect();
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(0.0, f64::max);
            (median(&values), (least, most))
        };
        let ((bytes_per_s, bytes_per_s_range), (flops_per_s, flops_per_s_range)) =
            (of(|limits| limits.bytes_per_s), of(|limits| limits.flops_per_s));
        MachineReport {
            threads: kernels.threads(),
            isa: kernels.isa().to_string(),
            bytes_per_s,
            bytes_per_s_range,
            flops_per_s,
            flops_per_s_range,
            readings: self.readings.len(),
        }
    }
}

impl MachineReport {
    /// One line for people.
    pub(crate) fn line(&self) -> String {
        let giga = |value: f64| figure(value / 1e9);
        format!(
            "limits: {} GB/s ({}…{}) and {} GFLOP/s f32 ({}…{}), {} threads, {}, median of {} readings within this run",
            giga(self.bytes_per_s),
            giga(self.bytes_per_s_range.0),
            giga(self.bytes_per_s_range.1),
            giga(self.flops_per_s),
            giga(self.flops_per_s_range.0),
            giga(self.flops_per_s_range.1),
            self.threads,
            self.isa,
            self.readings
        )
    }
}
