//! Products with quantised weights: against a plain emulation of their definition, bit for bit, on every instruction set,
//! in every batch, with any number of threads and any cut of the inputs.

use ashlar_kernels::{BlockAxis, BlockScale, Isa, Kernels, PackedMatrix, QuantizedRow, ThreadPool};
use ashlar_vocabulary::WeightType;
use std::ops::Range;

const KINDS: [WeightType; 8] = [
    WeightType::Q8_0,
    WeightType::Q4_0,
    WeightType::Q4_1,
    WeightType::Q5_0,
    WeightType::Q5_1,
    WeightType::Q4K,
    WeightType::Q5K,
    WeightType::Q6K,
];

/// Reproducible numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ z >> 31) % end
    }

    /// Of mixed size, some blocks all zero.
    fn activations(&mut self, len: usize) -> Vec<f32> {
        let mut size = 0.0;
        (0..len)
            .map(|index| {
                if index % 32 == 0 {
                    size = [0.0, 0.01, 1.0, 1.0, 30.0][self.below(5) as usize];
                }
                (self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0) * size
            })
            .collect()
    }
}

/// Zero and number of quants.
fn range(kind: WeightType) -> (i32, u64) {
    match kind {
        WeightType::Q8_0 => (128, 256),
        WeightType::Q4_0 => (8, 16),
        WeightType::Q5_0 => (16, 32),
        WeightType::Q6K => (32, 64),
        WeightType::Q4_1 | WeightType::Q4K => (0, 16),
        _ => (0, 32),
    }
}

/// A half of moderate size, and its value.
fn half(random: &mut Random) -> (u16, f32) {
    let (sign, exponent, fraction) = (random.below(2), 5 + random.below(8), random.below(1024));
    let value = (1.0 + fraction as f32 / 1024.0) * 2f32.powi(exponent as i32 - 15);
    ((sign << 15 | exponent << 10 | fraction) as u16, if sign == 1 { -value } else { value })
}

/// One output's weights: what is packed, and per piece (first scale, second scale or minimum).
struct Row {
    stored: QuantizedRow,
    scales: Vec<(f32, f32)>,
}

/// A whole matrix, each superblock of a row with its own halves.
fn matrix(kind: WeightType, n: usize, k: usize, random: &mut Random) -> Vec<Row> {
    let (_, levels) = range(kind);
    let row = |random: &mut Random| {
        let quants = (0..k).map(|_| random.below(levels) as u8).collect();
        let (mut scales, mut values) = (Vec::new(), Vec::new());
        let mut shared = (half(random), half(random));
        for block in 0..k.div_ceil(32) {
            if kind.block_len() == 32 || block % 8 == 0 {
                shared = (half(random), half(random));
            }
            let ((scale, d), (min, m)) = shared;
            let six = (random.below(64) as i8, random.below(64) as u8);
            let eight = [random.below(256) as u8 as i8, random.below(256) as u8 as i8];
            let (sub_scales, sub_min, value) = match kind {
                WeightType::Q4K | WeightType::Q5K => {
                    ([six.0, 0], six.1, (d * f32::from(six.0), -(m * f32::from(six.1))))
                }
                WeightType::Q6K => (eight, 0, (d * f32::from(eight[0]), d * f32::from(eight[1]))),
                WeightType::Q4_1 | WeightType::Q5_1 => ([0, 0], 0, (d, m)),
                _ => ([0, 0], 0, (d, 0.0)),
            };
            scales.push(BlockScale { scale, min, sub_scales, sub_min });
            values.push(value);
        }
        Row { stored: QuantizedRow { quants, scales }, scales: values }
    };
    (0..n).map(|_| row(random)).collect()
}

/// The inputs `from..from + k` of the matrix, packed as a rank that holds them would.
fn pack(kind: WeightType, rows: &[Row], from: usize, parts: &[Range<usize>]) -> PackedMatrix {
    let axis = BlockAxis::new(from, parts);
    let pieces = axis.pieces().to_vec();
    PackedMatrix::pack_blocks(kind, rows.len(), axis, &ThreadPool::new(2), &|row, to| {
        let source = &rows[row].stored;
        let k = to.quants.len();
        to.quants.copy_from_slice(&source.quants[from..from + k]);
        for (piece, to) in pieces.iter().zip(&mut to.scales) {
            *to = source.scales[piece.block];
        }
    })
}

