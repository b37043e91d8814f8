//! Entries on their way out: which goes next, and what becomes of its bytes.

use super::fills::Reservation;
use super::{BATCH, Cache, Victim};
use crate::block::Block;
use crate::cell::State;
use crate::cells::List;
use crate::error::{Fault, Res};
use crate::key::Span;

impl<B: Block, T: Clone> Cache<B, T> {
    /// Drops entries of at least `size` bytes, if there are so many; a batch at most.
    pub fn evict(&mut self, size: u64, now: u64) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        let mut victims = Vec::new();
        let mut freed = 0u64;
        while freed < size && victims.len() < BATCH {
            let Some(i) = self.next_victim(now, true)? else {
                break;
            };
            self.stats.evictions += u64::from(self.cells.get(i)?.state() == State::Present);
            freed = freed.saturating_add(self.take(i, &mut victims)?);
        }
        Ok(victims)
    }

    pub(super) fn unwrite(&mut self, reservation: &Reservation) -> Res<Vec<Victim>> {
        let cell = reservation.cell;
        self.cells.get_mut(cell)?.set_state(State::Dropping);
        let cache_key = reservation.span.cache_key(&reservation.key);
        Ok(vec![Victim { cell, cache_key }])
    }

    /// Reports deletes that no reservation waits for.
    pub fn settled(&mut self, dropped: &[u32], failed: &[u32]) -> Res<()> {
        for &i in dropped {
            if self.is_dropping(i) {
                self.cells.release(i)?;
            }
        }
        for &i in failed {
            if self.is_dropping(i) {
                self.cells.orphan(i)?;
            }
        }
        Ok(())
    }

    pub(super) fn settled_victims(&mut self, victims: &[Victim]) -> Res<()> {
        let failed: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        self.settled(&[], &failed)
    }

    pub(super) fn is_dropping(&self, i: u32) -> bool {
        let cell = self.cells.get(i);
        let me = self.cells.block.me() as u32 + 1;
        cell.is_ok_and(|c| c.is_entry() && c.state() == State::Dropping && c.earlier == me)
    }

    /// Whether there are bytes that could not be deleted.
    #[must_use]
    pub fn has_orphans(&self) -> bool {
        self.cells.header().orphans != [0; 2]
    }

    /// Up to `limit` orphans whose delete is worth another try.
    pub fn orphans(&mut self, limit: usize) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        let mut victims = Vec::new();
        while victims.len() < limit {
            let Some(i) = self.cells.end(List::Orphans, false)? else {
                break;
            };
            self.take(i, &mut victims)?;
        }
        Ok(victims)
    }

    /// Who goes next: bytes that are of no use, then the stale, then the least recently used.
    pub(super) fn next_victim(&self, now: u64, orphans: bool) -> Res<Option<u32>> {
        if orphans && let Some(orphan) = self.cells.end(List::Orphans, false)? {
            return Ok(Some(orphan));
        }
        // What is stale is at the ends: too old at one, of a future that never was at the other.
        for at_last in [false, true] {
            if let Some(i) = self.cells.end(List::Time, at_last)?
                && self.is_stale(self.cells.get(i)?, now)
            {
                return Ok(Some(i));
            }
        }
        self.cells.end(List::Recency, false)
    }

    /// Makes an entry a victim; returns its bytes, or 0 where somebody else has it in hand.
    pub(super) fn take(&mut self, i: u32, victims: &mut Vec<Victim>) -> Res<u64> {
        let state = self.cells.get(i)?.state();
        if matches!(state, State::Writing | State::Dropping) {
            return Ok(0);
        }
        self.cells.bring_near(i)?;
        let (key, span) = self.cells.name(i)?;
        if !B::EXCLUSIVE && self.cells.find(&key, span)? != Some(i) {
            // The name that a damaged cell gives may be that of bytes which are not ours.
            return Err(Fault::Corrupt("a name that leads to another cell"));
        }
        let size = if state == State::Present {
            self.cells.drop_present(i)?
        } else {
            self.cells.retry(i)?
        };
        let cache_key = match span {
            Span::Full => key,
            _ => span.cache_key(&key),
        };
        victims.push(Victim { cell: i, cache_key });
        Ok(size)
    }

    pub(super) fn drop_all(&mut self, cells: &[u32]) -> Res<Vec<Victim>> {
        let mut victims = Vec::with_capacity(cells.len());
        for &i in cells {
            self.take(i, &mut victims)?;
        }
        Ok(victims)
    }
}
