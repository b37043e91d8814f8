//! The bound at every instant: reads, writes and prefix deletes that obey the protocol, taken
//! apart into single steps, over a cache store that fails, loses values and deletes late.
//!
//! Each task is a small state machine and proptest picks which step is next, what goes wrong in
//! it and which task is cancelled. After each step the cache store is summed up; at rest the counters have to
//! equal reality, and what is cached has to be what the source holds.

use std::collections::BTreeMap;

use proptest::prelude::*;
use zcache::arena::Heap;
use zcache::cache::{Cache, Found, Freshness, Joined, Limits, Reserve, START, Victim};
use zcache::key::{ByteRange, select};

const KEYS: [&str; 6] = ["a/c/0", "a/c/1", "a/c/1/2", "a/zarr.json", "a", "b"];
const PREFIXES: [&str; 5] = ["a", "a/c", "a/c/1", "", "b"];

/// What the source holds, or held: the number counts the changes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Value {
    version: u32,
    /// `None`: deleted.
    size: Option<u64>,
}

#[derive(Clone, Debug)]
enum Kind {
    Read(ByteRange),
    /// A value of this size, or a delete.
    Write(Option<u64>),
    DropPrefix,
}

#[derive(Clone, Debug)]
struct Task {
    /// Key or prefix.
    name: &'static str,
    kind: Kind,
    stage: Stage,
    /// What every change that had returned when this task began left behind.
    floor: BTreeMap<&'static str, u32>,
    /// What this task changed.
    changed: BTreeMap<&'static str, u32>,
}

impl Task {
    fn range(&self) -> ByteRange {
        match self.kind {
            Kind::Read(range) => range,
            Kind::Write(_) | Kind::DropPrefix => ByteRange::Full,
        }
    }

    /// The reader has its answer.
    fn read(&self, version: u32) -> Stage {
        let floor = self.floor.get(self.name).copied().unwrap_or(0);
        assert!(version >= floor, "{} of before a write", self.name);
        Stage::Done
    }
}

/// What a task does next.
#[derive(Clone, Debug)]
enum Stage {
    Begin,
    Serve(Found),
    Join,
    Follow(usize),
    /// Ticket and flight.
    ReadSource(u64, usize),
    Reserve(Fill),
    Evict(Fill, u64, Deletes),
    Put(Fill, u64),
    Commit(Fill, u64),
    Abort(Fill, u64),
    Delete(Deletes, Box<Stage>),
    Sweep(Box<Stage>),
    Change,
    End {
        ok: bool,
    },
    Land(u64),
    Done,
}

#[derive(Clone, Debug)]
struct Fill {
    ticket: u64,
    range: ByteRange,
    size: u64,
    version: u32,
}

impl Fill {
    fn next(self, answer: Reserve) -> Stage {
        match answer {
            Reserve::Granted(id) => Stage::Put(self, id),
            Reserve::NeedsEviction(id, victims) => Stage::Evict(self, id, Deletes::new(victims)),
            Reserve::Rejected(_) => Stage::Land(self.ticket),
        }
    }
}

/// Deletes in progress.
#[derive(Clone, Debug, Default)]
struct Deletes {
    todo: Vec<Victim>,
    dropped: Vec<u32>,
    failed: Vec<u32>,
}

impl Deletes {
    fn new(todo: Vec<Victim>) -> Self {
        Deletes {
            todo,
            ..Deletes::default()
        }
    }
}

/// What happens in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Fine,
    FailsBefore,
    FailsAfter,
    Cancelled,
}

struct World {
    /// A flight's payload is its place in `flights`.
    cache: Cache<Heap, usize>,
    /// What each flight brought; `None` inside: it was aborted.
    flights: Vec<Option<Option<Value>>>,
    source: BTreeMap<&'static str, Value>,
    /// Size and version by name.
    store: BTreeMap<String, (u64, u32)>,
    /// Changes that have returned.
    returned: BTreeMap<&'static str, u32>,
    now: u64,
}

impl World {
    fn new(limits: Limits) -> Self {
        let mut source = BTreeMap::new();
        for (key, size) in KEYS.into_iter().zip([10u64, 20, 30, 5, 0, 60]) {
            let size = Some(size);
            source.insert(key, Value { version: 1, size });
        }
        World {
            cache: Cache::new(Heap::default(), limits, 7).unwrap(),
            flights: Vec::new(),
            source,
            store: BTreeMap::new(),
            returned: BTreeMap::new(),
            now: 1000,
        }
    }

