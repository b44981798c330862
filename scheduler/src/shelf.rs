//! Records by name, and in the order in which they came, newest first.

use std::collections::{BTreeMap, BTreeSet};

/// Records of one kind.
#[derive(Debug, Clone)]
pub(crate) struct Shelf<Id, T> {
    records: BTreeMap<Id, T>,
    /// When each came, with its name: the order of lists.
    order: BTreeSet<(u64, Id)>,
    came: fn(&T) -> u64,
}

impl<Id: Ord + Copy, T> Shelf<Id, T> {
    /// An empty shelf; `came` tells when a record came, which must never change.
    pub(crate) fn new(came: fn(&T) -> u64) -> Shelf<Id, T> {
        Shelf { records: BTreeMap::new(), order: BTreeSet::new(), came }
    }

    pub(crate) fn insert(&mut self, id: Id, record: T) {
        self.order.insert(((self.came)(&record), id));
        self.records.insert(id, record);
    }

    pub(crate) fn remove(&mut self, id: Id) -> Option<T> {
        let record = self.records.remove(&id)?;
        self.order.remove(&((self.came)(&record), id));
        Some(record)
    }

    pub(crate) fn get(&self, id: Id) -> Option<&T> {
        self.records.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        self.records.get_mut(&id)
    }

    pub(crate) fn contains(&self, id: Id) -> bool {
        self.records.contains_key(&id)
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// In the order of names.
    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.records.values()
    }

    /// Oldest first.
    pub(crate) fn oldest_first(&self) -> impl Iterator<Item = (Id, &T)> {
        self.order.iter().filter_map(|(_, id)| Some((*id, self.records.get(id)?)))
    }

    /// At most `limit` records out of those that the caller `sees`, which follow `after`, newest first, and whether there are more;
    /// `None` where it sees no such record to follow.
    pub(crate) fn page(
        &self,
        after: Option<Id>,
        limit: usize,
        sees: impl Fn(&T) -> bool,
    ) -> Option<(Vec<&T>, bool)> {
        if after.is_some_and(|id| !self.get(id).is_some_and(&sees)) {
            return None;
        }
        let rest: Box<dyn Iterator<Item = &(u64, Id)>> = match after {
            Some(id) => Box::new(self.order.range(..((self.came)(self.get(id)?), id)).rev()),
            None => Box::new(self.order.iter().rev()),
        };
        let mut rest = rest.filter_map(|(_, id)| self.records.get(id)).filter(|record| sees(record));
        let page = rest.by_ref().take(limit).collect();
        Some((page, rest.next().is_some()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pages_are_newest_first_and_records_of_one_second_are_told_apart() {
        let mut shelf = Shelf::new(|came: &u64| *came);
        for (id, came) in [(1, 10), (2, 30), (3, 20), (4, 20), (5, 5)] {
            shelf.insert(id, came);
        }
        let ids: Vec<u32> = shelf.oldest_first().map(|(id, _)| id).collect();
        assert_eq!(ids, [5, 1, 3, 4, 2]);
        assert_eq!(shelf.page(None, 2, |_| true).unwrap(), (vec![&30, &20], true));
        assert_eq!(shelf.page(Some(4), 2, |_| true).unwrap(), (vec![&20, &10], true));
        assert_eq!(shelf.page(Some(3), 9, |_| true).unwrap(), (vec![&10, &5], false));
        assert_eq!(shelf.page(Some(5), 9, |_| true).unwrap(), (vec![], false));
        assert!(shelf.page(Some(6), 9, |_| true).is_none());
        // Whoever does not see a record cannot follow it either.
        assert_eq!(shelf.page(None, 2, |came| *came != 20).unwrap(), (vec![&30, &10], true));
        assert!(shelf.page(Some(4), 9, |came| *came != 20).is_none());
        shelf.remove(4);
        assert_eq!(shelf.page(Some(2), 1, |_| true).unwrap(), (vec![&20], true));
    }
}
