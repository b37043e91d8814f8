//! The index against a reference model: any operations in any order, and after each of them every
//! counter, the recency order, every answer and every victim compared.

use crate::keys;

use crate::reference::{Model, Name, Sighting};
use proptest::prelude::*;
use proptest::sample::Index;
use zcache::arena::Heap;
use zcache::cache::ClosedFlight;
use zcache::cache::{
    Cache, Committed, Freshness, Joined, Limits, MAX_NAME, Reserve, START, Victim,
};
use zcache::key::{Asked, ByteRange};
use zcache::policy::{Minimise, PolicyKind};

/// One step. Keys, ranges and what is in progress are picked by index.
#[derive(Clone, Debug)]
enum Step {
    Lookup(Index, Index),
    /// A whole fill at once, so that there is something to find and to evict.
    Fill(Index, Index, u64),
    Join(Index, Index, bool),
    Land(Index),
    /// Reserve under a ticket, for the range of its flight or for another one.
    Reserve(Index, Option<Index>, u64),
    /// Report the victims of a reservation: bit by bit deleted or failed.
    Settle(Index, u64),
    Commit(Index, u64),
    Abort(Index),
    BeginWrite(Index),
    EndWrite(Index, bool),
    Forget(Index),
    /// A prefix of a key, cut at any slash or character, with slashes after it.
    DropPrefix(Index, Index, usize),
    /// The same, and what is below it goes on changing, ...
    BeginChange(Index, Index, usize),
    /// ... until this.
    EndChange(Index),
    FailedDeletes(usize),
    /// Make room that no reservation asks for.
    Evict(u64),
    /// Report victims that no reservation waits for.
    Settled(usize, u64),
    Discard(Index),
    Fork,
    Clock(u64),
    Tick(i64),
    /// The age that look-ups ask for from now on.
    MaxAge(Option<u64>),
    /// Misuse: numbers that name nothing.
    Nonsense(u32),
}

fn steps() -> impl Strategy<Value = Step> {
    use Step::*;
    let i = any::<Index>;
    prop_oneof![
        14 => (i(), i()).prop_map(|(k, s)| Lookup(k, s)),
        14 => (i(), i(), size()).prop_map(|(k, s, n)| Fill(k, s, n)),
        16 => (i(), i(), prop::bool::weighted(0.1)).prop_map(|(k, s, a)| Join(k, s, a)),
        4 => i().prop_map(Land),
        18 => (i(), prop::option::weighted(0.2, i()), size()).prop_map(|(t, s, n)| Reserve(t, s, n)),
        12 => (i(), bits()).prop_map(|(r, b)| Settle(r, b)),
        18 => (i(), age()).prop_map(|(r, age)| Commit(r, age)),
        3 => i().prop_map(Abort),
        3 => i().prop_map(BeginWrite),
        4 => (i(), prop::bool::weighted(0.8)).prop_map(|(k, ok)| EndWrite(k, ok)),
        2 => i().prop_map(Forget),
        3 => (i(), i(), 0usize..3).prop_map(|(k, c, n)| DropPrefix(k, c, n)),
        1 => (i(), i(), 0usize..3).prop_map(|(k, c, n)| BeginChange(k, c, n)),
        2 => i().prop_map(EndChange),
        3 => (0usize..4).prop_map(FailedDeletes),
        3 => size().prop_map(Evict),
        6 => (1usize..6, bits()).prop_map(|(n, b)| Settled(n, b)),
        3 => i().prop_map(Discard),
        1 => Just(Fork),
        1 => keys::time().prop_map(Clock),
        6 => (-1500i64..2500).prop_map(Tick),
        3 => max_age().prop_map(MaxAge),
        1 => any::<u32>().prop_map(Nonsense),
    ]
}

/// Time between the fetch of a value and its commit.
fn age() -> impl Strategy<Value = u64> {
    prop_oneof![3 => Just(0), 3 => 0u64..5000, 1 => any::<u64>()]
}

/// Most deletes succeed.
fn bits() -> impl Strategy<Value = u64> {
    prop_oneof![4 => Just(u64::MAX), 1 => Just(0), 1 => any::<u64>()]
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => Just(0),
        8 => 1u64..40,
        3 => 40u64..400,
        1 => (0u64..3).prop_map(|n| (u64::MAX / 2).wrapping_add(n)),
        1 => (0u64..40).prop_map(|n| u64::MAX - n),
    ]
}

