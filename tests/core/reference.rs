//! What the index has to do, in the plainest collections: a map of entries, a vector by recency, a
//! list of flights, sums that are summed up each time.
//!
//! Where the documentation fixes an answer it is predicted. Where it leaves a choice (which of two
//! stale entries goes first, in which order a prefix is drained) the answer is checked for being one
//! of those that are allowed, and followed.

use std::collections::{BTreeMap, BTreeSet};

use zcache::arena::State;
use zcache::cache::ClosedFlight;
use zcache::cache::{
    BATCH, Committed, Found, Joined, Limits, RejectReason, Reserve, Stats, Victim,
};
use zcache::key::{self, Asked, ByteRange};
use zcache::policy::PolicyKind;

pub(crate) type Name = (String, ByteRange);

/// A clock that goes back by more than this was set; by less, threads came out of order.
const SKEW: u64 = 1000;
/// Failed deletes after which a reservation may be rejected.
const PATIENCE: u32 = 8;

#[derive(Clone, Debug)]
struct Entry {
    size: u64,
    state: State,
    /// 0: cannot be dated.
    fetched: u64,
    checksum: u32,
    /// Tells one commit of a name from the next one.
    serial: u64,
}

#[derive(Debug)]
struct Flight {
    ticket: u64,
    name: Name,
    invalidated: bool,
    payload: Option<u32>,
    joined: bool,
    /// Age by which its reader has found nothing.
    max_age: Option<u64>,
    /// Tickets of those that end with it.
    passed: Vec<u64>,
}

#[derive(Debug)]
struct Reservation {
    name: Name,
    size: u64,
    ticket: u64,
    reserved: u64,
    failures: u32,
    granted: bool,
}

impl Reservation {
    fn lacking(&self) -> u64 {
        self.size - self.reserved
    }
}

/// What a found entry was when it was found.
#[derive(Clone, Debug)]
pub(crate) struct Sighting {
    pub(crate) handle: u64,
    name: Name,
    serial: u64,
}

/// The reference.
#[derive(Debug)]
pub(crate) struct Model {
    limits: Limits,
    /// What the adaptive policy lets go is its own business.
    pub(crate) policy: PolicyKind,
    /// Age that look-ups ask for now.
    pub(crate) max_age: Option<u64>,
    entries: BTreeMap<Name, Entry>,
    /// Least recently used first.
    recency: Vec<Name>,
    /// Next to try first; those of one set came at once.
    failed: Vec<BTreeSet<Name>>,
    flights: Vec<Flight>,
    /// All tickets there ever were.
    tickets: BTreeSet<u64>,
    /// Writers in progress, and whether another one overlapped.
    writers: BTreeMap<String, (usize, bool)>,
    /// Prefixes below which the source is being changed.
    changes: Vec<String>,
    reservations: BTreeMap<u64, Reservation>,
    stats: Stats,
    serials: u64,
    /// Keys of which a range was dropped: which of the others has most bytes may be forgotten.
    thinned: BTreeSet<String>,
}

fn is_older(entry: &Entry, now: u64, max_age: Option<u64>) -> bool {
    let Some(age) = max_age else {
        return false;
    };
    let passed = i128::from(now) - i128::from(entry.fetched);
    entry.fetched == 0 || passed < -i128::from(SKEW) || passed.max(0) >= i128::from(age)
}

impl Model {
    pub(crate) fn new(limits: Limits) -> Self {
        Model {
            limits,
            policy: PolicyKind::default(),
            max_age: None,
            entries: BTreeMap::new(),
            recency: Vec::new(),
            failed: Vec::new(),
            flights: Vec::new(),
            tickets: BTreeSet::new(),
            writers: BTreeMap::new(),
            changes: Vec::new(),
            reservations: BTreeMap::new(),
            stats: Stats::default(),
            serials: 0,
            thinned: BTreeSet::new(),
        }
    }

    // --------------------------------------------------------------- counters

    pub(crate) fn used_bytes(&self) -> u128 {
        self.entries.values().map(|e| u128::from(e.size)).sum()
    }

    pub(crate) fn reserved_bytes(&self) -> u128 {
        let rooms = self.reservations.values().map(|r| u128::from(r.reserved));
        rooms.sum()
    }

