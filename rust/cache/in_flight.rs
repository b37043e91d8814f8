//! Source reads in flight, so that one read serves all readers that ask, and the tickets that decide
//! whether its value may be cached.
//!
//! A ticket names a flight. A write, delete, prefix delete or clear invalidates the tickets of the
//! keys that it touches, before it begins and after it has ended: a value that was read before the
//! end of a write is never cached after it, and later readers never join such a flight. Writes by
//! other participants, and only those, show in the version of the key, with which a flight is opened
//! and checked. So those of this one are told by flags, exactly, and those of others by slots that
//! keys share by chance.
//!
//! A flight that a reader could not join ends together with the one that this reader has opened, at
//! the latest: no other reader comes by that could see that its leader cannot go on.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use foldhash::fast::RandomState;
use smallvec::{SmallVec, smallvec};

use super::changes::{Slot, slot_of_key, slot_of_prefix};
use super::peers::Version;
use crate::error::{Error, Result};
use crate::key::{self, ByteRange};

/// Names one flight for as long as the process lives.
pub type Ticket = u64;

#[derive(Debug)]
struct Flight<T> {
    ticket: Ticket,
    range: ByteRange,
    invalidated: bool,
    /// Version of the key when the flight was opened.
    version: Version,
    /// Milliseconds: what it replaces is older.
    max_age: Option<u64>,
    /// Absences that had been made when the flight was opened.
    absences_made: u64,
    /// Validator of what its reader has read, to be kept with that.
    validator: Option<Box<str>>,
    /// What the readers wait on; `None` for the copy that a writer puts into the cache.
    payload: Option<T>,
    /// Whether another reader waits, or has waited.
    joined: bool,
    /// Whether it began too long ago for a later reader.
    superseded: bool,
    /// Earlier flights that its reader could not join.
    passed: Vec<Ticket>,
}

impl<T> Flight<T> {
    fn is_valid(&self, version: Version) -> bool {
        !self.invalidated && self.version == version
    }

    fn may_be_joined(&self, version: Version) -> bool {
        self.is_valid(version) && !self.superseded && self.payload.is_some()
    }
}

/// A flight that is closed.
#[derive(Debug, PartialEq, Eq)]
pub struct ClosedFlight<T> {
    /// What its readers waited on.
    pub payload: Option<T>,
    /// Whether a reader other than the one who opened it holds the payload.
    pub joined: bool,
    /// The same as `payload` of flights that were closed with it.
    pub passed: Vec<T>,
}

/// The flights of one key. Most keys have one; where there are many (a shard of which all
/// inner chunks are read at once), they are found through an index.
#[derive(Debug)]
struct KeyFlights<T> {
    flights: SmallVec<[Flight<T>; 1]>,
    /// Made when there are many.
    index: Option<Box<FlightIndex>>,
}

/// Positions of the flights of a key.
#[derive(Debug, Default)]
struct FlightIndex {
    by_ticket: HashMap<Ticket, usize, RandomState>,
    /// The latest flight of a range that has readers. Earlier ones could not be joined when it was
    /// opened and are never joined again.
    by_span: HashMap<ByteRange, Ticket, RandomState>,
}

/// Flights of a key from which on there is an index.
const MANY: usize = 16;

impl<T> KeyFlights<T> {
    fn push(&mut self, flight: Flight<T>) {
        if let Some(index) = &mut self.index {
            index.add(&flight, self.flights.len());
        }
        self.flights.push(flight);
        if self.index.is_none() && self.flights.len() >= MANY {
            let mut index = Box::<FlightIndex>::default();
            for (at, flight) in self.flights.iter().enumerate() {
                index.add(flight, at);
            }
            self.index = Some(index);
        }
    }

    fn invalidate(&mut self) {
        self.flights.iter_mut().for_each(|f| f.invalidated = true);
    }

    fn position(&self, ticket: Ticket) -> Option<usize> {
        match &self.index {
            Some(index) => index.by_ticket.get(&ticket).copied(),
            None => self.flights.iter().position(|f| f.ticket == ticket),
        }
    }

    fn get(&self, ticket: Ticket) -> Option<&Flight<T>> {
        self.flights.get(self.position(ticket)?)
    }

    fn get_mut(&mut self, ticket: Ticket) -> Option<&mut Flight<T>> {
        let at = self.position(ticket)?;
        self.flights.get_mut(at)
    }