fn max_age() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![
        2 => Just(None),
        4 => (1u64..4000).prop_map(Some),
        1 => prop::sample::select(vec![Some(0), Some(u64::MAX)]),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    let max_size = prop_oneof![
        8 => 50u64..600,
        1 => Just(0),
        2 => Just(u64::MAX),
        1 => (0u64..100).prop_map(|n| u64::MAX - n),
    ];
    (max_size, max_age(), any::<bool>()).prop_map(|(max_size, max_age, flat_namespace)| Limits {
        max_age,
        flat_namespace,
        ..Limits::bounded(max_size)
    })
}

/// A request. Sources of both kinds share an index.
fn asked(key: &str, range: ByteRange) -> Asked {
    Asked {
        range,
        slices_like_python: key.len().is_multiple_of(2),
    }
}

/// Victims that are still to be reported.
type Pending = Vec<(u32, Name)>;

struct Run {
    cache: Cache<Heap, u32>,
    model: Model,
    keys: Vec<String>,
    ranges: Vec<ByteRange>,
    now: u64,
    tickets: Vec<(Name, u64)>,
    reservations: Vec<(u64, Pending)>,
    pending: Pending,
    changes: Vec<String>,
    sightings: Vec<Sighting>,
}

impl Run {
    fn new(limits: Limits, seed: u64, keys: Vec<String>, ranges: Vec<ByteRange>) -> Self {
        // Names that are too long for a segment are a matter of its own tests.
        let has_places = seed % 2 == 1 && keys.iter().all(|key| key.len() < MAX_NAME / 2);
        let heap = if has_places {
            Heap::default().with_places()
        } else {
            Heap::default()
        };
        Run {
            cache: Cache::new(heap, limits, seed).unwrap(),
            model: Model::new(limits),
            keys,
            ranges,
            now: 1_000,
            tickets: Vec::new(),
            reservations: Vec::new(),
            pending: Vec::new(),
            changes: Vec::new(),
            sightings: Vec::new(),
        }
    }

    fn fresh(&self) -> Freshness {
        (self.now, self.model.max_age).into()
    }

