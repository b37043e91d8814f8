//! Reads: what serves a request, in which order entries were used, and who reads the source.

use super::select::{select, within};
use super::{Cache, Found, Joined, Verify, Victim};
use crate::block::Block;
use crate::cell::{Cell, State};
use crate::error::{Fault, Res};
use crate::flights::{Closed, Ticket};
use crate::key::Span;

/// Uses of entries that are entered in the order together.
const PUT_OFF: usize = 64;

impl<B: Block, T: Clone> Cache<B, T> {
    /// Finds an entry that holds what is asked for, without counting or touching anything.
    ///
    /// For a range these are looked at: the full value, the very range, and of the other ranges of
    /// the key the one with most bytes and the one that came last. That takes the same time
    /// however many ranges there are; a range inside a third one is not found.
    pub fn peek(&self, key: &str, span: Span, now: u64) -> Res<Option<Found>> {
        if let Some(i) = self.cells.find(key, Span::Full)? {
            let cell = self.cells.get(i)?;
            if self.can_serve(cell, now)
                && let Some((start, length)) = select(cell.size, span, self.limits.lenient)
            {
                return Ok(Some(found(i, cell, Span::Full, start, length)));
            }
        }
        if span == Span::Full {
            return Ok(None);
        }
        self.peek_ranges(key, span, now)
    }

    fn peek_ranges(&self, key: &str, span: Span, now: u64) -> Res<Option<Found>> {
        let Some(object) = self.cells.find_object(key)? else {
            return Ok(None);
        };
        if let Some(i) = self.cells.find_range(object, span)? {
            let cell = self.cells.get(i)?;
            if self.can_serve(cell, now) {
                return Ok(Some(found(i, cell, span, 0, cell.size)));
            }
        }
        let hints = self.cells.get(object)?;
        for i in [hints.earlier, hints.later] {
            let cell = self.cells.get(i)?;
            if i == 0 || !self.can_serve(cell, now) {
                continue;
            }
            if cell.parent != object {
                return Err(Fault::Corrupt("a hint that leads to another key"));
            }
            let held = self.cells.span(i)?;
            if let Some((start, length)) = within(held, cell.size, span) {
                return Ok(Some(found(i, cell, held, start, length)));
            }
        }
        Ok(None)
    }

    /// Bytes of a full value that is served as it is, or `Some(None)` where there is none; marks it as
    /// most recently used and counts a hit, or a miss. What nearly every request is, in half of the
    /// instructions: the processor then goes on to the next one while it waits for the memory of this
    /// one. `None` says nothing; see [`Cache::lookup`].
    #[inline]
    pub fn hit(&mut self, key: &str, now: u64) -> Option<Option<u64>> {
        let Some(i) = self.cells.find_chunk(key)? else {
            self.stats.misses += 1;
            return Some(None);
        };
        let cell = self.cells.get(i).ok()?;
        if !self.can_serve(cell, now) || self.needs_check(i, cell) {
            return None;
        }
        let size = cell.size;
        self.touch(i).ok()?;
        self.stats.hits += 1;
        Some(Some(size))
    }

    /// Finds an entry that holds what is asked for, marks it as most recently used, and counts a
    /// hit or a miss.
    #[inline]
    pub fn lookup(&mut self, key: &str, span: Span, now: u64) -> Res<Option<Found>> {
        let found = self.peek(key, span, now)?;
        match found {
            Some(found) => {
                self.touch(found.handle as u32)?;
                self.stats.hits += 1;
            }
            None => self.stats.misses += 1,
        }
        Ok(found)
    }

    /// Marks an entry as most recently used. Where nobody else sees the order, that is put off, for
    /// its two neighbours are two cells that no cache of the processor has, and many of them are
    /// fetched in the time of one.
    #[inline]
    fn touch(&mut self, i: u32) -> Res<()> {
        if !B::EXCLUSIVE {
            return self.cells.touch(i);
        }
        self.touched.push(i);
        if self.touched.len() < PUT_OFF {
            return Ok(());
        }
        self.put_in_order()
    }

