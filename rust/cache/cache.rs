//! The cache as its callers see it: its bounds, its counters, and the types of its answers.

use std::collections::HashMap;
use std::ops::{Add, Sub};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::fast::RandomState;

use super::ages::{Ages, SourceAge};
use super::changes::{Changes, Slot, slots_of};
use super::entry::SKEW;
use super::in_flight::{Flights, Ticket};
use super::peers::{Peers, Version};
use super::planned::Planned;
use super::reserve::Reservation;
use super::segments::{OpenSegment, Placed, VALUE_HEADER};
use super::verified::VerifiedSet;
use crate::arena::{Arena, Cell, List, State};
use crate::error::{Error, Result};
use crate::key::ByteRange;
use crate::policy::{Eviction, Minimise, Policy};
use crate::sampling::Sample;

/// Entries that one step names at most, so that no step holds the lock for long.
pub const BATCH: usize = 1024;

/// The bounds of a cache.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes that the cache store may hold at most.
    pub max_size: u64,
    /// Milliseconds after its fetch from which on an entry is of no use to any store here, and the first to go
    /// when bytes are needed, if so it is elsewhere; `None` for never. In a pool that is of each source:
    /// [`Cache::set_ages`]. What a look-up may serve is its own [`Freshness`].
    pub max_age: Option<u64>,
    /// Whether the cache store can hold `a` beside `a/b`; a file system cannot.
    pub flat_namespace: bool,
    /// When to compare the bytes of an entry with its checksum.
    pub verify: Verify,
}

impl Limits {
    /// So many bytes, of any age, in a namespace that is flat; checksums are compared where only they can tell.
    #[must_use]
    pub const fn bounded(max_size: u64) -> Self {
        Limits {
            max_size,
            max_age: None,
            flat_namespace: true,
            verify: Verify::Never,
        }
    }
}

/// Which entries a look-up may serve: those that were fetched less than `max_age` before `now`.
///
/// The age is an argument, so that each store, and each kind of key, has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freshness {
    /// Milliseconds on the clock of the index.
    pub now: u64,
    /// Milliseconds; `None` for any age.
    pub max_age: Option<u64>,
}

impl Freshness {
    /// Whether an entry with this fetch time is too old. The age of a fetch in the future, or at an
    /// unknown time (0), is unknown, so it is not fresh.
    #[inline]
    #[must_use]
    pub fn is_stale(self, fetched: u64) -> bool {
        let Freshness { now, max_age } = self;
        max_age.is_some_and(|age| {
            fetched == 0 || fetched.saturating_sub(now) > SKEW || now.saturating_sub(fetched) >= age
        })
    }
}

/// A time alone: entries of any age.
impl From<u64> for Freshness {
    fn from(now: u64) -> Self {
        Freshness { now, max_age: None }
    }
}

impl From<(u64, Option<u64>)> for Freshness {
    fn from((now, max_age): (u64, Option<u64>)) -> Self {
        Freshness { now, max_age }
    }
}

/// When the bytes of an entry are compared with its checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Never, except once for what a rebuild has found in a file system.
    #[default]
    Never,
    /// At the first hit in each process.
    First,
    /// At each hit.
    Always,
}

/// Indexes that this process has made, or its parent before the fork. Each numbers its tickets and
/// reservations from another start, so what began with one index never ends in another.
static INDEXES: AtomicU64 = AtomicU64::new(0);
const NUMBER_BITS: u32 = 40;

/// Bytes to delete: the cell that counts them, and their name in the cache store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    /// To be reported back.
    pub cell: u32,
    /// Name in the cache store.
    pub cache_key: String,
    /// Where its bytes are, in a pool.
    pub placed: Option<Placed>,
}

/// An entry that can serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Names the entry for [`Cache::discard`].
    pub handle: u64,
    /// What the entry holds.
    pub range: ByteRange,
    /// Bytes of the entry.
    pub size: u64,
    /// CRC32C of the entry, where it is known.
    pub checksum: Option<u32>,
    /// First byte of the entry that was asked for.
    pub start: u64,
    /// Bytes that were asked for.
    pub length: u64,
}

/// The counters of an index, which can be read without its lock.
///
/// Only the holder of the lock counts, so an addition is a load and a store.
#[derive(Debug, Default)]
pub struct Tally {
    pub(super) evictions: AtomicU64,
    pub(super) expirations: AtomicU64,
    pub(super) refusals: AtomicU64,
    /// Absences, as of the last step that has changed their number here, or taken a shared index.
    pub(super) absences: AtomicU64,
}

