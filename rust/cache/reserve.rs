//! Reservations: bytes are reserved before they are written, and victims make way for them.

use std::sync::Arc;

use smallvec::SmallVec;

use super::cache::{BATCH, Cache, Freshness, Tally, Victim};
use super::evict::Candidate;
use super::in_flight::Ticket;
use super::peers::Peers;
use crate::arena::{Arena, Cell, Kind, ROOT, State, Storage, TOO_LARGE};
use crate::error::Result;
use crate::key::{self, ByteRange};
use crate::policy::{Eviction, Newcomer};

/// Failed deletes after which a reservation looks for no further victims.
const MAX_FAILURES: u32 = 8;

/// Blocks by which a folder may grow when it gets one more name.
const GROWTH: u64 = 2;

/// The answer to a request for bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// Write the bytes, then commit or abort.
    Granted(u64),
    /// Delete these first and report to [`Cache::evictions_done`].
    NeedsEviction(u64, Vec<Victim>),
    /// Leave the value uncached. The reservation is gone.
    Rejected(RejectReason),
}

/// Why a value stays uncached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectReason {
    /// It is larger than the bound.
    TooLarge,
    /// A part of its name is longer than [`key::MAX_LABEL`], or, in a pool, the name than a header takes.
    KeyTooLong,
    /// A write has invalidated its ticket.
    Invalidated,
    /// It is cached already.
    AlreadyCached,
    /// Bytes of the same name are being written or deleted.
    Busy,
    /// Not enough bytes can be freed.
    NoSpace,
    /// The key is a directory of other keys, or lies below a key, and these are of use: a file system cannot hold both.
    PathConflict,
    /// The index cannot grow.
    IndexFull,
    /// The index does not list yet what is in the cache store.
    Rebuilding,
}

impl RejectReason {
    /// The reason in words.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            RejectReason::TooLarge => "too large",
            RejectReason::KeyTooLong => "key too long",
            RejectReason::Invalidated => "overtaken by a write",
            RejectReason::AlreadyCached => "already cached",
            RejectReason::Busy => "busy",
            RejectReason::NoSpace => "no space",
            RejectReason::PathConflict => "path conflict",
            RejectReason::IndexFull => "index full",
            RejectReason::Rebuilding => "rebuilding",
        }
    }
}

#[derive(Debug)]
pub(super) struct Reservation {
    pub(super) key: Arc<str>,
    pub(super) range: ByteRange,
    pub(super) size: u64,
    /// Bytes that it may take in the cache store, folders included.
    pub(super) cost: u64,
    pub(super) ticket: Ticket,
    /// As the policy sees it.
    candidate: Candidate,
    /// The epoch of the flights when the ticket was valid.
    pub(super) invalidation_epoch: u64,
    /// Whether the plans have let it in.
    is_let_in: bool,
    /// Its part of `Header::reserved_bytes`.
    pub(super) reserved: u64,
    /// Rounds of deletes in which one has failed.
    pub(super) failures: u32,
    /// Entries that are being deleted for it.
    pub(super) awaited: SmallVec<[u32; 4]>,
    /// The entry, once granted, else 0.
    pub(super) cell: u32,
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Reserves `size` bytes for a value that was read or written under `ticket`.
    pub fn reserve(
        &mut self,
        key: &str,
        range: ByteRange,
        size: u64,
        ticket: Ticket,
        now: u64,
    ) -> Result<Reserve> {
        self.note_sampled_size(key, range, size);
        if !self.arena.storage.is_complete() {
            return Ok(self.rejected(RejectReason::Rebuilding));
        }
        if !key::labels_fit(key) || !self.name_fits(key, range) {
            return Ok(self.rejected(RejectReason::KeyTooLong));
        }
        let held = self.arena.find(key, range)?;
        // A stale entry goes even where its successor is too large; see `reserve_or_evict`.
        let cost = self.cost_of(key, range, size);
        let bound = self.bound();
        if does_not_fit(cost, size, bound) && !self.is_outdated(held, key, ticket, now)? {
            return Ok(self.rejected(RejectReason::TooLarge));
        }
        let Some(known) = self.valid_key(key, ticket).map(Arc::clone) else {
            return Ok(self.rejected(RejectReason::Invalidated));
        };
        let mut replaced = None;
        if let Some(i) = held {
            let cell = self.arena.get(i)?;
            replaced = match cell.state() {
                State::Live if self.is_stale(cell, key, ticket, now) => Some(i),
                State::Live => return Ok(self.rejected(RejectReason::AlreadyCached)),
                State::DeleteFailed => Some(i),
                State::Filling | State::Deleting => {
                    return Ok(self.rejected(RejectReason::Busy));
                }
            };
        }
        if self.in_the_way(key, range, now)?.is_none() {
            return Ok(self.rejected(RejectReason::PathConflict));
        }
        let candidate = Candidate {
            newcomer: Newcomer {
                hash: self.arena.hash_of_name(key, range),
                size,
                room: 0,
                is_alone: false,
            },
            // What takes the place of its own older value has been admitted before.
            is_admitted: replaced.map(|_| true),
        };
        let id = self.next_reservation;
        self.next_reservation += 1;
        let reservation = Reservation {
            key: known,
            range,
            size,
            cost,
            ticket,
            candidate,
            invalidation_epoch: self.flights.invalidation_epoch(),
            is_let_in: false,
            reserved: 0,
            failures: 0,
            awaited: SmallVec::new(),
            cell: 0,
        };
        self.advance(id, reservation, replaced, now)
    }