    fn note(&self, victims: &[Victim]) -> Pending {
        let cells = victims.iter().map(|victim| victim.cell);
        cells.zip(self.model.names(victims)).collect()
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Lookup(key, range) => {
                self.lookup(&pick(&self.keys, key), pick(&self.ranges, range))
            }
            Step::Fill(key, range, size) => {
                self.fill(&pick(&self.keys, key), pick(&self.ranges, range), *size);
            }
            Step::Join(key, range, anyway) => {
                self.join(&pick(&self.keys, key), pick(&self.ranges, range), *anyway);
            }
            Step::Land(at) => {
                if let Some(at) = place(&self.tickets, at) {
                    self.complete_flight(at);
                }
            }
            Step::Reserve(at, range, size) => {
                if let Some(at) = place(&self.tickets, at) {
                    let ((key, own), ticket) = self.tickets[at].clone();
                    let range = range
                        .as_ref()
                        .map_or(own, |range| pick(&self.ranges, range));
                    self.reserve(&(key, range), *size, ticket);
                }
            }
            Step::Settle(at, bits) => {
                if let Some(at) = place(&self.reservations, at) {
                    self.evictions_done(at, *bits);
                }
            }
            Step::Commit(at, age) => {
                if let Some(at) = place(&self.reservations, at) {
                    self.commit(at, *age);
                }
            }
            Step::Abort(at) => {
                if let Some(at) = place(&self.reservations, at) {
                    let (id, waiting) = self.reservations.swap_remove(at);
                    self.pending.extend(waiting);
                    let victims = self.cache.abort(id).unwrap();
                    self.pending.extend(self.note(&victims));
                    self.model.aborted(id, &victims);
                }
            }
            Step::BeginWrite(key) => {
                let key = pick(&self.keys, key);
                let victims = self.cache.begin_write(&key).unwrap();
                self.pending.extend(self.note(&victims));
                self.model.write_begun(&key, &victims);
            }
            Step::EndWrite(key, ok) => {
                let key = pick(&self.keys, key);
                let (victims, ticket) = self.cache.end_write(&key, *ok, None).unwrap();
                self.pending.extend(self.note(&victims));
                self.model.write_ended(&key, *ok, &victims, ticket);
                self.tickets
                    .extend(ticket.map(|t| ((key, ByteRange::Full), t)));
            }
            Step::Forget(key) => {
                let key = pick(&self.keys, key);
                let victims = self.cache.drop_missing(&key).unwrap();
                self.pending.extend(self.note(&victims));
                self.model.key_dropped(&key, &victims);
            }
            Step::DropPrefix(key, cut, slashes) => {
                let prefix = self.prefix(key, cut, *slashes);
                self.drop_prefix(&prefix, None);
            }
            Step::BeginChange(key, cut, slashes) => {
                let prefix = self.prefix(key, cut, *slashes);
                self.drop_prefix(&prefix, Some(true));
                self.changes.push(prefix);
            }
            Step::EndChange(at) => {
                if let Some(at) = place(&self.changes, at) {
                    let prefix = self.changes.swap_remove(at);
                    self.drop_prefix(&prefix, Some(false));
                }
            }
            Step::FailedDeletes(limit) => {
                let victims = self.cache.retry_failed(*limit).unwrap();
                self.pending.extend(self.note(&victims));
                self.model.retried(*limit, &victims);
            }
            Step::Evict(size) => {
                let victims = self.cache.evict(*size, self.now).unwrap();
                self.pending.extend(self.note(&victims));
                self.model.made_room(*size, self.now, &victims);
            }
            Step::Settled(count, bits) => {
                let count = (*count).min(self.pending.len());
                let (dropped, failed) = sort(self.pending.drain(..count).collect(), *bits);
                self.cache
                    .deletes_done(&cells(&dropped), &cells(&failed))
                    .unwrap();
                self.model.deletes_done(&names(&dropped), &names(&failed));
            }
            Step::Discard(at) => {
                if let Some(at) = place(&self.sightings, at) {
                    let sighting = self.sightings[at].clone();
                    let victims = self.cache.discard(sighting.handle).unwrap();
                    self.pending.extend(self.note(&victims));
                    self.model.discarded(&sighting, &victims);
                }
            }
            Step::Fork => {
                let fresh = self.cache.after_fork().unwrap();
                assert_eq!(fresh.len(), self.model.in_flight().0);
                self.model.forked();
                // The task that was to report these stayed with the parent.
                self.reservations.clear();
                self.pending.clear();
                self.changes.clear();
            }
            Step::Clock(now) => self.now = *now,
            Step::Tick(by) => self.now = self.now.saturating_add_signed(*by),
            Step::MaxAge(age) => self.model.max_age = *age,
            Step::Nonsense(n) => self.nonsense(*n),
        }
    }

    fn lookup(&mut self, key: &str, range: ByteRange) {
        let asked = asked(key, range);
        let peeked = self.cache.peek(key, asked, self.fresh()).unwrap();
        // The fast path, where it answers, agrees.
        let short = range == ByteRange::Full && self.tickets.len().is_multiple_of(2);
        let found = match short.then(|| self.cache.hit(key, self.fresh())).flatten() {
            Some(None) => None,
            Some(Some(size)) => peeked.filter(|found| found.size == size && found.range == range),
            None => self.cache.lookup(key, asked, self.fresh()).unwrap(),
        };
        assert_eq!(peeked, found);
        self.model.check_found(key, asked, self.now, found.as_ref());
        let sighting = self.model.looked_up(key, found.as_ref());
        self.sightings.extend(sighting);
    }

    fn join(&mut self, key: &str, range: ByteRange, anyway: bool) {
        let asked = asked(key, range);
        let found = self.cache.peek(key, asked, self.fresh()).unwrap();
        self.model.check_found(key, asked, self.now, found.as_ref());
        let payload = self.tickets.len() as u32;
        let joined = self
            .cache
            .join(key, asked, payload, self.fresh(), anyway)
            .unwrap();
        let ready = found.is_some() && !anyway;
        self.model.joined(key, range, payload, ready, &joined);
        if let Joined::Lead(ticket) = joined {
            self.tickets.push(((key.to_owned(), range), ticket));
        }
    }

    fn fill(&mut self, key: &str, range: ByteRange, size: u64) {
        let open = self.tickets.len();
        self.join(key, range, false);
        if open == self.tickets.len() {
            return;
        }
        let (name, ticket) = self.tickets[open].clone();
        if !size.is_multiple_of(3) {
            // Of every length, those that are too long to be kept among them.
            let validator = "v".repeat(size as usize % 150);
            self.cache.set_validator(key, ticket, &validator);
        }
        let others = self.reservations.len();
        self.reserve(&name, size, ticket);
        while others < self.reservations.len() {
            if self.reservations[others].1.is_empty() {
                self.commit(others, 0);
            } else {
                self.evictions_done(others, u64::MAX);
            }
        }
        self.complete_flight(open);
    }

    fn complete_flight(&mut self, at: usize) {
        let ((key, _), ticket) = self.tickets.swap_remove(at);
        let got = self.cache.complete_flight(&key, ticket);
        self.model.completed(&key, ticket, got);
    }

    fn commit(&mut self, at: usize, age: u64) {
        let (id, waiting) = self.reservations.swap_remove(at);
        self.pending.extend(waiting);
        let checksum = id as u32;
        let fetched = self.now.saturating_sub(age);
        let done = self
            .cache
            .commit_fetched(id, Some(checksum), fetched, self.now)
            .unwrap();
        let Some(done) = done else {
            // Nothing was granted.
            let victims = self.cache.abort(id).unwrap();
            return self.model.aborted(id, &victims);
        };
        self.pending.extend(self.note(&done.victims));
        self.model.finished(id, checksum, fetched, self.now, done);
    }

    fn reserve(&mut self, name: &Name, size: u64, ticket: u64) {
        let (key, range) = name;
        let answer = self
            .cache
            .reserve(key, *range, size, ticket, self.now)
            .unwrap();
        let waiting = self.victims(&answer);
        self.model.reserved(name, size, ticket, self.now, &answer);
        if let Reserve::Granted(id) | Reserve::NeedsEviction(id, _) = answer {
            self.reservations.push((id, waiting));
        }
    }

    fn evictions_done(&mut self, at: usize, bits: u64) {
        let (id, waiting) = self.reservations.swap_remove(at);
        let (dropped, failed) = sort(waiting, bits);
        let answer = if failed.is_empty() && id % 2 == 0 {
            self.cache.all_evicted(id, self.now)
        } else {
            let (dropped, failed) = (cells(&dropped), cells(&failed));
            self.cache.evictions_done(id, &dropped, &failed, self.now)
        };
        let answer = answer.unwrap();
        // A cell that has become free may be another entry's by now, never a victim's.
        let waiting = self.victims(&answer);
        let (dropped, failed) = (names(&dropped), names(&failed));
        self.model
            .evictions_done(id, &dropped, &failed, self.now, &answer);
        if let Reserve::Granted(id) | Reserve::NeedsEviction(id, _) = answer {
            self.reservations.push((id, waiting));
        }
    }

    fn victims(&self, answer: &Reserve) -> Pending {
        match answer {
            Reserve::NeedsEviction(_, victims) => self.note(victims),
            Reserve::Granted(_) | Reserve::Rejected(_) => Vec::new(),
        }
    }

    fn prefix(&self, key: &Index, cut: &Index, slashes: usize) -> String {
        let key = pick(&self.keys, key);
        let at_slashes = key.match_indices('/').map(|(at, _)| at);
        let mut cuts: Vec<usize> = at_slashes.chain([key.len()]).collect();
        if slashes == 2 {
            cuts = key.char_indices().map(|(at, _)| at).collect();
        }
        let end = place(&cuts, cut).map_or(0, |at| cuts[at]);
        key[..end].to_owned() + &"/".repeat(slashes)
    }

    fn drop_prefix(&mut self, prefix: &str, begins: Option<bool>) {
        self.cache.invalidate_prefix(prefix);
        self.model.prefix_voided(prefix);
        if let Some(begins) = begins {
            self.cache.prefix_change(prefix, begins).unwrap();
            self.model.prefix_marked(prefix, begins);
        }
        let mut rest = Some(START);
        while let Some(at) = rest {
            let victims;
            (victims, rest) = self.cache.drain_prefix(prefix, at).unwrap();
            self.pending.extend(self.note(&victims));
            self.model.drained(prefix, &victims, rest.is_none());
        }
    }

    fn nonsense(&mut self, n: u32) {
        let unknown = [0, 1, u32::MAX, n | 1 << 30];
        self.cache.deletes_done(&unknown, &unknown).unwrap();
        let id = u64::from(n) + (1 << 40);
        assert!(self.cache.commit(id, Some(n), self.now).unwrap().is_none());
        assert!(self.cache.abort(id).unwrap().is_empty());
        assert_eq!(self.cache.complete_flight("zarr.json", id), None);
        let answer = self
            .cache
            .evictions_done(id, &unknown, &unknown, self.now)
            .unwrap();
        self.model.evictions_done(id, &[], &[], self.now, &answer);
    }

    fn check(&mut self) {
        for (cell, number) in self.cache.spent_segments(1).unwrap() {
            self.cache.segment_removed(cell, number).unwrap();
        }
        self.cache.validate().unwrap();
        let entries = self.cache.entries().unwrap().into_iter();
        let mut entries: Vec<_> = entries
            .map(|one| (one.key, one.range, one.size, one.state))
            .collect();
        entries.sort_by(|one, other| (&one.0, one.1).cmp(&(&other.0, other.1)));
        assert_eq!(entries, self.model.entries());
        let mut order = self.cache.recency().unwrap();
        let mut expected = self.model.recency().to_vec();
        if self.model.policy != PolicyKind::Lru {
            order.sort();
            expected.sort();
        }
        assert_eq!(order, expected);
        assert_eq!(self.cache.len() as usize, self.model.recency().len());
        let used = self.model.used_bytes();
        assert_eq!(u128::from(self.cache.current_size()), used);
        let bound = u128::from(self.cache.limits().max_size);
        assert!(used + self.model.reserved_bytes() <= bound);
        assert_eq!(self.cache.stats(), self.model.stats());
        assert_eq!(self.cache.in_flight(), self.model.in_flight());
    }
}