impl Tally {
    /// What was counted so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            evictions: self.evictions.load(Ordering::Relaxed),
            expirations: self.expirations.load(Ordering::Relaxed),
            refusals: self.refusals.load(Ordering::Relaxed),
        }
    }

    /// Absences that the index was last seen to have.
    #[must_use]
    pub fn absences(&self) -> u64 {
        self.absences.load(Ordering::Relaxed)
    }

    pub(super) fn add(counter: &AtomicU64, count: u64) {
        let sum = counter.load(Ordering::Relaxed).saturating_add(count);
        counter.store(sum, Ordering::Relaxed);
    }
}

/// Counters since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Entries removed because bytes were needed.
    pub evictions: u64,
    /// Those of them that were stale.
    pub expirations: u64,
    /// Values that were left uncached.
    pub refusals: u64,
}

impl Stats {
    fn each(self, other: Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Stats {
            evictions: with(self.evictions, other.evictions),
            expirations: with(self.expirations, other.expirations),
            refusals: with(self.refusals, other.refusals),
        }
    }
}

impl Add for Stats {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.each(other, u64::wrapping_add)
    }
}

/// Wraps where more is taken away, so that what is added afterwards gives the right sum.
impl Sub for Stats {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.each(other, u64::wrapping_sub)
    }
}

/// An index with its bounds, flights and reservations.
///
/// `S` is the memory, `T` what the readers of a flight wait on, `P` the eviction policy.
#[derive(Debug)]
pub struct Cache<S, T, P = Policy> {
    pub(crate) arena: Arena<S>,
    pub(super) policy: P,
    pub(super) limits: Limits,
    pub(super) ages: Ages,
    pub(super) flights: Flights<T>,
    pub(super) reservations: HashMap<u64, Reservation, RandomState>,
    pub(crate) next_reservation: u64,
    /// Bytes that were reserved or granted when the index was emptied, until their writers have ended.
    pub(super) promises: HashMap<u64, u64, RandomState>,
    pub(super) tally: Arc<Tally>,
    /// Entries of a shared index that this process has verified.
    pub(super) verified: VerifiedSet,
    /// Changes since a process has begun to decode values.
    pub(super) changes: Changes,
    /// A sample of the requests, once one was to be sampled; a shared index has one in its storage.
    pub(super) own_sample: Option<Box<Sample>>,
    /// See [`Cache::generation`].
    pub(super) generation: u64,
    /// See [`Header::unit`](crate::arena::Header::unit).
    unit: u64,
    /// Where this participant appends values, in a pool.
    pub(super) open_segment: OpenSegment,
    /// Bytes of the copies that this participant is writing.
    pub(super) moving: u64,
    /// Whether a segment of a pool has lost its last entry; see [`Cache::take_emptied`].
    pub(super) emptied: bool,
    /// Whether no segment of a pool takes more than one value.
    pub(super) one_value_a_segment: bool,
    /// What an empty index is to minimise.
    pub(super) minimise: Minimise,
    /// What will be read, where this process knows.
    pub(super) planned: Option<Box<Planned>>,
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// A cache over empty memory.
    pub fn new(storage: S, limits: Limits, seed: u64) -> Result<Self> {
        let mut cache = Cache::over(storage, limits);
        cache.init(seed)?;
        Ok(cache)
    }

    pub(crate) fn init(&mut self, seed: u64) -> Result<()> {
        let policy = (self.policy.number(), self.minimise as u32);
        let is_free = !self.arena.storage.is_policy_used();
        let has_places = self.arena.storage.has_places();
        let header = self.arena.header_mut();
        header.unit = self.unit;
        header.value_header = if has_places { VALUE_HEADER } else { 0 };
        if is_free {
            (header.policy.kind, header.policy.minimise) = policy;
        }
        self.arena.table_init()?;
        self.arena.tree_init(seed)
    }

    /// A cache over memory that holds an index already.
    pub(crate) fn over(storage: S, limits: Limits) -> Self {
        let first = INDEXES.fetch_add(1, Ordering::Relaxed) << NUMBER_BITS | 1;
        let has_sources = storage.has_sources();
        let mut cache = Cache {
            arena: Arena::new(storage),
            policy: P::default(),
            limits,
            ages: Ages::default(),
            flights: Flights::new(first),
            reservations: HashMap::default(),
            next_reservation: first,
            promises: HashMap::default(),
            tally: Arc::default(),
            verified: VerifiedSet::default(),
            changes: Changes::default(),
            own_sample: None,
            generation: 0,
            unit: 0,
            open_segment: OpenSegment::default(),
            moving: 0,
            emptied: false,
            one_value_a_segment: false,
            minimise: Minimise::default(),
            planned: None,
        };
        if !has_sources {
            cache.note_ages(vec![SourceAge::of_place(limits.max_age)]);
        }
        cache
    }

