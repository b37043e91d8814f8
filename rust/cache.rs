//! The cache as its callers see it: every operation of the fill and write protocol, each one step
//! under one lock. It decides and counts; it never touches a value.
//!
//! What has to happen between two steps (a source read, a delete, a write of bytes) is the
//! caller's, who holds no lock then. Each step answers with the deletes that it wants done; the
//! caller reports every one of them back as dropped or failed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use foldhash::fast::RandomState;

use crate::cells::{Block, Cell, Cells, Kind, List, ROOT, State, Version};
use crate::entries::SKEW;
use crate::error::{Fault, Res};
use crate::flights::{Flights, Ticket};
use crate::key::{self, Span};
use crate::memo::Memo;

/// Entries that one step names at most, so that no step holds the lock for long.
pub const BATCH: usize = 1024;

/// Times that a reservation looks for other victims after deletes have failed.
const ROUNDS: u32 = 8;

/// Uses of entries that are entered in the order together.
const PUT_OFF: usize = 64;

/// The bounds of a cache.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes that the cache store may hold at most.
    pub max_size: u64,
    /// Milliseconds after its fetch from which on an entry is stale; `None` for never.
    pub max_age: Option<u64>,
    /// Whether a cached full value also answers requests that select none of its bytes or name
    /// more than it has. Sources disagree on those, so only where the source is known to slice.
    pub lenient: bool,
    /// Whether the cache store can hold `a` beside `a/b`; a file system cannot.
    pub flat: bool,
    /// When to compare the bytes of an entry with its checksum.
    pub verify: Verify,
}

/// When the bytes of an entry are compared with its checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Not at all, but for what a rebuild has taken in from a file system: that once.
    #[default]
    Never,
    /// At the first hit of each process.
    First,
    /// At each hit.
    Always,
}

/// Bytes to delete: the cell that counts them, and their name in the cache store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    /// To be reported back.
    pub cell: u32,
    /// Name in the cache store.
    pub cache_key: String,
}

/// An entry that can serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Names the entry for [`Cache::discard`].
    pub handle: u64,
    /// What the entry holds.
    pub span: Span,
    /// Bytes of the entry.
    pub size: u64,
    /// CRC32C of the entry, where it is known.
    pub checksum: Option<u32>,
    /// First byte of the entry that was asked for.
    pub start: u64,
    /// Bytes that were asked for.
    pub length: u64,
}

/// What a reader that found nothing does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Joined<T> {
    /// Look again: somebody has filled it meanwhile.
    Ready,
    /// Wait for this flight, which brings this span.
    Follow(Span, T),
    /// Read the source; the ticket decides whether the value may be kept.
    Lead(Ticket),
}

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
struct Reservation {
    key: Box<str>,
    span: Span,
    size: u64,
    ticket: Ticket,
    /// Bytes of `promised` that are held for this reservation.
    room: u64,
    /// Times that deletes which it asked for have failed.
    failures: u32,
    /// Entries whose deletes it has asked for last.
    asked: Vec<u32>,
    /// The entry, once granted.
    cell: u32,
}

/// Counters since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests served from the cache store.
    pub hits: u64,
    /// Requests that were not.
    pub misses: u64,
    /// Entries removed to make room.
    pub evictions: u64,
    /// Those of them that were stale.
    pub expirations: u64,
    /// Values that were left uncached.
    pub refusals: u64,
}

/// An index with its bounds, flights and reservations.
#[derive(Debug)]
pub struct Cache<B, T> {
    pub(crate) cells: Cells<B>,
    limits: Limits,
    flights: Flights<T>,
    reservations: HashMap<u64, Reservation, RandomState>,
    next_reservation: u64,
    stats: Stats,
    /// Entries that were used and are not yet moved to the end of the list, at most [`PUT_OFF`].
    touched: Vec<u32>,
    /// For each cell, the mark of the contents that this process has verified, or 0.
    seen: Vec<u32>,
}

impl<B: Block, T: Clone> Cache<B, T> {
    /// A cache over an empty block.
    pub fn new(block: B, limits: Limits, seed: u64) -> Res<Self> {
        let mut cache = Cache::over(block, limits);
        cache.init(seed)?;
        Ok(cache)
    }

    pub(crate) fn init(&mut self, seed: u64) -> Res<()> {
        self.cells.table_init()?;
        self.cells.names_init(seed)
    }

