//! The index and its flights under threads, with a scheduler that tries the orders in which they
//! can meet: all of them for two operations, thousands of random ones for more.
//!
//! The threads run whole reads, writes and prefix deletes, in the steps in which the shim runs
//! them: one lock per step, and nothing held between two steps. What must hold: no read that
//! begins after a write has returned gets older bytes; readers share one source read; the cache
//! store never holds more than the bound; and in the end the counters equal reality and what is
//! cached equals the source.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{LazyLock, Mutex, MutexGuard};

use shuttle::rand::Rng;
use shuttle::sync::Arc;
use shuttle::sync::atomic::AtomicBool;
use shuttle::sync::mpsc::{Sender, channel};
use shuttle::thread;
use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Peers, Reserve, START, Victim};
use zcache::error::Result;
use zcache::key::{ByteRange, select};

use crate::shared_memory::Shared;

const A: &str = "x/c/0";
const B: &str = "x/c/1";
const META: &str = "x/zarr.json";
/// Below the name of `A`, in the same directory of the index.
const BELOW: &str = "x/c/0/1";

/// More chunks than one step looks at, beside the others.
static CROWD: LazyLock<Vec<String>> =
    LazyLock::new(|| (0..4097).map(|n| format!("x/c/9/{n}")).collect());

/// What the source holds of a key; the number counts its changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Value {
    version: u32,
    /// `None`: deleted.
    size: Option<u64>,
}

/// A lock that lets the scheduler switch threads once, before it is taken. No thread waits while
/// holding one, so a switch at its release as well, as in shuttle's own, would add no order of
/// steps but square their number, and to try all of them would take hours.
#[derive(Debug, Default)]
struct Step<T> {
    point: AtomicBool,
    inner: Mutex<T>,
}

impl<T> Step<T> {
    fn new(inner: T) -> Self {
        Step {
            point: AtomicBool::new(false),
            inner: Mutex::new(inner),
        }
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        self.point.load(SeqCst);
        self.now()
    }

    /// Without a switch.
    fn now(&self) -> MutexGuard<'_, T> {
        self.inner.try_lock().expect("held over a switch")
    }
}

/// What the readers of one flight wait on, and who does.
#[derive(Debug, Default)]
struct Flight(Mutex<(Option<Value>, Vec<Sender<Value>>)>);

impl Flight {
    fn deliver(&self, value: Value) {
        let mut flight = self.0.lock().unwrap();
        flight.0 = Some(value);
        let waiting = std::mem::take(&mut flight.1);
        drop(flight);
        waiting
            .iter()
            .for_each(|reader| reader.send(value).unwrap());
    }

    fn wait(&self) -> Value {
        let mut flight = self.0.lock().unwrap();
        if let Some(value) = flight.0 {
            return value;
        }
        let (sender, receiver) = channel();
        flight.1.push(sender);
        drop(flight);
        receiver.recv().unwrap()
    }
}

/// Size and version by name, with the bound that is watched from inside.
#[derive(Debug)]
struct Store {
    held: BTreeMap<String, (u64, u32)>,
    bound: u64,
    /// Deletes that are still to fail.
    rejections: usize,
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
        let refused = self.rejections > 0;
        self.rejections = self.rejections.saturating_sub(1);
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
struct Observed {
    /// The change of a key that the latest write to return has made.
    returned: BTreeMap<String, u32>,
    source_reads: usize,
}

/// Over files of values, or over the segments of a pool, of one process or shared with others who may damage the index.
enum Index {
    Own(Cache<Heap, Arc<Flight>>),
    Shared(Cache<Shared, Arc<Flight>>),
}

/// What the index of a world is over.
#[derive(Clone, Copy)]
enum Kind {
    Files,
    Segments,
    SharedSegments,
}

/// Works with the cache of an index.
macro_rules! with {
    ($index:expr, |$cache:ident| $work:expr) => {
        match $index {
            Index::Own($cache) => $work,
            Index::Shared($cache) => $work,
        }
    };
}

/// Takes one step of the cache of a world.
macro_rules! step {
    ($world:expr, |$cache:ident| $work:expr) => {{
        let mut index = $world.cache.lock();
        with!(&mut *index, |$cache| $work)
    }};
}

struct World {
    cache: Step<Index>,
    source: Step<BTreeMap<&'static str, Value>>,
    store: Step<Store>,
    observed: Mutex<Observed>,
}

impl World {
    /// Of any kind, as chance has it.
    fn new(max_size: u64) -> Arc<Self> {
        let kinds = [Kind::Files, Kind::Segments, Kind::SharedSegments];
        World::with(
            max_size,
            kinds[shuttle::rand::thread_rng().gen_range(0..kinds.len())],
        )
    }

