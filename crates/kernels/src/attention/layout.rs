//! How keys and values lie in the cache, and how they get there.

use super::buffer::KvBuffer;
use crate::elements::{BrainFloat, Element, Half};
use crate::kernels::Kernels;
use crate::strided::{DisjointMut, StridedRows};
use ashlar_vocabulary::{BlockId, FloatType};

/// Tokens of a cache block.
pub const BLOCK_TOKENS: usize = 16;

/// This rank's share of one layer's cache.
///
/// Keys: `[block][kv_head][head_dim][16 tokens]` (a vector holds one element of sixteen keys). Values:
/// `[block][kv_head][16 tokens][head_dim]` (a vector holds sixteen elements of one value).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// KV heads that this rank holds.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl KvLayout {
    /// Elements of one block in the key cache; as many again in the value cache.
    pub const fn elements_per_block(&self) -> usize {
        self.kv_heads * self.elements_per_head()
    }

    /// Elements of one head of a block.
    pub(super) const fn elements_per_head(&self) -> usize {
        self.head_dim * BLOCK_TOKENS
    }

    /// Where one head of a block starts.
    #[inline(always)]
    pub(super) fn head_start(&self, block: BlockId, kv_head: usize) -> usize {
        (block.0 as usize * self.kv_heads + kv_head) * self.elements_per_head()
    }
}

/// Where a row stands: its position and its sequence's blocks.
#[derive(Debug, Clone, Copy)]
pub struct RowContext<'a> {
    /// Position of the row's token in its sequence, from 0.
    pub position: u32,
    /// Blocks of the sequence in order; the token of position p lies in block p / 16, at p mod 16.
    pub block_table: &'a [BlockId],
}

impl RowContext<'_> {
    /// The block of the row's own token.
    fn block(&self) -> BlockId {
        self.block_table[self.position as usize / BLOCK_TOKENS]
    }

    pub(super) fn assert_covered(&self) {
        let blocks = self.block_table.len();
        assert!(
            (self.position as usize) < blocks * BLOCK_TOKENS,
            "{blocks} blocks end before {}",
            self.position
        );
    }

    /// Whether both rows belong to one sequence, as far as the slices tell cheaply.
    pub(super) fn shares_table(&self, other: &RowContext<'_>) -> bool {
        std::ptr::eq(self.block_table, other.block_table)
    }
}

impl Kernels {
    /// Writes the keys and values of `rows` (each kv_heads·head_dim elements at the start of a row of `k` and `v`) to
    /// their slots of one layer's caches, rounded to the caches' type.
    ///
    /// # Panics
    /// If a length does not fit, the caches differ in type, or a row's block table is too short or points outside them.
    pub fn write_kv(
        &self,
        layout: KvLayout,
        rows: &[RowContext<'_>],
        k: StridedRows<'_>,
        v: StridedRows<'_>,
        k_cache: &mut KvBuffer,
        v_cache: &mut KvBuffer,
    ) {
        match k_cache.kind() {
            FloatType::F32 => write::<f32>(self, layout, rows, k, v, k_cache, v_cache),
            FloatType::Bf16 => write::<BrainFloat>(self, layout, rows, k, v, k_cache, v_cache),
            FloatType::F16 => write::<Half>(self, layout, rows, k, v, k_cache, v_cache),
        }
    }
}

/// Elements below which another thread is not worth its wake-up: each key is scattered over as many cache lines.
const MIN_ELEMENTS: usize = 1 << 10;

fn write<E: Element>(
    kernels: &Kernels,
    layout: KvLayout,
    rows: &[RowContext<'_>],
    k: StridedRows<'_>,
    v: StridedRows<'_>,
    k_cache: &mut KvBuffer,
    v_cache: &mut KvBuffer,
) {
    let KvLayout { kv_heads, head_dim } = layout;
    rows.iter().for_each(RowContext::assert_covered);
    let k_cache = DisjointMut::new(k_cache.elements_mut::<E>());
    let v_cache = DisjointMut::new(v_cache.elements_mut::<E>());
    // By head, so that threads never meet, whatever the rows' block tables say.
    kernels.for_ranges(kv_heads, MIN_ELEMENTS.div_ceil((rows.len() * head_dim).max(1)), |heads| {
        for (row, context) in rows.iter().enumerate() {
            let (block, slot) = (context.block(), context.position as usize % BLOCK_TOKENS);
            let (k, v) = (k.row(row, kv_heads * head_dim), v.row(row, kv_heads * head_dim));
            for head in heads.clone() {
                let start = layout.head_start(block, head);
                let elements = head * head_dim..(head + 1) * head_dim;
                // SAFETY: a head of a block belongs to one task.
                let keys = unsafe { k_cache.range(start..start + layout.elements_per_head()) };
                for (to, &k) in keys.chunks_exact_mut(BLOCK_TOKENS).zip(&k[elements.clone()]) {
                    to[slot] = E::round(k);
                }
                let start = start + slot * head_dim;
                // SAFETY: as above.
                let values = unsafe { v_cache.range(start..start + head_dim) };
                for (to, &v) in values.iter_mut().zip(&v[elements]) {
                    *to = E::round(v);
                }
            }
        }
    });
}
