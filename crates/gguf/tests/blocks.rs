//! Codecs of all types: agreement of their parts, bounds on what quantizing loses, and bad input.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_gguf::blocks::{BlockError, UnpackedBlock, dequantize, pack, quantize, unpack};
use ashlar_gguf::types::TensorType;
use proptest::prelude::*;

/// A splitmix64 stream, nearly normal: a sum of twelve uniform numbers.
fn gaussian(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

fn there_and_back(tensor_type: TensorType, values: &[f32]) -> Vec<f32> {
    let mut bytes = Vec::new();
    quantize(tensor_type, values, &mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, tensor_type.bytes_of(values.len() as u64).unwrap());
    let mut back = vec![f32::NAN; values.len()];
    dequantize(tensor_type, &bytes, &mut back).unwrap();
    back
}

/// Root mean square of the error over that of the values.
fn relative_error(values: &[f32], back: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let error: f64 = values.iter().zip(back).map(|(x, y)| square(f64::from(x - y))).sum();
    let norm: f64 = values.iter().map(|x| square(f64::from(*x))).sum();
    (error / norm).sqrt()
}

#[test]
fn quantizing_normal_values_loses_little() {
    let bounds = [
        (TensorType::F32, 0.0),
        (TensorType::F16, 0.0003),
        (TensorType::Bf16, 0.0025),
        (TensorType::Q8_0, 0.006),
        (TensorType::Q6K, 0.018),
        (TensorType::Q5K, 0.037),
        (TensorType::Q5_1, 0.04),
        (TensorType::Q5_0, 0.045),
        (TensorType::Q4K, 0.075),
        (TensorType::Q4_1, 0.08),
        (TensorType::Q4_0, 0.09),
    ];
    let values: Vec<f32> = gaussian(1, 1 << 16).iter().map(|x| x * 0.02).collect();
    for (tensor_type, bound) in bounds {
        let error = relative_error(&values, &there_and_back(tensor_type, &values));
        eprintln!("{tensor_type}: relative error {error:.5}");
        assert!(error <= bound, "{tensor_type}: {error} > {bound}");
    }
}

#[test]
fn zeros_and_constants_survive() {
    for tensor_type in TensorType::ALL {
        assert!(there_and_back(tensor_type, &[0.0; 256]).iter().all(|x| *x == 0.0), "{tensor_type}");
        for constant in [1.0f32, -3.5, 0.05] {
            let back = there_and_back(tensor_type, &[constant; 256]);
            let error = relative_error(&[constant; 256], &back);
            assert!(error < 0.01, "{tensor_type} of {constant}: {error}");
        }
    }
}

#[test]
fn values_below_the_smallest_scale_become_small_not_wild() {
    for tensor_type in TensorType::ALL {
        for size in [1e-9f32, 1e-20, 1e-38, 1e-45] {
            let values: Vec<f32> = gaussian(3, 256).iter().map(|x| x * size).collect();
            assert!(there_and_back(tensor_type, &values).iter().all(|x| x.abs() <= 1e-6), "{tensor_type}");
        }
    }
}

#[test]
fn values_that_no_block_can_hold_are_refused_and_nothing_is_appended() {
    for tensor_type in TensorType::ALL.into_iter().filter(|t| t.is_quantized()) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = gaussian(4, 512);
            values[300] = bad;
            let mut out = vec![7];
            let error = quantize(tensor_type, &values, &mut out).unwrap_err();
            assert!(matches!(error, BlockError::NotFinite { index: 300, .. }), "{error}");
            assert_eq!(out, [7]);
        }
        for large in [9e8f32, 1e9, 1e20, f32::MAX, f32::MIN] {
            let values = [large; 256];
            let error = quantize(tensor_type, &values, &mut Vec::new()).unwrap_err();
            assert!(matches!(error, BlockError::TooLarge { index: 0, .. }), "{error}");
        }
        // Large, but within reach of every type.
        let values: Vec<f32> = gaussian(5, 256).iter().map(|x| x * 1e4).collect();
        assert!(relative_error(&values, &there_and_back(tensor_type, &values)) < 0.1);
    }
}

