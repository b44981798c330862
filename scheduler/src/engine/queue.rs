//! Sequences that wait for a place: bounded, by priority, then in turn, then by arrival.
//!
//! Turns are what makes it fair between keys (start-time fair queueing: Goyal, Vin and Cheng, 1996). Time here is counted in tokens that
//! have been let in. A sequence's turn comes when those before it of the same key have had theirs, or now, if that is later; so a key
//! that asks a thousand times waits for itself, and one that asks once goes next. Among sequences of one key, or of none, turns come in
//! the order of arrival.

use ashlar_vocabulary::{KeyId, SequenceId};
use std::collections::BTreeMap;

/// Rank of a sequence among all: lower goes first. Preemption takes the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order {
    /// The client's priority; lower goes first.
    pub priority: i32,
    /// When its turn is, in tokens of others.
    pub turn: u64,
    /// Number of its arrival.
    pub arrival: u64,
}

/// The waiting sequences: new ones, preempted ones, and those whose replica was lost.
#[derive(Debug, Clone)]
pub struct Queue {
    by_order: BTreeMap<Order, Entry>,
    new_max: usize,
    new_count: usize,
    /// The latest turn that has come.
    turn: u64,
    /// Up to when the turns of each key are taken; those that are past are forgotten.
    taken: BTreeMap<Option<KeyId>, u64>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    id: SequenceId,
    new: bool,
}

/// What became of a new sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    /// It waits.
    Waiting,
    /// It waits in the place of this one, which is less urgent, or of a key that has taken more turns, and must be refused.
    Displaced(SequenceId),
    /// The queue is full of sequences that are no less urgent.
    Full,
}

impl Queue {
    /// An empty queue for at most `new_max` new sequences. Those that have been admitted once do not count: there are never
    /// more of them than fitted into the replicas.
    pub fn new(new_max: usize) -> Queue {
        Queue { by_order: BTreeMap::new(), new_max, new_count: 0, turn: 0, taken: BTreeMap::new() }
    }

    /// When the turn of a new sequence of a key is, which is expected to take so many tokens. Not before `push_new` has let it in
    /// is it [taken](Self::take_turn).
    pub fn next_turn(&self, key: Option<KeyId>) -> u64 {
        self.taken.get(&key).map_or(self.turn, |taken| self.turn.max(*taken))
    }

    /// A key has taken a turn, for so many tokens.
    pub fn take_turn(&mut self, key: Option<KeyId>, turn: u64, tokens: u64) {
        self.taken.insert(key, turn.saturating_add(tokens.max(1)));
    }

    /// A sequence's turn has come.
    pub fn has_begun(&mut self, order: Order) {
        if order.turn > self.turn {
            self.turn = order.turn;
            let now = self.turn;
            self.taken.retain(|_, taken| *taken > now);
        }
    }

    /// The waiting sequences that go before this one, most urgent first.
    pub fn before(&self, order: Order) -> impl Iterator<Item = SequenceId> + '_ {
        self.by_order.range(..order).map(|(_, entry)| entry.id)
    }

    /// Adds a new sequence, if there is room, or one to displace: a less urgent one, or one of a key that has taken more turns.
    pub fn push_new(&mut self, order: Order, id: SequenceId) -> Enqueued {
        let mut outcome = Enqueued::Waiting;
        if self.new_count >= self.new_max {
            let last = self.by_order.iter().rev().find(|(_, entry)| entry.new);
            match last.map(|(order, entry)| (*order, entry.id)) {
                Some((last, displaced)) if (last.priority, last.turn) > (order.priority, order.turn) => {
                    self.remove(last);
                    outcome = Enqueued::Displaced(displaced);
                }
                _ => return Enqueued::Full,
            }
        }
        self.by_order.insert(order, Entry { id, new: true });
        self.new_count += 1;
        outcome
    }

    /// Puts a sequence back that has run before, at its old rank.
    pub fn put_back(&mut self, order: Order, id: SequenceId) {
        self.by_order.insert(order, Entry { id, new: false });
    }

    /// Removes a sequence, if it waits.
    pub fn remove(&mut self, order: Order) {
        if let Some(entry) = self.by_order.remove(&order) {
            self.new_count -= usize::from(entry.new);
        }
    }

    /// The waiting sequences, most urgent first.
    pub fn iter(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.by_order.values().map(|entry| entry.id)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.by_order.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.by_order.is_empty()
    }
}