    pub(crate) fn entries(&self) -> Vec<(String, ByteRange, u64, State)> {
        let all = self.entries.iter();
        all.map(|((key, range), e)| (key.clone(), *range, e.size, e.state))
            .collect()
    }

    pub(crate) fn recency(&self) -> &[Name] {
        &self.recency
    }

    pub(crate) fn stats(&self) -> Stats {
        self.stats
    }

    pub(crate) fn in_flight(&self) -> (usize, usize) {
        (self.flights.len(), self.reservations.len())
    }

    /// Whether an entry is too old for a look-up.
    fn stale(&self, entry: &Entry, now: u64) -> bool {
        is_older(entry, now, self.max_age)
    }

    /// Whether an entry goes before live ones.
    fn useless(&self, entry: &Entry, now: u64) -> bool {
        is_older(entry, now, self.limits.max_age)
    }

    fn fresh(&self, key: &str, range: ByteRange, now: u64) -> Option<&Entry> {
        let entry = self.entries.get(&(key.to_owned(), range))?;
        (entry.state == State::Live && !self.stale(entry, now)).then_some(entry)
    }

    fn name_of(&self, victim: &Victim) -> Name {
        let mut names = self.entries.keys();
        let name = names.find(|(key, range)| range.cache_key(key) == victim.cache_key);
        name.unwrap_or_else(|| panic!("{victim:?} names nothing that is held"))
            .clone()
    }

    // ------------------------------------------------------------------ reads

    /// Checks what a look-up found. `None` may be the right answer or a lost chance, so it is
    /// refused only where the documentation promises a find.
    pub(crate) fn check_found(&self, key: &str, request: Asked, now: u64, found: Option<&Found>) {
        let asked = request.range;
        let mut due = None;
        if let Some(entry) = self.fresh(key, ByteRange::Full, now) {
            due = part_of_value(entry.size, asked, request.slices_like_python)
                .map(|part| (ByteRange::Full, part));
        }
        if due.is_none() && asked != ByteRange::Full {
            let exact = self.fresh(key, asked, now);
            due = exact.map(|entry| (asked, (0, entry.size)));
        }
        let Some(found) = found else {
            assert_eq!(due, None, "not found");
            if asked != ByteRange::Full {
                for (range, size) in self.hinted(key, now) {
                    assert_eq!(
                        part_of_range(range, size, asked),
                        None,
                        "{range:?} not found"
                    );
                }
            }
            return;
        };
        let entry = self
            .fresh(key, found.range, now)
            .expect("found what is not held");
        assert_eq!(
            (found.size, found.checksum.unwrap_or(0)),
            (entry.size, entry.checksum)
        );
        let part = (found.start, found.length);
        match due {
            Some(due) => assert_eq!((found.range, part), due),
            None => assert_eq!(Some(part), part_of_range(found.range, entry.size, asked)),
        }
    }

    /// The ranges of a key that must not be overlooked: the last, and the only one of most bytes.
    fn hinted(&self, key: &str, now: u64) -> Vec<(ByteRange, u64)> {
        let mut ranges: Vec<(ByteRange, &Entry)> = self
            .entries
            .iter()
            .filter(|((k, range), e)| {
                k == key && *range != ByteRange::Full && e.state == State::Live
            })
            .map(|((_, range), e)| (*range, e))
            .collect();
        ranges.sort_by_key(|(_, e)| e.serial);
        let mut hinted: Vec<(ByteRange, &Entry)> = Vec::new();
        if !self.thinned.contains(key) {
            hinted.extend(ranges.last());
            ranges.sort_by_key(|(_, e)| std::cmp::Reverse(e.size));
            if ranges.len() > 1 && ranges[0].1.size > ranges[1].1.size {
                hinted.push(ranges[0]);
            }
        }
        hinted.retain(|(_, e)| !self.stale(e, now));
        hinted
            .into_iter()
            .map(|(range, e)| (range, e.size))
            .collect()
    }

    pub(crate) fn looked_up(&mut self, key: &str, found: Option<&Found>) -> Option<Sighting> {
        let found = found?;
        let name = (key.to_owned(), found.range);
        self.recency.retain(|other| *other != name);
        self.recency.push(name.clone());
        Some(Sighting {
            handle: found.handle,
            serial: self.entries[&name].serial,
            name,
        })
    }

