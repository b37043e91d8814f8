//! Making room for a value, and deciding whether it stays once its bytes are written.

use std::collections::hash_map::Entry;
use std::sync::Arc;

use smallvec::SmallVec;

use super::{BATCH, Cache, Victim};
use crate::block::Block;
use crate::cell::{Kind, State};
use crate::cells::{Cells, List, ROOT};
use crate::error::{Fault, Res};
use crate::flights::{Closed, Ticket};
use crate::key::Span;

/// Times that a reservation looks for other victims after deletes have failed.
const ROUNDS: u32 = 8;

/// Whether bytes may be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// Write the bytes, then commit or abort.
    Granted(u64),
    /// Delete these first and report to [`Cache::settle`].
    Evict(u64, Vec<Victim>),
    /// Leave the value uncached. The reservation is gone.
    Refused(Refusal),
}

/// What is left of a fill that has ended.
#[derive(Debug)]
pub struct Finished<T> {
    /// What has to be deleted after all.
    pub victims: Vec<Victim>,
    /// The flight of its ticket; `None` where that was closed before.
    pub flight: Option<Closed<T>>,
}

/// Why a value stays uncached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is larger than the bound.
    TooLarge,
    /// A write has overtaken it.
    Void,
    /// It is there already.
    Held,
    /// Bytes of the same name are being written or deleted.
    Busy,
    /// What occupies the room cannot be deleted, or belongs to others.
    NoRoom,
    /// The key is a directory of other keys, or lies below a key: a file system cannot hold both.
    Conflict,
    /// The index cannot grow.
    Full,
    /// The index does not know yet what is in the cache store.
    Rebuilding,
}

#[derive(Debug)]
pub(super) struct Reservation {
    pub(super) key: Arc<str>,
    pub(super) span: Span,
    pub(super) size: u64,
    pub(super) ticket: Ticket,
    /// Bytes of `promised` that are held for this reservation.
    pub(super) room: u64,
    /// Times that deletes which it asked for have failed.
    pub(super) failures: u32,
    /// Entries whose deletes it has asked for last.
    pub(super) asked: SmallVec<[u32; 4]>,
    /// The entry, once granted.
    pub(super) cell: u32,
}

impl<B: Block, T: Clone> Cache<B, T> {
    /// Makes room for `size` bytes of a value that was read or written under `ticket`.
    pub fn reserve(
        &mut self,
        key: &str,
        span: Span,
        size: u64,
        ticket: Ticket,
        now: u64,
    ) -> Res<Room> {
        self.put_in_order()?;
        if !self.cells.block.is_complete() {
            return Ok(self.refuse(Refusal::Rebuilding));
        }
        let held = self.cells.find(key, span)?;
        // What it replaces goes even if there is no room for itself; see `proceed`.
        let too_large = size > self.bound();
        if too_large && !self.is_outdated(held, now)? {
            return Ok(self.refuse(Refusal::TooLarge));
        }
        let Some(known) = self.valid_key(key, ticket).map(Arc::clone) else {
            return Ok(self.refuse(Refusal::Void));
        };
        let mut own = None;
        if let Some(i) = held {
            let cell = self.cells.get(i)?;
            own = match cell.state() {
                State::Present if self.is_stale(cell, now) => Some(i),
                State::Present => return Ok(self.refuse(Refusal::Held)),
                State::Orphan => Some(i),
                State::Writing | State::Dropping => return Ok(self.refuse(Refusal::Busy)),
            };
        }
        if span == Span::Full && self.conflicts(key)? {
            return Ok(self.refuse(Refusal::Conflict));
        }
        let id = self.next_reservation;
        self.next_reservation += 1;
        let reservation = Reservation {
            key: known,
            span,
            size,
            ticket,
            room: 0,
            failures: 0,
            asked: SmallVec::new(),
            cell: 0,
        };
        self.reservations.insert(id, reservation);
        self.proceed(id, own, now)
    }

    /// Whether an entry is there of which nobody can make use any more.
    pub(super) fn is_outdated(&self, held: Option<u32>, now: u64) -> Res<bool> {
        let Some(i) = held else { return Ok(false) };
        let cell = self.cells.get(i)?;
        let stale = cell.state() == State::Present && self.is_stale(cell, now);
        Ok(stale || cell.state() == State::Orphan)
    }