    fn check(&self) {
        self.cache.validate().unwrap();
        let held: u64 = self.store.values().map(|(size, _)| size).sum();
        let bound = self.cache.limits().max_size;
        assert!(held <= bound, "{held} bytes of {bound}");
        let mut counted = BTreeMap::new();
        for entry in self.cache.entries().unwrap() {
            counted.insert(entry.range.cache_key(&entry.key), entry.size);
        }
        for (name, (size, _)) in &self.store {
            assert_eq!(counted.get(name), Some(size), "{name} is not counted");
        }
    }

    fn step(&mut self, task: &mut Task, fate: Fate) {
        self.now += 1;
        let stage = std::mem::replace(&mut task.stage, Stage::Done);
        task.stage = if fate == Fate::Cancelled {
            self.cancel(task, stage)
        } else {
            self.advance(task, stage, fate)
        };
        if matches!(task.stage, Stage::Done) {
            for (key, version) in std::mem::take(&mut task.changed) {
                let returned = self.returned.entry(key).or_default();
                *returned = version.max(*returned);
            }
        }
    }

    fn advance(&mut self, task: &mut Task, stage: Stage, fate: Fate) -> Stage {
        let key = task.name;
        match stage {
            Stage::Begin => {
                task.floor = self.returned.clone();
                self.begin(task)
            }
            Stage::Serve(found) => {
                let held = self.store.get(&found.range.cache_key(key));
                if fate == Fate::Fine && held == Some(&(found.size, found.checksum.unwrap_or(0))) {
                    return task.read(found.checksum.unwrap_or(0));
                }
                let victims = self.cache.discard(found.handle).unwrap();
                Stage::Delete(Deletes::new(victims), Box::new(Stage::Join))
            }
            Stage::Join => {
                let payload = self.flights.len();
                let range = task.range();
                match self
                    .cache
                    .join(key, range, payload, self.fresh(), false)
                    .unwrap()
                {
                    Joined::Ready => match self.cache.lookup(key, range, self.fresh()).unwrap() {
                        Some(found) => Stage::Serve(found),
                        None => panic!("ready for nothing"),
                    },
                    Joined::Follow(_, flight) => Stage::Follow(flight),
                    Joined::Lead(ticket) => {
                        self.flights.push(None);
                        Stage::ReadSource(ticket, payload)
                    }
                }
            }
            Stage::Follow(flight) => match self.flights[flight] {
                None => stage,
                Some(None) => Stage::Join,
                Some(Some(value)) => task.read(value.version),
            },
            Stage::ReadSource(ticket, flight) => {
                if fate != Fate::Fine {
                    self.flights[flight] = Some(None);
                    return Stage::Land(ticket);
                }
                let value = self.source[key];
                self.flights[flight] = Some(Some(value));
                task.read(value.version);
                let part = value
                    .size
                    .and_then(|size| select(size, task.range(), false));
                let Some((_, size)) = part else {
                    return Stage::Land(ticket);
                };
                Stage::Reserve(Fill {
                    ticket,
                    range: task.range(),
                    size,
                    version: value.version,
                })
            }
            Stage::Reserve(fill) => {
                let answer = self
                    .cache
                    .reserve(key, fill.range, fill.size, fill.ticket, self.now);
                fill.next(answer.unwrap())
            }
            Stage::Evict(fill, id, mut deletes) => {
                if self.delete_one(&mut deletes, fate) {
                    return Stage::Evict(fill, id, deletes);
                }
                let (dropped, failed) = (&deletes.dropped, &deletes.failed);
                let answer = self.cache.evictions_done(id, dropped, failed, self.now);
                fill.next(answer.unwrap())
            }
            Stage::Put(fill, id) => {
                let name = fill.range.cache_key(key);
                if fate != Fate::FailsBefore {
                    let before = self.store.insert(name, (fill.size, fill.version));
                    assert_eq!(before, None, "bytes over bytes");
                }
                if fate == Fate::Fine {
                    Stage::Commit(fill, id)
                } else {
                    Stage::Abort(fill, id)
                }
            }
            Stage::Commit(fill, id) => {
                let done = self.cache.commit(id, Some(fill.version), self.now).unwrap();
                let victims = done.expect("granted").victims;
                Stage::Delete(Deletes::new(victims), Box::new(Stage::Done))
            }
            Stage::Abort(fill, id) => {
                let victims = self.cache.abort(id).unwrap();
                Stage::Delete(Deletes::new(victims), Box::new(Stage::Land(fill.ticket)))
            }
            Stage::Delete(mut deletes, then) => {
                if self.delete_one(&mut deletes, fate) {
                    return Stage::Delete(deletes, then);
                }
                let (dropped, failed) = (&deletes.dropped, &deletes.failed);
                self.cache.deletes_done(dropped, failed).unwrap();
                *then
            }
            Stage::Sweep(then) => {
                let (victims, rest) = self.cache.drain_prefix(key, START).unwrap();
                assert_eq!(rest, None, "few take one step");
                Stage::Delete(Deletes::new(victims), then)
            }
            Stage::Change => {
                if fate != Fate::FailsBefore {
                    self.bump_version(task, fate);
                }
                Stage::End {
                    ok: fate == Fate::Fine,
                }
            }
            Stage::End { ok } => self.end(task, ok),
            Stage::Land(ticket) => {
                self.cache.complete_flight(key, ticket);
                Stage::Done
            }
            Stage::Done => Stage::Done,
        }
    }