    pub(crate) fn discarded(&mut self, sighting: &Sighting, victims: &[Victim]) {
        let entry = self.entries.get(&sighting.name);
        // An entry that could no longer be dated since is another one, which costs a retry.
        let same = |e: &Entry| e.state == State::Live && e.serial == sighting.serial;
        if entry.is_some_and(same) && !victims.is_empty() {
            assert_eq!(self.name_of(&victims[0]), sighting.name);
        }
        // Another entry of the same cell, time, size and checksum may go instead; that costs a miss.
        assert!(victims.len() <= 1);
        for victim in victims {
            assert_eq!(victim.cell, sighting.handle as u32);
            self.take(&self.name_of(victim));
        }
    }

    pub(crate) fn joined(
        &mut self,
        key: &str,
        asked: ByteRange,
        payload: u32,
        ready: bool,
        got: &Joined<u32>,
    ) {
        if ready {
            assert_eq!(*got, Joined::Ready);
            return;
        }
        let open: Vec<(ByteRange, u32)> = self
            .flights
            .iter()
            .filter(|f| f.name.0 == key && !f.invalidated)
            .filter(|f| f.name.1 == asked || f.name.1 == ByteRange::Full)
            .filter_map(|f| f.payload.map(|payload| (f.name.1, payload)))
            .collect();
        match got {
            Joined::Ready => panic!("ready, but nothing is there"),
            Joined::Follow(range, payload) => {
                assert!(open.contains(&(*range, *payload)));
                let name = (key.to_owned(), *range);
                let followed =
                    |f: &&mut Flight| !f.invalidated && f.name == name && f.payload.is_some();
                self.flights.iter_mut().find(followed).unwrap().joined = true;
            }
            Joined::Lead(ticket) => {
                assert!(open.is_empty(), "a second flight beside {open:?}");
                self.open(
                    *ticket,
                    (key.to_owned(), asked),
                    Some(payload),
                    self.max_age,
                );
            }
        }
    }

    fn open(&mut self, ticket: u64, name: Name, payload: Option<u32>, max_age: Option<u64>) {
        assert!(self.tickets.insert(ticket), "a ticket twice");
        let latest = |range| {
            let with_readers = self.flights.iter().filter(|f| f.payload.is_some());
            let mut of_range = with_readers.filter(|f| f.name.0 == name.0 && f.name.1 == range);
            of_range.next_back()
        };
        let mut passed: Vec<u64> = Vec::new();
        if payload.is_some() {
            passed.extend(latest(name.1).map(|f| f.ticket));
            passed.extend(
                latest(ByteRange::Full)
                    .filter(|f| f.invalidated)
                    .map(|f| f.ticket),
            );
        }
        self.flights.push(Flight {
            ticket,
            name,
            invalidated: false,
            payload,
            joined: false,
            max_age,
            passed,
        });
    }

    pub(crate) fn completed(&mut self, key: &str, ticket: u64, got: Option<ClosedFlight<u32>>) {
        let at = self
            .flights
            .iter()
            .position(|f| f.ticket == ticket && f.name.0 == key);
        let closed = at.map(|at| {
            let flight = self.flights.remove(at);
            ClosedFlight {
                payload: flight.payload,
                joined: flight.joined,
                passed: self.with_earlier(&flight.passed),
            }
        });
        let got = got.map(|mut closed| {
            closed.passed.sort_unstable();
            closed
        });
        assert_eq!(got, closed);
    }

    /// Takes out flights, with those that end with them, and returns the payloads.
    fn with_earlier(&mut self, tickets: &[u64]) -> Vec<u32> {
        let mut payloads = Vec::new();
        for ticket in tickets {
            if let Some(at) = self.flights.iter().position(|f| f.ticket == *ticket) {
                let flight = self.flights.remove(at);
                payloads.extend(flight.payload);
                payloads.extend(self.with_earlier(&flight.passed));
            }
        }
        payloads.sort_unstable();
        payloads
    }

    fn valid(&self, key: &str, ticket: u64) -> bool {
        if self.writers.contains_key(key) || self.changes.iter().any(|p| below(key, p)) {
            return false;
        }
        let mut flights = self.flights.iter();
        flights.any(|f| f.ticket == ticket && f.name.0 == key && !f.invalidated)
    }

    // ------------------------------------------------------------------ fills