    /// Reports the deletes that a reservation asked for, and goes on with it.
    pub fn settle(&mut self, id: u64, dropped: &[u32], failed: &[u32], now: u64) -> Res<Room> {
        self.put_in_order()?;
        self.settled(dropped, failed)?;
        if let Some(reservation) = self.reservations.get_mut(&id) {
            reservation.failures += u32::from(!failed.is_empty());
            reservation.asked.clear();
        }
        // In the same step, so what the victims held goes to nobody else.
        self.proceed(id, None, now)
    }

    /// Does the same where every delete that the reservation asked for has succeeded.
    pub fn cleared(&mut self, id: u64, now: u64) -> Res<Room> {
        let reservation = self.reservations.get_mut(&id);
        let asked = reservation.map_or_else(SmallVec::new, |r| std::mem::take(&mut r.asked));
        self.settle(id, &asked, &[], now)
    }

    /// Notes which deletes a reservation waits for.
    pub(super) fn ask(&mut self, id: u64, victims: Vec<Victim>) -> Room {
        if let Some(reservation) = self.reservations.get_mut(&id) {
            reservation.asked.clear();
            reservation.asked.extend(victims.iter().map(|v| v.cell));
        }
        Room::Evict(id, victims)
    }

    /// Gives a reservation up to `free` bytes; returns how many it still lacks.
    pub(super) fn promise(&mut self, id: u64, free: u64) -> u64 {
        let Some(reservation) = self.reservations.get_mut(&id) else {
            return 0;
        };
        let more = free.min(reservation.size - reservation.room);
        reservation.room += more;
        let lacking = reservation.size - reservation.room;
        self.change_promised(|promised| promised.saturating_add(more));
        lacking
    }

    pub(super) fn change_promised(&mut self, change: impl Fn(u64) -> u64) {
        let block = &mut self.cells.block;
        let header = block.header_mut();
        header.promised = change(header.promised);
        let me = block.me();
        if let Some(participant) = block.participants_mut().get_mut(me) {
            participant.promised = change(participant.promised);
        }
    }

    /// The smallest bound of all who share the index.
    pub(super) fn bound(&self) -> u64 {
        let participants = self.cells.block.participants().iter();
        let bounds = participants.filter(|p| p.live != 0).map(|p| p.bound);
        bounds.fold(self.limits.max_size, u64::min)
    }

    pub(super) fn proceed(&mut self, id: u64, own: Option<u32>, now: u64) -> Res<Room> {
        let Some(reservation) = self.reservations.get_mut(&id) else {
            return Ok(self.refuse(Refusal::Void));
        };
        if reservation.cell != 0 {
            return Ok(Room::Granted(id));
        }
        let failures = reservation.failures;
        if reservation.size > self.bound() {
            let mut victims = Vec::new();
            if let Some(i) = own {
                self.take(i, &mut victims)?;
            }
            if victims.is_empty() {
                return self.give_up(id, Refusal::TooLarge);
            }
            return Ok(self.ask(id, victims));
        }
        let header = self.cells.header();
        let taken = header.physical.saturating_add(header.promised);
        let bound = self.bound();
        // More than nothing where the bound has become smaller since.
        let excess = taken.saturating_sub(bound);
        let lacking = self.promise(id, bound.saturating_sub(taken));
        if lacking == 0 && own.is_none() {
            return self.grant(id);
        }
        let lacking = if lacking == 0 {
            0
        } else {
            lacking.saturating_add(excess)
        };
        if failures > ROUNDS {
            return self.give_up(id, Refusal::NoRoom);
        }
        let mut victims = Vec::new();
        let mut freed = 0u64;
        if let Some(i) = own {
            freed += self.take(i, &mut victims)?;
        }
        let reachable = self.cells.header().physical;
        if lacking > freed.saturating_add(reachable) {
            self.settled_victims(&victims)?;
            return self.give_up(id, Refusal::NoRoom);
        }
        while freed < lacking && victims.len() < BATCH {
            // Whoever has seen a delete fail looks for others, or one orphan that cannot be
            // deleted would keep everybody out.
            let Some(i) = self.next_victim(now, failures == 0)? else {
                break;
            };
            let cell = self.cells.get(i)?;
            if cell.state() == State::Present {
                let stale = self.is_stale(cell, now);
                self.stats.evictions += 1;
                self.stats.expirations += u64::from(stale);
            }
            freed = freed.saturating_add(self.take(i, &mut victims)?);
        }
        if victims.is_empty() {
            return self.give_up(id, Refusal::NoRoom);
        }
        Ok(self.ask(id, victims))
    }

