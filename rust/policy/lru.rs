//! Least recently used, exactly.

use super::deferred::Deferred;
use super::entries::Entries;
use super::policy::Eviction;
use crate::arena::{End, List};
use crate::error::Result;

/// The recency list is in the order of use; a touch moves an entry to its end.
///
/// Entries in the main list are those that another policy has left there, and that were not used since: they
/// go first.
#[derive(Debug, Default)]
pub struct Lru(Deferred);

#[inline]
fn move_to_end<E: Entries>(entries: &mut E, entry: u32) -> Result<()> {
    entries.move_to(entry, List::Recency)
}

impl Eviction for Lru {
    fn insert<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        self.0.flush(entries, move_to_end)?;
        entries.enter(entry, 0)
    }

    #[inline]
    fn touch<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        self.0.touch(entries, entry, move_to_end)
    }

    fn remove<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        self.0.flush(entries, move_to_end)?;
        entries.leave(entry)
    }

    fn victim<E: Entries>(&mut self, entries: &mut E) -> Result<Option<u32>> {
        self.0.flush(entries, move_to_end)?;
        match entries.end(List::Main, End::First)? {
            Some(left) => Ok(Some(left)),
            None => entries.end(List::Recency, End::First),
        }
    }

    fn first_of<E: Entries>(&mut self, entries: &mut E, list: List) -> Result<Option<u32>> {
        self.0.flush(entries, move_to_end)?;
        entries.end(list, End::First)
    }

    fn order<E: Entries>(&self, entries: &E) -> Result<Vec<u32>> {
        let mut order = entries.all_of(List::Main)?;
        order.extend(entries.all_of(List::Recency)?);
        for i in self.0.waiting() {
            order.retain(|other| other != i);
            order.push(*i);
        }
        Ok(order)
    }

    fn reset(&mut self) {
        self.0.clear();
    }
}