    fn with(max_size: u64, kind: Kind) -> Arc<Self> {
        let limits = Limits {
            flat_namespace: false,
            ..Limits::bounded(max_size)
        };
        let index = match kind {
            Kind::Files => Index::Own(Cache::new(Heap::default(), limits, 0).unwrap()),
            Kind::Segments => {
                Index::Own(Cache::new(Heap::default().with_places(), limits, 0).unwrap())
            }
            Kind::SharedSegments => {
                let heap = Heap::default().with_places();
                Index::Shared(Cache::new(Shared::from(heap), limits, 0).unwrap())
            }
        };
        let size = Some(10);
        let values = [A, B, META, BELOW].map(|key| (key, Value { version: 1, size }));
        Arc::new(World {
            cache: Step::new(index),
            source: Step::new(BTreeMap::from(values)),
            store: Step::new(Store {
                held: BTreeMap::new(),
                bound: max_size,
                rejections: 0,
            }),
            observed: Mutex::new(Observed::default()),
        })
    }

    /// With very many chunks in the directory of the others.
    fn crowded() -> Arc<Self> {
        let world = World::new(u64::MAX);
        for key in &*CROWD {
            let key = key.as_str();
            let made = with!(&mut *world.cache.now(), |cache| fill(cache, key));
            made.unwrap();
            let (version, size) = (1, Some(10));
            world.source.now().insert(key, Value { version, size });
            world.store.now().held.insert(key.to_owned(), (10, 1));
        }
        world
    }

    /// A read; checks that no write which had returned before is missed.
    fn read(&self, key: &str, range: ByteRange) {
        let floor = self.observed.lock().unwrap().returned.get(key).copied();
        let version = self.find(key, range).version;
        assert!(version >= floor.unwrap_or(1), "{version} after {floor:?}");
    }

    fn find(&self, key: &str, range: ByteRange) -> Value {
        loop {
            if let Some(value) = self.cached(key, range) {
                return value;
            }
            let flight = Arc::new(Flight::default());
            match step!(self, |c| c.join(key, range, Arc::clone(&flight), 1, false)).unwrap() {
                Joined::Ready => {}
                Joined::Follow(_, other) => return other.wait(),
                Joined::Lead(ticket) => {
                    let value = self.source.lock()[key];
                    self.observed.lock().unwrap().source_reads += 1;
                    flight.deliver(value);
                    match value.size.and_then(|size| select(size, range, false)) {
                        Some((_, size)) => self.fill(key, range, size, value.version, ticket),
                        None => {
                            let victims = step!(self, |c| c.drop_missing(key)).unwrap();
                            self.drop_bytes(victims);
                        }
                    }
                    step!(self, |c| c.complete_flight(key, ticket));
                    return value;
                }
            }
        }
    }

    fn cached(&self, key: &str, range: ByteRange) -> Option<Value> {
        let found = step!(self, |c| c.lookup(key, range, 1)).unwrap()?;
        let held = self
            .store
            .lock()
            .held
            .get(&found.range.cache_key(key))
            .copied();
        if held == Some((found.size, found.checksum.unwrap())) {
            let size = Some(found.size);
            return Some(Value {
                version: found.checksum.unwrap(),
                size,
            });
        }
        let victims = step!(self, |c| c.discard(found.handle)).unwrap();
        self.drop_bytes(victims);
        None
    }

    fn fill(&self, key: &str, range: ByteRange, size: u64, version: u32, ticket: u64) {
        let mut answer = step!(self, |c| c.reserve(key, range, size, ticket, 1)).unwrap();
        loop {
            match answer {
                Reserve::Rejected(_) => return,
                Reserve::Granted(id) => {
                    self.store.lock().put(range.cache_key(key), size, version);
                    let done = step!(self, |c| c.commit(id, Some(version), 1)).unwrap();
                    return self.drop_bytes(done.expect("granted").victims);
                }
                Reserve::NeedsEviction(id, victims) => {
                    let (dropped, failed) = self.delete(victims);
                    answer = step!(self, |c| c.evictions_done(id, &dropped, &failed, 1)).unwrap();
                }
            }
        }
    }