    fn fresh(&self) -> Freshness {
        (self.now, self.cache.limits().max_age).into()
    }

    fn begin(&mut self, task: &Task) -> Stage {
        match &task.kind {
            Kind::Read(range) => {
                match self.cache.lookup(task.name, *range, self.fresh()).unwrap() {
                    Some(found) => Stage::Serve(found),
                    None => Stage::Join,
                }
            }
            Kind::Write(_) => {
                let victims = self.cache.begin_write(task.name).unwrap();
                Stage::Delete(Deletes::new(victims), Box::new(Stage::Change))
            }
            Kind::DropPrefix => {
                self.cache.invalidate_prefix(task.name);
                Stage::Sweep(Box::new(Stage::Change))
            }
        }
    }

    fn bump_version(&mut self, task: &mut Task, fate: Fate) {
        let size = match task.kind {
            Kind::Write(size) => size,
            _ => None,
        };
        for (key, value) in &mut self.source {
            let covered = match task.kind {
                Kind::Write(_) => *key == task.name,
                _ => {
                    task.name.is_empty()
                        || *key == task.name
                        || key.starts_with(&format!("{}/", task.name))
                }
            };
            if covered {
                value.version += 1;
                value.size = size;
                if fate == Fate::Fine {
                    task.changed.insert(key, value.version);
                }
            }
        }
    }

    fn end(&mut self, task: &Task, ok: bool) -> Stage {
        let Kind::Write(size) = task.kind else {
            self.cache.invalidate_prefix(task.name);
            return Stage::Sweep(Box::new(Stage::Done));
        };
        let (victims, ticket) = self
            .cache
            .end_write(task.name, ok && size.is_some(), None)
            .unwrap();
        let then = match (ticket, size) {
            (Some(ticket), Some(size)) => Stage::Reserve(Fill {
                ticket,
                range: ByteRange::Full,
                size,
                version: task.changed[task.name],
            }),
            _ => Stage::Done,
        };
        Stage::Delete(Deletes::new(victims), Box::new(then))
    }

    /// Deletes the bytes of one victim; false where none is left.
    fn delete_one(&mut self, deletes: &mut Deletes, fate: Fate) -> bool {
        let Some(victim) = deletes.todo.pop() else {
            return false;
        };
        if fate != Fate::FailsBefore {
            self.store.remove(&victim.cache_key);
        }
        let done = if fate == Fate::Fine {
            &mut deletes.dropped
        } else {
            &mut deletes.failed
        };
        done.push(victim.cell);
        true
    }

    /// A cancelled task leaves its deletes to others, and its flight to the next reader.
    fn cancel(&mut self, task: &mut Task, stage: Stage) -> Stage {
        let key = task.name;
        match stage {
            Stage::ReadSource(ticket, flight) => {
                self.flights[flight] = Some(None);
                self.cache.complete_flight(key, ticket);
            }
            Stage::Reserve(fill) => {
                self.cache.complete_flight(key, fill.ticket);
            }
            Stage::Evict(fill, id, deletes) => {
                self.leave(deletes);
                let victims = self.cache.abort(id).unwrap();
                assert!(victims.is_empty());
                self.cache.complete_flight(key, fill.ticket);
            }
            Stage::Put(fill, id) | Stage::Commit(fill, id) | Stage::Abort(fill, id) => {
                let victims = self.cache.abort(id).unwrap();
                self.leave(Deletes::new(victims));
                self.cache.complete_flight(key, fill.ticket);
            }
            Stage::Delete(deletes, then) => {
                self.leave(deletes);
                return self.cancel(task, *then);
            }
            Stage::Change | Stage::End { .. } | Stage::Sweep(_) => {
                task.changed.clear();
                self.end_at_once(task);
            }
            Stage::Land(ticket) => {
                self.cache.complete_flight(key, ticket);
            }
            Stage::Begin | Stage::Serve(_) | Stage::Join | Stage::Follow(_) | Stage::Done => {}
        }
        Stage::Done
    }

