//! Lookups: what serves a request, and who reads the source.

use super::cache::{Cache, Found, Freshness, Verify, Victim};
use super::in_flight::{ClosedFlight, Ticket};
use super::peers::Peers;
use crate::arena::{Cell, State};
use crate::error::{Error, Result};
use crate::key::{Asked, ByteRange, Part, select, within};
use crate::policy::Eviction;

/// What a reader that found nothing does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Joined<T> {
    /// Look up again: the value was cached meanwhile.
    Ready,
    /// Wait for this flight, which brings this range.
    Follow(ByteRange, T),
    /// Read the source; the ticket decides whether the value may be cached.
    Lead(Ticket),
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Finds an entry that holds what is asked for, without counting or touching anything.
    ///
    /// For a range these are tried: the full value, the same range, and of the other ranges of the
    /// key the widest and the newest. That takes the same time however many ranges there are; a
    /// range inside a third one is not found.
    pub fn peek(
        &self,
        key: &str,
        asked: impl Into<Asked>,
        fresh: impl Into<Freshness>,
    ) -> Result<Option<Found>> {
        let (asked, fresh) = (asked.into(), fresh.into());
        let range = asked.range;
        if let Some(i) = self.arena.find(key, ByteRange::Full)? {
            let cell = self.arena.get(i)?;
            if can_serve(cell, fresh) {
                let size = cell.size()?;
                let selected = select(size, range, asked.slices_like_python);
                if let Some((start, length)) = selected {
                    return Ok(Some(found(i, cell, size, ByteRange::Full, start, length)));
                }
            }
        }
        if range == ByteRange::Full {
            return Ok(None);
        }
        self.peek_ranges(key, range, fresh)
    }

    fn peek_ranges(&self, key: &str, range: ByteRange, fresh: Freshness) -> Result<Option<Found>> {
        let Some(object) = self.arena.find_object(key)? else {
            return Ok(None);
        };
        if let Some(i) = self.arena.find_range(object, range)? {
            let cell = self.arena.get(i)?;
            if can_serve(cell, fresh) {
                let size = cell.size()?;
                return Ok(Some(found(i, cell, size, range, 0, size)));
            }
        }
        let hints = self.arena.get(object)?;
        for i in [hints.earlier, hints.later] {
            let cell = self.arena.get(i)?;
            if i == 0 || !can_serve(cell, fresh) {
                continue;
            }
            if cell.parent != object {
                return Err(Error::Corrupt("tree: a hint to another key"));
            }
            let held = self.arena.byte_range(i)?;
            let size = cell.size()?;
            if let Some((start, length)) = within(held, size, range) {
                return Ok(Some(found(i, cell, size, held, start, length)));
            }
        }
        Ok(None)
    }

    /// The fast path for a full value that is served as it is: its size, or `Some(None)` for a
    /// miss. Touches the entry. `None` where only [`Cache::lookup`] can
    /// tell.
    ///
    /// This takes half of the instructions of a general lookup, so the processor can start on the
    /// next request while it waits for the memory of this one.
    #[inline]
    pub fn hit(&mut self, key: &str, fresh: impl Into<Freshness>) -> Option<Option<u64>> {
        self.hit_sampled(key, fresh, false)
    }

    /// The same; the request goes into the sample if so asked.
    #[inline]
    pub fn hit_sampled(
        &mut self,
        key: &str,
        fresh: impl Into<Freshness>,
        sampled: bool,
    ) -> Option<Option<u64>> {
        let hit = self.hit_cell(key, fresh, sampled)?;
        Some(hit.map(|(_, size)| size))
    }

    /// The same; tells the cell of the entry as well.
    #[inline]
    pub fn hit_cell(
        &mut self,
        key: &str,
        fresh: impl Into<Freshness>,
        sampled: bool,
    ) -> Option<Option<(u32, u64)>> {
        let fresh = fresh.into();
        let (found, hash) = self.arena.find_chunk(key)?;
        let Some(i) = found else {
            if self.absences() != 0 {
                return None;
            }
            self.read_planned(key, None);
            if sampled {
                self.sample(key, ByteRange::Full, None, fresh);
            }
            return Some(None);
        };
        let cell = self.arena.get(i).ok()?;
        if !can_serve(cell, fresh) || self.needs_check(i, cell) {
            return None;
        }
        let size = cell.size().ok()?;
        self.policy.touch(&mut self.arena, i).ok()?;
        self.read_planned(key, Some(i));
        if sampled {
            self.sample_hit(&Part::of_whole(hash), size);
        }
        Some(Some((i, size)))
    }

    /// Finds an entry that holds what is asked for, and touches it.
    #[inline]
    pub fn lookup(
        &mut self,
        key: &str,
        asked: impl Into<Asked>,
        fresh: impl Into<Freshness>,
    ) -> Result<Option<Found>> {
        let found = self.peek(key, asked, fresh)?;
        if let Some(found) = found {
            self.policy.touch(&mut self.arena, found.handle as u32)?;
        }
        self.read_planned(key, found.map(|found| found.handle as u32));
        Ok(found)
    }

    /// The bytes of a hit were missing, short or damaged. The entry is dropped if it is still the
    /// same one.
    pub fn discard(&mut self, at: u64) -> Result<Vec<Victim>> {
        let i = at as u32;
        match self.arena.get(i) {
            Ok(cell) if is_same(cell, i, at) => self.drop_all(&[i]),
            _ => Ok(Vec::new()),
        }
    }

    /// Joins the flight that brings this range, or opens one; with `anyway` even where an entry
    /// could serve it, because the cache store is out of use. The flight replaces entries that are
    /// stale by `fresh`.
    pub fn join(
        &mut self,
        key: &str,
        asked: impl Into<Asked>,
        payload: T,
        fresh: impl Into<Freshness>,
        anyway: bool,
    ) -> Result<Joined<T>> {
        let (asked, fresh) = (asked.into(), fresh.into());
        if !anyway && self.peek(key, asked, fresh)?.is_some() {
            return Ok(Joined::Ready);
        }
        let range = asked.range;
        let version = self.version(key);
        Ok(match self.flights.join(key, range, version) {
            Some((range, payload)) => Joined::Follow(range, payload),
            None => {
                let (max_age, made) = (fresh.max_age, self.arena.header().absences_made);
                let ticket = self
                    .flights
                    .open(key, range, Some(payload), version, max_age, made);
                Joined::Lead(ticket)
            }
        })
    }

    /// Whether anything of this key is on its way.
    #[must_use]
    pub fn is_in_flight(&self, key: &str) -> bool {
        self.flights.has(key)
    }

    /// Closes a flight and returns what its readers waited on.
    pub fn complete_flight(&mut self, key: &str, ticket: Ticket) -> Option<ClosedFlight<T>> {
        self.flights.close(key, ticket)
    }

    /// Closes the flight with this payload, because its reader cannot go on.
    pub fn abort_flight(&mut self, key: &str, is: impl Fn(&T) -> bool) -> Option<ClosedFlight<T>> {
        self.flights.abort(key, is)
    }

    /// Has later readers join another flight than the one with this payload: it began too long ago for them.
    pub fn supersede_flight(&mut self, key: &str, is: impl Fn(&T) -> bool) {
        self.flights.supersede(key, is);
    }

    /// The bytes of an entry were read and have this checksum, which was expected or unknown.
    pub fn verified(&mut self, at: u64, checksum: u32) {
        let i = at as u32;
        if let Ok(cell) = self.arena.get_mut(i)
            && is_same(cell, i, at)
        {
            cell.set_checksum(Some(checksum));
            if S::EXCLUSIVE {
                cell.set_verified();
            } else {
                self.verified.set(i, fingerprint(cell));
            }
        }
    }

    /// Whether the bytes of an entry have to be compared with their checksum before they are served.
    #[must_use]
    pub fn must_verify(&self, at: u64) -> bool {
        let i = at as u32;
        let cell = self.arena.get(i);
        cell.is_ok_and(|cell| self.needs_check(i, cell))
    }

    #[inline]
    fn needs_check(&self, i: u32, cell: &Cell) -> bool {
        match self.limits.verify {
            // Found by a rebuild, perhaps after a power failure: only the bytes tell.
            Verify::Never => {
                let outlives = !self.limits.flat_namespace || self.arena.storage.has_places();
                outlives && cell.checksum().is_none()
            }
            Verify::Always => true,
            Verify::First if S::EXCLUSIVE => !cell.is_verified(),
            Verify::First => self.verified.get(i) != fingerprint(cell),
        }
    }
}

pub(super) fn can_serve(cell: &Cell, fresh: Freshness) -> bool {
    cell.is_entry() && cell.state() == State::Live && !fresh.is_stale(cell.time())
}

fn found(i: u32, cell: &Cell, size: u64, range: ByteRange, start: u64, length: u64) -> Found {
    Found {
        handle: handle(i, cell),
        range,
        size,
        checksum: cell.checksum(),
        start,
        length,
    }
}

/// Tells the contents of a cell from those that it may have later; never 0.
pub(super) fn fingerprint(cell: &Cell) -> u32 {
    (cell.checksum().unwrap_or(0) ^ cell.time() as u32) | 1
}

fn handle(i: u32, cell: &Cell) -> u64 {
    u64::from(i) | cell.fingerprint() << 32
}

fn is_same(cell: &Cell, i: u32, at: u64) -> bool {
    cell.is_entry() && cell.state() == State::Live && handle(i, cell) == at
}
