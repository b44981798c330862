//! A rank's paged KV cache: the same block numbers on every rank of a replica, each with its own layers and heads.

use ashlar_kernels::{BLOCK_TOKENS, KvBuffer, KvLayout};
use ashlar_vocabulary::{Bytes, FloatType};

/// Keys and values of all blocks, per layer.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    blocks: usize,
    layers: Vec<LayerCache>,
}

/// One layer's cache, in the layout that [`ashlar_kernels::KvLayout`] describes.
#[derive(Debug)]
pub struct LayerCache {
    /// Keys.
    pub keys: KvBuffer,
    /// Values.
    pub values: KvBuffer,
}

impl KvCache {
    /// Reserves `blocks` blocks of [`BLOCK_TOKENS`] tokens for `layers` layers. Pages become resident when first used.
    pub fn new(layout: KvLayout, kind: FloatType, layers: usize, blocks: usize) -> KvCache {
        let buffer = || KvBuffer::zeroed(kind, layout.elements_per_block() * blocks);
        let layers = (0..layers).map(|_| LayerCache { keys: buffer(), values: buffer() }).collect();
        KvCache { layout, blocks, layers }
    }

    /// Heads and head size.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Tokens that fit.
    pub fn capacity_tokens(&self) -> usize {
        self.blocks * BLOCK_TOKENS
    }

    /// One layer, counted from the stage's first.
    pub fn layer_mut(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }

    /// Reserved memory.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.layers.iter().map(|l| (l.keys.bytes() + l.values.bytes()) as u64).sum())
    }
}