    /// Moves what was touched, in the order of the touches; before anything else changes the order
    /// or goes by it.
    pub(super) fn put_in_order(&mut self) -> Res<()> {
        if self.touched.is_empty() {
            return Ok(());
        }
        // Reads that wait for nothing bring the neighbours near, all at once.
        let mut near = 0;
        for &i in &self.touched {
            let cell = self.cells.get(i)?;
            near ^= self.cells.get(cell.older)?.newer ^ self.cells.get(cell.newer)?.older;
        }
        std::hint::black_box(near);
        let mut touched = std::mem::take(&mut self.touched);
        let result = touched.iter().try_for_each(|i| self.cells.touch(*i));
        touched.clear();
        self.touched = touched;
        result
    }

    /// A hit turned out to be none: its bytes were gone, short or damaged. The entry is dropped if
    /// it is still the same one, and the request counts as a miss.
    pub fn discard(&mut self, at: u64) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        self.missed();
        let i = at as u32;
        match self.cells.get(i) {
            Ok(cell) if cell.is_entry() && cell.state() == State::Present => {
                if handle(i, cell) == at {
                    self.drop_all(&[i])
                } else {
                    Ok(Vec::new())
                }
            }
            _ => Ok(Vec::new()),
        }
    }

    /// A hit could not be used after all; the request counts as a miss.
    pub fn missed(&mut self) {
        self.stats.hits = self.stats.hits.saturating_sub(1);
        self.stats.misses += 1;
    }

    /// A request went past the index.
    pub fn count_miss(&mut self) {
        self.stats.misses += 1;
    }

    /// Joins the flight that brings this span, or opens one. With `anyway` that happens even
    /// where an entry could serve it: the cache store is out of use.
    pub fn join(
        &mut self,
        key: &str,
        span: Span,
        payload: T,
        now: u64,
        anyway: bool,
    ) -> Res<Joined<T>> {
        if !anyway && self.peek(key, span, now)?.is_some() {
            return Ok(Joined::Ready);
        }
        let version = self.version(key);
        Ok(match self.flights.join(key, span, version) {
            Some((span, payload)) => Joined::Follow(span, payload),
            None => Joined::Lead(self.flights.open(key, span, Some(payload), version)),
        })
    }

    /// Closes a flight and hands out what its readers waited on.
    pub fn land(&mut self, key: &str, ticket: Ticket) -> Option<Closed<T>> {
        self.flights.close(key, ticket)
    }

    /// Closes the flight with this payload, whose reader cannot go on; hands out the same.
    pub fn strike(&mut self, key: &str, is: impl Fn(&T) -> bool) -> Option<Closed<T>> {
        self.flights.strike(key, is)
    }

    /// The bytes of an entry were read and are what they should be, or it was not known what they
    /// should be and is now.
    pub fn verified(&mut self, at: u64, checksum: u32) {
        let i = at as u32;
        if let Ok(cell) = self.cells.get_mut(i)
            && cell.is_entry()
            && cell.state() == State::Present
            && handle(i, cell) == at
        {
            cell.set_checksum(Some(checksum));
            if B::EXCLUSIVE {
                cell.set_verified();
                return;
            }
            let mark = mark(cell);
            self.seen.set(i, mark);
        }
    }

    /// Whether the bytes of an entry have to be compared with the checksum before they are served.
    #[must_use]
    pub fn must_verify(&self, at: u64) -> bool {
        let i = at as u32;
        let cell = self.cells.get(i);
        cell.is_ok_and(|cell| self.needs_check(i, cell))
    }

    #[inline]
    fn needs_check(&self, i: u32, cell: &Cell) -> bool {
        match self.limits.verify {
            // Taken in by a rebuild, perhaps after a loss of power: only the bytes tell.
            Verify::Never => !self.limits.flat && cell.checksum().is_none(),
            Verify::Always => true,
            Verify::First if B::EXCLUSIVE => !cell.is_verified(),
            Verify::First => self.seen.get(i) != mark(cell),
        }
    }
}

fn found(i: u32, cell: &Cell, span: Span, start: u64, length: u64) -> Found {
    Found {
        handle: handle(i, cell),
        span,
        size: cell.size,
        checksum: cell.checksum(),
        start,
        length,
    }
}

/// Tells the contents of one cell from those that it may have later; never 0.
fn mark(cell: &Cell) -> u32 {
    (cell.checksum().unwrap_or(0) ^ cell.time() as u32) | 1
}

fn handle(i: u32, cell: &Cell) -> u64 {
    u64::from(i) | (cell.time() ^ cell.size.rotate_left(16)) << 32
}