    fn remove(&mut self, ticket: Ticket) -> Option<Flight<T>> {
        let at = self.position(ticket)?;
        let flight = self.flights.swap_remove(at);
        if let Some(index) = &mut self.index {
            index.by_ticket.remove(&ticket);
            if index.by_span.get(&flight.range) == Some(&ticket) {
                index.by_span.remove(&flight.range);
            }
            if let Some(moved) = self.flights.get(at) {
                index.by_ticket.insert(moved.ticket, at);
            }
        }
        Some(flight)
    }

    /// Removes a flight, and those that it has passed.
    fn close(&mut self, ticket: Ticket) -> Option<ClosedFlight<T>> {
        let mut flight = self.remove(ticket)?;
        let mut closed = ClosedFlight {
            payload: flight.payload,
            joined: flight.joined,
            passed: Vec::new(),
        };
        while let Some(ticket) = flight.passed.pop() {
            if let Some(earlier) = self.remove(ticket) {
                flight.passed.extend(earlier.passed);
                closed.passed.extend(earlier.payload);
            }
        }
        Some(closed)
    }

    /// The latest flight of exactly this range that has readers.
    fn latest(&self, range: ByteRange) -> Option<&Flight<T>> {
        match &self.index {
            Some(index) => self.get(*index.by_span.get(&range)?),
            None => {
                let all = self.flights.iter();
                let of_range = all.filter(|f| f.range == range && f.payload.is_some());
                of_range.max_by_key(|f| f.ticket)
            }
        }
    }

    /// Those that the reader of a new flight could not join. A full value that was superseded is not among
    /// them where the new one brings a part: it goes on.
    fn passed_by(&self, range: ByteRange, version: Version) -> Vec<Ticket> {
        let own = self.latest(range);
        let full = self.latest(ByteRange::Full);
        let full = full.filter(|f| range != ByteRange::Full && !f.is_valid(version));
        own.into_iter().chain(full).map(|f| f.ticket).collect()
    }

    /// The flight of exactly this range, if a reader may join it.
    fn joinable(&mut self, range: ByteRange, version: Version) -> Option<&mut Flight<T>> {
        let ticket = self.latest(range)?.ticket;
        self.get_mut(ticket).filter(|f| f.may_be_joined(version))
    }

    /// Joins the flight of this range.
    fn join(&mut self, range: ByteRange, version: Version) -> Option<(ByteRange, T)>
    where
        T: Clone,
    {
        let flight = self.joinable(range, version)?;
        flight.joined = true;
        Some((flight.range, flight.payload.clone()?))
    }
}

impl FlightIndex {
    fn add<T>(&mut self, flight: &Flight<T>, at: usize) {
        self.by_ticket.insert(flight.ticket, at);
        if flight.payload.is_some() {
            let latest = self.by_span.entry(flight.range).or_insert(flight.ticket);
            *latest = flight.ticket.max(*latest);
        }
    }
}

/// All flights of one cache.
#[derive(Debug)]
pub struct Flights<T> {
    by_key: HashMap<Arc<str>, KeyFlights<T>, RandomState>,
    writers: HashMap<Box<str>, Writers, RandomState>,
    /// Prefixes below which the source is being changed, and by how many writers.
    changes: HashMap<Box<str>, usize, RandomState>,
    next: Ticket,
    /// Counts the steps that may have invalidated a ticket or closed its flight.
    invalidation_epoch: u64,
}

#[derive(Debug, Default)]
struct Writers {
    active: usize,
    overlapped: bool,
    /// Version of the key when the first of them began.
    version: Version,
}

impl<T: Clone> Flights<T> {
    /// Without flights; tickets are counted from `next` on.
    pub(crate) fn new(next: Ticket) -> Self {
        Flights {
            by_key: HashMap::default(),
            writers: HashMap::default(),
            changes: HashMap::default(),
            next,
            invalidation_epoch: 0,
        }
    }

    /// While this is unchanged, every ticket that was valid is still valid, as far as this process
    /// can tell.
    #[must_use]
    pub(crate) fn invalidation_epoch(&self) -> u64 {
        self.invalidation_epoch
    }

    /// Joins the flight that brings this range, or the full value.
    pub fn join(
        &mut self,
        key: &str,
        range: ByteRange,
        version: Version,
    ) -> Option<(ByteRange, T)> {
        let flights = self.by_key.get_mut(key)?;
        let found = flights.join(range, version);
        found.or_else(|| flights.join(ByteRange::Full, version))
    }

