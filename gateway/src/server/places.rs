//! Places for connections: a bounded number. Whoever comes when all are taken gets the place of somebody who has no request in
//! progress, so that connections which only lie there, or never finish a head, keep nobody out.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// All places of a gateway.
#[derive(Debug)]
pub(super) struct Places {
    max: usize,
    seats: Mutex<BTreeMap<u64, Arc<Seat>>>,
    /// Counts what happens to connections: the order in which it did.
    clock: AtomicU64,
}

/// What is known of a connection.
#[derive(Debug)]
struct Seat {
    /// Whether a request is in progress.
    is_busy: AtomicBool,
    /// Whether a request has ever been answered.
    has_served: AtomicBool,
    /// When it began to wait for a request.
    idle_since: AtomicU64,
    /// Somebody else needs the place.
    wanted: Notify,
}

/// A connection's place. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    number: u64,
    seat: Arc<Seat>,
}

/// A request in progress, until its answer is sent.
#[derive(Debug)]
pub(super) struct Busy {
    places: Arc<Places>,
    seat: Arc<Seat>,
}

impl Places {
    pub(super) fn new(max: usize) -> Arc<Places> {
        Arc::new(Places { max, seats: Mutex::default(), clock: AtomicU64::new(0) })
    }

    /// A place, if need be that of who has waited longest without a request: of those who never had one first. `None` where all are busy.
    pub(super) fn take(self: &Arc<Places>) -> Option<Place> {
        let now = self.tick();
        let mut seats = self.seats();
        if seats.len() >= self.max {
            let idle = seats.iter().filter(|(_, seat)| !seat.is_busy.load(Ordering::Acquire));
            let rank = |seat: &Seat| {
                (seat.has_served.load(Ordering::Relaxed), seat.idle_since.load(Ordering::Relaxed))
            };
            let (&number, _) = idle.min_by_key(|(_, seat)| rank(seat))?;
            if let Some(seat) = seats.remove(&number) {
                seat.wanted.notify_one();
            }
        }
        let seat = Arc::new(Seat {
            is_busy: AtomicBool::new(false),
            has_served: AtomicBool::new(false),
            idle_since: AtomicU64::new(now),
            wanted: Notify::new(),
        });
        seats.insert(now, seat.clone());
        drop(seats);
        Some(Place { places: self.clone(), number: now, seat })
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    fn seats(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Seat>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// A request has begun.
    pub(super) fn begin(&self) -> Busy {
        self.seat.is_busy.store(true, Ordering::Release);
        Busy { places: self.places.clone(), seat: self.seat.clone() }
    }

    /// Whether a request is in progress.
    pub(super) fn is_busy(&self) -> bool {
        self.seat.is_busy.load(Ordering::Acquire)
    }

    /// Until somebody else needs the place.
    pub(super) async fn wanted(&self) {
        self.seat.wanted.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.seats().remove(&self.number);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.seat.idle_since.store(self.places.tick(), Ordering::Relaxed);
        self.seat.has_served.store(true, Ordering::Relaxed);
        self.seat.is_busy.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use futures::FutureExt;

    fn is_wanted(place: &Place) -> bool {
        place.wanted().now_or_never().is_some()
    }

    #[test]
    fn a_newcomer_gets_the_place_of_who_never_asked_for_anything_and_then_of_who_waits_longest() {
        let places = Places::new(3);
        let [first, second, third] = [0; 3].map(|_| places.take().unwrap());
        drop(first.begin());
        drop(second.begin());
        let fourth = places.take().unwrap();
        assert!(is_wanted(&third) && !is_wanted(&first) && !is_wanted(&second));
        drop(third);
        let busy = fourth.begin();
        let fifth = places.take().unwrap();
        assert!(is_wanted(&first) && !is_wanted(&second) && !is_wanted(&fourth));
        let _all_busy = (second.begin(), fifth.begin());
        assert!(places.take().is_none(), "nobody who is being answered gives way");
        drop(busy);
        let sixth = places.take().unwrap();
        assert!(is_wanted(&fourth));
        drop(sixth);
        assert!(places.take().is_some(), "a place that is given back is free");
        assert!(!is_wanted(&second));
    }
}
