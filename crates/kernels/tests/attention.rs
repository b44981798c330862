//! Attention: one order of operations for prefill, decode and any chunking.

mod common;

use ashlar_kernels::{
    AttentionShape, BLOCK_TOKENS, Isa, Kernels, KvBuffer, KvLayout, RowContext, StridedRows,
};
use ashlar_vocabulary::{BlockId, FloatType};
use common::{all_kernels, bits, numbers};
use proptest::prelude::*;

/// One sequence's queries, keys and values, and a cache whose unused slots hold NaN.
struct Sequence {
    shape: AttentionShape,
    tokens: usize,
    qkv: Vec<f32>,
    table: Vec<BlockId>,
    cache_type: FloatType,
    cache_elements: usize,
}

/// A cache that holds NaN.
fn unwritten(kind: FloatType, elements: usize) -> KvBuffer {
    let mut buffer = KvBuffer::zeroed(kind, elements);
    buffer.fill(f32::NAN);
    buffer
}

impl Sequence {
    fn new(shape: AttentionShape, tokens: usize, seed: u64) -> Sequence {
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        // Blocks lie scattered, with a stale one between neighbours.
        let table = (0..blocks).map(|block| BlockId(((blocks - block) * 2 - 1) as u32)).collect();
        let cache_elements = (2 * blocks + 1) * shape.layout.elements_per_block();
        let qkv = numbers(tokens * width(&shape), seed);
        Sequence { shape, tokens, qkv, table, cache_type: FloatType::F32, cache_elements }
    }

    fn with_cache(self, cache_type: FloatType) -> Sequence {
        Sequence { cache_type, ..self }
    }

    /// Writes and attends chunk by chunk.
    fn run(&self, kernels: &Kernels, chunks: &[usize]) -> Vec<f32> {
        let KvLayout { kv_heads, head_dim } = self.shape.layout;
        let cache = || unwritten(self.cache_type, self.cache_elements);
        let (mut k_cache, mut v_cache) = (cache(), cache());
        let (stride, out_width) = (width(&self.shape), self.shape.q_heads * head_dim);
        let mut out = vec![f32::NAN; self.tokens * out_width];
        let mut start = 0;
        for &chunk in chunks {
            let end = (start + chunk).min(self.tokens);
            let rows: Vec<RowContext<'_>> = (start..end)
                .map(|position| RowContext { position: position as u32, block_table: &self.table })
                .collect();
            let view = |offset: usize| StridedRows {
                data: self.qkv.get(start * stride + offset..).unwrap_or(&[]),
                stride,
            };
            let (q, k, v) = (view(0), view(out_width), view(out_width + kv_heads * head_dim));
            kernels.write_kv(self.shape.layout, &rows, k, v, &mut k_cache, &mut v_cache);
            let out = &mut out[start * out_width..end * out_width];
            kernels.attention(&self.shape, &rows, q, &k_cache, &v_cache, out);
            start = end;
        }
        assert_eq!(start, self.tokens);
        out
    }

    /// Softmax attention in double precision.
    fn exact(&self, row: usize, head: usize) -> Vec<f64> {
        let KvLayout { kv_heads, head_dim } = self.shape.layout;
        let kv_head = head / (self.shape.q_heads / kv_heads);
        let first = self.shape.window.map_or(0, |window| (row + 1).saturating_sub(window as usize));
        let at = |row: usize, element: usize| f64::from(self.qkv[row * width(&self.shape) + element]);
        let k = self.shape.q_heads * head_dim + kv_head * head_dim;
        let v = k + kv_heads * head_dim;
        let scores: Vec<f64> = (first..=row)
            .map(|key| (0..head_dim).map(|i| at(row, head * head_dim + i) * at(key, k + i)).sum::<f64>())
            .map(|score| score * f64::from(self.shape.scale))
            .map(|score| {
                self.shape.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            })
            .collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let p: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f64 = p.iter().sum();
        (0..head_dim).map(|i| (first..=row).zip(&p).map(|(key, p)| p / sum * at(key, v + i)).sum()).collect()
    }
}

fn width(shape: &AttentionShape) -> usize {
    (shape.q_heads + 2 * shape.layout.kv_heads) * shape.layout.head_dim + 3
}

