//! The index and its flights under threads, with a scheduler that tries the orders in which they
//! can meet: all of them for two operations, thousands of random ones for more.
//!
//! The threads run whole reads, writes and prefix deletes, in the steps in which the shim runs
//! them: one lock per step, and nothing held between two steps. What must hold: no read that
//! begins after a write has returned gets older bytes; readers share one source read; the cache
//! store never holds more than the bound; and in the end the books equal reality and what is
//! cached equals the source.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

use std::collections::BTreeMap;
use std::sync::Mutex as Notes;

use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::thread;
use zcache::cache::{Cache, Joined, Limits, Room, Verify, Victim, select};
use zcache::cells::Heap;
use zcache::key::Span;

const A: &str = "x/c/0";
const B: &str = "x/c/1";
const META: &str = "x/zarr.json";

/// What the source holds of a key; the number counts its changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Value {
    version: u32,
    /// `None`: deleted.
    size: Option<u64>,
}

/// What the readers of one flight wait on.
#[derive(Debug, Default)]
struct Flight {
    value: Mutex<Option<Value>>,
    landed: Condvar,
}

impl Flight {
    fn deliver(&self, value: Value) {
        *self.value.lock().unwrap() = Some(value);
        self.landed.notify_all();
    }

    fn wait(&self) -> Value {
        let mut value = self.value.lock().unwrap();
        loop {
            match *value {
                Some(value) => return value,
                None => value = self.landed.wait(value).unwrap(),
            }
        }
    }
}

/// Size and version by name, with the bound that is watched from inside.
#[derive(Debug)]
struct Store {
    held: BTreeMap<String, (u64, u32)>,
    bound: u64,
    /// Deletes that are still to fail.
    refusals: usize,
}

impl Store {
    fn put(&mut self, name: String, size: u64, version: u32) {
        assert_eq!(self.held.insert(name, (size, version)), None);
        assert!(
            self.sum() <= self.bound,
            "{:?} of {}",
            self.held,
            self.bound
        );
    }

    fn delete(&mut self, name: &str) -> bool {
        let refused = self.refusals > 0;
        self.refusals = self.refusals.saturating_sub(1);
        if !refused {
            self.held.remove(name);
        }
        !refused
    }

    fn sum(&self) -> u64 {
        self.held.values().map(|(size, _)| size).sum()
    }
}

/// What a test counts on the side; never a reason to switch threads.
#[derive(Debug, Default)]
struct Seen {
    /// The change of a key that the latest write to return has made.
    returned: BTreeMap<String, u32>,
    source_reads: usize,
}

struct World {
    cache: Mutex<Cache<Heap, Arc<Flight>>>,
    source: Mutex<BTreeMap<&'static str, Value>>,
    store: Mutex<Store>,
    seen: Notes<Seen>,
}

impl World {
    fn new(max_size: u64) -> Arc<Self> {
        let limits = Limits {
            max_size,
            max_age: None,
            lenient: false,
            flat: false,
            verify: Verify::Never,
        };
        let size = Some(10);
        let values = [A, B, META].map(|key| (key, Value { version: 1, size }));
        Arc::new(World {
            cache: Mutex::new(Cache::new(Heap::default(), limits, 0).unwrap()),
            source: Mutex::new(BTreeMap::from(values)),
            store: Mutex::new(Store {
                held: BTreeMap::new(),
                bound: max_size,
                refusals: 0,
            }),
            seen: Notes::new(Seen::default()),
        })
    }

    fn cache<R>(&self, step: impl FnOnce(&mut Cache<Heap, Arc<Flight>>) -> R) -> R {
        step(&mut self.cache.lock().unwrap())
    }

    /// A read; checks that no write which had returned before is missed.
    fn read(&self, key: &str, span: Span) {
        let floor = self.seen.lock().unwrap().returned.get(key).copied();
        let version = self.find(key, span).version;
        assert!(version >= floor.unwrap_or(1), "{version} after {floor:?}");
    }

    fn find(&self, key: &str, span: Span) -> Value {
        loop {
            if let Some(value) = self.cached(key, span) {
                return value;
            }
            let flight = Arc::new(Flight::default());
            match self
                .cache(|c| c.join(key, span, Arc::clone(&flight), 1, false))
                .unwrap()
            {
                Joined::Ready => {}
                Joined::Follow(_, other) => return other.wait(),
                Joined::Lead(ticket) => {
                    let value = self.source.lock().unwrap()[key];
                    self.seen.lock().unwrap().source_reads += 1;
                    flight.deliver(value);
                    match value.size.and_then(|size| select(size, span, false)) {
                        Some((_, size)) => self.fill(key, span, size, value.version, ticket),
                        None => {
                            let victims = self.cache(|c| c.forget(key)).unwrap();
                            self.drop_bytes(victims);
                        }
                    }
                    self.cache(|c| c.land(key, ticket));
                    return value;
                }
            }
        }
    }

