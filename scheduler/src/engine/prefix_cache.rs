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
    /// How many from the first on can be read as they are. The others have to be filled again on some stages.
    pub filled: usize,
}

impl PrefixHit {
    /// The longest prefix of `chain` that `pool` has, of at most `blocks_max` blocks.
    pub fn of(chain: &PrefixChain, pool: &BlockPool, blocks_max: usize) -> PrefixHit {
        let mut hit = PrefixHit::default();
        for hash in chain.hashes().iter().take(blocks_max) {
            match pool.lookup(hash) {
                Some(held) => {
                    let readable = hit.filled == hit.blocks && pool.has_filled(hash);
                    hit.filled += usize::from(readable);
                    hit.blocks += 1;
                    hit.held += usize::from(held);
                }
                None => break,
            }
        }
        hit
    }
}
