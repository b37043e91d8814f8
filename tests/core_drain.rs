//! Drains of a prefix among others, who cache, delete and learn of missing keys between any two of their steps.
//!
//! What must hold: at the end nothing is left below the prefix that was there at the beginning; what came meanwhile may
//! stay, and is no damage; each step takes only what is below the prefix.

use std::collections::{BTreeMap, BTreeSet};
use std::thread::sleep;

use proptest::prelude::*;
use zcache::arena::{Heap, State};
use zcache::cache::{Cache, Joined, Limits, Peers, Reserve, START};
use zcache::error::Result;
use zcache::key::{ByteRange, is_below};
use zcache::shared::{Mapped, Opening, SharedIndex};

use crate::place::Place;
use crate::pool;
use crate::shared_memory::Shared;

/// Chunks of a row, and rows: one step does not look at all of them, ...
const ROW: usize = 68;
/// ... unless so many are gone, which leaves 4,096 and fewer.
const MANY: usize = 1000;
const LIMITS: Limits = Limits::bounded(1 << 40);
/// Keys at and below the prefix and beside it, of which others choose.
const KEYS: usize = 7;
const PART: ByteRange = ByteRange::Range { start: 2, end: 6 };

/// Names of chunks, and prefixes that cut some of them off.
struct Layout {
    name: fn(usize, usize) -> String,
    prefixes: [&'static str; 4],
}

const LAYOUTS: [Layout; 2] = [
    Layout {
        name: |row, n| format!("a/c/{row}/{n}"),
        prefixes: ["a/c/7", "a/c/7/3", "a/c", ""],
    },
    Layout {
        name: |row, n| format!("data/2020/01/{row}/{n}"),
        prefixes: ["data/2020/01/7", "data/2020/01", "data/2020", "data"],
    },
];

/// An index in which steps are taken.
trait Steps {
    type Memory: Peers;
    fn step<R>(&mut self, work: impl FnOnce(&mut Cache<Self::Memory, u32>) -> Result<R>) -> R;
}

impl<S: Peers> Steps for Cache<S, u32> {
    type Memory = S;
    fn step<R>(&mut self, work: impl FnOnce(&mut Self) -> Result<R>) -> R {
        work(self).unwrap()
    }
}

impl Steps for SharedIndex<u32> {
    type Memory = Mapped;
    fn step<R>(&mut self, work: impl FnOnce(&mut Cache<Mapped, u32>) -> Result<R>) -> R {
        self.step(sleep, work).unwrap()
    }
}

/// What others do between two steps.
#[derive(Clone, Debug)]
enum Other {
    /// A key, or a part of it, is cached.
    Fill(usize, bool),
    /// A key is learned to be missing.
    Miss(usize),
    Write(usize),
    /// Very many chunks go, or come.
    Shrink,
    Grow,
    /// A whole other drain.
    Drain(usize),
}

fn others() -> impl Strategy<Value = Other> {
    let key = || 0..KEYS;
    prop_oneof![
        6 => (key(), any::<bool>()).prop_map(|(key, part)| Other::Fill(key, part)),
        3 => key().prop_map(Other::Miss),
        2 => key().prop_map(Other::Write),
        2 => Just(Other::Shrink),
        1 => Just(Other::Grow),
        1 => (0..4usize).prop_map(Other::Drain),
    ]
}

/// What an index may know of a key; without a range that it is missing.
type Known = (String, Option<ByteRange>);

struct World<I> {
    index: I,
    layout: &'static Layout,
    /// See [`KEYS`].
    keys: [String; KEYS],
    /// When something became known, by a clock that only goes on.
    since: BTreeMap<Known, u64>,
    now: u64,
    grown: usize,
}

impl<I: Steps> World<I> {
    fn new(index: I, layout: &'static Layout, prefix: &str, are_missing: bool) -> Self {
        let near = |tail| format!("{prefix}{tail}").trim_start_matches('/').to_owned();
        let mut world = World {
            index,
            layout,
            keys: [
                near(if prefix.is_empty() { "/3/2" } else { "" }),
                near("/3"),
                near("/3/1"),
                near("/zarr.json"),
                near("/x/c/1"),
                (layout.name)(8, 3),
                "b/c/7/1".into(),
            ],
            since: BTreeMap::new(),
            now: 1,
            grown: 0,
        };
        let mut all = Vec::new();
        for n in 0..ROW * ROW {
            let range = match n % 3 {
                _ if are_missing => None,
                0 => Some(PART),
                _ => Some(ByteRange::Full),
            };
            all.push(((layout.name)(n / ROW, n % ROW), range));
        }
        world.learn(&all);
        world
    }