    /// Counts whole blocks of so many bytes, in an index that is empty.
    pub fn set_unit(&mut self, unit: u64) {
        self.unit = unit;
        self.arena.header_mut().unit = unit;
    }

    /// The unit that an empty index gets.
    pub(crate) fn unit(&self) -> u64 {
        self.unit
    }

    /// The same, for an index that may have another one, in which case it has to be emptied.
    pub(crate) fn expect_unit(&mut self, unit: u64) -> bool {
        self.unit = unit;
        self.arena.header().unit == unit
    }

    /// Which sum of the folders there is now: a rebuild makes another one. See [`Cache::count_folders_since`].
    #[must_use]
    pub fn folder_sum(&self) -> u64 {
        let [_, generation] = self.arena.storage.first_version();
        u64::from(generation) << 1 | u64::from(self.is_complete())
    }

    /// Counts folders that were changed while there was this sum. What was removed from another one is not in this one:
    /// the rebuild has not found it.
    pub fn count_folders_since(&mut self, sum: Option<u64>, bytes: i64) {
        if bytes > 0 || sum == Some(self.folder_sum()) {
            self.count_folders(bytes);
        }
    }

    /// Counts folders that were made or grew, or, below 0, were removed; nothing where bytes count.
    pub fn count_folders(&mut self, bytes: i64) {
        let is_complete = self.is_complete();
        let header = self.arena.header_mut();
        if header.unit <= 1 {
            return;
        }
        let sum = header.folder_bytes.saturating_add(bytes);
        // What is removed while a rebuild has not counted the folders yet was never in the sum.
        header.folder_bytes = if is_complete { sum } else { sum.max(0) };
    }

    /// Bytes above the bound, less those that are being deleted already.
    pub fn excess(&self) -> Result<u64> {
        let above = self.taken().saturating_sub(self.bound());
        if above == 0 {
            return Ok(0);
        }
        // Seldom: no reservation is granted above the bound, so it has become smaller.
        let mut deleting = 0u64;
        for i in self.arena.list_cells(List::InProgress)? {
            let cell = self.arena.get(i)?;
            if cell.state() == State::Deleting {
                deleting = deleting.saturating_add(self.arena.header().cost(cell.size()?));
            }
        }
        Ok(above.saturating_sub(deleting))
    }

    /// The bounds.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Changes the bounds and when to verify; a smaller size is enforced before new bytes are
    /// written.
    pub fn set_limits(&mut self, max_size: u64, max_age: Option<u64>, verify: Verify) {
        self.limits.max_size = max_size;
        self.arena.storage.set_bound(max_size);
        self.limits.max_age = max_age;
        if !self.arena.storage.has_sources() {
            self.set_ages(vec![SourceAge::of_place(max_age)]);
        }
        self.limits.verify = verify;
    }

    /// Bytes that the cache store may hold by now, and those that are reserved.
    pub(super) fn taken(&self) -> u64 {
        let header = self.arena.header();
        let participants = self.arena.storage.participants().iter();
        let promised = participants.map(|p| p.promised_bytes);
        let taken = header.held_bytes().saturating_add(header.reserved_bytes);
        promised.fold(taken, u64::saturating_add)
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.tally.stats()
    }

    /// The counters, to be read without the lock.
    #[must_use]
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// Bytes that the cache store holds for this cache, or may hold.
    #[must_use]
    pub fn current_size(&self) -> u64 {
        self.arena.header().held_bytes()
    }

