//! The KV blocks of one replica: who holds which, which are free, which can be hit by a later prompt.
//!
//! A block is *free* (content worthless), *held* by one or more sequences, or *idle* (held by nobody, its content
//! known by hash, so that a prompt with the same prefix may take it up again). Idle blocks are evicted least recently
//! used first, and only once no block is free. A block with a known content may be *unfilled*: some stages have lost it, and are
//! made to compute it again before anything reads it.
//!
//! **Invariant:** every block is in exactly one of the three states; [`BlockPool::check`] verifies it.

use super::prefix_cache::BlockHash;
use ashlar_vocabulary::BlockId;
use std::collections::{BTreeMap, BTreeSet};

/// The blocks of one replica.
#[derive(Debug, Clone)]
pub struct BlockPool {
    states: Vec<BlockState>,
    free: Vec<BlockId>,
    /// Idle blocks by the tick of their last use.
    idle: BTreeMap<u64, BlockId>,
    /// Every block whose content is known, held or idle.
    by_hash: BTreeMap<BlockHash, BlockId>,
    /// Blocks, held or idle, whose content some stages have not.
    unfilled: BTreeSet<BlockId>,
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
            unfilled: BTreeSet::new(),
            tick: 0,
        }
    }

    /// A pool of `count` blocks, of which these have a content from before there was this pool: idle, to be hit. The `unfilled` ones
    /// have it on some stages only.
    pub fn with_kept(
        count: u32,
        kept: &[(BlockId, BlockHash)],
        unfilled: &[(BlockId, BlockHash)],
    ) -> BlockPool {
        let mut pool = BlockPool::new(count);
        let kept = kept.iter().map(|kept| (kept, false));
        for (&(block, hash), unfilled) in kept.chain(unfilled.iter().map(|lost| (lost, true))) {
            let is_free = pool.states.get(block.0 as usize) == Some(&BlockState::Free);
            if !is_free || pool.by_hash.contains_key(&hash) {
                continue;
            }
            pool.tick += 1;
            pool.idle.insert(pool.tick, block);
            pool.by_hash.insert(hash, block);
            if unfilled {
                pool.unfilled.insert(block);
            }
            let since = pool.tick;
            pool.set(block, BlockState::Idle { since, hash });
        }
        let states = &pool.states;
        pool.free.retain(|block| states.get(block.0 as usize) == Some(&BlockState::Free));
        pool
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
                self.unfilled.remove(&block);
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

    /// Whether the block with this content can be read on every stage.
    pub fn has_filled(&self, hash: &BlockHash) -> bool {
        self.by_hash.get(hash).is_some_and(|block| self.is_filled(*block))
    }

    /// Whether no stage lacks what this block is known to hold.
    pub fn is_filled(&self, block: BlockId) -> bool {
        !self.unfilled.contains(&block)
    }

    /// Whether there is no block that a stage would have to compute again.
    pub fn is_whole(&self) -> bool {
        self.unfilled.is_empty()
    }

    /// A step computes this block on the stages that have lost it.
    pub fn fill(&mut self, block: BlockId) {
        self.unfilled.remove(&block);
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
                self.unfilled.remove(&block);
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
        if let Some(block) = self.unfilled.iter().find(|block| self.state(**block) == BlockState::Free) {
            return Err(format!("block {block} is to be filled with nothing known"));
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use super::*;
    use crate::engine::prefix_cache::PrefixChain;
    use ashlar_vocabulary::ModelDigest;
    use proptest::prelude::*;

    fn hashes(count: usize) -> Vec<BlockHash> {
        let mut chain = PrefixChain::new(BlockHash::root(&ModelDigest([0; 32]), None, 0));
        chain.extend(count * 16, |position| position as u32);
        (0..count).filter_map(|index| chain.get(index).copied()).collect()
    }

    #[test]
    fn free_blocks_are_used_before_cached_ones_are_evicted() {
        let mut pool = BlockPool::new(2);
        let hash = hashes(1)[0];
        let first = pool.allocate().unwrap();
        pool.register(first, hash);
        pool.release(first);
        let second = pool.allocate().unwrap();
        assert_ne!(first, second);
        assert_eq!(pool.lookup(&hash), Some(false));
        assert_eq!(pool.allocate(), Some(first));
        assert_eq!(pool.lookup(&hash), None);
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn a_shared_block_is_given_back_by_its_last_holder() {
        let mut pool = BlockPool::new(1);
        let hash = hashes(1)[0];
        let block = pool.allocate().unwrap();
        pool.register(block, hash);
        assert_eq!(pool.share(&hash), Some(block));
        pool.release(block);
        assert_eq!((pool.held(), pool.lookup(&hash)), (1, Some(true)));
        pool.release(block);
        assert_eq!((pool.held(), pool.lookup(&hash)), (0, Some(false)));
    }

    #[test]
    fn what_ranks_have_kept_can_be_hit() {
        let names = hashes(2);
        // A second block of that content, another content of that block, and a block that does not exist change nothing.
        let kept = [(1, 0), (2, 0), (1, 1), (7, 1)].map(|(block, name)| (BlockId(block), names[name]));
        let mut pool = BlockPool::with_kept(3, &kept, &[]);
        assert!(pool.check(std::iter::empty()).is_ok());
        assert_eq!((pool.lookup(&names[0]), pool.lookup(&names[1])), (Some(false), None));
        assert_eq!(pool.share(&names[0]), Some(BlockId(1)));
        assert_eq!(
            [pool.allocate(), pool.allocate(), pool.allocate()],
            [Some(BlockId(0)), Some(BlockId(2)), None]
        );
    }

    #[test]
    fn what_a_stage_has_lost_is_unfilled_until_it_is_computed_or_given_to_others() {
        let names = hashes(3);
        let lost = [(0, 1), (2, 2)].map(|(block, name)| (BlockId(block), names[name]));
        let mut pool = BlockPool::with_kept(3, &[(BlockId(1), names[0])], &lost);
        assert!(pool.check(std::iter::empty()).is_ok());
        assert!(names.iter().map(|name| pool.has_filled(name)).eq([true, false, false]));
        pool.fill(BlockId(0));
        assert!(pool.has_filled(&names[1]) && !pool.is_whole());
        // New content is everywhere.
        let given: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(given.len(), 3);
        assert!(pool.is_whole() && given.iter().all(|block| pool.is_filled(*block)));
    }

    #[test]
    fn a_forgotten_block_cannot_be_hit() {
        let mut pool = BlockPool::new(1);
        let hash = hashes(1)[0];
        let block = pool.allocate().unwrap();
        pool.register(block, hash);
        pool.forget(block);
        assert_eq!(pool.lookup(&hash), None);
        pool.release(block);
        assert!(pool.check(std::iter::empty()).is_ok());
    }

    proptest! {
        #[test]
        fn blocks_are_conserved(count in 1u32..12, actions in prop::collection::vec((0u8..5, 0usize..16), 0..200)) {
            let mut pool = BlockPool::new(count);
            let hashes = hashes(16);
            let mut held: Vec<BlockId> = Vec::new();
            for (action, index) in actions {
                match action {
                    0 => held.extend(pool.allocate()),
                    1 => held.extend(pool.share(&hashes[index])),
                    2 if !held.is_empty() => pool.register(held[index % held.len()], hashes[index]),
                    3 if !held.is_empty() => pool.forget(held[index % held.len()]),
                    _ if !held.is_empty() => pool.release(held.swap_remove(index % held.len())),
                    _ => {}
                }
                pool.check(held.iter().copied()).map_err(TestCaseError::fail)?;
            }
        }
    }
}