    /// Whether an entry was too old for the reader of this flight.
    fn is_stale(&self, cell: &Cell, key: &str, ticket: Ticket, now: u64) -> bool {
        let max_age = self.flights.max_age(key, ticket);
        Freshness { now, max_age }.is_stale(cell.time())
    }

    /// Whether an entry exists that is stale or could not be deleted.
    fn is_outdated(&self, held: Option<u32>, key: &str, ticket: Ticket, now: u64) -> Result<bool> {
        let Some(i) = held else { return Ok(false) };
        let cell = self.arena.get(i)?;
        let stale = cell.state() == State::Live && self.is_stale(cell, key, ticket, now);
        Ok(stale || cell.state() == State::DeleteFailed)
    }

    /// Reports the deletes that a reservation waits for, and advances it in the same step, so that
    /// no other reservation takes the bytes.
    pub fn evictions_done(
        &mut self,
        id: u64,
        deleted: &[u32],
        failed: &[u32],
        now: u64,
    ) -> Result<Reserve> {
        self.deletes_done(deleted, failed)?;
        let Some(mut reservation) = self.reservations.remove(&id) else {
            return Ok(self.rejected(RejectReason::Invalidated));
        };
        reservation.failures += u32::from(!failed.is_empty());
        reservation.awaited.clear();
        self.advance(id, reservation, None, now)
    }

    /// The same where every delete has succeeded.
    pub fn all_evicted(&mut self, id: u64, now: u64) -> Result<Reserve> {
        let Some(mut reservation) = self.reservations.remove(&id) else {
            return Ok(self.rejected(RejectReason::Invalidated));
        };
        let awaited = std::mem::take(&mut reservation.awaited);
        match self.deletes_done(&awaited, &[]) {
            Ok(()) => self.advance(id, reservation, None, now),
            Err(error) => {
                self.reservations.insert(id, reservation);
                Err(error)
            }
        }
    }

    /// The smallest bound of all participants.
    #[must_use]
    pub fn bound(&self) -> u64 {
        let participants = self.arena.storage.participants().iter();
        let bounds = participants.filter(|p| p.live != 0).map(|p| p.bound);
        bounds.fold(self.limits.max_size, u64::min)
    }

    /// Advances a reservation. It is kept unless it is rejected.
    pub(super) fn advance(
        &mut self,
        id: u64,
        mut reservation: Reservation,
        replaced: Option<u32>,
        now: u64,
    ) -> Result<Reserve> {
        let answer = self.reserve_or_evict(id, &mut reservation, replaced, now);
        if !matches!(answer, Ok(Reserve::Rejected(_))) {
            self.reservations.insert(id, reservation);
        }
        answer
    }