    /// Caches a value, or that a key is missing, as readers of the source do.
    fn learn(&mut self, all: &[Known]) {
        let now = self.now;
        let learned = self.index.step(|cache| {
            let mut learned = Vec::new();
            for (key, range) in all {
                if learn(cache, key, *range)? {
                    learned.push((key.clone(), *range));
                }
            }
            Ok(learned)
        });
        self.since.extend(learned.into_iter().map(|one| (one, now)));
    }

    fn forget(&mut self, keys: &[String]) {
        self.index.step(|cache| {
            for key in keys {
                let victims = cache.drop_missing(key)?;
                let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
                cache.deletes_done(&cells, &[])?;
            }
            Ok(())
        });
    }

    fn act(&mut self, other: &Other) {
        self.now += 1;
        match other {
            Other::Fill(key, is_part) => {
                let range = if *is_part { PART } else { ByteRange::Full };
                self.learn(&[(self.keys[*key].clone(), Some(range))]);
            }
            Other::Miss(key) => self.learn(&[(self.keys[*key].clone(), None)]),
            Other::Write(key) => {
                let key = &self.keys[*key];
                self.index.step(|cache| {
                    let mut victims = cache.begin_write(key)?;
                    victims.extend(cache.end_write(key, true, None)?.0);
                    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
                    cache.deletes_done(&cells, &[])
                });
            }
            Other::Shrink => {
                let rows = ROW - MANY.div_ceil(ROW)..ROW;
                let name = self.layout.name;
                let gone: Vec<String> = rows
                    .flat_map(|row| (0..ROW).map(move |n| name(row, n)))
                    .collect();
                self.forget(&gone);
            }
            Other::Grow => {
                self.grown += 1;
                let row = 1000 + self.grown;
                let name = |n| ((self.layout.name)(row, n), Some(ByteRange::Full));
                let more: Vec<Known> = (0..MANY).map(name).collect();
                self.learn(&more);
            }
            Other::Drain(prefix) => {
                let prefix = self.layout.prefixes[*prefix];
                self.drain(prefix, &[]);
            }
        }
    }

    /// A drain; after each step the next of these is done.
    fn drain(&mut self, prefix: &str, others: &[Vec<Other>]) {
        self.now += 1;
        let begun = self.now;
        let mut others = others.iter();
        self.index.step(|cache| {
            cache.invalidate_prefix(prefix);
            Ok(())
        });
        let mut rest = Some(START);
        while let Some(at) = rest {
            let before = self.known();
            let victims;
            (victims, rest) = self.index.step(|cache| cache.drain_prefix(prefix, at));
            self.took_only_below(prefix, &before);
            for other in others.next().into_iter().flatten() {
                self.act(other);
            }
            let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
            self.index.step(|cache| cache.deletes_done(&cells, &[]));
        }
        self.all_are_newer(prefix, begun, |range| range.is_some());
        let mut rest = Some(START);
        while let Some(at) = rest {
            let before = self.known();
            rest = self.index.step(|cache| cache.drain_absences(prefix, at));
            self.took_only_below(prefix, &before);
            for other in others.next().into_iter().flatten() {
                self.act(other);
            }
        }
        self.all_are_newer(prefix, begun, |_| true);
        self.index.step(|cache| cache.validate());
    }

    fn known(&mut self) -> BTreeSet<Known> {
        self.index.step(|cache| {
            let live = cache.entries()?.into_iter();
            let live = live.filter(|entry| entry.state == State::Live);
            let live = live.map(|entry| (entry.key, Some(entry.range)));
            let missing = cache.absent_keys()?.into_iter().map(|key| (key, None));
            Ok(live.chain(missing).collect())
        })
    }

