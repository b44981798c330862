//! A rank's KV cache: what was written where.

use ashlar_shard_node::sequencer::BLOCK_TOKENS;

/// What belongs to places of blocks: keys and values, or what was handed on. Blocks, by number; those that nobody has written to yet take no memory.
#[derive(Default)]
pub(super) struct Kv(Vec<Option<Box<[Option<u64>; BLOCK_TOKENS]>>>);

impl Kv {
    /// What was written to a place of a block.
    pub(super) fn get(&self, (block, place): (u32, usize)) -> Option<u64> {
        *self.0.get(block as usize)?.as_ref()?.get(place)?
    }

    pub(super) fn insert(&mut self, (block, place): (u32, usize), state: u64) {
        let block = block as usize;
        if self.0.len() <= block {
            self.0.resize_with(block + 1, || None);
        }
        if let Some(at) = self.0[block].get_or_insert_default().get_mut(place) {
            *at = Some(state);
        }
    }
}