/// The definition, one output: chains over the pieces of each part, then the tree.
fn emulate(kind: WeightType, row: &Row, from: usize, parts: &[Range<usize>], x: &[f32]) -> f32 {
    let (zero, _) = range(kind);
    let axis = BlockAxis::new(from, parts);
    let chain = |part: &Range<usize>| {
        let mut sum = 0f32;
        for piece in axis.pieces().iter().filter(|p| part.contains(&p.inputs.start)) {
            let values = &x[piece.inputs.clone()];
            let largest = values.iter().fold(0f32, |most, v| most.max(v.abs()));
            let (factor, scale) =
                if largest == 0.0 { (0.0, 0.0) } else { (127.0 / largest, largest / 127.0) };
            let q: Vec<i32> = values.iter().map(|v| (v * factor).round_ties_even() as i32).collect();
            let quants = &row.stored.quants[from + piece.inputs.start..];
            let dot = |range: Range<usize>| -> i32 {
                range.map(|i| if i < q.len() { q[i] * (i32::from(quants[i]) - zero) } else { 0 }).sum()
            };
            let (first, second) = row.scales[piece.block];
            if kind == WeightType::Q6K {
                sum = (dot(0..16) as f32).mul_add(first * scale, sum);
                sum = (dot(16..32) as f32).mul_add(second * scale, sum);
            } else {
                sum = (dot(0..32) as f32).mul_add(first * scale, sum);
                if zero == 0 {
                    sum = second.mul_add(scale * q.iter().sum::<i32>() as f32, sum);
                }
            }
        }
        sum
    };
    let mut sums: Vec<Option<f32>> = parts.iter().map(|p| (!p.is_empty()).then(|| chain(p))).collect();
    while sums.len() > 1 {
        sums = sums
            .chunks(2)
            .map(|pair| match (pair[0], pair[1]) {
                (Some(a), Some(b)) => Some(a + b),
                (a, b) => a.or(b),
            })
            .collect();
    }
    sums[0].unwrap_or(-0.0)
}

fn same(a: &[f32], b: &[f32], what: &str) {
    for (index, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}, element {index}: {a} and {b}");
    }
}

#[test]
fn every_format_is_its_definition_on_every_instruction_set_in_every_batch() {
    let mut random = Random(7);
    for kind in KINDS {
        for (n, k) in [(1, 256), (16, 512), (70, 768), (33, 2304)] {
            let rows = matrix(kind, n, k, &mut random);
            let eighth = k / 32 / 8;
            let cuts = [
                vec![0..k],
                (0..8).map(|i| 32 * eighth * i..if i == 7 { k } else { 32 * eighth * (i + 1) }).collect(),
                vec![0..16, 16..16, 16..k - 16, k - 16..k],
            ];
            for parts in &cuts {
                let packed = pack(kind, &rows, 0, parts);
                let batch = 29;
                let x = random.activations(batch * k);
                let expected: Vec<f32> = x
                    .chunks(k)
                    .flat_map(|x| rows.iter().map(|row| emulate(kind, row, 0, parts, x)).collect::<Vec<_>>())
                    .collect();
                for isa in Isa::available() {
                    for (threads, count) in [(1, 1), (2, 2), (1, 3), (3, 5), (1, 12), (2, 13), (2, batch)] {
                        let kernels = Kernels::new(isa, threads);
                        let mut y = vec![f32::NAN; count * n];
                        kernels.matmul(count, &x[..count * k], &packed, parts, None, &mut y);
                        same(&y, &expected, &format!("{kind} {n}×{k}, {count} rows, {isa}"));
                    }
                }
            }
        }
    }
}

#[test]
fn ranks_that_hold_parts_add_up_to_the_whole() {
    let mut random = Random(8);
    let kernels = Kernels::new(Isa::best(), 2);
    for kind in KINDS {
        // Parts of 96 inputs cut superblocks, parts of 16 cut blocks.
        for (k, part) in [(768, 96), (256, 16)] {
            let (n, ranks) = (40, 2);
            let parts: Vec<_> = (0..8).map(|i| part * i..if i == 7 { k } else { part * (i + 1) }).collect();
            let rows = matrix(kind, n, k, &mut random);
            let x = random.activations(3 * k);
            let mut whole = vec![0.0; 3 * n];
            kernels.matmul(3, &x, &pack(kind, &rows, 0, &parts), &parts, None, &mut whole);
            let shares: Vec<Vec<f32>> = (0..ranks)
                .map(|rank| {
                    let own = &parts[rank * 4..rank * 4 + 4];
                    let (from, to) = (own[0].start, own[3].end);
                    let local: Vec<_> = own.iter().map(|p| p.start - from..p.end - from).collect();
                    let x: Vec<f32> = x.chunks(k).flat_map(|x| x[from..to].to_vec()).collect();
                    let mut y = vec![0.0; 3 * n];
                    kernels.matmul(3, &x, &pack(kind, &rows, from, &local), &local, None, &mut y);
                    y
                })
                .collect();
            let sum: Vec<f32> = shares[0].iter().zip(&shares[1]).map(|(a, b)| a + b).collect();
            same(&sum, &whole, &format!("{kind}, parts of {part}"));
        }
    }
}

