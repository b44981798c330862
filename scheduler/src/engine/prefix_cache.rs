//! Names for the content of KV blocks: chained hashes, so that an equal name means an equal prefix.
//!
//! A block's hash covers the model, the adapter, the tenant's salt, and every token from the start of the sequence to the end of the
//! block. Only full blocks have one. Tenants with different salts never share a block, and so cannot learn from timing
//! what others have asked.

use super::block_pool::BlockPool;
use ashlar_vocabulary::{AdapterId, ModelDigest, TokenId};
use std::fmt;

/// Tokens per KV block.
pub const BLOCK_TOKENS: usize = 16;

/// How many blocks `tokens` occupy.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// Name of a full block's content together with all that precedes it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash([u8; 32]);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(4).try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// The hashes of one sequence's full blocks, extended as the sequence grows.
#[derive(Debug, Clone)]
pub struct PrefixChain {
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

impl PrefixChain {
    /// The empty chain of a tenant, of the model alone or with an adapter.
    pub fn new(model: &ModelDigest, adapter: Option<AdapterId>, tenant_salt: u64) -> PrefixChain {
        let mut hasher = blake3::Hasher::new_derive_key("ashlar kv block prefix 1");
        hasher.update(&model.0);
        hasher.update(&tenant_salt.to_le_bytes());
        if let Some(AdapterId(blob)) = adapter {
            hasher.update(&blob.0);
        }
        PrefixChain { root: BlockHash(*hasher.finalize().as_bytes()), hashes: Vec::new() }
    }

    /// Hashes every full block of the sequence that is not hashed yet; `token_at` gives the token of a position.
    pub fn extend(&mut self, len: usize, token_at: impl Fn(usize) -> TokenId) {
        while (self.hashes.len() + 1) * BLOCK_TOKENS <= len {
            let previous = self.hashes.last().copied().unwrap_or(self.root);
            let start = self.hashes.len() * BLOCK_TOKENS;
            let mut bytes = [0u8; 32 + 4 * BLOCK_TOKENS];
            bytes[..32].copy_from_slice(&previous.0);
            for offset in 0..BLOCK_TOKENS {
                let at = 32 + 4 * offset;
                bytes[at..at + 4].copy_from_slice(&token_at(start + offset).to_le_bytes());
            }
            self.hashes.push(BlockHash(*blake3::hash(&bytes).as_bytes()));
        }
    }

    /// Hash of block `index`, if it is full.
    pub fn get(&self, index: usize) -> Option<&BlockHash> {
        self.hashes.get(index)
    }

    /// The longest prefix that `pool` has, of at most `blocks_max` blocks.
    pub fn find(&self, pool: &BlockPool, blocks_max: usize) -> PrefixHit {
        let mut hit = PrefixHit::default();
        for hash in self.hashes.iter().take(blocks_max) {
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

/// A prefix found in a pool.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PrefixHit {
    /// Its length in blocks.
    pub blocks: usize,
    /// How many of them other sequences hold at present: sharing these takes nothing from the pool.
    pub held: usize,
}
