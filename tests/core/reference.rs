//! What the index has to do, in the plainest collections: a map of entries, a vector by recency, a
//! list of flights, sums that are summed up each time.
//!
//! Where the documentation fixes an answer it is predicted. Where it leaves a choice (which of two
//! stale entries goes first, in which order a prefix is swept) the answer is checked for being one
//! of those that are allowed, and followed.

use std::collections::{BTreeMap, BTreeSet};

use zcache::cache::{BATCH, Finished, Found, Joined, Limits, Refusal, Room, Stats, Victim};
use zcache::cell::State;
use zcache::flights::Closed;
use zcache::key::{self, Span};

pub(crate) type Name = (String, Span);

/// A clock that goes back by more than this was set; by less, threads came out of order.
const SKEW: u64 = 1000;
/// After how many failures a reservation may give up.
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
    void: bool,
    payload: Option<u32>,
    joined: bool,
}

#[derive(Debug)]
struct Reservation {
    name: Name,
    size: u64,
    ticket: u64,
    room: u64,
    failures: u32,
    granted: bool,
}

impl Reservation {
    fn lacking(&self) -> u64 {
        self.size - self.room
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
    entries: BTreeMap<Name, Entry>,
    /// Least recently used first.
    recency: Vec<Name>,
    /// Next to try first; those of one set came at once.
    orphans: Vec<BTreeSet<Name>>,
    flights: Vec<Flight>,
    /// All tickets there ever were.
    tickets: BTreeSet<u64>,
    /// Writers under way, and whether another one overlapped.
    writers: BTreeMap<String, (usize, bool)>,
    /// Prefixes below which the source is being changed.
    changes: Vec<String>,
    reservations: BTreeMap<u64, Reservation>,
    stats: Stats,
    serials: u64,
    /// Keys of which a range was dropped: which of the others has most bytes may be forgotten.
    thinned: BTreeSet<String>,
}

impl Model {
    pub(crate) fn new(limits: Limits) -> Self {
        Model {
            limits,
            entries: BTreeMap::new(),
            recency: Vec::new(),
            orphans: Vec::new(),
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

    // ------------------------------------------------------------------ books

    pub(crate) fn physical(&self) -> u128 {
        self.entries.values().map(|e| u128::from(e.size)).sum()
    }

    pub(crate) fn promised(&self) -> u128 {
        let rooms = self.reservations.values().map(|r| u128::from(r.room));
        rooms.sum()
    }

    pub(crate) fn entries(&self) -> Vec<(String, Span, u64, State)> {
        let all = self.entries.iter();
        all.map(|((key, span), e)| (key.clone(), *span, e.size, e.state))
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

    fn stale(&self, entry: &Entry, now: u64) -> bool {
        let Some(age) = self.limits.max_age else {
            return false;
        };
        let passed = i128::from(now) - i128::from(entry.fetched);
        entry.fetched == 0 || passed < -i128::from(SKEW) || passed.max(0) >= i128::from(age)
    }

    fn fresh(&self, key: &str, span: Span, now: u64) -> Option<&Entry> {
        let entry = self.entries.get(&(key.to_owned(), span))?;
        (entry.state == State::Present && !self.stale(entry, now)).then_some(entry)
    }

    fn name_of(&self, victim: &Victim) -> Name {
        let mut names = self.entries.keys();
        let name = names.find(|(key, span)| span.cache_key(key) == victim.cache_key);
        name.unwrap_or_else(|| panic!("{victim:?} names nothing that is held"))
            .clone()
    }

    // ------------------------------------------------------------------ reads

    /// Checks what a look-up found. `None` may be the right answer or a lost chance, so it is
    /// refused only where the documentation promises a find.
    pub(crate) fn check_found(&self, key: &str, asked: Span, now: u64, found: Option<&Found>) {
        let mut due = None;
        if let Some(entry) = self.fresh(key, Span::Full, now) {
            due = part_of_value(entry.size, asked, self.limits.lenient)
                .map(|part| (Span::Full, part));
        }
        if due.is_none() && asked != Span::Full {
            let exact = self.fresh(key, asked, now);
            due = exact.map(|entry| (asked, (0, entry.size)));
        }
        let Some(found) = found else {
            assert_eq!(due, None, "not found");
            if asked != Span::Full {
                for (span, size) in self.hinted(key, now) {
                    assert_eq!(part_of_range(span, size, asked), None, "{span:?} not found");
                }
            }
            return;
        };
        let entry = self
            .fresh(key, found.span, now)
            .expect("found what is not held");
        assert_eq!(
            (found.size, found.checksum.unwrap_or(0)),
            (entry.size, entry.checksum)
        );
        let part = (found.start, found.length);
        match due {
            Some(due) => assert_eq!((found.span, part), due),
            None => assert_eq!(Some(part), part_of_range(found.span, entry.size, asked)),
        }
    }

    /// The ranges of a key that must not be overlooked: the last, and the only one of most bytes.
    fn hinted(&self, key: &str, now: u64) -> Vec<(Span, u64)> {
        let mut ranges: Vec<(Span, &Entry)> = self
            .entries
            .iter()
            .filter(|((k, span), e)| k == key && *span != Span::Full && e.state == State::Present)
            .map(|((_, span), e)| (*span, e))
            .collect();
        ranges.sort_by_key(|(_, e)| e.serial);
        let mut hinted: Vec<(Span, &Entry)> = Vec::new();
        if !self.thinned.contains(key) {
            hinted.extend(ranges.last());
            ranges.sort_by_key(|(_, e)| std::cmp::Reverse(e.size));
            if ranges.len() > 1 && ranges[0].1.size > ranges[1].1.size {
                hinted.push(ranges[0]);
            }
        }
        hinted.retain(|(_, e)| !self.stale(e, now));
        hinted.into_iter().map(|(span, e)| (span, e.size)).collect()
    }

    pub(crate) fn looked_up(&mut self, key: &str, found: Option<&Found>) -> Option<Sighting> {
        let Some(found) = found else {
            self.stats.misses += 1;
            return None;
        };
        self.stats.hits += 1;
        let name = (key.to_owned(), found.span);
        self.recency.retain(|other| *other != name);
        self.recency.push(name.clone());
        Some(Sighting {
            handle: found.handle,
            serial: self.entries[&name].serial,
            name,
        })
    }

    pub(crate) fn discarded(&mut self, sighting: &Sighting, victims: &[Victim]) {
        self.stats.hits = self.stats.hits.saturating_sub(1);
        self.stats.misses += 1;
        let entry = self.entries.get(&sighting.name);
        // An entry that could no longer be dated since is another one, which costs a retry.
        let same = |e: &Entry| e.state == State::Present && e.serial == sighting.serial;
        if entry.is_some_and(same) && !victims.is_empty() {
            assert_eq!(self.name_of(&victims[0]), sighting.name);
        }
        // Another entry of the same cell, time and size may go instead; that costs a miss.
        assert!(victims.len() <= 1);
        for victim in victims {
            assert_eq!(victim.cell, sighting.handle as u32);
            self.take(&self.name_of(victim));
        }
    }

    pub(crate) fn joined(
        &mut self,
        key: &str,
        asked: Span,
        payload: u32,
        ready: bool,
        got: &Joined<u32>,
    ) {
        if ready {
            assert_eq!(*got, Joined::Ready);
            return;
        }
        let open: Vec<(Span, u32)> = self
            .flights
            .iter()
            .filter(|f| f.name.0 == key && !f.void)
            .filter(|f| f.name.1 == asked || f.name.1 == Span::Full)
            .filter_map(|f| f.payload.map(|payload| (f.name.1, payload)))
            .collect();
        match got {
            Joined::Ready => panic!("ready, but nothing is there"),
            Joined::Follow(span, payload) => {
                assert!(open.contains(&(*span, *payload)));
                let name = (key.to_owned(), *span);
                let followed = |f: &&mut Flight| !f.void && f.name == name && f.payload.is_some();
                self.flights.iter_mut().find(followed).unwrap().joined = true;
            }
            Joined::Lead(ticket) => {
                assert!(open.is_empty(), "a second flight beside {open:?}");
                self.open(*ticket, (key.to_owned(), asked), Some(payload));
            }
        }
    }

    fn open(&mut self, ticket: u64, name: Name, payload: Option<u32>) {
        assert!(self.tickets.insert(ticket), "a ticket twice");
        self.flights.push(Flight {
            ticket,
            name,
            void: false,
            payload,
            joined: false,
        });
    }

    pub(crate) fn landed(&mut self, key: &str, ticket: u64, got: Option<Closed<u32>>) {
        let at = self
            .flights
            .iter()
            .position(|f| f.ticket == ticket && f.name.0 == key);
        let flight = at.map(|at| self.flights.remove(at));
        let closed = flight.map(
            |Flight {
                 payload, joined, ..
             }| Closed { payload, joined },
        );
        assert_eq!(got, closed);
    }

    fn valid(&self, key: &str, ticket: u64) -> bool {
        if self.writers.contains_key(key) || self.changes.iter().any(|p| below(key, p)) {
            return false;
        }
        let mut flights = self.flights.iter();
        flights.any(|f| f.ticket == ticket && f.name.0 == key && !f.void)
    }

    // ------------------------------------------------------------------ fills

    pub(crate) fn reserved(&mut self, name: &Name, size: u64, ticket: u64, now: u64, got: &Room) {
        let mut own = false;
        let outdated = self.entries.get(name).is_some_and(|e| {
            e.state == State::Orphan || e.state == State::Present && self.stale(e, now)
        });
        let refusal = if size > self.limits.max_size && !outdated {
            Some(Refusal::TooLarge)
        } else if !self.valid(&name.0, ticket) {
            Some(Refusal::Void)
        } else {
            let entry = self.entries.get(name);
            match entry.map(|e| (e.state, self.stale(e, now))) {
                Some((State::Present, false)) => Some(Refusal::Held),
                Some((State::Writing | State::Dropping, _)) => Some(Refusal::Busy),
                held => {
                    own = held.is_some();
                    self.conflicts(name).then_some(Refusal::Conflict)
                }
            }
        };
        if let Some(refusal) = refusal {
            assert_eq!(*got, Room::Refused(refusal));
            self.stats.refusals += 1;
            return;
        }
        let id = match got {
            Room::Granted(id) | Room::Evict(id, _) => *id,
            // It was there for a moment only.
            Room::Refused(_) => u64::MAX,
        };
        let reservation = Reservation {
            name: name.clone(),
            size,
            ticket,
            room: 0,
            failures: 0,
            granted: false,
        };
        let before = self.reservations.insert(id, reservation);
        assert!(before.is_none(), "two reservations of one number");
        self.proceed(id, own, now, got);
    }

    pub(crate) fn settled_for(
        &mut self,
        id: u64,
        dropped: &[Name],
        failed: &[Name],
        now: u64,
        got: &Room,
    ) {
        self.settled(dropped, failed);
        let Some(reservation) = self.reservations.get_mut(&id) else {
            assert_eq!(*got, Room::Refused(Refusal::Void));
            self.stats.refusals += 1;
            return;
        };
        reservation.failures += u32::from(!failed.is_empty());
        if reservation.granted {
            assert_eq!(*got, Room::Granted(id));
        } else {
            self.proceed(id, false, now, got);
        }
    }

    fn proceed(&mut self, id: u64, own: bool, now: u64, got: &Room) {
        let taken = self.physical() + self.promised();
        let free = u128::from(self.limits.max_size) - taken;
        let free = u64::try_from(free).expect("a bound is a u64");
        let reservation = self.reservations.get_mut(&id).expect("open");
        reservation.room += free.min(reservation.lacking());
        let (lacking, failures) = (reservation.lacking(), reservation.failures);
        let (name, size, ticket) = (
            reservation.name.clone(),
            reservation.size,
            reservation.ticket,
        );
        if size > self.limits.max_size {
            // Only what it replaces goes.
            match got {
                Room::Evict(same, victims) => {
                    assert!(*same == id && own && victims.len() == 1);
                    self.reservations.get_mut(&id).expect("open").room = 0;
                    return self.evicted(id, own, 0, now, victims);
                }
                Room::Refused(refusal) => assert!(*refusal == Refusal::TooLarge && !own),
                Room::Granted(_) => panic!("granted beyond the bound"),
            }
            self.reservations.remove(&id);
            self.stats.refusals += 1;
            return;
        }
        let refusal = match got {
            Room::Granted(granted) => {
                assert_eq!((*granted, lacking, own), (id, 0, false));
                assert!(self.valid(&name.0, ticket), "granted to a void ticket");
                assert!(!self.entries.contains_key(&name), "two entries of one name");
                assert!(!self.conflicts(&name));
                let reservation = self.reservations.get_mut(&id).expect("open");
                (reservation.granted, reservation.room) = (true, 0);
                self.serials += 1;
                let entry = Entry {
                    size,
                    state: State::Writing,
                    fetched: 0,
                    checksum: 0,
                    serial: self.serials,
                };
                self.entries.insert(name, entry);
                return;
            }
            Room::Evict(same, victims) => {
                assert_eq!(*same, id);
                return self.evicted(id, own, lacking, now, victims);
            }
            Room::Refused(refusal) => *refusal,
        };
        let out_of_room = lacking > 0 || own;
        match refusal {
            Refusal::NoRoom => {
                let hopeless = u128::from(lacking) > self.physical();
                let nothing = !own && self.candidates(failures == 0) == 0;
                assert!(lacking > 0 && (failures > PATIENCE || hopeless || nothing));
            }
            Refusal::Void => assert!(!out_of_room && !self.valid(&name.0, ticket)),
            Refusal::Busy => assert!(!out_of_room && self.entries.contains_key(&name)),
            Refusal::Conflict => assert!(!out_of_room && self.conflicts(&name)),
            Refusal::TooLarge | Refusal::Held | Refusal::Full | Refusal::Rebuilding => {
                panic!("{refusal:?} by now")
            }
        }
        if own {
            // It was to be replaced; nobody has tried to delete it.
            self.take(&name);
            self.fail(&[name]);
        }
        self.reservations.remove(&id);
        self.stats.refusals += 1;
    }

    fn candidates(&self, orphans: bool) -> usize {
        self.recency.len() + if orphans { self.orphans.len() } else { 0 }
    }

    /// Victims are right if each of them was the next to go when it was taken, and none is too
    /// many or missing.
    fn evicted(&mut self, id: u64, own: bool, lacking: u64, now: u64, victims: &[Victim]) {
        let orphans = self.reservations[&id].failures == 0;
        let mut freed = 0u128;
        let mut victims = victims.iter().map(|v| self.name_of(v)).collect::<Vec<_>>();
        assert!(!victims.is_empty());
        let count = victims.len();
        if own {
            let first = victims.remove(0);
            assert_eq!(first, self.reservations[&id].name);
            freed += self.take(&first);
        }
        for name in victims {
            assert!(freed < u128::from(lacking), "a victim too many");
            self.check_next(&name, orphans, now);
            let entry = &self.entries[&name];
            if entry.state == State::Present {
                self.stats.evictions += 1;
                self.stats.expirations += u64::from(self.stale(entry, now));
            }
            freed += self.take(&name);
        }
        let enough = freed >= u128::from(lacking) || count >= BATCH;
        assert!(enough || self.candidates(orphans) == 0, "a victim too few");
    }

    /// Bytes of no use first, then the stale, then the least recently used.
    fn check_next(&self, name: &Name, orphans: bool, now: u64) {
        if let Some(next) = self.orphans.first().filter(|_| orphans) {
            assert!(next.contains(name), "an orphan waits");
            return;
        }
        let old: Vec<(&Name, u64)> = self
            .recency
            .iter()
            .map(|name| (name, &self.entries[name]))
            .filter(|(_, entry)| self.stale(entry, now))
            .map(|(name, entry)| (name, entry.fetched))
            .collect();
        let Some(earliest) = old.iter().map(|(_, fetched)| *fetched).min() else {
            assert_eq!(Some(name), self.recency.first(), "not the least recent");
            return;
        };
        let fetched = old.iter().find(|(other, _)| *other == name);
        let (_, fetched) = fetched.expect("a live entry goes before a stale one");
        // Those of a future that never was have no order among the others.
        assert!(*fetched == earliest || *fetched > now || earliest > now);
    }

    pub(crate) fn finished(&mut self, id: u64, checksum: u32, now: u64, done: Finished<u32>) {
        let reservation = &self.reservations[&id];
        assert!(reservation.granted);
        let (key, ticket) = (reservation.name.0.clone(), reservation.ticket);
        if self.valid(&key, ticket) {
            assert!(done.victims.is_empty());
            self.committed(id, checksum, now);
        } else {
            self.stats.refusals += 1;
            self.aborted(id, &done.victims);
        }
        self.landed(&key, ticket, done.flight);
    }

    fn committed(&mut self, id: u64, checksum: u32, now: u64) {
        let name = self.reservations.remove(&id).expect("granted").name;
        let mut latest = 0;
        for other in &self.recency {
            let entry = self.entries.get_mut(other).expect("present");
            if i128::from(entry.fetched) > i128::from(now) + i128::from(SKEW) {
                entry.fetched = 0;
            }
            latest = latest.max(entry.fetched);
        }
        self.serials += 1;
        let entry = self.entries.get_mut(&name).expect("granted");
        entry.state = State::Present;
        entry.checksum = checksum;
        entry.serial = self.serials;
        let fetched = now.max(latest).max(1);
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
        entry.state = State::Dropping;
    }

    /// A file system holds no file where it holds a directory. A chunk above other chunks of its
    /// array is not noticed: to ask would be to walk the array.
    fn conflicts(&self, (key, span): &Name) -> bool {
        if self.limits.flat || *span != Span::Full {
            return false;
        }
        let below = format!("{key}/");
        self.entries.keys().any(|(other, other_span)| {
            *other_span == Span::Full
                && (key.starts_with(&format!("{other}/"))
                    || key::split(other).0.starts_with(&below))
        })
    }

    // ---------------------------------------------------------------- deletes

    /// Somebody starts to delete it; returns its bytes.
    fn take(&mut self, name: &Name) -> u128 {
        let entry = self.entries.get_mut(name).expect("held");
        match entry.state {
            State::Present => {
                self.recency.retain(|other| other != name);
                self.thinned.insert(name.0.clone());
            }
            State::Orphan => {
                for group in &mut self.orphans {
                    group.remove(name);
                }
                self.orphans.retain(|group| !group.is_empty());
            }
            State::Writing | State::Dropping => panic!("{name:?} is in other hands"),
        }
        entry.state = State::Dropping;
        u128::from(entry.size)
    }

    fn release(&mut self, name: &Name) {
        let entry = self.entries.get(name);
        if entry.is_some_and(|entry| entry.state == State::Dropping) {
            self.entries.remove(name);
            let mut ranges = self.entries.keys().filter(|(_, span)| *span != Span::Full);
            if !ranges.any(|(key, _)| *key == name.0) {
                self.thinned.remove(&name.0);
            }
        }
    }

    fn fail(&mut self, failed: &[Name]) {
        for name in failed {
            let entry = self.entries.get_mut(name).expect("held");
            assert_eq!(entry.state, State::Dropping);
            entry.state = State::Orphan;
            self.orphans.push(BTreeSet::from([name.clone()]));
        }
    }

    pub(crate) fn settled(&mut self, dropped: &[Name], failed: &[Name]) {
        for name in dropped {
            self.release(name);
        }
        self.fail(failed);
    }

    pub(crate) fn orphans_taken(&mut self, limit: usize, victims: &[Victim]) {
        for victim in victims {
            let name = self.name_of(victim);
            assert!(self.orphans[0].contains(&name), "another orphan waits");
            self.take(&name);
        }
        assert!(victims.len() == limit || self.orphans.is_empty());
    }

    /// Everything that is not in other hands goes.
    pub(crate) fn key_dropped(&mut self, key: &str, victims: &[Victim]) {
        let due: BTreeSet<Name> = self
            .entries
            .iter()
            .filter(|((k, _), e)| k == key && matches!(e.state, State::Present | State::Orphan))
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
        self.void(|other| other == key);
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
        self.void(|other| other == key);
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
        if let Some(ticket) = ticket {
            self.open(ticket, (key.to_owned(), Span::Full), None);
        }
    }

    fn void(&mut self, covers: impl Fn(&str) -> bool) {
        for flight in self.flights.iter_mut().filter(|f| covers(&f.name.0)) {
            flight.void = true;
        }
    }

    pub(crate) fn prefix_voided(&mut self, prefix: &str) {
        self.void(|key| below(key, prefix));
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

    /// Returns whether more is to be swept.
    pub(crate) fn swept(&mut self, prefix: &str, victims: &[Victim]) -> bool {
        for victim in victims {
            let name = self.name_of(victim);
            assert!(below(&name.0, prefix), "{name:?} is not below {prefix:?}");
            assert_eq!(self.entries[&name].state, State::Present);
            self.take(&name);
        }
        if victims.is_empty() {
            let left = self.recency.iter().find(|name| below(&name.0, prefix));
            assert_eq!(left, None, "left below {prefix:?}");
        }
        !victims.is_empty()
    }

    pub(crate) fn forked(&mut self) {
        self.flights.clear();
        self.writers.clear();
        self.changes.clear();
        self.reservations.clear();
        let mut lost = BTreeSet::new();
        for (name, entry) in &mut self.entries {
            if matches!(entry.state, State::Writing | State::Dropping) {
                entry.state = State::Orphan;
                lost.insert(name.clone());
            }
        }
        if !lost.is_empty() {
            self.orphans.push(lost);
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
fn part_of_value(size: u64, asked: Span, lenient: bool) -> Option<(u64, u64)> {
    let size = i128::from(size);
    let (from, to) = match asked {
        Span::Full => return Some((0, u64::try_from(size).ok()?)),
        Span::Range { start, end } => (i128::from(start), i128::from(end)),
        Span::Offset(start) => (i128::from(start), i128::MAX),
        Span::Suffix(count) => (size - i128::from(count), size),
    };
    // All sources agree where there is something to give, and not more is asked for at the front
    // than there is.
    let agreed = 0 <= from && from < to && from < size;
    if from > to || !(agreed || lenient) {
        return None;
    }
    let (from, to) = (from.clamp(0, size), to.clamp(0, size));
    Some((u64::try_from(from).ok()?, u64::try_from(to - from).ok()?))
}

/// The same in a range of which `size` bytes are held.
fn part_of_range(held: Span, size: u64, asked: Span) -> Option<(u64, u64)> {
    let size = i128::from(size);
    let (first, last) = match (held, asked) {
        (Span::Range { start, end }, Span::Range { end: wanted, .. }) => {
            if wanted > end {
                return None;
            }
            (i128::from(start), i128::from(start) + size)
        }
        (Span::Offset(start), Span::Range { .. } | Span::Offset(_)) => {
            (i128::from(start), i128::from(start) + size)
        }
        // Counted from the end.
        (Span::Suffix(_), Span::Suffix(_)) => (-size, 0),
        _ => return None,
    };
    let (from, to) = match asked {
        Span::Full => return None,
        Span::Range { start, end } => (i128::from(start), i128::from(end)),
        Span::Offset(start) => (i128::from(start), last),
        Span::Suffix(count) => (-i128::from(count), 0),
    };
    let inside = first <= from && from < to && to <= last;
    let start = u64::try_from(from - first).ok()?;
    inside.then(|| (start, u64::try_from(to - from).unwrap_or(0)))
}