    /// Opens a flight.
    pub fn open(
        &mut self,
        key: &str,
        range: ByteRange,
        payload: Option<T>,
        version: Version,
        max_age: Option<u64>,
        absences_made: u64,
    ) -> Ticket {
        let ticket = self.next;
        self.next += 1;
        let has_readers = payload.is_some();
        let mut flight = Flight {
            ticket,
            range,
            invalidated: false,
            version,
            max_age,
            absences_made,
            validator: None,
            payload,
            joined: false,
            superseded: false,
            passed: Vec::new(),
        };
        match self.by_key.get_mut(key) {
            Some(flights) => {
                if has_readers {
                    flight.passed = flights.passed_by(range, version);
                }
                flights.push(flight);
            }
            None => {
                let flights = smallvec![flight];
                let index = None;
                self.by_key
                    .insert(key.into(), KeyFlights { flights, index });
            }
        }
        ticket
    }

    /// The key of a flight, if its value may be cached.
    #[must_use]
    pub fn valid(&self, key: &str, ticket: Ticket, version: Version) -> Option<&Arc<str>> {
        let (key, flights) = self.by_key.get_key_value(key)?;
        let flight = flights.get(ticket)?;
        // A write in progress may reach the source at any moment.
        let is_written = self.is_changing(key);
        (flight.is_valid(version) && !is_written).then_some(key)
    }

    /// Whether this process is changing this key or a directory above it.
    pub(crate) fn is_changing(&self, key: &str) -> bool {
        !self.writers.is_empty() && self.writers.contains_key(key)
            || !self.changes.is_empty() && self.is_changed(key)
    }