#[test]
fn lengths_that_do_not_fit_are_errors() {
    for tensor_type in TensorType::ALL {
        let mut out = vec![0.0; tensor_type.block_len()];
        for bytes in [0, tensor_type.block_bytes() - 1, tensor_type.block_bytes() + 1] {
            let bytes = vec![0; bytes];
            assert!(matches!(dequantize(tensor_type, &bytes, &mut out), Err(BlockError::Bytes { .. })));
            assert!(unpack(tensor_type, &bytes).is_err());
        }
        if tensor_type.is_quantized() {
            let odd = vec![0.0; tensor_type.block_len() + 1];
            assert!(matches!(quantize(tensor_type, &odd, &mut Vec::new()), Err(BlockError::Values { .. })));
        } else {
            let block = UnpackedBlock::zero(tensor_type);
            assert!(matches!(pack(&block, &mut Vec::new()), Err(BlockError::NotQuantized { .. })));
            let bytes = vec![0; tensor_type.block_bytes()];
            assert!(matches!(unpack(tensor_type, &bytes), Err(BlockError::NotQuantized { .. })));
        }
    }
}

#[test]
fn the_six_bit_scales_come_from_their_twelve_bytes() {
    // Scales 1, 2, 3, 4, 17, 34, 51, 63 and minima 63, 51, 34, 17, 4, 3, 2, 1, packed by hand.
    let mut block = UnpackedBlock::zero(TensorType::Q4K);
    block.scales[..8].copy_from_slice(&[1, 2, 3, 4, 17, 34, 51, 63]);
    block.mins = [63, 51, 34, 17, 4, 3, 2, 1];
    let mut bytes = Vec::new();
    pack(&block, &mut bytes).unwrap();
    let expected = [0x41, 0x82, 0xc3, 0xc4, 63, 51, 34, 17, 0x41, 0x32, 0x23, 0x1f];
    assert_eq!(bytes[4..16], expected);
    assert_eq!(unpack(TensorType::Q4K, &bytes).unwrap(), block);
}

fn quantized() -> impl Strategy<Value = TensorType> {
    prop::sample::select(TensorType::ALL.into_iter().filter(|t| t.is_quantized()).collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn unpacking_agrees_with_dequantizing_and_packing_undoes_it(
        tensor_type in quantized(),
        random in prop::collection::vec(any::<u8>(), 210),
    ) {
        let bytes = &random[..tensor_type.block_bytes()];
        let block = unpack(tensor_type, bytes).unwrap();
        let mut values = vec![0.0; block.len()];
        dequantize(tensor_type, bytes, &mut values).unwrap();
        for (index, value) in values.iter().enumerate() {
            let unpacked = block.value(index);
            prop_assert!(
                unpacked.to_bits() == value.to_bits() || (unpacked.is_nan() && value.is_nan()),
                "{tensor_type} at {index}: {unpacked} and {value}"
            );
        }
        let mut packed = Vec::new();
        pack(&block, &mut packed).unwrap();
        prop_assert_eq!(packed, bytes);
    }

    #[test]
    fn quantizing_never_panics(
        tensor_type in prop::sample::select(TensorType::ALL.to_vec()),
        bits in prop::collection::vec(any::<u32>(), 256),
        scale in -40i32..40,
    ) {
        let wild: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b)).collect();
        let _ = quantize(tensor_type, &wild, &mut Vec::new());
        let mixed: Vec<f32> = wild.iter().map(|x| if x.abs() < 1e8 { *x } else { 0.0 }).collect();
        let _ = quantize(tensor_type, &mixed, &mut Vec::new());
        let tame: Vec<f32> = bits.iter().map(|b| (*b as f32 / 2f32.powi(31) - 1.0) * 2f32.powi(scale)).collect();
        let mut bytes = Vec::new();
        if quantize(tensor_type, &tame, &mut bytes).is_ok() {
            let mut back = vec![0.0; 256];
            dequantize(tensor_type, &bytes, &mut back).unwrap();
            prop_assert!(back.iter().all(|x| x.is_finite()) || tensor_type == TensorType::F16);
        }
    }
}
