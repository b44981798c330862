//! What of a sequence a pool has already, by the names of its blocks.

use super::block_pool::BlockPool;
pub use ashlar_protocol::prefix::{BLOCK_TOKENS, BlockHash, PrefixChain};

/// How many blocks `tokens` occupy.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// A prefix found in a pool.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PrefixHit {
    /// Its length in blocks.
    pub blocks: usize,
    /// How many of them other sequences hold at present: sharing these takes nothing from the pool.
    pub held: usize,
}

impl PrefixHit {
    /// The longest prefix of `chain` that `pool` has, of at most `blocks_max` blocks.
    pub fn of(chain: &PrefixChain, pool: &BlockPool, blocks_max: usize) -> PrefixHit {
        let mut hit = PrefixHit::default();
        for hash in chain.hashes().iter().take(blocks_max) {
            match pool.lookup(hash) {
                Some(held) => {
                    hit.blocks += 1;
                    hit.held += usize::from(held);
                }
                None => break,
            }
        }
        hit
    }
}