fn place<T>(from: &[T], at: &Index) -> Option<usize> {
    (!from.is_empty()).then(|| at.index(from.len()))
}

fn pick<T: Clone>(from: &[T], at: &Index) -> T {
    at.get(from).clone()
}

fn sort(victims: Pending, bits: u64) -> (Pending, Pending) {
    let numbered = victims.into_iter().enumerate();
    let (dropped, failed): (Vec<_>, Vec<_>) =
        numbered.partition(|(n, _)| bits >> (n % 64) & 1 == 1);
    let strip = |list: Vec<(usize, (u32, Name))>| list.into_iter().map(|(_, victim)| victim);
    (strip(dropped).collect(), strip(failed).collect())
}

fn cells(victims: &Pending) -> Vec<u32> {
    victims.iter().map(|(cell, _)| *cell).collect()
}

fn names(victims: &Pending) -> Vec<Name> {
    victims.iter().map(|(_, name)| name.clone()).collect()
}

/// A few keys, so that they meet again and again, some of them below others.
fn pool() -> impl Strategy<Value = Vec<String>> {
    let tail = prop::sample::select(vec!["/", "/0", "/c/0", "0", "/c/0/0", "//", "/zarr.json"]);
    let more = prop::collection::vec((any::<Index>(), tail), 0..3);
    (prop::collection::vec(keys::key(), 1..6), more).prop_map(|(mut keys, more)| {
        for (at, tail) in more {
            keys.push(at.get(&keys).clone() + tail);
        }
        keys
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn does_what_the_reference_does(
        limits in limits(),
        policy in prop::sample::select(PolicyKind::ALL.to_vec()),
        seed in any::<u64>(),
        keys in pool(),
        ranges in prop::collection::vec(keys::range(), 1..5),
        steps in prop::collection::vec(steps(), 1..120),
    ) {
        let mut run = Run::new(limits, seed, keys, ranges);
        run.cache.set_policy(policy, Minimise::Requests);
        run.model.policy = policy;
        run.check();
        for step in &steps {
            run.step(step);
            run.check();
        }
    }
}

#[test]
fn commit_closes_the_flight() {
    let limits = Limits::bounded(20);
    let mut cache: Cache<Heap, u32> = Cache::new(Heap::default(), limits, 1).unwrap();
    for (payload, overtaken, joined) in [(7, false, false), (8, true, false), (9, false, true)] {
        let key = format!("a/{payload}");
        let Joined::Lead(ticket) = cache
            .join(&key, ByteRange::Full, payload, 1, false)
            .unwrap()
        else {
            panic!("no other reader");
        };
        let Reserve::Granted(id) = cache.reserve(&key, ByteRange::Full, 5, ticket, 1).unwrap()
        else {
            panic!("not granted");
        };
        if overtaken {
            assert!(cache.begin_write(&key).unwrap().is_empty());
        }
        if joined {
            let follower = cache.join(&key, ByteRange::Full, 99, 1, false).unwrap();
            assert_eq!(follower, Joined::Follow(ByteRange::Full, payload));
        }
        let Committed { victims, flight } = cache.commit(id, Some(1), 1).unwrap().unwrap();
        let payload = Some(payload);
        let passed = Vec::new();
        assert_eq!(
            flight,
            Some(ClosedFlight {
                payload,
                joined,
                passed
            })
        );
        assert_eq!(cache.in_flight(), (0, 0));
        let names: Vec<_> = victims.iter().map(|v| v.cache_key.as_str()).collect();
        assert_eq!(
            names,
            if overtaken {
                vec![key.as_str()]
            } else {
                vec![]
            }
        );
        let found = cache.lookup(&key, ByteRange::Full, 1).unwrap();
        assert_eq!(found.is_some(), !overtaken);
        // It has ended, and completes only once.
        assert!(cache.commit(id, Some(1), 1).unwrap().is_none());
        cache.validate().unwrap();
    }
}