    /// Entries that can be served.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.arena.header().live_entries
    }

    /// Whether nothing can be served.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory that the index has touched.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let header = self.arena.header();
        let cells = u64::from(header.cells_used) * size_of::<Cell>() as u64;
        let strings = u64::from(header.strings_used) * size_of::<u32>() as u64;
        let slots = std::mem::size_of_val(self.arena.storage.slots())
            + std::mem::size_of_val(self.arena.storage.history());
        let sample = self.own_sample.as_ref().map_or(0, |sample| sample.memory());
        let others = self.verified.memory() + sample + self.plan_memory();
        cells + strings + (slots + others) as u64
    }

    /// What the changes of a key by other participants are told by. Its own ones invalidate its flights.
    pub(super) fn version(&self, key: &str) -> Version {
        if S::EXCLUSIVE {
            return Version::default();
        }
        self.version_of(key, |storage, slot| {
            let all = storage.changes(slot);
            all.wrapping_sub(storage.own_changes(slot))
        })
    }

    /// The same with those of this participant.
    pub(super) fn version_by_all(&self, key: &str) -> Version {
        self.version_of(key, |storage, slot| storage.changes(slot))
    }

    fn version_of(&self, key: &str, count: impl Fn(&S, Slot) -> u32) -> Version {
        let storage = &self.arena.storage;
        // Counters only ever grow, so no two changes cancel each other.
        let sum = slots_of(key).fold(0u32, |sum, slot| sum.wrapping_add(count(storage, slot)));
        [sum, storage.epoch()]
    }

    /// Whether the ticket of a reservation is still valid.
    pub(super) fn is_valid(&self, reservation: &Reservation) -> bool {
        // In memory of one process every invalidation is counted.
        S::EXCLUSIVE && reservation.invalidation_epoch == self.flights.invalidation_epoch()
            || self
                .valid_key(&reservation.key, reservation.ticket)
                .is_some()
    }

    /// The key of a ticket under which a value may be cached.
    pub(super) fn valid_key(&self, key: &str, ticket: Ticket) -> Option<&Arc<str>> {
        let valid = self.flights.valid(key, ticket, self.version(key))?;
        (S::EXCLUSIVE || !self.is_written(key)).then_some(valid)
    }

    /// Whether this key, or a directory above it, is being changed by any writer that is known.
    pub(super) fn is_changing(&self, key: &str) -> bool {
        self.flights.is_changing(key) || !S::EXCLUSIVE && self.is_written(key)
    }

    /// Whether another participant is changing this key or a directory above it.
    fn is_written(&self, key: &str) -> bool {
        let storage = &self.arena.storage;
        storage.has_writers() && slots_of(key).any(|slot| storage.is_written(slot))
    }

    /// Whether it is for this participant to [`Cache::adopt`].
    #[must_use]
    pub fn owns_rebuild(&self) -> bool {
        self.arena.storage.owns_rebuild()
    }

    /// Whether its rebuild deletes the values that are there, for the index was damaged; see [`Peers::begins_empty`].
    #[must_use]
    pub fn begins_empty(&self) -> bool {
        self.arena.storage.begins_empty()
    }

    /// Whether the index lists everything that is in the cache store.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.arena.storage.is_complete()
    }

    /// Times that the index was emptied; cell numbers of another generation mean nothing.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The slot of this participant; `None` where the index is not shared.
    #[must_use]
    pub fn slot(&self) -> Option<usize> {
        (!S::EXCLUSIVE).then(|| self.arena.storage.own_slot())
    }

    /// Open flights, and reservations that are not committed.
    #[must_use]
    pub fn in_flight(&self) -> (usize, usize) {
        (self.flights.len(), self.reservations.len())
    }

    /// Recomputes every counter and list from the cells and the reservations, and looks at the flights.
    pub fn validate(&self) -> Result<()> {
        self.arena.validate()?;
        self.flights.validate()?;
        let mut parts = self.reservations.values().map(|r| r.reserved);
        let reserved = parts.try_fold(0u64, u64::checked_add);
        self.policy.validate(&self.arena)?;
        if !self.is_plan_sound()? {
            return Err(Error::Corrupt("entries of the plan"));
        }
        let storage = &self.arena.storage;
        let header = self.arena.header();
        // In a shared index each participant knows its own part only.
        let own = storage.own();
        let counted = own.map_or(header.reserved_bytes, |own| own.reserved_bytes);
        if reserved != Some(counted) {
            return Err(Error::Corrupt("reserved bytes"));
        }
        if let Some(own) = own {
            let writing = self.reservations.values().filter(|r| r.cell != 0);
            let promised = self.promised();
            let writing: u64 = writing.map(|r| header.cost(r.size)).sum();
            if own.writing_bytes != writing + self.moving || own.promised_bytes != promised {
                return Err(Error::Corrupt("bytes of a participant"));
            }
        }
        for reservation in self.reservations.values().filter(|r| r.cell != 0) {
            if self.arena.get(reservation.cell)?.state() != State::Filling {
                return Err(Error::Corrupt("granted reservation that is not written"));
            }
        }
        // A directory may have been opened with a smaller bound; the next fill enforces it.
        let alone = storage.participants().is_empty();
        let bytes = header.held_bytes().saturating_add(header.reserved_bytes);
        if alone && bytes > self.limits.max_size {
            return Err(Error::Corrupt("more bytes than the bound allows"));
        }
        Ok(())
    }
}