    pub(crate) fn reserved(
        &mut self,
        name: &Name,
        size: u64,
        ticket: u64,
        now: u64,
        got: &Reserve,
    ) {
        let mut own = false;
        let max_age = self.max_age(&name.0, ticket);
        let outdated = self.is_outdated(name, now, max_age);
        let (dirs, tail) = key::split(&name.0);
        let too_long = |part: &str| part.len() > 255;
        let cache_key = name.1.cache_key(&name.0);
        let file = cache_key.rsplit('/').next().unwrap_or_default();
        let has_no_name = name.1 != ByteRange::Full && too_long(file);
        let reason = if has_no_name || too_long(tail) || dirs.split('/').any(too_long) {
            Some(RejectReason::KeyTooLong)
        } else if self.is_too_large(size) && !outdated {
            Some(RejectReason::TooLarge)
        } else if !self.valid(&name.0, ticket) {
            Some(RejectReason::Invalidated)
        } else {
            let entry = self.entries.get(name);
            match entry.map(|e| (e.state, is_older(e, now, max_age))) {
                Some((State::Live, false)) => Some(RejectReason::AlreadyCached),
                Some((State::Filling | State::Deleting, _)) => Some(RejectReason::Busy),
                held => {
                    own = held.is_some();
                    let mut others = self.in_the_way(name).into_iter();
                    let blocks = |other: Name| !self.is_outdated(&other, now, self.limits.max_age);
                    (others.any(blocks)).then_some(RejectReason::PathConflict)
                }
            }
        };
        if let Some(reason) = reason {
            assert_eq!(*got, Reserve::Rejected(reason));
            self.stats.refusals += 1;
            return;
        }
        let id = match got {
            Reserve::Granted(id) | Reserve::NeedsEviction(id, _) => *id,
            // It existed within the step only.
            Reserve::Rejected(_) => u64::MAX,
        };
        let reservation = Reservation {
            name: name.clone(),
            size,
            ticket,
            reserved: 0,
            failures: 0,
            granted: false,
        };
        let before = self.reservations.insert(id, reservation);
        assert!(before.is_none(), "two reservations of one number");
        self.advance(id, own, now, got);
    }

    pub(crate) fn evictions_done(
        &mut self,
        id: u64,
        dropped: &[Name],
        failed: &[Name],
        now: u64,
        got: &Reserve,
    ) {
        self.deletes_done(dropped, failed);
        let Some(reservation) = self.reservations.get_mut(&id) else {
            assert_eq!(*got, Reserve::Rejected(RejectReason::Invalidated));
            self.stats.refusals += 1;
            return;
        };
        reservation.failures += u32::from(!failed.is_empty());
        if reservation.granted {
            assert_eq!(*got, Reserve::Granted(id));
        } else {
            self.advance(id, false, now, got);
        }
    }

    /// An entry has 48 bits for its size. A bound of nothing lets in no empty value either.
    fn is_too_large(&self, size: u64) -> bool {
        size > self.limits.max_size || size >= 1 << 48 || self.limits.max_size == 0
    }

