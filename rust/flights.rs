//! Flights: the source reads under way, so that one read serves everyone who asks, and the tickets
//! that decide whether what a read brings may be kept.
//!
//! A ticket names a flight. A write, delete, prefix delete or clear makes the tickets of the keys
//! that it touches void, before it begins and after it has ended: what was read before the end of
//! a write is never kept after it, and a reader that comes later never joins such a flight. Writes
//! of other processes show in the version of the key, with which a flight is opened and asked for.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use smallvec::{SmallVec, smallvec};

use crate::block::Version;
use crate::few::Few;
use crate::key::{self, Span};

/// Names one flight for as long as the process lives.
pub type Ticket = u64;

#[derive(Debug)]
struct Flight<T> {
    ticket: Ticket,
    span: Span,
    void: bool,
    /// Version of the key when the flight was opened.
    version: Version,
    /// What the readers wait on; `None` for the copy that a writer puts into the cache.
    payload: Option<T>,
    /// Whether anybody but its reader waits, or has waited.
    joined: bool,
}

/// What is left of a flight that is closed.
#[derive(Debug, PartialEq, Eq)]
pub struct Closed<T> {
    /// What its readers waited on.
    pub payload: Option<T>,
    /// Whether anybody but the one who opened it has it.
    pub joined: bool,
}

impl<T> From<Flight<T>> for Closed<T> {
    fn from(flight: Flight<T>) -> Self {
        Closed {
            payload: flight.payload,
            joined: flight.joined,
        }
    }
}

/// The flights of one key. Most have one; where there are many (a shard whose inner chunks are all
/// read at once), each is found without a look at the others.
#[derive(Debug)]
struct OfKey<T> {
    flights: SmallVec<[Flight<T>; 1]>,
    /// Only kept where there are many.
    places: Option<Box<Places>>,
}

/// Where the flights of a key are.
#[derive(Debug, Default)]
struct Places {
    by_ticket: HashMap<Ticket, usize, RandomState>,
    /// The latest flight of a span that has readers. Earlier ones were void when it was opened,
    /// and nobody joins those any more.
    by_span: HashMap<Span, Ticket, RandomState>,
}

/// Flights of a key from which on they are found by hash.
const MANY: usize = 16;

impl<T> OfKey<T> {
    fn push(&mut self, flight: Flight<T>) {
        if let Some(places) = &mut self.places {
            places.add(&flight, self.flights.len());
        }
        self.flights.push(flight);
        if self.places.is_none() && self.flights.len() >= MANY {
            let mut places = Box::<Places>::default();
            for (at, flight) in self.flights.iter().enumerate() {
                places.add(flight, at);
            }
            self.places = Some(places);
        }
    }

    fn void(&mut self) {
        self.flights.iter_mut().for_each(|f| f.void = true);
    }

    fn place(&self, ticket: Ticket) -> Option<usize> {
        match &self.places {
            Some(places) => places.by_ticket.get(&ticket).copied(),
            None => self.flights.iter().position(|f| f.ticket == ticket),
        }
    }

    fn get(&self, ticket: Ticket) -> Option<&Flight<T>> {
        self.flights.get(self.place(ticket)?)
    }

    fn get_mut(&mut self, ticket: Ticket) -> Option<&mut Flight<T>> {
        let at = self.place(ticket)?;
        self.flights.get_mut(at)
    }

    fn remove(&mut self, ticket: Ticket) -> Option<Flight<T>> {
        let at = self.place(ticket)?;
        let flight = self.flights.swap_remove(at);
        if let Some(places) = &mut self.places {
            places.by_ticket.remove(&ticket);
            if places.by_span.get(&flight.span) == Some(&ticket) {
                places.by_span.remove(&flight.span);
            }
            if let Some(moved) = self.flights.get(at) {
                places.by_ticket.insert(moved.ticket, at);
            }
        }
        Some(flight)
    }

    /// The flight that brings just this span, if a reader may join it.
    fn joinable(&mut self, span: Span, version: Version) -> Option<&mut Flight<T>> {
        let open = |f: &&mut Flight<T>| !f.void && f.version == version && f.payload.is_some();
        match &self.places {
            Some(places) => {
                let ticket = *places.by_span.get(&span)?;
                self.get_mut(ticket).filter(open)
            }
            None => self
                .flights
                .iter_mut()
                .filter(|f| f.span == span)
                .find(open),
        }
    }

    /// Has somebody join the flight of this span.
    fn join(&mut self, span: Span, version: Version) -> Option<(Span, T)>
    where
        T: Clone,
    {
        let flight = self.joinable(span, version)?;
        flight.joined = true;
        Some((flight.span, flight.payload.clone()?))
    }
}

impl Places {
    fn add<T>(&mut self, flight: &Flight<T>, at: usize) {
        self.by_ticket.insert(flight.ticket, at);
        if flight.payload.is_some() {
            let latest = self.by_span.entry(flight.span).or_insert(flight.ticket);
            *latest = flight.ticket.max(*latest);
        }
    }
}

/// All flights of one cache.
#[derive(Debug)]
pub struct Flights<T> {
    by_key: Few<Arc<str>, OfKey<T>>,
    writers: HashMap<Box<str>, Writers, RandomState>,
    /// Prefixes below which the source is being changed, and by how many.
    changes: HashMap<Box<str>, usize, RandomState>,
    next: Ticket,
    /// Steps that may have made a ticket void, or closed its flight.
    losses: u64,
}

#[derive(Debug, Default)]
struct Writers {
    active: usize,
    overlapped: bool,
    /// Version of the key once the first of them had begun.
    version: Version,
}

