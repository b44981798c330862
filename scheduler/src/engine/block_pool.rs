//! The KV blocks of one replica: who holds which, which are free, which can be hit by a later prompt.
//!
//! A block is *free* (content worthless), *held* by one or more sequences, or *idle* (held by nobody, its content
//! known by hash, so that a prompt with the same prefix may take it up again). Idle blocks are evicted least recently
//! used first, and only once no block is free.
//!
//! **Invariant:** every block is in exactly one of the three states; [`BlockPool::check`] verifies it.

use super::prefix_cache::BlockHash;
use ashlar_vocabulary::BlockId;
use std::collections::BTreeMap;

/// The blocks of one replica.
#[derive(Debug, Clone)]
pub struct BlockPool {
    states: Vec<BlockState>,
    free: Vec<BlockId>,
    /// Idle blocks by the tick of their last use.
    idle: BTreeMap<u64, BlockId>,
    /// Every block whose content is known, held or idle.
    by_hash: BTreeMap<BlockHash, BlockId>,
    tick: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum BlockState {
    Free,
    Held { holders: u32, hash: Option<BlockHash> },
    Idle { since: u64, hash: BlockHash },
}

impl BlockPool {
    /// A pool of `count` free blocks, numbered from 0.
    pub fn new(count: u32) -> BlockPool {
        BlockPool {
            states: vec![BlockState::Free; count as usize],
            // Popped from the end: low numbers are used first.
            free: (0..count).rev().map(BlockId).collect(),
            idle: BTreeMap::new(),
            by_hash: BTreeMap::new(),
            tick: 0,
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.states.len()
    }

    /// Blocks that [`allocate`](Self::allocate) could hand out now: free and idle ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks held by sequences.
    pub fn held(&self) -> usize {
        self.total() - self.available()
    }

    /// Takes a block for new content: a free one, else the idle one unused for longest. `None` if all are held.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.idle.pop_first()?;
                if let BlockState::Idle { hash, .. } = self.state(block) {
                    self.by_hash.remove(&hash);
                }
                block
            }
        };
        self.set(block, BlockState::Held { holders: 1, hash: None });
        Some(block)
    }

    /// Whether a block with this content exists; `Some(true)` if somebody holds it already.
    pub fn lookup(&self, hash: &BlockHash) -> Option<bool> {
        let block = *self.by_hash.get(hash)?;
        Some(matches!(self.states.get(block.0 as usize), Some(BlockState::Held { .. })))
    }

    /// Takes up the block with this content, once more.
    pub fn share(&mut self, hash: &BlockHash) -> Option<BlockId> {
        let block = *self.by_hash.get(hash)?;
        let state = match self.state(block) {
            BlockState::Free => return None,
            BlockState::Held { holders, hash } => BlockState::Held { holders: holders + 1, hash },
            BlockState::Idle { since, hash } => {
                self.idle.remove(&since);
                BlockState::Held { holders: 1, hash: Some(hash) }
            }
        };
        self.set(block, state);
        Some(block)
    }

    /// Makes a held block hittable under `hash`. If another block has this content already, that one stays.
    pub fn register(&mut self, block: BlockId, hash: BlockHash) {
        if self.by_hash.contains_key(&hash) {
            return;
        }
        if let BlockState::Held { holders, hash: None } = self.state(block) {
            self.set(block, BlockState::Held { holders, hash: Some(hash) });
            self.by_hash.insert(hash, block);
        }
    }

    /// Forgets a held block's content, because what was computed into it is not to be trusted.
    pub fn forget(&mut self, block: BlockId) {
        if let BlockState::Held { holders, hash: Some(hash) } = self.state(block) {
            self.by_hash.remove(&hash);
            self.set(block, BlockState::Held { holders, hash: None });
        }
    }

    /// Gives back one hold. The last holder's block becomes idle if its content is known, else free.
    pub fn release(&mut self, block: BlockId) {
        let state = match self.state(block) {
            BlockState::Held { holders: 1, hash: Some(hash) } => {
                self.tick += 1;
                self.idle.insert(self.tick, block);
                BlockState::Idle { since: self.tick, hash }
            }
            BlockState::Held { holders: 1, hash: None } => {
                self.free.push(block);
                BlockState::Free
            }
            BlockState::Held { holders, hash } => BlockState::Held { holders: holders - 1, hash },
            unheld => {
                debug_assert!(false, "released block {block}, which nobody holds");
                unheld
            }
        };
        self.set(block, state);
    }

    /// Verifies that no block is lost, doubled or miscounted; `holds` are all blocks that sequences hold, repeated where
    /// several share one.
    pub fn check(&self, holds: impl Iterator<Item = BlockId>) -> Result<(), String> {
        let mut counted = vec![0u32; self.total()];
        for block in holds {
            match counted.get_mut(block.0 as usize) {
                Some(count) => *count += 1,
                None => return Err(format!("block {block} does not exist")),
            }
        }
        let (mut free, mut idle, mut hashed) = (0, 0, 0);
        for (number, (state, counted)) in self.states.iter().zip(counted).enumerate() {
            let block = BlockId(number as u32);
            let (holders, hash) = match state {
                BlockState::Free => {
                    free += 1;
                    (0, None)
                }
                BlockState::Idle { since, hash } => {
                    idle += 1;
                    if self.idle.get(since) != Some(&block) {
                        return Err(format!("idle block {block} is not in the eviction order"));
                    }
                    (0, Some(hash))
                }
                BlockState::Held { holders, hash } => (*holders, hash.as_ref()),
            };
            if holders != counted {
                return Err(format!(
                    "block {block} counts {holders} holders, sequences hold it {counted} times"
                ));
            }
            if let Some(hash) = hash {
                hashed += 1;
                if self.by_hash.get(hash) != Some(&block) {
                    return Err(format!("block {block} has a hash that does not lead to it"));
                }
            }
        }
        if (free, idle, hashed) != (self.free.len(), self.idle.len(), self.by_hash.len()) {
            return Err(format!(
                "{free} free, {idle} idle, {hashed} hashed blocks, but lists of {}, {} and {}",
                self.free.len(),
                self.idle.len(),
                self.by_hash.len()
            ));
        }
        Ok(())
    }

    fn state(&self, block: BlockId) -> BlockState {
        self.states.get(block.0 as usize).cloned().unwrap_or(BlockState::Free)
    }

    fn set(&mut self, block: BlockId, state: BlockState) {
        if let Some(slot) = self.states.get_mut(block.0 as usize) {
            *slot = state;
        }
    }
}
