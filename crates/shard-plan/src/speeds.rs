//! Measured speeds that differ by noise only count as equal.

use crate::request::DeviceReport;

/// Speeds within this share of the fastest of them are taken for equal: less than half a layer's worth in any pipeline, and
/// more than what two measurements of one machine differ by.
const EQUAL_WITHIN: f64 = 0.1;

/// The same devices, with one speed for all that were measured as about equally fast: so that equal machines get the same cut
/// from one start to the next, whatever the noise, and find what they hold or have packed.
pub fn evened(devices: &[DeviceReport]) -> Vec<DeviceReport> {
    let mut even = devices.to_vec();
    even_out(&mut even, |device| &mut device.bandwidth_bytes_per_s);
    even_out(&mut even, |device| &mut device.flops_per_s);
    even_out(&mut even, |device| &mut device.quantized_flops_per_s);
    even
}

fn even_out(devices: &mut [DeviceReport], speed: impl Fn(&mut DeviceReport) -> &mut f64) {
    let mut measured: Vec<f64> = devices.iter_mut().map(|device| *speed(device)).collect();
    measured.sort_by(|a, b| b.total_cmp(a));
    let mut rest = measured.as_slice();
    while let Some(&fastest) = rest.first() {
        let slowest = fastest * (1.0 - EQUAL_WITHIN);
        let (equal, slower) = rest.split_at(rest.partition_point(|&speed| speed >= slowest).max(1));
        let mean = equal.iter().sum::<f64>() / equal.len() as f64;
        let last = equal[equal.len() - 1];
        for device in devices.iter_mut() {
            let speed = speed(device);
            if (last..=fastest).contains(speed) {
                *speed = mean;
            }
        }
        rest = slower;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_vocabulary::{Bytes, NodeId};

    #[test]
    fn noise_is_evened_out_and_differences_stay() {
        let device = |(index, bandwidth_bytes_per_s): (usize, f64)| DeviceReport {
            node: NodeId(index.to_string()),
            memory: Bytes(1),
            bandwidth_bytes_per_s,
            flops_per_s: 5.0,
            quantized_flops_per_s: bandwidth_bytes_per_s,
            threads: 1,
            layers: None,
        };
        let devices: Vec<DeviceReport> =
            [97.0, 50.0, 103.0, 100.0, 46.0, 10.0].into_iter().enumerate().map(device).collect();
        let even = evened(&devices);
        let speeds: Vec<f64> = even.iter().map(|device| device.bandwidth_bytes_per_s).collect();
        assert_eq!(speeds, [100.0, 48.0, 100.0, 100.0, 48.0, 10.0]);
        let quantized: Vec<f64> = even.iter().map(|device| device.quantized_flops_per_s).collect();
        assert_eq!(quantized, speeds);
        assert!(even.iter().all(|device| device.flops_per_s == 5.0));
    }
}