#[test]
fn a_row_widens_to_scale_times_quant_plus_minimum() {
    let mut random = Random(9);
    for kind in KINDS {
        let (n, k) = (70, 512);
        let rows = matrix(kind, n, k, &mut random);
        let packed = pack(kind, &rows, 0, &[0..k]);
        let (zero, _) = range(kind);
        let mut out = vec![f32::NAN; k];
        for (index, row) in rows.iter().enumerate() {
            packed.row(index, &mut out);
            for (input, out) in out.iter().enumerate() {
                let (first, second) = row.scales[input / 32];
                let q = (i32::from(row.stored.quants[input]) - zero) as f32;
                let value = match kind {
                    WeightType::Q6K => q * if input % 32 < 16 { first } else { second },
                    _ => q * first + second,
                };
                assert_eq!(*out, value, "{kind} output {index} input {input}");
            }
        }
    }
}

#[test]
fn weights_take_their_true_bits() {
    for kind in KINDS {
        let (n, k) = (64, 2048);
        let packed = PackedMatrix::pack_blocks(kind, n, BlockAxis::whole(k), &ThreadPool::new(1), &|_, _| {});
        assert_eq!(packed.bytes(), kind.bytes(n * k), "{kind}");
    }
}

#[test]
fn zeros_tiny_numbers_and_numbers_out_of_range_are_defined() {
    let mut random = Random(10);
    let rows = matrix(WeightType::Q8_0, 16, 32, &mut random);
    let packed = pack(WeightType::Q8_0, &rows, 0, &[0..32]);
    for isa in Isa::available() {
        let kernels = Kernels::new(isa, 1);
        let run = |x: [f32; 32]| {
            let mut y = [0.0; 16];
            kernels.matmul(1, &x, &packed, &[0..32], None, &mut y);
            y
        };
        assert_eq!(run([0.0; 32]), [0.0; 16]);
        assert_eq!(run([1e-45; 32]), [0.0; 16]);
        let mut x = [1.0; 32];
        x[9] = f32::NAN;
        assert!(run(x).iter().all(|y| y.is_nan()), "{isa}");
        x[9] = f32::NEG_INFINITY;
        assert!(run(x).iter().all(|y| y.is_nan()), "{isa}");
        assert!(run([f32::MAX; 32]).iter().all(|y| y.is_finite() || y.is_infinite()), "{isa}");
    }
}

#[test]
fn stacked_types_are_one_product_with_the_bytes_of_each() {
    let mut random = Random(11);
    let (k, count) = (512, 5);
    let kinds = [WeightType::Q4K, WeightType::Q6K, WeightType::Q8_0];
    let sizes = [70, 16, 33];
    let kernels = Kernels::new(Isa::best(), 2);
    let x = random.activations(count * k);
    let all: Vec<_> = kinds.iter().zip(sizes).map(|(&kind, n)| matrix(kind, n, k, &mut random)).collect();
    let part = |index: usize| pack(kinds[index], &all[index], 0, &[0..k]);
    let stacked = PackedMatrix::stack((0..3).map(part).collect());
    let n: usize = sizes.iter().sum();
    let mut y = vec![f32::NAN; count * n];
    let bias: Vec<f32> = (0..n).map(|i| i as f32).collect();
    kernels.matmul(count, &x, &stacked, &[0..k], Some(&bias), &mut y);
    let mut first = 0;
    for index in 0..3 {
        let mut alone = vec![f32::NAN; count * sizes[index]];
        let bias = &bias[first..first + sizes[index]];
        kernels.matmul(count, &x, &part(index), &[0..k], Some(bias), &mut alone);
        for row in 0..count {
            let got = &y[row * n + first..][..sizes[index]];
            same(got, &alone[row * sizes[index]..][..sizes[index]], "stacked");
        }
        let mut widened = [vec![0.0; k], vec![0.0; k]];
        stacked.row(first, &mut widened[0]);
        part(index).row(0, &mut widened[1]);
        same(&widened[0], &widened[1], "row");
        first += sizes[index];
    }
}