    pub(super) fn grant(&mut self, id: u64) -> Res<Room> {
        let Some(reservation) = self.reservations.get(&id) else {
            return Ok(self.refuse(Refusal::Void));
        };
        let (key, span) = (&*reservation.key, reservation.span);
        if !self.is_valid(key, reservation.ticket) {
            return self.give_up(id, Refusal::Void);
        }
        if self.cells.find(key, span)?.is_some() {
            return self.give_up(id, Refusal::Busy);
        }
        if span == Span::Full && self.conflicts(key)? {
            return self.give_up(id, Refusal::Conflict);
        }
        let cell = match self.cells.begin_writing(key, span, reservation.size) {
            Ok(cell) => cell,
            Err(Fault::Full) => return self.give_up(id, Refusal::Full),
            Err(fault) => return Err(fault),
        };
        self.give_back_room(id);
        if let Some(reservation) = self.reservations.get_mut(&id) {
            reservation.cell = cell;
        }
        Ok(Room::Granted(id))
    }

    pub(super) fn give_back_room(&mut self, id: u64) {
        if let Some(reservation) = self.reservations.get_mut(&id) {
            let room = std::mem::take(&mut reservation.room);
            self.change_promised(|promised| promised.saturating_sub(room));
        }
    }

    pub(super) fn give_up(&mut self, id: u64, why: Refusal) -> Res<Room> {
        self.give_back_room(id);
        self.reservations.remove(&id);
        Ok(self.refuse(why))
    }

    pub(super) fn refuse(&mut self, why: Refusal) -> Room {
        self.stats.refusals += 1;
        Room::Refused(why)
    }

    /// The bytes are written. Returns what has to be deleted after all: the bytes themselves,
    /// where a write has made the ticket void.
    pub fn commit(&mut self, id: u64, checksum: Option<u32>, now: u64) -> Res<Vec<Victim>> {
        match self.take_granted(id) {
            Some(reservation) => self.decide(&reservation, checksum, now),
            // Nothing was granted, so nothing was written.
            None => self.abort(id),
        }
    }

    pub(super) fn take_granted(&mut self, id: u64) -> Option<Reservation> {
        let entry = self.reservations.entry(id);
        match entry {
            Entry::Occupied(entry) if entry.get().cell != 0 => Some(entry.remove()),
            _ => None,
        }
    }

    pub(super) fn decide(
        &mut self,
        reservation: &Reservation,
        checksum: Option<u32>,
        now: u64,
    ) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        if self.is_valid(&reservation.key, reservation.ticket) {
            self.cells.make_present(reservation.cell, checksum, now)?;
            return Ok(Vec::new());
        }
        self.stats.refusals += 1;
        self.unwrite(reservation)
    }

    /// The same as [`Cache::commit`], then [`Cache::land`] for the flight of its ticket, in one step.
    /// `None` where nothing was granted.
    pub fn finish(&mut self, id: u64, checksum: Option<u32>, now: u64) -> Res<Option<Finished<T>>> {
        let Some(reservation) = self.take_granted(id) else {
            return Ok(None);
        };
        let victims = self.decide(&reservation, checksum, now)?;
        let flight = self.land(&reservation.key, reservation.ticket);
        Ok(Some(Finished { victims, flight }))
    }

    /// Whether this reservation is known; one from before the index was emptied is not.
    #[must_use]
    pub fn is_reserved(&self, id: u64) -> bool {
        self.reservations.contains_key(&id)
    }

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

    /// The bytes were not written, or nobody knows. Returns what has to be deleted.
    pub fn abort(&mut self, id: u64) -> Res<Vec<Victim>> {
        self.give_back_room(id);
        match self.reservations.remove(&id) {
            Some(reservation) if reservation.cell != 0 => self.unwrite(&reservation),
            _ => Ok(Vec::new()),
        }
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

    /// Whether a file system could not hold this key beside those that are held.
    pub(super) fn conflicts(&self, key: &str) -> Res<bool> {
        if self.limits.flat {
            return Ok(false);
        }
        if let Some(dir) = self.cells.find_dir(&format!("{key}/"))?
            && dir != ROOT
            && !self.cells.entries_below(dir, 1, values_only)?.is_empty()
        {
            return Ok(true);
        }
        for (slash, _) in key.match_indices('/') {
            let above = key.get(..slash).unwrap_or("");
            if self.cells.find(above, Span::Full)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn values_only<B: Block>(cells: &Cells<B>, i: u32) -> Res<bool> {
    Ok(cells.get(i)?.kind()? == Kind::Value)
}