    /// Whether a flight of this key is open.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.by_key.contains_key(key)
    }

    /// The age by which the reader of a flight has found nothing; `None` for any age.
    #[must_use]
    pub(crate) fn max_age(&self, key: &str, ticket: Ticket) -> Option<u64> {
        self.by_key.get(key)?.get(ticket)?.max_age
    }

    /// Absences that had been made when a flight was opened.
    #[must_use]
    pub(crate) fn absences_made(&self, key: &str, ticket: Ticket) -> Option<u64> {
        Some(self.by_key.get(key)?.get(ticket)?.absences_made)
    }

    /// Notes the validator of what the reader of a flight has read.
    pub(crate) fn set_validator(&mut self, key: &str, ticket: Ticket, validator: &str) {
        let flights = self.by_key.get_mut(key);
        if let Some(flight) = flights.and_then(|flights| flights.get_mut(ticket)) {
            flight.validator = Some(validator.into());
        }
    }

    /// Takes the same out.
    pub(crate) fn take_validator(&mut self, key: &str, ticket: Ticket) -> Option<Box<str>> {
        let flights = self.by_key.get_mut(key)?;
        flights.get_mut(ticket)?.validator.take()
    }

    /// Closes a flight, and those that its reader could not join; they are never joined again.
    pub fn close(&mut self, key: &str, ticket: Ticket) -> Option<ClosedFlight<T>> {
        self.invalidation_epoch += 1;
        let flights = self.by_key.get_mut(key)?;
        let closed = flights.close(ticket)?;
        if flights.flights.is_empty() {
            self.by_key.remove(key);
        }
        Some(closed)
    }

    /// The same with the key that the flight was opened with, which saves a second hash.
    pub(crate) fn close_known(&mut self, key: Arc<str>, ticket: Ticket) -> Option<ClosedFlight<T>> {
        self.invalidation_epoch += 1;
        let Entry::Occupied(mut entry) = self.by_key.entry(key) else {
            return None;
        };
        let closed = entry.get_mut().close(ticket)?;
        if entry.get().flights.is_empty() {
            entry.remove();
        }
        Some(closed)
    }

    /// Closes the flight with this payload; it is never joined again, and its value is not cached.
    pub fn abort(&mut self, key: &str, is: impl Fn(&T) -> bool) -> Option<ClosedFlight<T>> {
        let flights = &self.by_key.get(key)?.flights;
        let found = flights.iter().find(|f| f.payload.as_ref().is_some_and(&is));
        let ticket = found?.ticket;
        self.close(key, ticket)
    }

    /// Has later readers open another flight than the one with this payload. What this one brings is
    /// cached where nothing else is by then, for it is older than what they read.
    pub fn supersede(&mut self, key: &str, is: impl Fn(&T) -> bool) {
        let flights = self.by_key.get_mut(key).map(|of_key| &mut of_key.flights);
        let mut all = flights.into_iter().flatten();
        if let Some(flight) = all.find(|f| f.payload.as_ref().is_some_and(&is)) {
            flight.max_age = None;
            flight.superseded = true;
        }
    }

    /// Invalidates the flights of one key.
    pub fn invalidate_key(&mut self, key: &str) {
        self.invalidation_epoch += 1;
        if let Some(flights) = self.by_key.get_mut(key) {
            flights.invalidate();
        }
    }

    /// Invalidates the flights of all keys that `covers` accepts. Writers of these keys count as
    /// overlapped: what they write may be gone again already.
    pub fn invalidate_where(&mut self, covers: impl Fn(&str) -> bool) {
        self.invalidation_epoch += 1;
        for (key, flights) in self.by_key.iter_mut() {
            if covers(key) {
                flights.invalidate();
            }
        }
        for (key, writers) in &mut self.writers {
            if covers(key) {
                writers.overlapped = true;
            }
        }
    }

    /// Invalidates everything: the index was emptied.
    pub fn invalidate_all(&mut self) {
        self.invalidate_where(|_| true);
    }

    /// A writer of this key begins, at this version.
    pub fn begin_write(&mut self, key: &str, version: Version) {
        self.invalidate_key(key);
        match self.writers.get_mut(key) {
            Some(writers) => {
                writers.active += 1;
                writers.overlapped = true;
            }
            None => {
                self.writers.insert(
                    key.into(),
                    Writers {
                        active: 1,
                        overlapped: false,
                        version,
                    },
                );
            }
        }
    }

    /// A change of everything below this prefix begins or ends; nothing below it is cached meanwhile.
    /// False for the end of one that is not known to have begun.
    pub fn prefix_change(&mut self, prefix: &str, begins: bool) -> bool {
        self.invalidation_epoch += 1;
        match self.changes.get_mut(prefix) {
            Some(changes) if begins => *changes += 1,
            Some(changes) if *changes > 1 => *changes -= 1,
            Some(_) => _ = self.changes.remove(prefix),
            None if begins => _ = self.changes.insert(prefix.into(), 1),
            None => return false,
        }
        true
    }

    /// Whether a write of this key is known to be in progress.
    pub(crate) fn is_written(&self, key: &str) -> bool {
        self.writers.contains_key(key)
    }

    /// Whether this key, or a directory above it, is being changed.
    fn is_changed(&self, key: &str) -> bool {
        key::and_above(key).any(|name| self.changes.contains_key(name))
    }

    /// Slots of the keys and prefixes that are being changed, once for each writer.
    pub(crate) fn changed(&self) -> impl Iterator<Item = Slot> {
        let writers = self.writers.iter();
        let writers = writers.map(|(key, writers)| (slot_of_key(key), writers.active));
        let changes = self.changes.iter();
        let changes = changes.map(|(prefix, times)| (slot_of_prefix(prefix), *times));
        let all = writers.chain(changes);
        all.flat_map(|(slot, times)| std::iter::repeat_n(slot, times))
    }

    /// A writer of this key has ended, at this version. True when it was alone all the time, so that
    /// the source is known to hold what it wrote.
    pub fn end_write(&mut self, key: &str, version: Version) -> bool {
        self.invalidate_key(key);
        let Some(writers) = self.writers.get_mut(key) else {
            return false;
        };
        writers.active = writers.active.saturating_sub(1);
        let alone = !writers.overlapped && writers.version == version;
        if writers.active == 0 {
            self.writers.remove(key);
        }
        alone
    }

    /// Takes all flights and writers out. Tickets are never reused: one that is still held stays
    /// invalid.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let mut fresh = Flights::new(self.next);
        fresh.invalidation_epoch = self.invalidation_epoch + 1;
        std::mem::replace(self, fresh)
    }

    /// Flights that are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_key
            .values()
            .map(|of_key| of_key.flights.len())
            .sum()
    }

    /// Checks that each flight is found by its ticket, and that one that is not the latest of its range
    /// ends with a later one.
    pub(crate) fn validate(&self) -> Result<()> {
        for of_key in self.by_key.values() {
            let all = &of_key.flights;
            let passed = all.iter().flat_map(|f| f.passed.iter().copied());
            let passed: HashSet<Ticket, RandomState> = passed.collect();
            let is_sound = |(at, f): (usize, &Flight<T>)| {
                let latest = of_key.latest(f.range).map(|latest| latest.ticket);
                let ends = f.payload.is_none() || latest == Some(f.ticket);
                of_key.position(f.ticket) == Some(at) && (ends || passed.contains(&f.ticket))
            };
            if all.is_empty() || !all.iter().enumerate().all(is_sound) {
                return Err(Error::Corrupt("flights of a key"));
            }
        }
        Ok(())
    }

    /// Whether no flight is open and nothing is being written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty() && self.writers.is_empty() && self.changes.is_empty()
    }
}
