//! From rates to faults at given moments.

use super::{FaultRate, Plan, PlannedFault};
use crate::random::Random;

/// Keeps the stream of faults apart from that of the world, which begins with the same seed.
const FAULTS: u64 = 0x6661_756c_7473;

/// Every fault of every rate, from the first arrival to the last one.
pub(super) fn of_rates(plan: &Plan) -> Vec<PlannedFault> {
    let of = |(number, rate): (u64, &FaultRate)| {
        let mut random = Random::new(plan.seed ^ FAULTS.wrapping_mul(number + 1));
        let (end_s, count) = (plan.last_arrival_us() as f64 / 1e6, plan.count(rate.role) as u64);
        let mut at_s = 0.0;
        let mut faults = Vec::new();
        loop {
            at_s += random.exponential(rate.mean_time_between_s);
            if at_s >= end_s {
                return faults;
            }
            faults.push(PlannedFault {
                at_us: (at_s * 1e6) as u64,
                role: rate.role,
                index: random.between(0, count) as usize,
                kind: rate.kind,
            });
        }
    };
    (0..).zip(&plan.fault_rates).flat_map(of).collect()
}