    fn end_at_once(&mut self, task: &Task) {
        if let Kind::Write(_) = task.kind {
            let (victims, ticket) = self.cache.end_write(task.name, false, None).unwrap();
            assert_eq!(ticket, None);
            return self.leave(Deletes::new(victims));
        }
        self.cache.invalidate_prefix(task.name);
        let mut rest = Some(START);
        while let Some(at) = rest {
            let victims;
            (victims, rest) = self.cache.drain_prefix(task.name, at).unwrap();
            self.leave(Deletes::new(victims));
        }
    }

    fn leave(&mut self, deletes: Deletes) {
        let left = deletes.todo.iter().map(|victim| victim.cell);
        let failed: Vec<u32> = left.chain(deletes.failed).collect();
        self.cache.deletes_done(&deletes.dropped, &failed).unwrap();
    }

    /// Checks what holds when all tasks have ended.
    fn check_at_rest(&mut self) {
        assert_eq!(self.cache.in_flight(), (0, 0));
        let failed = self.cache.retry_failed(usize::MAX).unwrap();
        let mut deletes = Deletes::new(failed);
        while self.delete_one(&mut deletes, Fate::Fine) {}
        self.cache.deletes_done(&deletes.dropped, &[]).unwrap();
        self.check();
        let held: u64 = self.store.values().map(|(size, _)| size).sum();
        assert_eq!(self.cache.current_size(), held);
        assert_eq!(self.cache.len() as usize, self.store.len());
        for (name, (_, version)) in &self.store {
            let (key, _) = ByteRange::parse(name).unwrap();
            assert_eq!(self.source[key].version, *version, "{name} is out of date");
        }
    }
}

fn tasks() -> impl Strategy<Value = Vec<Task>> {
    let range = prop::sample::select(vec![
        ByteRange::Full,
        ByteRange::Full,
        ByteRange::Range { start: 2, end: 8 },
        ByteRange::Range { start: 3, end: 5 },
        ByteRange::Offset(4),
        ByteRange::Suffix(6),
    ]);
    let key = prop::sample::select(KEYS.to_vec());
    let prefix = prop::sample::select(PREFIXES.to_vec());
    let size = prop::option::weighted(0.8, 0u64..90);
    let task = prop_oneof![
        6 => (key.clone(), range).prop_map(|(key, range)| (key, Kind::Read(range))),
        3 => (key, size).prop_map(|(key, size)| (key, Kind::Write(size))),
        1 => prefix.prop_map(|prefix| (prefix, Kind::DropPrefix)),
    ];
    let task = task.prop_map(|(name, kind)| Task {
        name,
        kind,
        stage: Stage::Begin,
        floor: BTreeMap::new(),
        changed: BTreeMap::new(),
    });
    prop::collection::vec(task, 2..30)
}

fn fates() -> impl Strategy<Value = Fate> {
    prop_oneof![
        20 => Just(Fate::Fine),
        1 => Just(Fate::FailsBefore),
        1 => Just(Fate::FailsAfter),
        1 => Just(Fate::Cancelled),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn holds_at_every_instant(
        max_size in 0u64..150,
        max_age in prop::option::weighted(0.3, 1u64..40),
        flat_namespace in any::<bool>(),
        // How many tasks run at once.
        width in 1usize..6,
        mut tasks in tasks(),
        schedule in prop::collection::vec((any::<usize>(), fates()), 0..400),
    ) {
        let limits = Limits { max_age, flat_namespace, ..Limits::bounded(max_size) };
        let mut world = World::new(limits);
        for (pick, fate) in schedule {
            let under_way = tasks.iter_mut().filter(|task| !matches!(task.stage, Stage::Done));
            let mut under_way: Vec<&mut Task> = under_way.take(width).collect();
            if !under_way.is_empty() {
                let at = pick % under_way.len();
                world.step(under_way[at], fate);
                world.check();
            }
        }
        let mut rounds = 0;
        while tasks.iter().any(|task| !matches!(task.stage, Stage::Done)) {
            rounds += 1;
            assert!(rounds < 10_000, "no task makes progress");
            for task in &mut tasks {
                world.step(task, Fate::Fine);
                world.check();
            }
        }
        world.check_at_rest();
    }
}