    fn cached(&self, key: &str, span: Span) -> Option<Value> {
        let found = self.cache(|c| c.lookup(key, span, 1)).unwrap()?;
        let held = self
            .store
            .lock()
            .unwrap()
            .held
            .get(&found.span.cache_key(key))
            .copied();
        if held == Some((found.size, found.checksum.unwrap_or(0))) {
            let size = Some(found.size);
            return Some(Value {
                version: found.checksum.unwrap_or(0),
                size,
            });
        }
        let victims = self.cache(|c| c.discard(found.handle)).unwrap();
        self.drop_bytes(victims);
        None
    }

    fn fill(&self, key: &str, span: Span, size: u64, version: u32, ticket: u64) {
        let mut room = self
            .cache(|c| c.reserve(key, span, size, ticket, 1))
            .unwrap();
        loop {
            match room {
                Room::Refused(_) => return,
                Room::Granted(id) => {
                    self.store
                        .lock()
                        .unwrap()
                        .put(span.cache_key(key), size, version);
                    let victims = self.cache(|c| c.commit(id, Some(version), 1)).unwrap();
                    return self.drop_bytes(victims);
                }
                Room::Evict(id, victims) => {
                    let (dropped, failed) = self.delete(victims);
                    room = self.cache(|c| c.settle(id, &dropped, &failed, 1)).unwrap();
                }
            }
        }
    }

    fn delete(&self, victims: Vec<Victim>) -> (Vec<u32>, Vec<u32>) {
        let (mut dropped, mut failed) = (Vec::new(), Vec::new());
        for victim in victims {
            if self.store.lock().unwrap().delete(&victim.cache_key) {
                dropped.push(victim.cell);
            } else {
                failed.push(victim.cell);
            }
        }
        (dropped, failed)
    }

    fn drop_bytes(&self, victims: Vec<Victim>) {
        if !victims.is_empty() {
            let (dropped, failed) = self.delete(victims);
            self.cache(|c| c.settled(&dropped, &failed)).unwrap();
        }
    }

    /// A write of so many bytes, or a delete.
    fn write(&self, key: &'static str, size: Option<u64>) {
        let victims = self.cache(|c| c.begin_write(key)).unwrap();
        self.drop_bytes(victims);
        let version = self.change(key, size);
        let (victims, ticket) = self.cache(|c| c.end_write(key, size.is_some())).unwrap();
        self.drop_bytes(victims);
        if let (Some(ticket), Some(size)) = (ticket, size) {
            self.fill(key, Span::Full, size, version, ticket);
            self.cache(|c| c.land(key, ticket));
        }
        self.returned(key, version);
    }

    fn change(&self, key: &'static str, size: Option<u64>) -> u32 {
        let mut source = self.source.lock().unwrap();
        let version = source[key].version + 1;
        source.insert(key, Value { version, size });
        version
    }

    fn returned(&self, key: &str, version: u32) {
        let mut seen = self.seen.lock().unwrap();
        let returned = seen.returned.entry(key.to_owned()).or_default();
        *returned = version.max(*returned);
    }

    fn drop_prefix(&self) {
        self.cache(|c| c.void_prefix("x/c"));
        self.sweep();
        let changed = [A, B].map(|key| (key, self.change(key, None)));
        self.cache(|c| c.void_prefix("x/c"));
        self.sweep();
        for (key, version) in changed {
            self.returned(key, version);
        }
    }

    fn sweep(&self) {
        loop {
            let victims = self.cache(|c| c.sweep("x/c")).unwrap();
            if victims.is_empty() {
                return;
            }
            self.drop_bytes(victims);
        }
    }

    /// Nobody is under way any more.
    fn check_at_rest(&self) {
        let orphans = self.cache(|c| c.orphans(usize::MAX)).unwrap();
        self.store.lock().unwrap().refusals = 0;
        self.drop_bytes(orphans);
        let (cache, store) = (self.cache.lock().unwrap(), self.store.lock().unwrap());
        cache.validate().unwrap();
        assert_eq!(cache.in_flight(), (0, 0));
        assert_eq!(cache.current_size(), store.sum());
        assert_eq!(cache.len() as usize, store.held.len());
        let source = self.source.lock().unwrap();
        for (name, (_, version)) in &store.held {
            let (key, _) = Span::parse(name).unwrap();
            assert_eq!(source[key].version, *version, "{name} is out of date");
        }
    }
}

type Operation = fn(&World);

