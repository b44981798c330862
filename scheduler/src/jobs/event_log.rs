//! A job's events: all are numbered, the latest are in memory, the others are in the store alone.

use super::events::CHUNK_EVENTS;
use ashlar_protocol::admin::{JobEvent, JobEventKind};
use std::collections::VecDeque;

/// The events of one job.
#[derive(Debug, Default, Clone)]
pub(super) struct EventLog {
    /// The latest, without a gap.
    kept: VecDeque<JobEvent>,
    /// Number of events.
    next: u64,
    /// Of these, durable.
    durable: u64,
}

impl EventLog {
    /// The log of a stored job with `count` events. Later ones belong to a record that was never written. Where the last ones are gone (of
    /// two leaders under one term, which a store that forgets has granted twice, one has written the chunk and the other the record),
    /// the log goes on from those that are there.
    pub(super) fn stored(count: u64, mut tail: Vec<JobEvent>) -> EventLog {
        tail.retain(|event| event.number < count);
        let count = tail.last().map_or(count, |last| last.number + 1);
        // Only what reaches up to the end without a gap is of use.
        let mut kept = VecDeque::new();
        for event in tail.into_iter().rev() {
            let expected = kept.front().map_or(count, |event: &JobEvent| event.number);
            if event.number + 1 != expected {
                break;
            }
            kept.push_front(event);
        }
        EventLog { kept, next: count, durable: count }
    }

    pub(super) fn push(&mut self, created_at: u64, what: JobEventKind) {
        self.kept.push_back(JobEvent { number: self.next, created_at, what });
        self.next += 1;
    }

    /// Number of events.
    pub(super) fn count(&self) -> u64 {
        self.next
    }

    /// How many chunks the store has of them, once all are saved.
    pub(super) fn chunks(&self) -> u64 {
        self.next.div_ceil(CHUNK_EVENTS)
    }

    /// Every chunk in which something is not durable, whole.
    pub(super) fn unsaved(&self) -> Vec<(u64, Vec<JobEvent>)> {
        let chunks = self.durable / CHUNK_EVENTS..self.chunks();
        let of = |chunk| self.kept.iter().filter(move |event| event.number / CHUNK_EVENTS == chunk);
        let dirty = chunks.filter(|_| self.durable < self.next);
        dirty.map(|chunk| (chunk, of(chunk).cloned().collect())).collect()
    }

    /// So many events are durable. What no chunk that is still filled needs is forgotten; once a job has `ended`, all of it.
    pub(super) fn saved(&mut self, count: u64, ended: bool) {
        self.durable = self.durable.max(count.min(self.next));
        let chunk = self.durable / CHUNK_EVENTS;
        let first = if ended && self.durable == self.next { self.next } else { chunk * CHUNK_EVENTS };
        while self.kept.front().is_some_and(|event| event.number < first) {
            self.kept.pop_front();
        }
    }

    /// The number of the first event in memory.
    #[cfg(test)]
    fn first_kept(&self) -> u64 {
        self.kept.front().map_or(self.next, |event| event.number)
    }

    /// Events in memory before `before`, newest first.
    pub(super) fn newest_before(&self, before: u64) -> impl Iterator<Item = &JobEvent> {
        self.kept.iter().rev().filter(move |event| event.number < before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(count: u64) -> EventLog {
        let mut log = EventLog::default();
        (0..count).for_each(|_| log.push(0, JobEventKind::Paused));
        log
    }

    #[test]
    fn a_chunk_is_saved_whole_until_it_is_full_and_then_forgotten() {
        let mut log = log(CHUNK_EVENTS + 2);
        let sizes = |log: &EventLog| -> Vec<(u64, usize)> {
            log.unsaved().iter().map(|(chunk, events)| (*chunk, events.len())).collect()
        };
        assert_eq!(sizes(&log), [(0, CHUNK_EVENTS as usize), (1, 2)]);
        log.saved(3, false);
        assert_eq!(sizes(&log), [(0, CHUNK_EVENTS as usize), (1, 2)]);
        log.saved(CHUNK_EVENTS + 1, false);
        assert_eq!((sizes(&log), log.first_kept()), (vec![(1, 2)], CHUNK_EVENTS));
        log.saved(CHUNK_EVENTS + 2, false);
        assert_eq!((sizes(&log), log.first_kept()), (vec![], CHUNK_EVENTS));
        log.push(0, JobEventKind::Resumed);
        assert_eq!(sizes(&log), [(1, 3)]);
        log.saved(CHUNK_EVENTS + 3, true);
        assert_eq!((sizes(&log), log.first_kept()), (vec![], CHUNK_EVENTS + 3));
    }

    #[test]
    fn events_beyond_a_stored_record_never_happened() {
        let events: Vec<JobEvent> = log(9).kept.into();
        let stored = EventLog::stored(7, events.clone());
        assert_eq!((stored.count(), stored.first_kept()), (7, 0));
        // The end is gone: a chunk is saved without a gap nevertheless.
        let mut short = EventLog::stored(9, events[..6].to_vec());
        short.push(0, JobEventKind::Paused);
        let saved = short.unsaved();
        assert!(saved[0].1.iter().map(|event| event.number).eq(0..7), "{saved:?}");
        // A gap: what is before it is read from the store where it is wanted.
        let gap = events.into_iter().filter(|event| event.number != 4).collect();
        assert_eq!(EventLog::stored(9, gap).first_kept(), 5);
    }
}
