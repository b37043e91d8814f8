//! Least recently used, exactly.

use super::policy::Eviction;
use crate::arena::{Arena, List, Storage};
use crate::error::Result;

/// Touches that are applied together. Moving an entry writes to two neighbours that are in no cache
/// of the processor; many such misses overlap and take the time of one.
const BATCH: usize = 64;

/// The list is in the order of use; a touch moves an entry to its end.
///
/// In memory of one process touches are deferred and applied in batches, before anything else
/// looks at the order. Other processes would not see deferred touches, so in a shared index each is
/// applied at once.
#[derive(Debug, Default)]
pub struct Lru {
    /// Entries that were used since the last batch, in the order of use.
    touched: Vec<u32>,
}

impl Lru {
    fn flush<S: Storage>(&mut self, arena: &mut Arena<S>) -> Result<()> {
        if self.touched.is_empty() {
            return Ok(());
        }
        // Independent reads of all neighbours, so that the misses overlap.
        let mut read = 0;
        for &i in &self.touched {
            let cell = arena.get(i)?;
            read ^= arena.get(cell.older)?.newer ^ arena.get(cell.newer)?.older;
        }
        std::hint::black_box(read);
        let mut touched = std::mem::take(&mut self.touched);
        let result = touched.iter().try_for_each(|i| move_to_end(arena, *i));
        touched.clear();
        self.touched = touched;
        result
    }
}

#[inline]
fn move_to_end<S: Storage>(arena: &mut Arena<S>, entry: u32) -> Result<()> {
    if arena.list(List::Recency)[1] == entry {
        return Ok(());
    }
    arena.unlink(List::Recency, entry)?;
    arena.link(List::Recency, entry, true)
}

impl Eviction for Lru {
    fn insert<S: Storage>(&mut self, arena: &mut Arena<S>, entry: u32) -> Result<()> {
        self.flush(arena)?;
        arena.link(List::Recency, entry, true)
    }

    #[inline]
    fn touch<S: Storage>(&mut self, arena: &mut Arena<S>, entry: u32) -> Result<()> {
        if !S::EXCLUSIVE {
            return move_to_end(arena, entry);
        }
        self.touched.push(entry);
        if self.touched.len() < BATCH {
            return Ok(());
        }
        self.flush(arena)
    }

    fn remove<S: Storage>(&mut self, arena: &mut Arena<S>, entry: u32) -> Result<()> {
        self.flush(arena)?;
        arena.unlink(List::Recency, entry)
    }

    fn victim<S: Storage>(&mut self, arena: &mut Arena<S>) -> Result<Option<u32>> {
        self.flush(arena)?;
        arena.end(List::Recency, false)
    }

    fn order<S: Storage>(&self, arena: &Arena<S>) -> Result<Vec<u32>> {
        let mut order = arena.list_cells(List::Recency)?;
        for i in &self.touched {
            order.retain(|other| other != i);
            order.push(*i);
        }
        Ok(order)
    }

    fn reset(&mut self) {
        self.touched.clear();
    }
}