fn shape(kv_heads: usize, group: usize, head_dim: usize, window: Option<u32>) -> AttentionShape {
    let layout = KvLayout { kv_heads, head_dim };
    AttentionShape {
        layout,
        q_heads: kv_heads * group,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window,
        softcap: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_chunking_thread_count_and_instruction_set_gives_the_same_bits(
        kv_heads in 1usize..3, group in 1usize..6, head_dim in prop_oneof![Just(8usize), Just(20), Just(64), Just(80)],
        tokens in prop_oneof![3 => 1usize..100, 1 => 250usize..600], window in prop::option::of(1u32..400),
        chunks in prop::collection::vec(1usize..70, 1..5), seed: u64,
        softcap in prop::option::weighted(0.2, 0.5f32..30.0), cache_type in prop::sample::select(&FloatType::ALL),
    ) {
        let shape = AttentionShape { softcap, ..shape(kv_heads, group, head_dim, window) };
        let sequence = Sequence::new(shape, tokens, seed).with_cache(cache_type);
        let whole = bits(&sequence.run(&all_kernels()[0], &[tokens]));
        prop_assert!(whole.iter().all(|&bits| f32::from_bits(bits).is_finite()));
        for (index, kernels) in all_kernels().iter().enumerate() {
            if kernels.isa() == Isa::Portable && tokens > 100 {
                continue;
            }
            let chunks: Vec<usize> = (0..tokens).map(|i| chunks[(i + index) % chunks.len()]).collect();
            let mut total = 0;
            let chunks: Vec<usize> =
                chunks.into_iter().take_while(|chunk| { let go = total < tokens; total += chunk; go }).collect();
            prop_assert!(bits(&sequence.run(kernels, &chunks)) == whole, "{:?} {:?}", kernels, chunks);
        }
        let single: Vec<usize> = vec![1; tokens];
        prop_assert!(bits(&sequence.run(&all_kernels()[0], &single)) == whole);
    }
}

#[test]
fn attention_is_close_to_double_precision() {
    for (shape, tokens) in [
        (shape(2, 4, 64, None), 700),
        (shape(1, 1, 128, None), 300),
        (shape(2, 3, 24, Some(37)), 600),
        (shape(1, 2, 16, Some(256)), 530),
        (shape(3, 1, 5, None), 40),
        (AttentionShape { softcap: Some(0.7), ..shape(2, 2, 32, None) }, 300),
        (AttentionShape { softcap: Some(50.0), ..shape(1, 7, 64, None) }, 300),
    ] {
        let sequence = Sequence::new(shape, tokens, 11);
        let out = sequence.run(&Kernels::new(Isa::best(), 2), &[tokens]);
        for row in (0..tokens).step_by(13).chain([tokens - 1]) {
            for head in 0..shape.q_heads {
                let start = (row * shape.q_heads + head) * shape.layout.head_dim;
                for (out, exact) in out[start..].iter().zip(sequence.exact(row, head)) {
                    assert!((f64::from(*out) - exact).abs() < 2e-5, "{shape:?} row {row}: {out} {exact}");
                }
            }
        }
    }
}

#[test]
fn a_batch_of_sequences_gives_each_its_own_bits() {
    let shape = shape(2, 2, 32, None);
    let sequences: Vec<Sequence> =
        [5, 300, 40, 1].iter().map(|&tokens| Sequence::new(shape, tokens, tokens as u64)).collect();
    let out_width = shape.q_heads * shape.layout.head_dim;
    // All caches in one, tables moved accordingly.
    let (mut elements, mut tables, mut q) = (0, Vec::new(), Vec::new());
    for sequence in &sequences {
        let base = (elements / shape.layout.elements_per_block()) as u32;
        tables.push(sequence.table.iter().map(|block| BlockId(base + block.0)).collect::<Vec<_>>());
        elements += sequence.cache_elements;
        q.extend_from_slice(&sequence.qkv[(sequence.tokens - 1) * width(&shape)..]);
    }
    let cache = || unwritten(FloatType::F32, elements);
    let (mut k_cache, mut v_cache) = (cache(), cache());
    for kernels in all_kernels() {
        for (sequence, table) in sequences.iter().zip(&tables) {
            let rows: Vec<RowContext<'_>> = (0..sequence.tokens)
                .map(|position| RowContext { position: position as u32, block_table: table })
                .collect();
            let view = |offset: usize| StridedRows { data: &sequence.qkv[offset..], stride: width(&shape) };
            let kv_width = shape.layout.kv_heads * shape.layout.head_dim;
            kernels.write_kv(
                shape.layout,
                &rows,
                view(out_width),
                view(out_width + kv_width),
                &mut k_cache,
                &mut v_cache,
            );
        }
        let rows: Vec<RowContext<'_>> = sequences
            .iter()
            .zip(&tables)
            .map(|(sequence, table)| RowContext { position: sequence.tokens as u32 - 1, block_table: table })
            .collect();
        let mut out = vec![f32::NAN; rows.len() * out_width];
        let q = StridedRows { data: &q, stride: width(&shape) };
        kernels.attention(&shape, &rows, q, &k_cache, &v_cache, &mut out);
        for (index, sequence) in sequences.iter().enumerate() {
            let alone = sequence.run(&all_kernels()[0], &[sequence.tokens]);
            let last = &alone[(sequence.tokens - 1) * out_width..];
            assert_eq!(bits(&out[index * out_width..(index + 1) * out_width]), bits(last), "{kernels:?}");
        }
    }
}

#[test]
fn a_narrower_cache_attends_to_rounded_keys_and_values() {
    let shape = shape(2, 3, 24, Some(200));
    let kernels = Kernels::new(Isa::best(), 2);
    for (kind, bits_kept) in [(FloatType::Bf16, 8), (FloatType::F16, 11)] {
        let narrow = Sequence::new(shape, 300, 5).with_cache(kind);
        // The same keys and values, rounded beforehand, in a cache that rounds nothing.
        let mut rounded = Sequence::new(shape, 300, 5);
        let queries = shape.q_heads * shape.layout.head_dim;
        for row in rounded.qkv.chunks_exact_mut(width(&shape)) {
            for x in &mut row[queries..] {
                *x = round_to(*x, bits_kept);
            }
        }
        assert!(bits(&narrow.run(&kernels, &[300])) == bits(&rounded.run(&kernels, &[300])), "{kind}");
    }
}

/// The nearest float with so many significant bits, ties to even; for what is normal in the narrower type.
fn round_to(x: f32, bits_kept: u32) -> f32 {
    let unit = 1u32 << (24 - bits_kept);
    let (bits, odd) = (x.to_bits(), (x.to_bits() / unit) & 1);
    f32::from_bits((bits + unit / 2 - 1 + odd) / unit * unit)
}

#[test]
fn large_numbers_stay_finite_in_a_cache_of_halves() {
    let shape = shape(1, 1, 16, None);
    let mut sequence = Sequence::new(shape, 20, 3).with_cache(FloatType::F16);
    let values = shape.layout.head_dim * 2..shape.layout.head_dim * 3;
    for row in sequence.qkv.chunks_exact_mut(width(&shape)) {
        row[values.clone()].fill(-1e9);
    }
    let out = sequence.run(&Kernels::new(Isa::best(), 1), &[20]);
    assert!(out.iter().all(|&x| (x + 65504.0).abs() < 1.0), "{out:?}");
}

/// Few rows with long contexts compute splits in windows; 40 of them are more than any number of threads here takes at once.
#[test]
fn windows_of_splits_give_the_bits_of_one_task() {
    const TOKENS: usize = 40 * 256 + 17;
    for window in [None, Some(9000)] {
        let sequence = Sequence::new(shape(1, 2, 8, window), TOKENS, 9);
        let whole = bits(&sequence.run(&all_kernels()[0], &[TOKENS]));
        for kernels in all_kernels().iter().filter(|kernels| kernels.isa() != Isa::Portable) {
            kernels.reserve_attention(4, sequence.shape.layout, sequence.shape.q_heads);
            let few = sequence.run(kernels, &[TOKENS - 9, 1, 1, 4, 3]);
            assert!(bits(&few) == whole, "{window:?} {kernels:?}");
        }
    }
}