fn run(world: &Arc<World>, threads: &[&'static [Operation]]) {
    let start = |operations: &'static [Operation]| {
        let world = Arc::clone(world);
        thread::spawn(move || operations.iter().for_each(|operation| operation(&world)))
    };
    let threads: Vec<_> = threads.iter().map(|operations| start(operations)).collect();
    for thread in threads {
        thread.join().unwrap();
    }
    world.check_at_rest();
}

const READ: Operation = |world| world.read(A, Span::Full);
const READ_RANGE: Operation = |world| world.read(A, Span::Range { start: 2, end: 6 });
const READ_SUFFIX: Operation = |world| world.read(A, Span::Suffix(4));
const READ_OTHER: Operation = |world| world.read(B, Span::Full);
const READ_META: Operation = |world| world.read(META, Span::Full);
const WRITE: Operation = |world| world.write(A, Some(14));
const WRITE_SMALL: Operation = |world| world.write(A, Some(3));
const WRITE_OTHER: Operation = |world| world.write(B, Some(8));
const DELETE: Operation = |world| world.write(A, None);
const DROP_PREFIX: Operation = |world| world.drop_prefix();

/// Every order in which two operations can meet, on a cold cache and on a warm one, with and
/// without room for both; each followed by a read.
#[test]
fn two_operations_in_every_order() {
    let pairs: [(Operation, Operation); 10] = [
        (READ, READ),
        (READ, READ_RANGE),
        (READ, READ_OTHER),
        (READ, WRITE),
        (READ_SUFFIX, WRITE_SMALL),
        (READ, DELETE),
        (WRITE, WRITE_SMALL),
        (READ, DROP_PREFIX),
        (WRITE, DROP_PREFIX),
        (WRITE, READ_OTHER),
    ];
    for (one, other) in pairs {
        for (max_size, warm) in [(100, false), (100, true), (15, true), (15, false)] {
            shuttle::check_dfs(
                move || {
                    let world = World::new(max_size);
                    if warm {
                        world.read(A, Span::Full);
                        world.read(B, Span::Suffix(3));
                    }
                    let second = Arc::clone(&world);
                    let second = thread::spawn(move || other(&second));
                    one(&world);
                    // Nothing that has returned is missed, even while the other one goes on.
                    world.read(A, Span::Full);
                    second.join().unwrap();
                    world.read(A, Span::Full);
                    world.check_at_rest();
                },
                Some(1_500),
            );
        }
    }
}

#[test]
fn readers_share_one_source_read() {
    let test = || {
        let world = World::new(100);
        run(&world, &[&[READ], &[READ, READ], &[READ], &[READ]]);
        assert_eq!(world.seen.lock().unwrap().source_reads, 1);
    };
    shuttle::check_random(test, 1_000);
    shuttle::check_pct(test, 500, 3);
}

#[test]
fn readers_and_writers_of_one_key() {
    let test = || {
        let world = World::new(60);
        let readers: [&[Operation]; 2] = [&[READ, READ_RANGE, READ], &[READ_SUFFIX, READ]];
        run(
            &world,
            &[
                readers[0],
                readers[1],
                &[WRITE, READ, DELETE],
                &[WRITE_SMALL, READ],
            ],
        );
    };
    shuttle::check_random(test, 1_500);
    shuttle::check_pct(test, 1_000, 3);
}

#[test]
fn a_bound_that_is_too_small_for_all() {
    let test = || {
        let world = World::new(22);
        run(
            &world,
            &[
                &[READ, READ_OTHER, READ_META],
                &[READ_META, WRITE, READ],
                &[READ_RANGE, READ_OTHER, READ_SUFFIX],
                &[WRITE_OTHER, READ_META],
            ],
        );
    };
    shuttle::check_random(test, 1_500);
    shuttle::check_pct(test, 1_000, 3);
}

#[test]
fn prefix_deletes_among_reads_and_writes() {
    let test = || {
        let world = World::new(100);
        run(
            &world,
            &[
                &[READ, READ_OTHER, READ],
                &[WRITE, READ],
                &[DROP_PREFIX, READ, READ_OTHER],
                &[READ_RANGE, WRITE_OTHER, READ_META],
            ],
        );
    };
    shuttle::check_random(test, 1_500);
    shuttle::check_pct(test, 1_000, 3);
}

#[test]
fn deletes_that_fail() {
    let test = || {
        let world = World::new(22);
        world.store.lock().unwrap().refusals = 4;
        run(
            &world,
            &[
                &[READ, WRITE_OTHER, READ_META],
                &[READ_META, WRITE, READ],
                &[READ_OTHER, DELETE],
            ],
        );
    };
    shuttle::check_random(test, 1_500);
    shuttle::check_pct(test, 1_000, 3);
}
