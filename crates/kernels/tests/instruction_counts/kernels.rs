//! The kernels that are counted, in shapes that take some ten thousand instructions.

use crate::common::numbers;
use ashlar_kernels::{
    AttentionShape, BLOCK_TOKENS, BlockAxis, Kernels, KvBuffer, KvLayout, PackedMatrix, RowContext,
    StridedRows, ThreadPool,
};
use ashlar_vocabulary::{BlockId, FloatType, WeightType};

/// One call of a kernel.
pub struct Case {
    /// What stands in the record.
    pub name: String,
    /// How much it computes, and of what.
    pub operations: (u64, &'static str),
    /// Runs it.
    pub run: Box<dyn FnMut(&Kernels)>,
}

fn case(
    name: impl Into<String>,
    operations: usize,
    of: &'static str,
    run: impl FnMut(&Kernels) + 'static,
) -> Case {
    Case { name: name.into(), operations: (operations as u64, of), run: Box::new(run) }
}

/// Every kernel that is counted.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let kinds = [WeightType::F32, WeightType::Bf16, WeightType::Q8_0, WeightType::Q4_0, WeightType::Q4K];
    for kind in kinds {
        cases.extend([1, 8].map(|rows| product(kind, rows)));
    }
    cases.extend([attention("decode", 1, 300), attention("prefill", 16, 48)]);
    cases.extend([rms_norm(), exponentials(), silu_mul(), rope()]);
    cases
}

/// `rows` rows times a matrix of 64 outputs × 256 inputs.
fn product(kind: WeightType, rows: usize) -> Case {
    const N: usize = 64;
    const K: usize = 256;
    let pool = ThreadPool::new(1);
    let weights = if kind.is_quantized() {
        PackedMatrix::pack_blocks(kind, N, BlockAxis::whole(K), &pool, &|row, to| {
            for (input, to) in to.quants.iter_mut().enumerate() {
                *to = ((row * 31 + input * 17) % 15) as u8;
            }
            for to in &mut to.scales {
                (to.scale, to.min, to.sub_scales, to.sub_min) = (0x2000, 0x2000, [5, 7], 9);
            }
        })
    } else {
        let values = numbers(N * K, 1);
        PackedMatrix::pack(kind, N, &[0..K], &pool, &|row, to| to.copy_from_slice(&values[row * K..][..K]))
    };
    let (x, mut y) = (numbers(rows * K, 2), vec![0.0; rows * N]);
    case(format!("product/{kind}/rows-{rows}"), rows * N * K, "multiply-add", move |kernels| {
        kernels.matmul(rows, &x, &weights, &[0..K], None, &mut y);
    })
}

/// The last `rows` positions of `context`: four query heads of one key/value head of 64.
fn attention(phase: &str, rows: usize, context: usize) -> Case {
    const GROUP: usize = 4;
    let layout = KvLayout { kv_heads: 1, head_dim: 64 };
    let shape = AttentionShape { layout, q_heads: GROUP, scale: 0.125, window: None, softcap: None };
    let blocks = context.div_ceil(BLOCK_TOKENS);
    // Leaked, so that the rows can be described before the count begins.
    let table: &[BlockId] = Vec::leak((0..blocks).rev().map(|block| BlockId(block as u32)).collect());
    let contexts: Vec<RowContext<'_>> = (context - rows..context)
        .map(|position| RowContext { position: position as u32, block_table: table })
        .collect();
    let cache = |value: f32| {
        let mut buffer = KvBuffer::zeroed(FloatType::F32, blocks * layout.elements_per_block());
        buffer.fill(value);
        buffer
    };
    let (keys, values) = (cache(0.25), cache(0.5));
    let width = GROUP * layout.head_dim;
    let (q, mut out) = (numbers(rows * width, 5), vec![0.0; rows * width]);
    let pairs: usize = (context - rows + 1..=context).sum();
    case(format!("attention/{phase}"), 2 * pairs * width, "multiply-add", move |kernels| {
        kernels.attention(
            &shape,
            &contexts,
            StridedRows { data: &q, stride: width },
            &keys,
            &values,
            &mut out,
        );
    })
}

fn rms_norm() -> Case {
    const ROWS: usize = 2;
    const DIM: usize = 2048;
    let (x, weight, mut out) = (numbers(ROWS * DIM, 6), numbers(DIM, 7), vec![0.0; ROWS * DIM]);
    case("rms_norm", ROWS * DIM, "element", move |kernels| {
        kernels.rms_norm(ROWS, DIM, &x, &weight, 1e-5, &mut out);
    })
}

fn exponentials() -> Case {
    const LEN: usize = 4096;
    let logits = numbers(LEN, 8);
    case("softmax/exp_sum", LEN, "element", move |kernels| {
        std::hint::black_box(kernels.exp_sum(&logits, 8.0));
    })
}

fn silu_mul() -> Case {
    const LEN: usize = 2048;
    let (gate_up, mut out) = (numbers(2 * LEN, 9), vec![0.0; LEN]);
    case("silu_mul", LEN, "element", move |kernels| kernels.silu_mul(1, LEN, &gate_up, &mut out))
}

fn rope() -> Case {
    const ROWS: usize = 2;
    const HEADS: usize = 32;
    const DIM: usize = 64;
    let mut x = numbers(ROWS * HEADS * DIM, 10);
    let (cos, sin) = (numbers(ROWS * DIM / 2, 11), numbers(ROWS * DIM / 2, 12));
    case("rope", x.len(), "element", move |kernels| {
        kernels.rope(ROWS, HEADS, DIM, &mut x, HEADS * DIM, &cos, &sin);
    })
}