    fn took_only_below(&mut self, prefix: &str, before: &BTreeSet<Known>) {
        let after = self.known();
        let taken = before.difference(&after);
        let beside: Vec<_> = taken.filter(|(key, _)| !is_below(key, prefix)).collect();
        assert!(beside.is_empty(), "{beside:?} with {prefix}");
    }

    fn all_are_newer(&mut self, prefix: &str, begun: u64, of: impl Fn(Option<ByteRange>) -> bool) {
        for known in self.known() {
            let is_newer = self.since[&known] > begun;
            let (key, range) = &known;
            assert!(
                is_newer || !is_below(key, prefix) || !of(*range),
                "{known:?}"
            );
        }
    }
}

fn learn<S: Peers>(cache: &mut Cache<S, u32>, key: &str, range: Option<ByteRange>) -> Result<bool> {
    let asked = range.unwrap_or(ByteRange::Full);
    let Joined::Lead(ticket) = cache.join(key, asked, 0, 1000, false)? else {
        return Ok(false);
    };
    let Some(range) = range else {
        let (victims, _) = cache.commit_absence(key, ticket, 1000, 1000, true)?;
        let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        cache.deletes_done(&cells, &[])?;
        return Ok(true);
    };
    if let Reserve::Granted(id) = cache.reserve(key, range, 4, ticket, 1000)? {
        return Ok(cache
            .commit(id, None, 1000)?
            .is_some_and(|done| done.victims.is_empty()));
    }
    // What was cached there is being deleted still.
    cache.complete_flight(key, ticket);
    Ok(false)
}

/// A drain in some kind of memory: of one process, shared, or in files that are shared.
fn drain_in(
    memory: usize,
    layout: &'static Layout,
    prefix: &str,
    missing: bool,
    others: &[Vec<Other>],
) {
    let heap = if memory.is_multiple_of(2) {
        Heap::default()
    } else {
        Heap::default().with_places()
    };
    match memory {
        0 | 1 => {
            let cache = Cache::new(heap, LIMITS, 7).unwrap();
            World::new(cache, layout, prefix, missing).drain(prefix, others);
        }
        2 | 3 => {
            let cache = Cache::new(Shared::from(heap), LIMITS, 7).unwrap();
            World::new(cache, layout, prefix, missing).drain(prefix, others);
        }
        _ => {
            let place = Place::new("drain");
            let opening = Opening {
                with_places: memory == 5,
                ..pool::opening(LIMITS)
            };
            let (mut index, _) = SharedIndex::open(&place.0, &opening).unwrap();
            index.complete().unwrap();
            World::new(index, layout, prefix, missing).drain(prefix, others);
        }
    }
}

/// Each thing alone, after each step, where a prefix cuts a row out of very many chunks.
#[test]
fn what_others_do_between_two_steps_of_a_walk_is_no_damage() {
    let mut each = vec![Other::Shrink, Other::Grow, Other::Drain(0), Other::Drain(1)];
    for key in 0..KEYS {
        each.extend([false, true].map(|is_part| Other::Fill(key, is_part)));
        each.extend([Other::Miss(key), Other::Write(key)]);
    }
    // What came into cells that the walk has passed, and is in few by its end.
    let pairs = [Other::Fill(1, false), Other::Miss(1)].map(|one| vec![one, Other::Shrink]);
    for others in each.into_iter().map(|one| vec![one]).chain(pairs) {
        for are_missing in [false, true] {
            let (layout, others) = (&LAYOUTS[0], vec![others.clone(); 4]);
            drain_in(3, layout, layout.prefixes[0], are_missing, &others);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn drain_among_others_takes_what_was_there_and_is_no_damage(
        memory in prop_oneof![2 => 0..6usize, 1 => Just(3), 1 => Just(5)],
        layout in 0..LAYOUTS.len(),
        prefix in prop_oneof![Just(0), 1..4usize],
        are_missing in any::<bool>(),
        others in prop::collection::vec(prop::collection::vec(others(), 0..4), 1..5),
    ) {
        let layout = &LAYOUTS[layout];
        drain_in(memory, layout, layout.prefixes[prefix], are_missing, &others);
    }
}