    fn advance(&mut self, id: u64, own: bool, now: u64, got: &Reserve) {
        let taken = self.used_bytes() + self.reserved_bytes();
        let free = u128::from(self.limits.max_size) - taken;
        let free = u64::try_from(free).expect("a bound is a u64");
        let reservation = self.reservations.get_mut(&id).expect("open");
        reservation.reserved += free.min(reservation.lacking());
        let (lacking, failures) = (reservation.lacking(), reservation.failures);
        let (name, size, ticket) = (
            reservation.name.clone(),
            reservation.size,
            reservation.ticket,
        );
        if self.is_too_large(size) {
            // Only what it replaces goes.
            match got {
                Reserve::NeedsEviction(same, victims) => {
                    assert!(*same == id && own && victims.len() == 1);
                    self.reservations.get_mut(&id).expect("open").reserved = 0;
                    return self.evicted(id, own, 0, false, now, victims);
                }
                Reserve::Rejected(reason) => assert!(*reason == RejectReason::TooLarge && !own),
                Reserve::Granted(_) => panic!("granted beyond the bound"),
            }
            self.reservations.remove(&id);
            self.stats.refusals += 1;
            return;
        }
        // As many entries as the bound has bytes.
        let crowded = size == 0 && self.entries.len() as u64 >= self.limits.max_size;
        let out_of_room = lacking > 0 || own || crowded;
        let in_the_way = self.in_the_way(&name);
        let longest = self.limits.max_age;
        let all_outdated = (in_the_way.iter()).all(|other| self.is_outdated(other, now, longest));
        let reason = match got {
            Reserve::Granted(granted) => {
                assert_eq!((*granted, lacking, own, crowded), (id, 0, false, false));
                assert!(self.valid(&name.0, ticket), "granted to an invalid ticket");
                assert!(!self.entries.contains_key(&name), "two entries of one name");
                assert!(in_the_way.is_empty());
                let reservation = self.reservations.get_mut(&id).expect("open");
                (reservation.granted, reservation.reserved) = (true, 0);
                self.serials += 1;
                let entry = Entry {
                    size,
                    state: State::Filling,
                    fetched: 0,
                    checksum: 0,
                    serial: self.serials,
                };
                self.entries.insert(name, entry);
                return;
            }
            Reserve::NeedsEviction(same, victims) if !out_of_room => {
                assert_eq!(*same, id);
                assert!(self.valid(&name.0, ticket) && all_outdated && failures == 0);
                let victims: Vec<Name> = victims.iter().map(|v| self.name_of(v)).collect();
                assert!(!victims.is_empty());
                assert_eq!(in_the_way, victims.iter().cloned().collect());
                for victim in victims {
                    self.take(&victim);
                }
                return;
            }
            Reserve::NeedsEviction(same, victims) => {
                assert_eq!(*same, id);
                return self.evicted(id, own, lacking, crowded, now, victims);
            }
            Reserve::Rejected(reason) => *reason,
        };
        match reason {
            RejectReason::NoSpace => {
                let hopeless = u128::from(lacking) > self.used_bytes();
                let nothing = !own && self.candidates(failures == 0, now) == 0;
                assert!(lacking > 0 || crowded);
                assert!(failures > PATIENCE || hopeless || nothing);
            }
            RejectReason::Invalidated => assert!(!out_of_room && !self.valid(&name.0, ticket)),
            RejectReason::Busy => assert!(!out_of_room && self.entries.contains_key(&name)),
            RejectReason::PathConflict => {
                assert!(!out_of_room && !in_the_way.is_empty());
                assert!(!all_outdated || failures > 0);
            }
            RejectReason::TooLarge
            | RejectReason::KeyTooLong
            | RejectReason::AlreadyCached
            | RejectReason::IndexFull
            | RejectReason::Rebuilding => {
                panic!("{reason:?} by now")
            }
        }
        if own {
            // It was to be replaced, but its delete was not tried.
            self.take(&name);
            self.fail(&[name]);
        }
        self.reservations.remove(&id);
        self.stats.refusals += 1;
    }

    fn candidates(&self, failed: bool, now: u64) -> usize {
        let live = self.recency.iter().filter(|name| {
            self.policy != PolicyKind::None || self.useless(&self.entries[*name], now)
        });
        live.count() + if failed { self.failed.len() } else { 0 }
    }

    /// Victims are right if each of them was the next to go when it was taken, and none is too
    /// many or missing.
    fn evicted(
        &mut self,
        id: u64,
        own: bool,
        lacking: u64,
        mut crowded: bool,
        now: u64,
        victims: &[Victim],
    ) {
        let failed = self.reservations[&id].failures == 0;
        let mut freed = 0u128;
        let mut victims = victims.iter().map(|v| self.name_of(v)).collect::<Vec<_>>();
        assert!(!victims.is_empty());
        let count = victims.len();
        if own {
            let first = victims.remove(0);
            assert_eq!(first, self.reservations[&id].name);
            freed += self.take(&first);
            crowded = false;
        }
        for name in victims {
            assert!(freed < u128::from(lacking) || crowded, "a victim too many");
            crowded = false;
            self.check_next(&name, failed, false, now);
            freed += self.evict(&name, now);
        }
        let enough = freed >= u128::from(lacking) || count >= BATCH;
        assert!(
            enough || self.candidates(failed, now) == 0,
            "a victim too few"
        );
    }

    /// Room for bytes that are in no reservation: what is there has to go, whatever the policy.
    pub(crate) fn made_room(&mut self, size: u64, now: u64, victims: &[Victim]) {
        let mut freed = 0u128;
        for victim in victims {
            assert!(freed < u128::from(size), "a victim too many");
            let name = self.name_of(victim);
            self.check_next(&name, true, true, now);
            freed += self.evict(&name, now);
        }
        let left = self.recency.len() + self.failed.len();
        let enough = freed >= u128::from(size) || victims.len() >= BATCH;
        assert!(enough || left == 0, "a victim too few");
    }