    fn reserve_or_evict(
        &mut self,
        id: u64,
        reservation: &mut Reservation,
        replaced: Option<u32>,
        now: u64,
    ) -> Result<Reserve> {
        if reservation.cell != 0 {
            return Ok(Reserve::Granted(id));
        }
        let mut victims = Vec::new();
        let bound = self.bound();
        if does_not_fit(reservation.cost, reservation.size, bound) {
            if let Some(i) = replaced {
                self.take(i, &mut victims)?;
            }
            if victims.is_empty() {
                return Ok(self.reject(reservation, RejectReason::TooLarge));
            }
            return Ok(Self::await_evictions(id, reservation, victims));
        }
        reservation.candidate.newcomer.is_alone = self.is_alone(reservation);
        let taken = self.taken();
        // A bound of so many bytes is one of so many entries as well: those without bytes are not free.
        let crowded = reservation.cost == 0 && self.arena.header().entries >= bound;
        let missing = self.reserve_bytes(reservation, bound.saturating_sub(taken));
        if missing == 0 && !crowded && replaced.is_none() {
            return self.grant(id, reservation, now);
        }
        // The bound may have become smaller than what is taken.
        let excess = self.excess()?;
        let missing = match missing {
            0 => 0,
            missing => missing.saturating_add(excess),
        };
        if reservation.failures > MAX_FAILURES {
            return Ok(self.reject(reservation, RejectReason::NoSpace));
        }
        let mut freed = 0u64;
        if let Some(i) = replaced {
            freed += self.take(i, &mut victims)?;
        }
        if missing > freed.saturating_add(self.arena.header().used_bytes) {
            self.deletes_failed(&victims)?;
            return Ok(self.reject(reservation, RejectReason::NoSpace));
        }
        let mut need = self.need(&reservation.key, reservation.size);
        need.is_let_in = reservation.is_let_in;
        // What is above the bound goes whatever the policy says.
        let room = missing.saturating_sub(freed.max(excess));
        reservation.candidate.newcomer.room = self.value_bytes(room, reservation.size);
        while (freed < missing || crowded && victims.is_empty()) && victims.len() < BATCH {
            // After a delete has failed, look for other victims: one entry that cannot be deleted
            // must not keep everything else out.
            let is_above = freed < excess;
            let failed = reservation.failures == 0;
            let candidate = Some(&mut reservation.candidate);
            let wanted = if is_above {
                missing.min(excess)
            } else {
                missing
            };
            need.missing = wanted.saturating_sub(freed);
            let Some(i) = self.next_victim(now, failed, is_above, &mut need, candidate)? else {
                break;
            };
            freed = freed.saturating_add(self.evict_one(i, now, &mut victims)?);
        }
        reservation.is_let_in = need.is_let_in;
        if victims.is_empty() {
            let newcomer = reservation.candidate.newcomer;
            self.policy.turn_away(&mut self.arena, newcomer)?;
            return Ok(self.reject(reservation, RejectReason::NoSpace));
        }
        Ok(Self::await_evictions(id, reservation, victims))
    }

    /// Bytes of values that take so many bytes of the cache store, if all of them are of this size.
    fn value_bytes(&self, room: u64, size: u64) -> u64 {
        let cost = self.arena.header().cost(size).max(1);
        (u128::from(room) * u128::from(size) / u128::from(cost)) as u64
    }

    /// Whether this is the only value on its way in.
    fn is_alone(&self, reservation: &Reservation) -> bool {
        let header = self.arena.header();
        header.in_progress == [0; 2] && header.reserved_bytes == reservation.reserved
    }

    fn await_evictions(id: u64, reservation: &mut Reservation, victims: Vec<Victim>) -> Reserve {
        reservation.awaited.clear();
        reservation.awaited.extend(victims.iter().map(|v| v.cell));
        Reserve::NeedsEviction(id, victims)
    }

    /// Reserves up to `free` bytes; returns how many are still missing.
    fn reserve_bytes(&mut self, reservation: &mut Reservation, free: u64) -> u64 {
        let more = free.min(reservation.cost - reservation.reserved);
        reservation.reserved += more;
        if more != 0 {
            self.change_reserved(|bytes| bytes.saturating_add(more));
        }
        reservation.cost - reservation.reserved
    }

    /// Bytes that a value may take in the cache store, with the folders that have to be made for it.
    #[must_use]
    pub fn cost_of(&self, key: &str, range: ByteRange, size: u64) -> u64 {
        let header = self.arena.header();
        let cost = header.cost(size);
        if header.unit <= 1 {
            return cost;
        }
        if self.arena.storage.has_places() {
            return cost.saturating_add(self.segment_overhead(size));
        }
        let above = match range {
            ByteRange::Full => 0,
            _ => 2,
        };
        // The one that gets a new name may grow as well.
        let folders = key.matches('/').count() as u64 + above + GROWTH;
        cost.saturating_add(folders.saturating_mul(header.unit))
    }

    pub(super) fn release_reserved(&mut self, reservation: &mut Reservation) {
        let bytes = std::mem::take(&mut reservation.reserved);
        if bytes != 0 {
            self.change_reserved(|reserved| reserved.saturating_sub(bytes));
        }
    }

    /// Notes that this participant writes more, or fewer, bytes of entries.
    pub(super) fn change_writing(&mut self, change: impl Fn(u64) -> u64) {
        if let Some(own) = self.arena.storage.own_mut() {
            own.writing_bytes = change(own.writing_bytes);
        }
    }

    fn change_reserved(&mut self, change: impl Fn(u64) -> u64) {
        let storage = &mut self.arena.storage;
        let header = storage.header_mut();
        header.reserved_bytes = change(header.reserved_bytes);
        if let Some(own) = storage.own_mut() {
            own.reserved_bytes = change(own.reserved_bytes);
        }
    }

