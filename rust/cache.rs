//! The cache as its callers see it: every operation of the fill and write protocol, each one step
//! under one lock. It decides and counts; it never touches a value.
//!
//! What has to happen between two steps (a source read, a delete, a write of bytes) is the
//! caller's, who holds no lock then. Each step answers with the deletes that it wants done; the
//! caller reports every one of them back as dropped or failed.

mod changes;
mod fills;
mod reads;
mod select;
mod victims;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::fills::Reservation;
pub use self::fills::{Finished, Refusal, Room};
pub use self::select::select;
use crate::block::{Block, Version};
use crate::cell::{Cell, State};
use crate::cells::{Cells, List, ROOT};
use crate::entries::SKEW;
use crate::error::{Fault, Res};
use crate::few::Few;
use crate::flights::{Flights, Ticket};
use crate::key::{self, Span};
use crate::memo::Memo;
use crate::seen::Seen;

/// Entries that one step names at most, so that no step holds the lock for long.
pub const BATCH: usize = 1024;

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

/// Indexes that this process has made, or its parent before the fork. Each counts its tickets and
/// reservations from another number on: what was begun with one index never ends in another.
static INDEXES: AtomicU64 = AtomicU64::new(0);
const NUMBERS_BITS: u32 = 40;

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
    reservations: Few<u64, Reservation>,
    next_reservation: u64,
    stats: Stats,
    /// Entries that were used and are not yet moved to the end of the list, at most so many at once.
    touched: Vec<u32>,
    /// For each cell, the mark of the contents that this process has verified, or 0; of an index that
    /// other processes share.
    seen: Seen,
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
        let first = INDEXES.fetch_add(1, Ordering::Relaxed) << NUMBERS_BITS | 1;
        Cache {
            cells: Cells {
                block,
                memo: Memo::default(),
            },
            limits,
            flights: Flights::new(first),
            reservations: Few::default(),
            next_reservation: first,
            stats: Stats::default(),
            touched: Vec::new(),
            seen: Seen::default(),
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
        let header = self.cells.header();
        let cells = u64::from(header.used) * std::mem::size_of::<Cell>() as u64;
        let texts = u64::from(header.texts_used) * std::mem::size_of::<u32>() as u64;
        let slots = std::mem::size_of_val(self.cells.block.slots());
        cells + texts + (slots + self.seen.memory()) as u64
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

    fn can_serve(&self, cell: &Cell, now: u64) -> bool {
        cell.is_entry() && cell.state() == State::Present && !self.is_stale(cell, now)
    }

    fn version(&self, key: &str) -> Version {
        if B::EXCLUSIVE {
            // Nobody else writes, and our own writes void the flights.
            return Version::default();
        }
        let hashes = key::and_above(key).map(shared_hash);
        hashes.fold(Version::default(), |[sum, _], hash| {
            let [version, epoch] = self.cells.block.version(hash);
            // They only ever grow, so no two changes cancel each other.
            [sum.wrapping_add(version), epoch]
        })
    }

    /// Whether the ticket of a reservation is valid still.
    fn is_valid(&self, reservation: &Reservation) -> bool {
        // On the heap only what this process does makes a ticket void, and that is counted.
        B::EXCLUSIVE && reservation.losses == self.flights.losses()
            || self
                .valid_key(&reservation.key, reservation.ticket)
                .is_some()
    }

    /// The key of a ticket under which a value may be kept.
    fn valid_key(&self, key: &str, ticket: Ticket) -> Option<&Arc<str>> {
        let valid = self.flights.valid(key, ticket, self.version(key))?;
        (B::EXCLUSIVE || !self.is_written(key)).then_some(valid)
    }

    /// Whether somebody is changing this key or a directory above it.
    fn is_written(&self, key: &str) -> bool {
        let block = &self.cells.block;
        let is_written = |name| block.is_written(shared_hash(name));
        block.has_writers() && key::and_above(key).any(is_written)
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

    /// Changes the bounds and when to compare bytes with their checksum; a smaller size is enforced
    /// before new bytes are written.
    pub fn rebound(&mut self, max_size: u64, max_age: Option<u64>, verify: Verify) {
        self.limits.max_size = max_size;
        self.limits.max_age = max_age;
        self.limits.verify = verify;
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