    /// An entry goes because bytes are needed; returns its own.
    fn evict(&mut self, name: &Name, now: u64) -> u128 {
        let entry = &self.entries[name];
        if entry.state == State::Live {
            self.stats.evictions += 1;
            self.stats.expirations += u64::from(self.useless(entry, now));
        }
        self.take(name)
    }

    /// Failed deletes first, then the useless, then the least recently used.
    fn check_next(&self, name: &Name, failed: bool, has_to_be: bool, now: u64) {
        if let Some(next) = self.failed.first().filter(|_| failed) {
            assert!(next.contains(name), "a failed delete comes first");
            return;
        }
        let old: Vec<(&Name, u64)> = self
            .recency
            .iter()
            .map(|name| (name, &self.entries[name]))
            .filter(|(_, entry)| self.useless(entry, now))
            .map(|(name, entry)| (name, entry.fetched))
            .collect();
        let Some(earliest) = old.iter().map(|(_, fetched)| *fetched).min() else {
            match self.policy {
                PolicyKind::Lru => {
                    assert_eq!(Some(name), self.recency.first(), "not the least recent");
                }
                PolicyKind::None if !has_to_be => panic!("what is there stays"),
                PolicyKind::None | PolicyKind::Adaptive => {
                    assert!(self.recency.contains(name), "not live")
                }
            }
            return;
        };
        let fetched = old.iter().find(|(other, _)| *other == name);
        let (_, fetched) = fetched.expect("a live entry goes before a stale one");
        // Those with a fetch time in the future have no order among the stale.
        assert!(*fetched == earliest || *fetched > now || earliest > now);
    }

    pub(crate) fn finished(
        &mut self,
        id: u64,
        checksum: u32,
        fetched: u64,
        now: u64,
        done: Committed<u32>,
    ) {
        let reservation = &self.reservations[&id];
        assert!(reservation.granted);
        let (key, ticket) = (reservation.name.0.clone(), reservation.ticket);
        if self.valid(&key, ticket) {
            assert!(done.victims.is_empty());
            self.committed(id, checksum, fetched, now);
        } else {
            self.stats.refusals += 1;
            self.aborted(id, &done.victims);
        }
        self.completed(&key, ticket, done.flight);
    }

    fn committed(&mut self, id: u64, checksum: u32, fetched: u64, now: u64) {
        let name = self.reservations.remove(&id).expect("granted").name;
        for other in &self.recency {
            let entry = self.entries.get_mut(other).expect("present");
            if i128::from(entry.fetched) > i128::from(now) + i128::from(SKEW) {
                entry.fetched = 0;
            }
        }
        self.serials += 1;
        let entry = self.entries.get_mut(&name).expect("granted");
        entry.state = State::Live;
        entry.checksum = checksum;
        entry.serial = self.serials;
        let fetched = fetched.min(now).max(1);
        entry.fetched = if fetched < 1 << 48 { fetched } else { 0 };
        self.recency.push(name);
    }

    pub(crate) fn aborted(&mut self, id: u64, victims: &[Victim]) {
        let reservation = self.reservations.remove(&id);
        let Some(reservation) = reservation.filter(|r| r.granted) else {
            assert!(victims.is_empty());
            return;
        };
        assert_eq!(victims.len(), 1);
        assert_eq!(self.name_of(&victims[0]), reservation.name);
        let entry = self.entries.get_mut(&reservation.name).expect("granted");
        entry.state = State::Deleting;
    }

    /// A file system holds no file where it holds a directory. A chunk above other chunks of its
    /// array is not noticed: that would mean visiting the whole array.
    fn in_the_way(&self, (key, range): &Name) -> BTreeSet<Name> {
        if self.limits.flat_namespace || *range != ByteRange::Full {
            return BTreeSet::new();
        }
        let below = format!("{key}/");
        let is_there = |(other, other_span): &&Name| {
            *other_span == ByteRange::Full
                && (key.starts_with(&format!("{other}/"))
                    || key::split(other).0.starts_with(&below))
        };
        self.entries.keys().filter(is_there).cloned().collect()
    }

