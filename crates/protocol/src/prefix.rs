//! Names for the content of KV blocks: chained hashes, so that an equal name means an equal prefix.
//!
//! A block's name covers the model, the adapter, the tenant's salt, and every token from the start of the sequence to the end of the
//! block. Only full blocks have one. Tenants with different salts never share a block, and so cannot learn from timing
//! what others have asked. What a block holds depends on nothing else, so that scheduler and ranks mean the same by a name,
//! whatever has happened to either in between.

use ashlar_vocabulary::{AdapterId, ModelDigest, TokenId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Tokens per KV block.
pub const BLOCK_TOKENS: usize = 16;

/// Name of a full block's content together with all that precedes it.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// Before the first block: of a tenant, of the model alone or with an adapter.
    pub fn root(model: &ModelDigest, adapter: Option<AdapterId>, tenant_salt: u64) -> BlockHash {
        let mut hasher = blake3::Hasher::new_derive_key("ashlar kv block prefix 1");
        hasher.update(&model.0);
        hasher.update(&tenant_salt.to_le_bytes());
        if let Some(AdapterId(blob)) = adapter {
            hasher.update(&blob.0);
        }
        BlockHash(*hasher.finalize().as_bytes())
    }

    /// Of the full block with these tokens, after what `self` names.
    pub fn followed_by(&self, token_at: impl Fn(usize) -> TokenId) -> BlockHash {
        let mut bytes = [0u8; 32 + 4 * BLOCK_TOKENS];
        bytes[..32].copy_from_slice(&self.0);
        for offset in 0..BLOCK_TOKENS {
            let at = 32 + 4 * offset;
            bytes[at..at + 4].copy_from_slice(&token_at(offset).to_le_bytes());
        }
        BlockHash(*blake3::hash(&bytes).as_bytes())
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(4).try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// The names of one sequence's full blocks, extended as the sequence grows.
#[derive(Debug, Clone)]
pub struct PrefixChain {
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

impl PrefixChain {
    /// The empty chain after `root`.
    pub fn new(root: BlockHash) -> PrefixChain {
        PrefixChain { root, hashes: Vec::new() }
    }

    /// What it begins after.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// Names every full block of the sequence that has no name yet; `token_at` gives the token of a position.
    pub fn extend(&mut self, len: usize, token_at: impl Fn(usize) -> TokenId) {
        while (self.hashes.len() + 1) * BLOCK_TOKENS <= len {
            let previous = self.hashes.last().copied().unwrap_or(self.root);
            let start = self.hashes.len() * BLOCK_TOKENS;
            self.hashes.push(previous.followed_by(|offset| token_at(start + offset)));
        }
    }

    /// Name of block `index`, if it is full.
    pub fn get(&self, index: usize) -> Option<&BlockHash> {
        self.hashes.get(index)
    }

    /// The names, from the first block on.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}
