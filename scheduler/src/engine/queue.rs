//! Sequences that wait for a place: bounded, by priority, then arrival.

use ashlar_vocabulary::SequenceId;
use std::collections::BTreeMap;

/// Rank of a sequence among all: lower goes first. Preemption takes the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order {
    /// The client's priority; lower goes first.
    pub priority: i32,
    /// Number of its arrival.
    pub arrival: u64,
}

/// The waiting sequences: new ones, preempted ones, and those whose replica was lost.
#[derive(Debug, Clone)]
pub struct Queue {
    by_order: BTreeMap<Order, Entry>,
    new_max: usize,
    new_count: usize,
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
    /// It waits in the place of this one, which has a lower priority and must be refused.
    Displaced(SequenceId),
    /// The queue is full of sequences that are no less urgent.
    Full,
}

impl Queue {
    /// An empty queue for at most `new_max` new sequences. Those that have been admitted once do not count: there are never
    /// more of them than fitted into the replicas.
    pub fn new(new_max: usize) -> Queue {
        Queue { by_order: BTreeMap::new(), new_max, new_count: 0 }
    }

    /// Adds a new sequence, if there is room or a less urgent one to displace.
    pub fn push_new(&mut self, order: Order, id: SequenceId) -> Enqueued {
        let mut outcome = Enqueued::Waiting;
        if self.new_count >= self.new_max {
            let last = self.by_order.iter().rev().find(|(_, entry)| entry.new);
            match last.map(|(order, entry)| (*order, entry.id)) {
                Some((last, displaced)) if last.priority > order.priority => {
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