    fn delete(&self, victims: Vec<Victim>) -> (Vec<u32>, Vec<u32>) {
        let (mut dropped, mut failed) = (Vec::new(), Vec::new());
        for victim in victims {
            if self.store.lock().delete(&victim.cache_key) {
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
            step!(self, |c| c.deletes_done(&dropped, &failed)).unwrap();
        }
    }

    /// A write of so many bytes, or a delete.
    fn write(&self, key: &'static str, size: Option<u64>) {
        let victims = step!(self, |c| c.begin_write(key)).unwrap();
        self.drop_bytes(victims);
        let version = self.bump_version(key, size);
        let (victims, ticket) = step!(self, |c| c.end_write(key, size.is_some(), None)).unwrap();
        self.drop_bytes(victims);
        if let (Some(ticket), Some(size)) = (ticket, size) {
            self.fill(key, ByteRange::Full, size, version, ticket);
            step!(self, |c| c.complete_flight(key, ticket));
        }
        self.returned(key, version);
    }

    fn bump_version(&self, key: &'static str, size: Option<u64>) -> u32 {
        let mut source = self.source.lock();
        let version = source[key].version + 1;
        source.insert(key, Value { version, size });
        version
    }

    fn returned(&self, key: &str, version: u32) {
        let mut observed = self.observed.lock().unwrap();
        let returned = observed.returned.entry(key.to_owned()).or_default();
        *returned = version.max(*returned);
    }

    /// Deletes what is at and below a prefix: these keys.
    fn drop_prefix(&self, prefix: &str, keys: &[&'static str]) {
        step!(self, |c| c.invalidate_prefix(prefix));
        self.drain_prefix(prefix);
        let deleted = keys.iter().map(|key| (key, self.bump_version(key, None)));
        let changed: Vec<_> = deleted.collect();
        step!(self, |c| c.invalidate_prefix(prefix));
        self.drain_prefix(prefix);
        for (key, version) in changed {
            self.returned(key, version);
        }
    }

    fn drain_prefix(&self, prefix: &str) {
        let mut rest = Some(START);
        while let Some(at) = rest {
            let victims;
            (victims, rest) = step!(self, |c| c.drain_prefix(prefix, at)).unwrap();
            self.drop_bytes(victims);
        }
    }

    /// Checks what holds when all tasks have ended.
    fn check_at_rest(&self) {
        let failed = step!(self, |c| c.retry_failed(usize::MAX)).unwrap();
        self.store.lock().rejections = 0;
        self.drop_bytes(failed);
        for (cell, number) in step!(self, |c| c.spent_segments(usize::MAX)).unwrap() {
            step!(self, |c| c.segment_removed(cell, number)).unwrap();
        }
        let store = self.store.now();
        with!(&*self.cache.now(), |cache| {
            cache.validate().unwrap();
            assert_eq!(cache.in_flight(), (0, 0));
            assert_eq!(cache.current_size(), store.sum());
            assert_eq!(cache.len() as usize, store.held.len());
        });
        let source = self.source.now();
        for (name, (_, version)) in &store.held {
            let (key, _) = ByteRange::parse(name).unwrap();
            assert_eq!(source[key].version, *version, "{name} is out of date");
        }
    }
}

/// Caches a value of 10 bytes, which no other reader asks for.
fn fill<S: Peers>(cache: &mut Cache<S, Arc<Flight>>, key: &str) -> Result<()> {
    let joined = cache.join(key, ByteRange::Full, Arc::default(), 1, false)?;
    let Joined::Lead(ticket) = joined else {
        panic!("{key} is there");
    };
    let Reserve::Granted(id) = cache.reserve(key, ByteRange::Full, 10, ticket, 1)? else {
        panic!("no room for {key}");
    };
    assert!(cache.commit(id, Some(1), 1)?.is_some());
    Ok(())
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

const READ: Operation = |world| world.read(A, ByteRange::Full);
const READ_RANGE: Operation = |world| world.read(A, ByteRange::Range { start: 2, end: 6 });
const READ_SUFFIX: Operation = |world| world.read(A, ByteRange::Suffix(4));
const READ_OTHER: Operation = |world| world.read(B, ByteRange::Full);
const READ_META: Operation = |world| world.read(META, ByteRange::Full);
const WRITE: Operation = |world| world.write(A, Some(14));
const WRITE_SMALL: Operation = |world| world.write(A, Some(3));
const WRITE_OTHER: Operation = |world| world.write(B, Some(8));
const DELETE: Operation = |world| world.write(A, None);
const DROP_PREFIX: Operation = |world| world.drop_prefix("x/c", &[A, B, BELOW]);
const DROP_ROW: Operation = |world| world.drop_prefix(A, &[A, BELOW]);
const READ_BELOW: Operation = |world| world.read(BELOW, ByteRange::Full);
const WRITE_BELOW: Operation = |world| world.write(BELOW, Some(9));

/// Whether something of key `A` is cached before the operations begin.
#[derive(Clone, Copy)]
enum Start {
    Cold,
    Warm,
}
use Start::{Cold, Warm};

/// Runs two operations in every order in which their steps can meet, each time followed by a read.
fn in_every_order(start: Start, max_size: u64, one: Operation, other: Operation) {
    for kind in [Kind::Files, Kind::SharedSegments] {
        in_every_order_over(kind, start, max_size, one, other);
    }
}

fn in_every_order_over(kind: Kind, start: Start, max_size: u64, one: Operation, other: Operation) {
    const MOST: usize = 30_000;
    let orders = std::sync::Arc::new(AtomicUsize::new(0));
    let count = std::sync::Arc::clone(&orders);
    let test = move || {
        count.fetch_add(1, Relaxed);
        let world = World::with(max_size, kind);
        if matches!(start, Warm) {
            world.read(A, ByteRange::Full);
        }
        let second = Arc::clone(&world);
        let second = thread::spawn(move || other(&second));
        one(&world);
        second.join().unwrap();
        world.read(A, ByteRange::Full);
        world.check_at_rest();
    };
    shuttle::check_dfs(test, Some(MOST));
    let orders = orders.load(Relaxed);
    assert!(1 < orders && orders < MOST, "{orders} orders are not all");
}

#[test]
fn two_reads_every_order_agree() {
    in_every_order(Cold, 100, READ, READ);
    in_every_order(Warm, 100, READ, READ);
    in_every_order(Cold, 100, READ, READ_RANGE);
    in_every_order(Cold, 100, READ, READ_OTHER);
    // The bound does not hold both.
    in_every_order(Cold, 15, READ, READ_OTHER);
    in_every_order(Warm, 15, READ, READ_OTHER);
}

#[test]
fn read_and_change_every_order_read_your_writes() {
    in_every_order(Cold, 100, READ, WRITE);
    in_every_order(Warm, 100, READ, WRITE);
    in_every_order(Cold, 100, READ_SUFFIX, WRITE_SMALL);
    in_every_order(Cold, 100, READ, DELETE);
    in_every_order(Warm, 100, READ, DELETE);
    in_every_order(Cold, 100, READ, DROP_PREFIX);
    in_every_order(Warm, 100, READ, DROP_PREFIX);
    in_every_order(Cold, 15, READ_OTHER, WRITE);
}

#[test]
fn two_changes_every_order_cache_equals_source() {
    in_every_order(Cold, 100, WRITE, WRITE_SMALL);
    in_every_order(Cold, 100, WRITE, DROP_PREFIX);
    in_every_order(Warm, 100, DELETE, DROP_PREFIX);
    in_every_order(Warm, 100, WRITE, DELETE);
    in_every_order(Cold, 15, WRITE, WRITE_OTHER);
}

#[test]
fn readers_of_one_key_share_one_source_read() {
    let test = || {
        let world = World::new(100);
        run(&world, &[&[READ], &[READ, READ], &[READ], &[READ]]);
        assert_eq!(world.observed.lock().unwrap().source_reads, 1);
    };
    shuttle::check_random(test, 10_000);
    shuttle::check_pct(test, 5_000, 3);
}

#[test]
fn readers_and_writers_of_one_key_stay_coherent() {
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
    shuttle::check_random(test, 10_000);
    shuttle::check_pct(test, 5_000, 3);
}

#[test]
fn bound_too_small_for_all_is_never_exceeded() {
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
    shuttle::check_random(test, 10_000);
    shuttle::check_pct(test, 5_000, 3);
}

#[test]
fn prefix_deletes_among_reads_and_writes_stay_coherent() {
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
    shuttle::check_random(test, 10_000);
    shuttle::check_pct(test, 5_000, 3);
}

/// The drain walks, and between its steps others cache what is at and below its prefix.
#[test]
fn deletes_of_a_row_of_very_many_among_reads_and_writes_stay_coherent() {
    let test = || {
        let world = World::crowded();
        run(
            &world,
            &[
                &[READ, READ_BELOW, READ],
                &[WRITE, READ_OTHER],
                &[READ_BELOW, DROP_ROW],
                &[WRITE_BELOW, READ_RANGE],
            ],
        );
    };
    shuttle::check_random(test, 80);
    shuttle::check_pct(test, 60, 3);
}

#[test]
fn failing_deletes_stay_counted() {
    let test = || {
        let world = World::new(22);
        world.store.lock().rejections = 4;
        run(
            &world,
            &[
                &[READ, WRITE_OTHER, READ_META],
                &[READ_META, WRITE, READ],
                &[READ_OTHER, DELETE],
            ],
        );
    };
    shuttle::check_random(test, 10_000);
    shuttle::check_pct(test, 5_000, 3);
}