    /// The age by which the reader of a flight has found nothing.
    fn max_age(&self, key: &str, ticket: u64) -> Option<u64> {
        let mut flights = self.flights.iter();
        flights
            .find(|f| f.ticket == ticket && f.name.0 == key)?
            .max_age
    }

    /// Whether an entry exists that such a reader cannot use, and that nothing is done with.
    fn is_outdated(&self, name: &Name, now: u64, max_age: Option<u64>) -> bool {
        self.entries.get(name).is_some_and(|e| {
            e.state == State::DeleteFailed || e.state == State::Live && is_older(e, now, max_age)
        })
    }

    // ---------------------------------------------------------------- deletes

    /// Its delete begins; returns its bytes.
    fn take(&mut self, name: &Name) -> u128 {
        let entry = self.entries.get_mut(name).expect("held");
        match entry.state {
            State::Live => {
                self.recency.retain(|other| other != name);
                self.thinned.insert(name.0.clone());
            }
            State::DeleteFailed => {
                for group in &mut self.failed {
                    group.remove(name);
                }
                self.failed.retain(|group| !group.is_empty());
            }
            State::Filling | State::Deleting => panic!("{name:?} is in progress"),
        }
        entry.state = State::Deleting;
        u128::from(entry.size)
    }

    fn release(&mut self, name: &Name) {
        let entry = self.entries.get(name);
        if entry.is_some_and(|entry| entry.state == State::Deleting) {
            self.entries.remove(name);
            let mut ranges = self
                .entries
                .keys()
                .filter(|(_, range)| *range != ByteRange::Full);
            if !ranges.any(|(key, _)| *key == name.0) {
                self.thinned.remove(&name.0);
            }
        }
    }

    fn fail(&mut self, failed: &[Name]) {
        for name in failed {
            let entry = self.entries.get_mut(name).expect("held");
            assert_eq!(entry.state, State::Deleting);
            entry.state = State::DeleteFailed;
            self.failed.push(BTreeSet::from([name.clone()]));
        }
    }

    pub(crate) fn deletes_done(&mut self, dropped: &[Name], failed: &[Name]) {
        for name in dropped {
            self.release(name);
        }
        self.fail(failed);
    }

    pub(crate) fn retried(&mut self, limit: usize, victims: &[Victim]) {
        for victim in victims {
            let name = self.name_of(victim);
            assert!(
                self.failed[0].contains(&name),
                "another failed delete comes first"
            );
            self.take(&name);
        }
        assert!(victims.len() == limit || self.failed.is_empty());
    }

    /// Everything that is not in progress goes.
    pub(crate) fn key_dropped(&mut self, key: &str, victims: &[Victim]) {
        let due: BTreeSet<Name> = self
            .entries
            .iter()
            .filter(|((k, _), e)| k == key && matches!(e.state, State::Live | State::DeleteFailed))
            .map(|(name, _)| name.clone())
            .collect();
        let got: BTreeSet<Name> = victims.iter().map(|v| self.name_of(v)).collect();
        assert_eq!(got, due);
        assert_eq!(got.len(), victims.len());
        for name in &got {
            self.take(name);
        }
    }

    /// Returns the names of the victims.
    pub(crate) fn names(&self, victims: &[Victim]) -> Vec<Name> {
        victims.iter().map(|v| self.name_of(v)).collect()
    }

    // ----------------------------------------------------------------- writes

    pub(crate) fn write_begun(&mut self, key: &str, victims: &[Victim]) {
        self.invalidate(|other| other == key);
        let writers = self.writers.entry(key.to_owned()).or_default();
        writers.0 += 1;
        writers.1 |= writers.0 > 1;
        self.key_dropped(key, victims);
    }

    pub(crate) fn write_ended(
        &mut self,
        key: &str,
        ok: bool,
        victims: &[Victim],
        ticket: Option<u64>,
    ) {
        self.invalidate(|other| other == key);
        self.key_dropped(key, victims);
        let mut alone = false;
        if let Some((active, overlapped)) = self.writers.get_mut(key) {
            alone = !*overlapped;
            *active -= 1;
            if *active == 0 {
                self.writers.remove(key);
            }
        }
        assert_eq!(ticket.is_some(), ok && alone);
        self.stats.refusals += u64::from(ok && !alone);
        if let Some(ticket) = ticket {
            self.open(ticket, (key.to_owned(), ByteRange::Full), None, None);
        }
    }

