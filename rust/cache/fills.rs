//! Making room for a value, and deciding whether it stays once its bytes are written.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{BATCH, Cache, Victim};
use crate::block::Block;
use crate::cell::{Kind, State};
use crate::cells::{Cells, ROOT};
use crate::error::{Fault, Res};
use crate::flights::{Closed, Ticket};
use crate::key::Span;

/// Times that a reservation looks for other victims after deletes have failed.
const ROUNDS: u32 = 8;

/// Whether bytes may be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// Write the bytes, then finish or abort.
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
    /// [`crate::flights::Flights::losses`] when the ticket was valid.
    pub(super) losses: u64,
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
        if self.conflicts(key, span)? {
            return Ok(self.refuse(Refusal::Conflict));
        }
        let id = self.next_reservation;
        self.next_reservation += 1;
        let reservation = Reservation {
            key: known,
            span,
            size,
            ticket,
            losses: self.flights.losses(),
            room: 0,
            failures: 0,
            asked: SmallVec::new(),
            cell: 0,
        };
        self.proceed(id, reservation, own, now)
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
        let Some(mut reservation) = self.reservations.remove(&id) else {
            return Ok(self.refuse(Refusal::Void));
        };
        reservation.failures += u32::from(!failed.is_empty());
        reservation.asked.clear();
        // In the same step, so what the victims held goes to nobody else.
        self.proceed(id, reservation, None, now)
    }

    /// Does the same where every delete that the reservation asked for has succeeded.
    pub fn cleared(&mut self, id: u64, now: u64) -> Res<Room> {
        self.put_in_order()?;
        let Some(mut reservation) = self.reservations.remove(&id) else {
            return Ok(self.refuse(Refusal::Void));
        };
        let asked = std::mem::take(&mut reservation.asked);
        match self.settled(&asked, &[]) {
            Ok(()) => self.proceed(id, reservation, None, now),
            Err(fault) => {
                self.reservations.insert(id, reservation);
                Err(fault)
            }
        }
    }

    /// Notes which deletes a reservation waits for.
    pub(super) fn ask(id: u64, reservation: &mut Reservation, victims: Vec<Victim>) -> Room {
        reservation.asked.clear();
        reservation.asked.extend(victims.iter().map(|v| v.cell));
        Room::Evict(id, victims)
    }

    /// Gives a reservation up to `free` bytes; returns how many it still lacks.
    pub(super) fn promise(&mut self, reservation: &mut Reservation, free: u64) -> u64 {
        let more = free.min(reservation.size - reservation.room);
        reservation.room += more;
        if more != 0 {
            self.change_promised(|promised| promised.saturating_add(more));
        }
        reservation.size - reservation.room
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

    /// Goes on with a reservation. It is kept unless it is refused.
    pub(super) fn proceed(
        &mut self,
        id: u64,
        mut reservation: Reservation,
        own: Option<u32>,
        now: u64,
    ) -> Res<Room> {
        let room = self.make_room(id, &mut reservation, own, now);
        if !matches!(room, Ok(Room::Refused(_))) {
            self.reservations.insert(id, reservation);
        }
        room
    }

    fn make_room(
        &mut self,
        id: u64,
        reservation: &mut Reservation,
        own: Option<u32>,
        now: u64,
    ) -> Res<Room> {
        if reservation.cell != 0 {
            return Ok(Room::Granted(id));
        }
        let bound = self.bound();
        if reservation.size > bound {
            let mut victims = Vec::new();
            if let Some(i) = own {
                self.take(i, &mut victims)?;
            }
            if victims.is_empty() {
                return Ok(self.give_up(reservation, Refusal::TooLarge));
            }
            return Ok(Self::ask(id, reservation, victims));
        }
        let header = self.cells.header();
        let taken = header.physical.saturating_add(header.promised);
        // More than nothing where the bound has become smaller since.
        let excess = taken.saturating_sub(bound);
        let lacking = self.promise(reservation, bound.saturating_sub(taken));
        if lacking == 0 && own.is_none() {
            return self.grant(id, reservation);
        }
        let lacking = if lacking == 0 {
            0
        } else {
            lacking.saturating_add(excess)
        };
        if reservation.failures > ROUNDS {
            return Ok(self.give_up(reservation, Refusal::NoRoom));
        }
        let mut victims = Vec::new();
        let mut freed = 0u64;
        if let Some(i) = own {
            freed += self.take(i, &mut victims)?;
        }
        let reachable = self.cells.header().physical;
        if lacking > freed.saturating_add(reachable) {
            self.settled_victims(&victims)?;
            return Ok(self.give_up(reservation, Refusal::NoRoom));
        }
        while freed < lacking && victims.len() < BATCH {
            // Whoever has seen a delete fail looks for others, or one orphan that cannot be
            // deleted would keep everybody out.
            let Some(i) = self.next_victim(now, reservation.failures == 0)? else {
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
            return Ok(self.give_up(reservation, Refusal::NoRoom));
        }
        Ok(Self::ask(id, reservation, victims))
    }

    fn grant(&mut self, id: u64, reservation: &mut Reservation) -> Res<Room> {
        if !self.is_valid(reservation) {
            return Ok(self.give_up(reservation, Refusal::Void));
        }
        let (key, span) = (&*reservation.key, reservation.span);
        if self.conflicts(key, span)? {
            let is_held = self.cells.find(key, span)?.is_some();
            let why = if is_held {
                Refusal::Busy
            } else {
                Refusal::Conflict
            };
            return Ok(self.give_up(reservation, why));
        }
        match self.cells.begin_writing(key, span, reservation.size) {
            Ok(Some(cell)) => reservation.cell = cell,
            Ok(None) => return Ok(self.give_up(reservation, Refusal::Busy)),
            Err(Fault::Full) => return Ok(self.give_up(reservation, Refusal::Full)),
            Err(fault) => return Err(fault),
        }
        self.give_back_room(reservation);
        Ok(Room::Granted(id))
    }

    fn give_back_room(&mut self, reservation: &mut Reservation) {
        let room = std::mem::take(&mut reservation.room);
        if room != 0 {
            self.change_promised(|promised| promised.saturating_sub(room));
        }
    }

    fn give_up(&mut self, reservation: &mut Reservation, why: Refusal) -> Room {
        self.give_back_room(reservation);
        self.refuse(why)
    }

    pub(super) fn refuse(&mut self, why: Refusal) -> Room {
        self.stats.refusals += 1;
        Room::Refused(why)
    }

    fn take_granted(&mut self, id: u64) -> Option<Reservation> {
        let reservation = self.reservations.remove(&id)?;
        if reservation.cell == 0 {
            self.reservations.insert(id, reservation);
            return None;
        }
        Some(reservation)
    }

    fn decide(
        &mut self,
        reservation: &Reservation,
        checksum: Option<u32>,
        now: u64,
    ) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        if self.is_valid(reservation) {
            self.cells.make_present(reservation.cell, checksum, now)?;
            return Ok(Vec::new());
        }
        self.stats.refusals += 1;
        self.unwrite(reservation)
    }

    /// The bytes are written: commits the entry, and closes the flight of its ticket as [`Cache::land`]
    /// does, in one step. What has to be deleted after all are the bytes themselves, where a write has
    /// made the ticket void. `None` where nothing was granted.
    pub fn finish(&mut self, id: u64, checksum: Option<u32>, now: u64) -> Res<Option<Finished<T>>> {
        let Some(reservation) = self.take_granted(id) else {
            return Ok(None);
        };
        let victims = self.decide(&reservation, checksum, now)?;
        let (key, ticket) = (reservation.key, reservation.ticket);
        let flight = self.flights.close_known(key, ticket);
        Ok(Some(Finished { victims, flight }))
    }

    /// Whether this reservation is known; one from before the index was emptied is not.
    #[must_use]
    pub fn is_reserved(&self, id: u64) -> bool {
        self.reservations.get(&id).is_some()
    }

    /// The bytes were not written, or nobody knows. Returns what has to be deleted.
    pub fn abort(&mut self, id: u64) -> Res<Vec<Victim>> {
        let Some(mut reservation) = self.reservations.remove(&id) else {
            return Ok(Vec::new());
        };
        self.give_back_room(&mut reservation);
        if reservation.cell == 0 {
            return Ok(Vec::new());
        }
        self.unwrite(&reservation)
    }

    /// Whether a file system could not hold this key beside those that are held.
    #[inline]
    pub(super) fn conflicts(&self, key: &str, span: Span) -> Res<bool> {
        if self.limits.flat || span != Span::Full {
            return Ok(false);
        }
        self.conflicts_in_files(key)
    }

    fn conflicts_in_files(&self, key: &str) -> Res<bool> {
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