    /// A cache over a block that holds an index already.
    pub(crate) fn over(block: B, limits: Limits) -> Self {
        Cache {
            cells: Cells {
                block,
                memo: Memo::default(),
            },
            limits,
            flights: Flights::default(),
            reservations: HashMap::default(),
            next_reservation: 1,
            stats: Stats::default(),
            touched: Vec::new(),
            seen: Vec::new(),
        }
    }

    /// The bounds.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Bytes that the cache store holds for this cache, or may hold.
    #[must_use]
    pub fn current_size(&self) -> u64 {
        self.cells.header().physical
    }

    /// Entries that can be served.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.cells.header().present_entries
    }

    /// Whether nothing can be served.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory that the index has touched.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let cells = u64::from(self.cells.header().used) * std::mem::size_of::<Cell>() as u64;
        cells + std::mem::size_of_val(self.cells.block.slots()) as u64
    }

    fn is_stale(&self, cell: &Cell, now: u64) -> bool {
        match self.limits.max_age {
            None => false,
            // A fetch that lies in the future cannot be dated, so it is not fresh.
            Some(age) => {
                let fetched = cell.time();
                fetched == 0
                    || fetched.saturating_sub(now) > SKEW
                    || now.saturating_sub(fetched) >= age
            }
        }
    }

    fn servable(&self, i: u32, now: u64) -> Res<bool> {
        let cell = self.cells.get(i)?;
        Ok(cell.is_entry() && cell.state() == State::Present && !self.is_stale(cell, now))
    }

    /// Finds an entry that holds what is asked for, without counting or touching anything.
    ///
    /// For a range these are looked at: the full value, the very range, and of the other ranges of
    /// the key the one with most bytes and the one that came last. That takes the same time
    /// however many ranges there are; a range inside a third one is not found.
    pub fn peek(&self, key: &str, span: Span, now: u64) -> Res<Option<Found>> {
        if let Some(i) = self.cells.find(key, Span::Full)?
            && self.servable(i, now)?
        {
            let size = self.cells.get(i)?.size;
            if let Some((start, length)) = select(size, span, self.limits.lenient) {
                return self.found(i, Span::Full, start, length).map(Some);
            }
        }
        if span == Span::Full {
            return Ok(None);
        }
        let Some(object) = self.cells.find_object(key)? else {
            return Ok(None);
        };
        if let Some(i) = self.cells.find_range(object, span)?
            && self.servable(i, now)?
        {
            return self.found(i, span, 0, self.cells.get(i)?.size).map(Some);
        }
        let hints = self.cells.get(object)?;
        for i in [hints.earlier, hints.later] {
            if i == 0 || !self.servable(i, now)? {
                continue;
            }
            if self.cells.get(i)?.parent != object {
                return Err(Fault::Corrupt("a hint that leads to another key"));
            }
            let held = self.cells.span(i)?;
            if let Some((start, length)) = within(held, self.cells.get(i)?.size, span) {
                return self.found(i, held, start, length).map(Some);
            }
        }
        Ok(None)
    }

    fn found(&self, i: u32, span: Span, start: u64, length: u64) -> Res<Found> {
        let cell = self.cells.get(i)?;
        let handle = handle(i, cell);
        Ok(Found {
            handle,
            span,
            size: cell.size,
            checksum: cell.checksum(),
            start,
            length,
        })
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
    fn put_in_order(&mut self) -> Res<()> {
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
        Ok(match self.flights.joinable(key, span, version) {
            Some((span, payload)) => Joined::Follow(span, payload),
            None => Joined::Lead(self.flights.open(key, span, Some(payload), version)),
        })
    }

    /// Closes a flight and hands out what its readers waited on.
    pub fn land(&mut self, key: &str, ticket: Ticket) -> Option<T> {
        self.flights.close(key, ticket)
    }

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
        if !self.is_valid(key, ticket) {
            return Ok(self.refuse(Refusal::Void));
        }
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
        let key = key.into();
        let reservation = Reservation {
            key,
            span,
            size,
            ticket,
            room: 0,
            failures: 0,
            asked: Vec::new(),
            cell: 0,
        };
        self.reservations.insert(id, reservation);
        self.proceed(id, own, now)
    }

    /// Whether an entry is there of which nobody can make use any more.
    fn is_outdated(&self, held: Option<u32>, now: u64) -> Res<bool> {
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
        }
        // In the same step, so what the victims held goes to nobody else.
        self.proceed(id, None, now)
    }

    /// Does the same where every delete that the reservation asked for has succeeded.
    pub fn cleared(&mut self, id: u64, now: u64) -> Res<Room> {
        let reservation = self.reservations.get_mut(&id);
        let asked = reservation.map_or_else(Vec::new, |r| std::mem::take(&mut r.asked));
        self.settle(id, &asked, &[], now)
    }

    /// Notes which deletes a reservation waits for.
    fn ask(&mut self, id: u64, victims: Vec<Victim>) -> Room {
        if let Some(reservation) = self.reservations.get_mut(&id) {
            reservation.asked.clear();
            reservation.asked.extend(victims.iter().map(|v| v.cell));
        }
        Room::Evict(id, victims)
    }

    /// Gives a reservation up to `free` bytes; returns how many it still lacks.
    fn promise(&mut self, id: u64, free: u64) -> u64 {
        let Some(reservation) = self.reservations.get_mut(&id) else {
            return 0;
        };
        let more = free.min(reservation.size - reservation.room);
        reservation.room += more;
        let lacking = reservation.size - reservation.room;
        self.change_promised(|promised| promised.saturating_add(more));
        lacking
    }

    fn change_promised(&mut self, change: impl Fn(u64) -> u64) {
        let block = &mut self.cells.block;
        let header = block.header_mut();
        header.promised = change(header.promised);
        let me = block.me();
        if let Some(participant) = block.participants_mut().get_mut(me) {
            participant.promised = change(participant.promised);
        }
    }

    /// The smallest bound of all who share the index.
    fn bound(&self) -> u64 {
        let participants = self.cells.block.participants().iter();
        let bounds = participants.filter(|p| p.live != 0).map(|p| p.bound);
        bounds.fold(self.limits.max_size, u64::min)
    }

    fn version(&self, key: &str) -> Version {
        if B::EXCLUSIVE {
            // Nobody else writes, and our own writes void the flights.
            return Version::default();
        }
        self.cells.block.version(shared_hash(key))
    }

    fn is_valid(&self, key: &str, ticket: Ticket) -> bool {
        self.flights.valid(key, ticket, self.version(key))
            && (B::EXCLUSIVE || !self.cells.block.is_written(shared_hash(key)))
    }

    fn proceed(&mut self, id: u64, own: Option<u32>, now: u64) -> Res<Room> {
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

    fn grant(&mut self, id: u64) -> Res<Room> {
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

    fn give_back_room(&mut self, id: u64) {
        if let Some(reservation) = self.reservations.get_mut(&id) {
            let room = std::mem::take(&mut reservation.room);
            self.change_promised(|promised| promised.saturating_sub(room));
        }
    }

    fn give_up(&mut self, id: u64, why: Refusal) -> Res<Room> {
        self.give_back_room(id);
        self.reservations.remove(&id);
        Ok(self.refuse(why))
    }

    fn refuse(&mut self, why: Refusal) -> Room {
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

    fn take_granted(&mut self, id: u64) -> Option<Reservation> {
        let entry = self.reservations.entry(id);
        match entry {
            Entry::Occupied(entry) if entry.get().cell != 0 => Some(entry.remove()),
            _ => None,
        }
    }

    fn decide(
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
    /// Hands out what the readers of the flight waited on.
    pub fn finish(
        &mut self,
        id: u64,
        checksum: Option<u32>,
        now: u64,
    ) -> Res<(Vec<Victim>, Option<T>)> {
        let Some(reservation) = self.take_granted(id) else {
            return Ok((self.abort(id)?, None));
        };
        let victims = self.decide(&reservation, checksum, now)?;
        Ok((victims, self.land(&reservation.key, reservation.ticket)))
    }

    /// Whether this reservation is known; one from before the index was emptied is not.
    #[must_use]
    pub fn is_reserved(&self, id: u64) -> bool {
        self.reservations.contains_key(&id)
    }

    /// Whether it is for this participant to [`Cache::adopt`].
    #[must_use]
    pub fn is_filled_here(&self) -> bool {
        self.cells.block.is_filled_here()
    }

    /// Whether the index knows all that is in the cache store.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.cells.block.is_complete()
    }

    /// Changes the bounds; a smaller size is enforced before new bytes are written.
    pub fn rebound(&mut self, max_size: u64, max_age: Option<u64>) {
        self.limits.max_size = max_size;
        self.limits.max_age = max_age;
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

    fn unwrite(&mut self, reservation: &Reservation) -> Res<Vec<Victim>> {
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

    fn settled_victims(&mut self, victims: &[Victim]) -> Res<()> {
        let failed: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        self.settled(&[], &failed)
    }

    fn is_dropping(&self, i: u32) -> bool {
        let cell = self.cells.get(i);
        let me = self.cells.block.me() as u32 + 1;
        cell.is_ok_and(|c| c.is_entry() && c.state() == State::Dropping && c.earlier == me)
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
    fn next_victim(&self, now: u64, orphans: bool) -> Res<Option<u32>> {
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
    fn take(&mut self, i: u32, victims: &mut Vec<Victim>) -> Res<u64> {
        let state = self.cells.get(i)?.state();
        if matches!(state, State::Writing | State::Dropping) {
            return Ok(0);
        }
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
        victims.push(Victim {
            cell: i,
            cache_key: span.cache_key(&key),
        });
        Ok(size)
    }

    fn drop_all(&mut self, cells: &[u32]) -> Res<Vec<Victim>> {
        let mut victims = Vec::with_capacity(cells.len());
        for &i in cells {
            self.take(i, &mut victims)?;
        }
        Ok(victims)
    }

    fn drop_key(&mut self, key: &str) -> Res<Vec<Victim>> {
        let mut cells = Vec::new();
        cells.extend(self.cells.find(key, Span::Full)?);
        if let Some(object) = self.cells.find_object(key)? {
            cells.extend(self.cells.entries_below(object, usize::MAX, in_reach)?);
        }
        self.drop_all(&cells)
    }

    /// A write of this key begins: nothing that is cached of it is valid from now on.
    pub fn begin_write(&mut self, key: &str) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        self.change(key);
        self.mark_key(key, true);
        self.flights.begin_write(key, self.version(key));
        self.drop_key(key)
    }

    /// A write of this key has ended. Where it succeeded and no other write overlapped it, the
    /// ticket allows its value to be cached.
    pub fn end_write(&mut self, key: &str, ok: bool) -> Res<(Vec<Victim>, Option<Ticket>)> {
        self.put_in_order()?;
        let alone = self.flights.end_write(key, self.version(key));
        self.change(key);
        self.mark_key(key, false);
        let version = self.version(key);
        let victims = self.drop_key(key)?;
        let ticket = (ok && alone).then(|| self.flights.open(key, Span::Full, None, version));
        Ok((victims, ticket))
    }

    fn change(&mut self, key: &str) {
        if !B::EXCLUSIVE {
            self.cells.block.change_key(shared_hash(key));
        }
    }

    fn mark_key(&mut self, key: &str, begins: bool) {
        if !B::EXCLUSIVE {
            let key = Some(shared_hash(key));
            self.cells.block.mark_write(key, begins);
        }
    }

    /// The source has no such key.
    pub fn forget(&mut self, key: &str) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        self.drop_key(key)
    }

    /// Makes the flights and writes below a prefix void; "" is everything. To be followed by
    /// [`Cache::sweep`].
    pub fn void_prefix(&mut self, prefix: &str) {
        let prefix = prefix.trim_end_matches('/');
        self.cells.block.change_all();
        self.flights.void_where(|key| is_below(key, prefix));
    }

    /// A write below a prefix begins or ends: until then nobody fills anything.
    pub fn mark_change(&mut self, begins: bool) {
        self.cells.block.mark_write(None, begins);
    }

    /// Drops entries below a prefix ("" is everything), a batch at a time; to be called until it
    /// returns nothing. The keys outside the prefix are not looked at, save that a prefix that ends
    /// inside chunk coordinates (`a/c/12`) looks at the chunks of its array.
    pub fn sweep(&mut self, prefix: &str) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        let prefix = prefix.trim_end_matches('/');
        if prefix.is_empty() {
            let cells = self.cells.entries_below(ROOT, BATCH, present)?;
            return self.drop_all(&cells);
        }
        let mut found = Vec::new();
        found.extend(self.cells.find(prefix, Span::Full)?);
        if let Some(object) = self.cells.find_object(prefix)? {
            found.extend(self.cells.entries_below(object, BATCH, present)?);
        }
        let dirs = format!("{prefix}/");
        if let Some(dir) = self.cells.find_dir(&dirs)? {
            found.extend(self.cells.entries_below(dir, BATCH, present)?);
        }
        let inside = format!("{dirs}0");
        let (above, _) = key::split(&inside);
        if above.len() < dirs.len()
            && let Some(dir) = self.cells.find_dir(above)?
        {
            found.extend(self.cells.entries_below(dir, BATCH, |cells, i| {
                Ok(present(cells, i)? && is_below(&cells.name(i)?.0, prefix))
            })?);
        }
        let mut victims = Vec::new();
        for i in found {
            if present(&self.cells, i)? {
                self.take(i, &mut victims)?;
            }
        }
        Ok(victims)
    }

    /// Whether a file system could not hold this key beside those that are held.
    fn conflicts(&self, key: &str) -> Res<bool> {
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

    /// After a fork: what other threads of the parent had in flight will never land here.
    ///
    /// Returns the flights, for their payloads are the caller's to release.
    pub fn after_fork(&mut self) -> Res<Flights<T>> {
        self.put_in_order()?;
        let flights = self.flights.take();
        self.reservations.clear();
        self.cells.header_mut().promised = 0;
        for i in self.cells.walk(List::Busy)? {
            self.cells.orphan(i)?;
        }
        Ok(flights)
    }

    /// Somebody has emptied the index: nothing that was begun before counts any more.
    pub(crate) fn renew(&mut self) {
        self.flights.void_all();
        self.reservations.clear();
        self.touched.clear();
        self.seen.clear();
    }

    /// Says once more what is being written, in an index that was emptied meanwhile.
    pub(crate) fn mark_writes(&mut self) {
        for key in self.flights.written() {
            self.cells.block.mark_write(Some(shared_hash(key)), true);
        }
    }

    /// Takes over what participants had in hand that are dead now.
    pub(crate) fn bury(&mut self, dead: &[usize]) -> Res<()> {
        self.put_in_order()?;
        for &n in dead {
            let block = &mut self.cells.block;
            let gone = block.bury(n);
            let header = block.header_mut();
            header.promised = header.promised.saturating_sub(gone.promised);
            if gone.is_writing() {
                // What was read while it wrote may be older than what it has written.
                block.change_all();
            }
            for i in self.cells.walk(List::Busy)? {
                if self.cells.get(i)?.earlier as usize == n + 1 {
                    self.cells.orphan(i)?;
                }
            }
        }
        Ok(())
    }

    /// Enters a value that a walk of the cache store has found, unless it is known. Values are to
    /// be given in the order of their fetch; 0 is for one that cannot be dated. Returns whether it was new.
    pub fn adopt(&mut self, cache_key: &str, size: u64, fetched: u64) -> Res<bool> {
        self.put_in_order()?;
        let Some((key, span)) = Span::parse(cache_key) else {
            return Ok(false);
        };
        if self.cells.find(key, span)?.is_some() {
            return Ok(false);
        }
        // A key that was written since the index was emptied: the walk may have seen the old value.
        let written = self.version(key) != self.cells.block.first_version();
        let i = self.cells.begin_writing(key, span, size)?;
        if written {
            self.cells.get_mut(i)?.set_state(State::Dropping);
            self.cells.orphan(i)?;
            return Ok(true);
        }
        self.cells.make_present(i, None, fetched)?;
        if fetched == 0 {
            self.cells.undate(i)?;
        }
        Ok(true)
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
            let mark = mark(cell);
            let at = i as usize;
            if self.seen.len() <= at {
                self.seen.resize(at + 1, 0);
            }
            if let Some(seen) = self.seen.get_mut(at) {
                *seen = mark;
            }
        }
    }

    /// Whether the bytes of an entry have to be compared with the checksum before they are served.
    #[must_use]
    pub fn must_verify(&self, at: u64) -> bool {
        let i = at as u32;
        match (self.limits.verify, self.cells.get(i)) {
            (_, Err(_)) => false,
            // Taken in by a rebuild, perhaps after a loss of power: only the bytes tell.
            (Verify::Never, Ok(cell)) => !self.limits.flat && cell.checksum().is_none(),
            (Verify::Always, _) => true,
            (Verify::First, Ok(cell)) => self.seen.get(i as usize) != Some(&mark(cell)),
        }
    }

    /// Entries in every state with their bytes, for tests and tools.
    pub fn entries(&self) -> Res<Vec<(String, Span, u64, State)>> {
        let all = self
            .cells
            .entries_below(ROOT, usize::MAX, |_, _| Ok(true))?;
        let mut entries = Vec::with_capacity(all.len());
        for i in all {
            let (key, span) = self.cells.name(i)?;
            let cell = self.cells.get(i)?;
            entries.push((key, span, cell.size, cell.state()));
        }
        Ok(entries)
    }

    /// Keys and spans by recency, least recently used first.
    pub fn recency(&self) -> Res<Vec<(String, Span)>> {
        let mut order = self.cells.walk(List::Recency)?;
        for i in &self.touched {
            order.retain(|other| other != i);
            order.push(*i);
        }
        order.into_iter().map(|i| self.cells.name(i)).collect()
    }

    /// Flights that are open and reservations that are not committed.
    #[must_use]
    pub fn in_flight(&self) -> (usize, usize) {
        (self.flights.len(), self.reservations.len())
    }

    /// Recomputes every book from the cells and the reservations.
    pub fn validate(&self) -> Res<()> {
        self.cells.validate()?;
        let mut rooms = self.reservations.values().map(|r| r.room);
        let promised = rooms.try_fold(0u64, u64::checked_add);
        let block = &self.cells.block;
        // Where others share the index, each knows its own part only.
        let booked = block.participants().get(block.me());
        let booked = booked.map_or(self.cells.header().promised, |me| me.promised);
        if promised != Some(booked) {
            return Err(Fault::Corrupt("promised bytes that no reservation holds"));
        }
        for reservation in self.reservations.values().filter(|r| r.cell != 0) {
            if self.cells.get(reservation.cell)?.state() != State::Writing {
                return Err(Fault::Corrupt(
                    "a granted reservation that is not being written",
                ));
            }
        }
        let header = self.cells.header();
        // A directory may have been opened with a smaller bound; the next fill enforces it.
        let alone = self.cells.block.participants().is_empty();
        if alone && header.physical.saturating_add(header.promised) > self.limits.max_size {
            return Err(Fault::Corrupt("more bytes than the bound allows"));
        }
        Ok(())
    }
}

/// What the versions of keys go by: the same in every process, whatever its seed.
fn shared_hash(key: &str) -> u64 {
    key::hash(key.as_bytes(), 0, 0)
}

/// Tells the contents of one cell from those that it may have later; never 0.
fn mark(cell: &Cell) -> u32 {
    (cell.checksum().unwrap_or(0) ^ cell.time() as u32) | 1
}

fn handle(i: u32, cell: &Cell) -> u64 {
    u64::from(i) | (cell.time() ^ cell.size.rotate_left(16)) << 32
}

fn in_reach<B: Block>(cells: &Cells<B>, i: u32) -> Res<bool> {
    Ok(matches!(
        cells.get(i)?.state(),
        State::Present | State::Orphan
    ))
}

fn present<B: Block>(cells: &Cells<B>, i: u32) -> Res<bool> {
    Ok(cells.get(i)?.state() == State::Present)
}

fn values_only<B: Block>(cells: &Cells<B>, i: u32) -> Res<bool> {
    Ok(cells.get(i)?.kind()? == Kind::Value)
}

fn is_below(key: &str, prefix: &str) -> bool {
    prefix.is_empty()
        || key
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// First byte and count of what `span` selects of a value of `size` bytes; `None` where sources
/// disagree about the answer, unless `lenient`.
#[must_use]
pub fn select(size: u64, span: Span, lenient: bool) -> Option<(u64, u64)> {
    let (start, end, plain) = match span {
        Span::Full => return Some((0, size)),
        // Some stores read to the end when the end comes before the start.
        Span::Range { start, end } if end < start => return None,
        Span::Range { start, end } => (start, end.min(size), start < end && start < size),
        Span::Offset(start) => (start, size, start < size),
        Span::Suffix(count) => (size.saturating_sub(count), size, 0 < count && count <= size),
    };
    let start = start.min(size);
    (plain || lenient).then(|| (start, end.saturating_sub(start)))
}

/// Where `asked` lies inside a range `held` of which `size` bytes are there.
fn within(held: Span, size: u64, asked: Span) -> Option<(u64, u64)> {
    match (held, asked) {
        // Of a range that selects nothing by its own numbers nobody knows what a source made.
        (Span::Range { end: to, .. }, Span::Range { end, .. }) if end > to => None,
        (Span::Range { start: from, .. } | Span::Offset(from), Span::Range { start, end }) => {
            let inside = from <= start && start < end && end - from <= size;
            inside.then(|| (start - from, end - start))
        }
        (Span::Offset(from), Span::Offset(start)) => {
            let skip = start.checked_sub(from).filter(|skip| *skip < size)?;
            Some((skip, size - skip))
        }
        (Span::Suffix(_), Span::Suffix(count)) => {
            (0 < count && count <= size).then(|| (size - count, count))
        }
        _ => None,
    }
}