    fn invalidate(&mut self, covers: impl Fn(&str) -> bool) {
        for flight in self.flights.iter_mut().filter(|f| covers(&f.name.0)) {
            flight.invalidated = true;
        }
    }

    pub(crate) fn prefix_voided(&mut self, prefix: &str) {
        self.invalidate(|key| below(key, prefix));
        for (_, writers) in self
            .writers
            .iter_mut()
            .filter(|(key, _)| below(key, prefix))
        {
            writers.1 = true;
        }
    }

    pub(crate) fn prefix_marked(&mut self, prefix: &str, begins: bool) {
        if begins {
            self.changes.push(prefix.to_owned());
        } else {
            let at = self.changes.iter().position(|other| other == prefix);
            self.changes.swap_remove(at.expect("begun"));
        }
    }

    pub(crate) fn drained(&mut self, prefix: &str, victims: &[Victim], is_all: bool) {
        for victim in victims {
            let name = self.name_of(victim);
            assert!(below(&name.0, prefix), "{name:?} is not below {prefix:?}");
            assert_eq!(self.entries[&name].state, State::Live);
            self.take(&name);
        }
        if is_all {
            let left = self.recency.iter().find(|name| below(&name.0, prefix));
            assert_eq!(left, None, "left below {prefix:?}");
        }
    }

    pub(crate) fn forked(&mut self) {
        self.flights.clear();
        self.writers.clear();
        self.changes.clear();
        self.reservations.clear();
        let mut lost = BTreeSet::new();
        for (name, entry) in &mut self.entries {
            if matches!(entry.state, State::Filling | State::Deleting) {
                entry.state = State::DeleteFailed;
                lost.insert(name.clone());
            }
        }
        if !lost.is_empty() {
            self.failed.push(lost);
        }
    }
}

/// A prefix names a key and what is below it as a directory; slashes at its end do not count.
fn below(key: &str, prefix: &str) -> bool {
    let mut prefix = prefix;
    while let Some(shorter) = prefix.strip_suffix('/') {
        prefix = shorter;
    }
    prefix.is_empty() || key == prefix || key.starts_with(&format!("{prefix}/"))
}

/// First byte and count of what is asked for in a value of `size` bytes.
fn part_of_value(size: u64, asked: ByteRange, slices_like_python: bool) -> Option<(u64, u64)> {
    let size = i128::from(size);
    let (from, to) = match asked {
        ByteRange::Full => return Some((0, u64::try_from(size).ok()?)),
        ByteRange::Range { start, end } => (i128::from(start), i128::from(end)),
        ByteRange::Offset(start) => (i128::from(start), i128::MAX),
        ByteRange::Suffix(count) => (size - i128::from(count), size),
    };
    // All sources agree where there is something to give, and not more is asked for at the front
    // than there is.
    let agreed = 0 <= from && from < to && from < size;
    if from > to || !(agreed || slices_like_python) {
        return None;
    }
    let (from, to) = (from.clamp(0, size), to.clamp(0, size));
    Some((u64::try_from(from).ok()?, u64::try_from(to - from).ok()?))
}

/// The same in a range of which `size` bytes are held.
fn part_of_range(held: ByteRange, size: u64, asked: ByteRange) -> Option<(u64, u64)> {
    let size = i128::from(size);
    let (first, last) = match (held, asked) {
        (ByteRange::Range { start, end }, ByteRange::Range { end: wanted, .. }) => {
            if wanted > end {
                return None;
            }
            (i128::from(start), i128::from(start) + size)
        }
        (ByteRange::Offset(start), ByteRange::Range { .. } | ByteRange::Offset(_)) => {
            (i128::from(start), i128::from(start) + size)
        }
        // Counted from the end.
        (ByteRange::Suffix(_), ByteRange::Suffix(_)) => (-size, 0),
        _ => return None,
    };
    let (from, to) = match asked {
        ByteRange::Full => return None,
        ByteRange::Range { start, end } => (i128::from(start), i128::from(end)),
        ByteRange::Offset(start) => (i128::from(start), last),
        ByteRange::Suffix(count) => (-i128::from(count), 0),
    };
    let inside = first <= from && from < to && to <= last;
    let start = u64::try_from(from - first).ok()?;
    inside.then(|| (start, u64::try_from(to - from).unwrap_or(0)))
}