impl<T: Clone> Flights<T> {
    /// Without flights; tickets are counted from `next` on.
    pub(crate) fn new(next: Ticket) -> Self {
        Flights {
            by_key: Few::default(),
            writers: HashMap::default(),
            changes: HashMap::default(),
            next,
            losses: 0,
        }
    }

    /// Where this is what it was, every ticket that was valid then is valid still, but for what
    /// versions say.
    #[must_use]
    pub(crate) fn losses(&self) -> u64 {
        self.losses
    }

    /// Joins the flight that brings this span, or the full value.
    pub fn join(&mut self, key: &str, span: Span, version: Version) -> Option<(Span, T)> {
        let flights = self.by_key.get_mut(key)?;
        let found = flights.join(span, version);
        found.or_else(|| flights.join(Span::Full, version))
    }

    /// Opens a flight.
    pub fn open(&mut self, key: &str, span: Span, payload: Option<T>, version: Version) -> Ticket {
        let ticket = self.next;
        self.next += 1;
        let flight = Flight {
            ticket,
            span,
            void: false,
            version,
            payload,
            joined: false,
        };
        match self.by_key.get_mut(key) {
            Some(flights) => flights.push(flight),
            None => {
                let flights = smallvec![flight];
                let places = None;
                self.by_key.insert(key.into(), OfKey { flights, places });
            }
        }
        ticket
    }

    /// The key of a flight, if what that brings may be kept.
    #[must_use]
    pub fn valid(&self, key: &str, ticket: Ticket, version: Version) -> Option<&Arc<str>> {
        let (key, flights) = self.by_key.get(key)?;
        let flight = flights.get(ticket)?;
        // Of a write that never ends nobody knows when it lands.
        let is_written = !self.writers.is_empty() && self.writers.contains_key(&**key)
            || !self.changes.is_empty() && self.is_changed(key);
        (!flight.void && flight.version == version && !is_written).then_some(key)
    }

    /// Closes a flight; nobody joins it from now on.
    pub fn close(&mut self, key: &str, ticket: Ticket) -> Option<Closed<T>> {
        self.losses += 1;
        let flights = self.by_key.get_mut(key)?;
        let flight = flights.remove(ticket)?;
        if flights.flights.is_empty() {
            self.by_key.remove(key);
        }
        Some(flight.into())
    }

    /// The same for whoever has the key at hand: that is looked for once.
    pub(crate) fn close_known(&mut self, key: Arc<str>, ticket: Ticket) -> Option<Closed<T>> {
        self.losses += 1;
        let is_empty = |flights: &OfKey<T>| flights.flights.is_empty();
        let taken = self.by_key.take_from(key, |of| of.remove(ticket), is_empty);
        taken.flatten().map(Closed::from)
    }

    /// Closes the flight with this payload, whoever has opened it: nobody joins it from now on, and
    /// what it brings is not kept.
    pub fn strike(&mut self, key: &str, is: impl Fn(&T) -> bool) -> Option<Closed<T>> {
        let flights = &self.by_key.get(key)?.1.flights;
        let found = flights.iter().find(|f| f.payload.as_ref().is_some_and(&is));
        let ticket = found?.ticket;
        self.close(key, ticket)
    }

    /// Makes the flights of one key void.
    pub fn void_key(&mut self, key: &str) {
        self.losses += 1;
        if let Some(flights) = self.by_key.get_mut(key) {
            flights.void();
        }
    }

    /// Makes the flights of all keys void that `covers` accepts, and spoils the writers among
    /// them: what they write may be gone again already.
    pub fn void_where(&mut self, covers: impl Fn(&str) -> bool) {
        self.losses += 1;
        for (key, flights) in self.by_key.iter_mut() {
            if covers(key) {
                flights.void();
            }
        }
        for (key, writers) in &mut self.writers {
            if covers(key) {
                writers.overlapped = true;
            }
        }
    }

    /// Makes everything void: the index was emptied.
    pub fn void_all(&mut self) {
        self.void_where(|_| true);
    }

    /// A writer of this key begins. `version` is the one that it has made.
    pub fn begin_write(&mut self, key: &str, version: Version) {
        self.void_key(key);
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

    /// A change of whatever is below this prefix begins or ends: until then nothing of that is kept.
    pub fn mark_change(&mut self, prefix: &str, begins: bool) {
        self.losses += 1;
        match self.changes.get_mut(prefix) {
            Some(changes) if begins => *changes += 1,
            Some(changes) if *changes > 1 => *changes -= 1,
            Some(_) => _ = self.changes.remove(prefix),
            None if begins => _ = self.changes.insert(prefix.into(), 1),
            None => {}
        }
    }

    /// Whether a change of this key, or of a directory above it, is under way.
    fn is_changed(&self, key: &str) -> bool {
        key::and_above(key).any(|name| self.changes.contains_key(name))
    }

    /// Keys and prefixes that are being changed, once for each who does so.
    pub fn changed(&self) -> impl Iterator<Item = &str> {
        let writers = self.writers.iter();
        let writers = writers.map(|(key, writers)| (key, writers.active));
        let changes = self.changes.iter().map(|(prefix, times)| (prefix, *times));
        let all = writers.chain(changes);
        all.flat_map(|(name, times)| std::iter::repeat_n(&**name, times))
    }

    /// A writer of this key has ended, at this version. True when it was alone all the time, so that the source is
    /// known to hold what it wrote.
    pub fn end_write(&mut self, key: &str, version: Version) -> bool {
        self.void_key(key);
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

    /// Takes all flights and writers out. Tickets go on from where they are: one that somebody
    /// still holds never becomes valid again.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let mut fresh = Flights::new(self.next);
        fresh.losses = self.losses + 1;
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

    /// Whether no flight is open and nobody writes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_key.len() == 0 && self.writers.is_empty() && self.changes.is_empty()
    }
}
