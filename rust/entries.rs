//! Entries: the states that one goes through, and the books that its bytes are entered in.
//!
//! ```text
//!            granted            committed
//!   (none) ───────────▶ Writing ─────────▶ Present ──┐ dropped: evicted, expired,
//!                          │ aborted, void           │ overwritten, damaged
//!                          ▼                         ▼
//!   (none) ◀─────────── Dropping ◀───────────────────┘
//!            released      │ ▲
//!                   failed ▼ │ retried
//!                        Orphan
//! ```
//!
//! `physical` counts an entry in every state, for until its delete has returned nobody knows
//! that the bytes are gone. It changes in [`Cells::begin_writing`] and [`Cells::release`] only;
//! `present` changes in [`Cells::make_present`] and [`Cells::drop_present`] only.

use crate::block::Block;
use crate::cell::{Kind, State};
use crate::cells::{COUNT, Cells, List};
use crate::error::{Fault, Res};
use crate::key::Span;

const UNDERFLOW: Fault = Fault::Corrupt("more bytes gone than were there");

/// Milliseconds that a clock may seem to go back without having been set: every thread reads it
/// before it waits for the lock, so the readings arrive out of order. An entry of such a future
/// was fetched just now.
pub(crate) const SKEW: u64 = 1000;

impl<B: Block> Cells<B> {
    /// Makes an entry for bytes that are about to be written; `None` where there is one.
    pub(crate) fn begin_writing(&mut self, key: &str, span: Span, size: u64) -> Res<Option<u32>> {
        let physical = self
            .header()
            .physical
            .checked_add(size)
            .ok_or(Fault::Full)?;
        let Some(i) = self.insert(key, span)? else {
            return Ok(None);
        };
        let cell = self.get_mut(i)?;
        cell.size = size;
        cell.set_state(State::Writing);
        self.take_in_hand(i)?;
        let header = self.header_mut();
        header.physical = physical;
        header.entries = header.entries.checked_add(1).ok_or(COUNT)?;
        Ok(Some(i))
    }

    /// The bytes of a `Writing` entry are there and valid: it can be served from now on.
    pub(crate) fn make_present(&mut self, i: u32, checksum: Option<u32>, now: u64) -> Res<()> {
        self.unlink(List::Busy, i)?;
        let cell = self.get_mut(i)?;
        cell.set_checksum(checksum);
        cell.set_state(State::Present);
        let (size, parent, kind) = (cell.size, cell.parent, cell.kind()?);
        self.distrust_the_future(now)?;
        let latest = match self.list(List::Time)[1] {
            0 => 0,
            latest => self.get(latest)?.time(),
        };
        let cell = self.get_mut(i)?;
        cell.set_time(now.max(latest).max(1));
        // Undated ones are at the front.
        let dated = cell.time() != 0;
        self.link(List::Time, i, dated)?;
        self.link(List::Recency, i, true)?;
        if kind != Kind::Value {
            let widest = self.get(parent)?.earlier;
            let wider = widest == 0 || self.get(widest)?.size < size;
            let object = self.get_mut(parent)?;
            object.later = i;
            if wider {
                object.earlier = i;
            }
        }
        let header = self.header_mut();
        header.present = header.present.checked_add(size).ok_or(COUNT)?;
        header.present_entries = header.present_entries.checked_add(1).ok_or(COUNT)?;
        Ok(())
    }

    /// After the clock has stepped back, entries that were fetched "later" than now cannot be
    /// dated: they move to the front of the list with time 0, which is stale under any finite age.
    /// Each moves once, so a step costs no more than the entries that it concerns.
    fn distrust_the_future(&mut self, now: u64) -> Res<()> {
        loop {
            let latest = self.list(List::Time)[1];
            if latest == 0 || self.get(latest)?.time() <= now.saturating_add(SKEW) {
                return Ok(());
            }
            self.undate(latest)?;
        }
    }

    /// Says of a `Present` entry that it cannot be dated.
    pub(crate) fn undate(&mut self, i: u32) -> Res<()> {
        self.unlink(List::Time, i)?;
        self.get_mut(i)?.set_time(0);
        self.link(List::Time, i, false)
    }

    /// Notes that this participant is writing or deleting the bytes of an entry.
    fn take_in_hand(&mut self, i: u32) -> Res<()> {
        let me = self.block.me() as u32 + 1;
        self.link(List::Busy, i, true)?;
        self.get_mut(i)?.earlier = me;
        Ok(())
    }

    /// Marks a `Present` entry as most recently used.
    #[inline]
    pub(crate) fn touch(&mut self, i: u32) -> Res<()> {
        if self.list(List::Recency)[1] == i {
            return Ok(());
        }
        self.unlink(List::Recency, i)?;
        self.link(List::Recency, i, true)
    }

    /// A `Present` entry is not valid any more; the caller deletes its bytes.
    pub(crate) fn drop_present(&mut self, i: u32) -> Res<u64> {
        self.unlink(List::Recency, i)?;
        self.unlink(List::Time, i)?;
        let cell = self.get_mut(i)?;
        cell.set_state(State::Dropping);
        let (size, parent, kind) = (cell.size, cell.parent, cell.kind()?);
        self.take_in_hand(i)?;
        if kind != Kind::Value {
            // The hints of an object name entries that can be served, or nothing.
            let object = self.get_mut(parent)?;
            if object.earlier == i {
                object.earlier = 0;
            }
            if object.later == i {
                object.later = 0;
            }
        }
        let header = self.header_mut();
        header.present = header.present.checked_sub(size).ok_or(UNDERFLOW)?;
        header.present_entries = header.present_entries.checked_sub(1).ok_or(UNDERFLOW)?;
        Ok(size)
    }

    /// Takes an orphan up again; the caller tries once more to delete its bytes.
    pub(crate) fn retry(&mut self, i: u32) -> Res<u64> {
        self.unlink(List::Orphans, i)?;
        let cell = self.get_mut(i)?;
        cell.set_state(State::Dropping);
        let size = cell.size;
        self.take_in_hand(i)?;
        Ok(size)
    }

    /// The bytes of a `Dropping` entry could not be deleted.
    pub(crate) fn orphan(&mut self, i: u32) -> Res<()> {
        self.unlink(List::Busy, i)?;
        self.get_mut(i)?.set_state(State::Orphan);
        self.link(List::Orphans, i, true)
    }

    /// The bytes of a `Dropping` entry are gone.
    pub(crate) fn release(&mut self, i: u32) -> Res<()> {
        let size = self.get(i)?.size;
        self.unlink(List::Busy, i)?;
        self.remove(i)?;
        let header = self.header_mut();
        header.physical = header.physical.checked_sub(size).ok_or(UNDERFLOW)?;
        header.entries = header.entries.checked_sub(1).ok_or(UNDERFLOW)?;
        Ok(())
    }
}