    /// Turns reserved bytes into an entry that is being written, once what is in its way is deleted.
    fn grant(&mut self, id: u64, reservation: &mut Reservation, now: u64) -> Result<Reserve> {
        if !self.is_valid(reservation) {
            return Ok(self.reject(reservation, RejectReason::Invalidated));
        }
        let (key, range) = (Arc::clone(&reservation.key), reservation.range);
        match self.in_the_way(&key, range, now)? {
            Some(cells) if cells.is_empty() => {}
            Some(cells) if reservation.failures == 0 => {
                let victims = self.drop_all(&cells)?;
                return Ok(Self::await_evictions(id, reservation, victims));
            }
            _ => {
                let reason = match self.arena.find(&key, range)? {
                    Some(_) => RejectReason::Busy,
                    None => RejectReason::PathConflict,
                };
                return Ok(self.reject(reservation, reason));
            }
        }
        let segment = match self.segment_for(reservation) {
            Err(error) if !error.is_fatal() => {
                return Ok(self.reject(reservation, RejectReason::IndexFull));
            }
            segment => segment?,
        };
        match self.begin_writing(&key, range, reservation.size) {
            Ok(Some(cell)) => {
                reservation.cell = cell;
                if let Some(segment) = segment {
                    self.append_entry(cell, segment)?;
                }
            }
            Ok(None) => return Ok(self.reject(reservation, RejectReason::Busy)),
            Err(error) if !error.is_fatal() => {
                return Ok(self.reject(reservation, RejectReason::IndexFull));
            }
            Err(error) => return Err(error),
        }
        // What remains is for the folders, until it is known which were made.
        let cost = self.arena.header().cost(reservation.size);
        self.use_reserved(reservation, cost);
        Ok(Reserve::Granted(id))
    }

    /// Bytes that were reserved are counted elsewhere from now on.
    pub(super) fn use_reserved(&mut self, reservation: &mut Reservation, bytes: u64) {
        let used = bytes.min(reservation.reserved);
        reservation.reserved -= used;
        self.change_reserved(|reserved| reserved.saturating_sub(used));
    }

    fn reject(&mut self, reservation: &mut Reservation, reason: RejectReason) -> Reserve {
        self.release_reserved(reservation);
        self.rejected(reason)
    }

    /// Leaves a value uncached.
    pub(crate) fn rejected(&self, reason: RejectReason) -> Reserve {
        self.count_refusals(1);
        Reserve::Rejected(reason)
    }

    /// Counts values that are left uncached.
    pub(crate) fn count_refusals(&self, count: u64) {
        Tally::add(&self.tally.refusals, count);
    }

    /// Entries beside which a file system could not hold this key, up to a batch: the source has another value in their
    /// place. `None` where one of them is of use.
    ///
    /// A chunk above other chunks of its array is not noticed here, for that would mean to visit the whole array; see
    /// [`Cache::drop_below`].
    #[inline]
    fn in_the_way(&self, key: &str, range: ByteRange, now: u64) -> Result<Option<Vec<u32>>> {
        if self.limits.flat_namespace || range != ByteRange::Full {
            return Ok(Some(Vec::new()));
        }
        let cells = self.in_the_way_of_file(key)?;
        self.if_useless(cells, now)
    }

    fn in_the_way_of_file(&self, key: &str) -> Result<Vec<u32>> {
        let mut cells = Vec::new();
        if let Some(dir) = self.arena.find_dir(&format!("{key}/"))?
            && dir != ROOT
        {
            cells = self.arena.entries_below(dir, BATCH, is_value)?;
        }
        for (slash, _) in key.match_indices('/') {
            let above = key.get(..slash).unwrap_or("");
            cells.extend(self.arena.find(above, ByteRange::Full)?);
        }
        Ok(cells)
    }

    /// The same entries if none of them is of use to any store, by the longest age: the age of the new key is not theirs.
    fn if_useless(&self, cells: Vec<u32>, now: u64) -> Result<Option<Vec<u32>>> {
        for &i in &cells {
            let cell = self.arena.get(i)?;
            let useless = cell.state() == State::Live && self.is_useless(i, now)?;
            if !useless && cell.state() != State::DeleteFailed {
                return Ok(None);
            }
        }
        Ok(Some(cells))
    }

    /// Drops the entries of keys below that of a reservation, in a folder where it needs a file. `None` where one of them
    /// is of use: then all stay.
    pub fn drop_below(&mut self, id: u64, below: &[&str], now: u64) -> Result<Option<Vec<Victim>>> {
        if !self.reservations.contains_key(&id) {
            return Ok(None);
        }
        let mut cells = Vec::new();
        for below in below {
            cells.extend(self.arena.find(below, ByteRange::Full)?);
        }
        let cells = self.if_useless(cells, now)?;
        cells.map(|cells| self.drop_all(&cells)).transpose()
    }
}

/// Whether a value is never taken. A bound of 0 is one of no entries: an empty value would take no bytes.
fn does_not_fit(cost: u64, size: u64, bound: u64) -> bool {
    cost > bound || size >= TOO_LARGE || bound == 0
}

fn is_value<S: Storage>(arena: &Arena<S>, i: u32) -> Result<bool> {
    Ok(arena.get(i)?.kind()? == Kind::Value)
}
