//! Absences against a reference model: any operations in any order, and after each the index recomputed,
//! and all that is known to be missing compared.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use proptest::sample::Index;
use zcache::arena::Heap;
use zcache::cache::{
    AbsenceAges, Answer, Cache, FEW_ABSENCES, Joined, Limits, Reserve, START, Ticket, Verify,
};
use zcache::key::{ByteRange, is_below};

const KEYS: [&str; 16] = [
    "a",
    "a/b",
    "zarr.json",
    ".zarray",
    "g/zarr.json",
    "g/.zarray",
    "g/.zattrs",
    "g/x/c/0",
    "g/x/c/1/2",
    "g/x/c/1/2/3",
    "g/x/c/10/2/3",
    "g/x/c/1/20/3",
    "g/0/1/2/3",
    "g/0/1/2/4",
    "long/name of a directory that is no number/and a name that is longer than a cell",
    "gg/x",
];
const PREFIXES: [&str; 14] = [
    "",
    "a",
    "a/b",
    "g",
    "g/",
    "g/x",
    "g/x/c",
    "g/x/c/1",
    "g/x/c/1/2",
    "g/x/c/1/2/3",
    "g/0",
    "g/0/1",
    "long",
    "none",
];
const NODES: [&str; 3] = ["zarr.json", ".zarray", ".zgroup"];
const DOCUMENTS: [&str; 5] = ["zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"];
const RANGE: ByteRange = ByteRange::Range { start: 0, end: 4 };

fn limits(max_size: u64) -> Limits {
    Limits::bounded(max_size)
}

#[derive(Clone, Debug)]
enum Step {
    /// A flight begins.
    Join(Index, bool),
    /// It brings nothing.
    Miss(Index, bool),
    /// It brings a value.
    Fill(Index),
    BeginWrite(Index),
    EndWrite(Index, bool),
    Change(Index),
    Ask(Index, bool, Option<u64>),
    Discard(Index),
    Tick(u64),
}

fn steps() -> impl Strategy<Value = Step> {
    let i = any::<Index>;
    prop_oneof![
        8 => (i(), any::<bool>()).prop_map(|(k, r)| Step::Join(k, r)),
        6 => (i(), prop::bool::weighted(0.9)).prop_map(|(t, kept)| Step::Miss(t, kept)),
        4 => i().prop_map(Step::Fill),
        1 => i().prop_map(Step::BeginWrite),
        1 => (i(), any::<bool>()).prop_map(|(k, ok)| Step::EndWrite(k, ok)),
        2 => i().prop_map(Step::Change),
        8 => (i(), any::<bool>(), prop::option::of(0u64..40)).prop_map(|(k, r, a)| Step::Ask(k, r, a)),
        2 => i().prop_map(Step::Discard),
        2 => (1u64..20).prop_map(Step::Tick),
    ]
}

struct Flight {
    key: &'static str,
    range: ByteRange,
    ticket: Ticket,
    begun: u64,
    /// Absences that had been made by then.
    made: u64,
    valid: bool,
}

/// What is under test, and what it should know.
struct World {
    cache: Cache<Heap, u32>,
    now: u64,
    flights: Vec<Flight>,
    writing: Vec<&'static str>,
    /// Keys that are missing and when that was learned, least recently used first.
    absent: Vec<(&'static str, u64)>,
    /// The number of each, and how many were ever made.
    numbers: HashMap<&'static str, u64>,
    made: u64,
    /// What is cached, and when it was fetched.
    live: HashMap<(&'static str, ByteRange), u64>,
}

impl World {
    fn drop_key(&mut self, key: &str) {
        self.absent.retain(|(absent, _)| *absent != key);
        self.live.retain(|(live, _), _| *live != key);
    }

    /// A document that makes a node real was found by a read that began when so many absences had been made.
    fn drop_older(&mut self, key: &str, made: u64) {
        let (node, name) = key.split_at(key.rfind('/').map_or(0, |slash| slash + 1));
        if !NODES.contains(&name) {
            return;
        }
        self.absent.retain(|(absent, _)| {
            let other = absent.strip_prefix(node).unwrap_or("");
            NODES.contains(&other) || !DOCUMENTS.contains(&other) || self.numbers[absent] > made
        });
    }

    fn void(&mut self, covers: impl Fn(&str) -> bool) {
        for flight in &mut self.flights {
            flight.valid &= !covers(flight.key);
        }
    }

    fn take(&mut self, at: Index) -> Option<Flight> {
        let count = self.flights.len();
        (count > 0).then(|| self.flights.swap_remove(at.index(count)))
    }

    fn is_open(&self, flight: &Flight) -> bool {
        flight.valid && !self.writing.contains(&flight.key)
    }

    fn confirm(&mut self, victims: &[zcache::cache::Victim]) {
        let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        self.cache.deletes_done(&cells, &[]).unwrap();
    }

    fn knows(&self, key: &str, ages: AbsenceAges) -> bool {
        let Some((_, learned)) = self.absent.iter().find(|(absent, _)| *absent == key) else {
            return false;
        };
        let is_young = ages.own.is_none_or(|age| self.now - learned < age);
        let (node, name) = key.split_at(key.rfind('/').map_or(0, |slash| slash + 1));
        let is_real = || {
            let others = NODES.iter().filter(|other| **other != name);
            let mut names = others.map(|other| format!("{node}{other}"));
            names.any(|other| {
                let mut live = self.live.keys();
                live.any(|(key, range)| *key == other && *range == ByteRange::Full)
            })
        };
        is_young && (!DOCUMENTS.contains(&name) || is_real())
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Join(key, part) => {
                let key = KEYS[key.index(KEYS.len())];
                let range = if part { RANGE } else { ByteRange::Full };
                let joined = self.cache.join(key, range, 0, self.now, true).unwrap();
                if let Joined::Lead(ticket) = joined {
                    let (begun, valid) = (self.now, true);
                    self.flights.push(Flight {
                        key,
                        range,
                        ticket,
                        begun,
                        made: self.made,
                        valid,
                    });
                }
            }
            Step::Miss(at, kept) => {
                let Some(flight) = self.take(at) else { return };
                let answer = self.cache.commit_absence(
                    flight.key,
                    flight.ticket,
                    flight.begun,
                    self.now,
                    kept,
                );
                let (victims, closed) = answer.unwrap();
                // What no reader can join may have ended with a later one.
                assert!(closed.is_some() || !flight.valid);
                self.confirm(&victims);
                let mut live = self.live.iter();
                let is_newer = live.any(|((key, _), at)| *key == flight.key && *at > flight.begun);
                if self.is_open(&flight) && !is_newer {
                    self.drop_key(flight.key);
                    if kept {
                        self.absent.push((flight.key, flight.begun));
                        self.made += 1;
                        self.numbers.insert(flight.key, self.made);
                    }
                }
            }
            Step::Fill(at) => {
                let Some(flight) = self.take(at) else { return };
                let (key, range) = (flight.key, flight.range);
                let room = self.cache.reserve(key, range, 4, flight.ticket, self.now);
                if let Reserve::Granted(id) = room.unwrap() {
                    assert!(self.is_open(&flight));
                    let done = self.cache.commit(id, None, self.now).unwrap().unwrap();
                    assert_eq!(done.victims, []);
                    self.absent.retain(|(absent, _)| *absent != key);
                    if range == ByteRange::Full {
                        self.drop_older(key, flight.made);
                    }
                    self.live.insert((key, range), self.now);
                } else {
                    let _ = self.cache.complete_flight(key, flight.ticket);
                }
            }
            Step::BeginWrite(key) => {
                let key = KEYS[key.index(KEYS.len())];
                let victims = self.cache.begin_write(key).unwrap();
                self.confirm(&victims);
                self.void(|other| other == key);
                self.writing.push(key);
                self.drop_key(key);
            }
            Step::EndWrite(at, ok) => {
                let count = self.writing.len();
                if count == 0 {
                    return;
                }
                let key = self.writing.swap_remove(at.index(count));
                let (victims, ticket) = self.cache.end_write(key, ok, None).unwrap();
                self.confirm(&victims);
                if let Some(ticket) = ticket {
                    let _ = self.cache.complete_flight(key, ticket);
                }
                self.void(|other| other == key);
                self.drop_key(key);
            }
            Step::Change(prefix) => {
                let prefix = PREFIXES[prefix.index(PREFIXES.len())];
                self.cache.invalidate_prefix(prefix);
                let mut rest = Some(START);
                while let Some(at) = rest {
                    let victims;
                    (victims, rest) = self.cache.drain_prefix(prefix, at).unwrap();
                    self.confirm(&victims);
                }
                let mut rest = Some(START);
                while let Some(at) = rest {
                    rest = self.cache.drain_absences(prefix, at).unwrap();
                }
                let prefix = prefix.trim_end_matches('/');
                let below = format!("{prefix}/");
                let covers =
                    |key: &str| prefix.is_empty() || key == prefix || key.starts_with(&below);
                self.void(covers);
                self.absent.retain(|(key, _)| !covers(key));
                self.live.retain(|(key, _), _| !covers(key));
            }
            Step::Ask(key, part, age) => {
                let key = KEYS[key.index(KEYS.len())];
                let range = if part { RANGE } else { ByteRange::Full };
                let found =
                    [range, ByteRange::Full].map(|range| self.live.contains_key(&(key, range)));
                let listed = self.absent.iter().position(|(absent, _)| *absent == key);
                let unknown = self.cache.ask(key, range, self.now, None).unwrap();
                match unknown {
                    Answer::Found(_) => assert!(found.contains(&true), "{key}"),
                    Answer::PerhapsAbsent => assert!(listed.is_some(), "{key}"),
                    _ => assert!(!found.contains(&true) && listed.is_none(), "{key}"),
                }
                let ages = AbsenceAges {
                    own: age,
                    node: None,
                };
                let known = self.knows(key, ages);
                let answer = self.cache.ask(key, range, self.now, Some(ages)).unwrap();
                assert_eq!(answer == Answer::Absent, known, "{key} {age:?}");
                if known {
                    let used = self.absent.remove(listed.unwrap());
                    self.absent.push(used);
                }
            }
            Step::Discard(key) => {
                let key = KEYS[key.index(KEYS.len())];
                if let Some(found) = self.cache.peek(key, ByteRange::Full, self.now).unwrap() {
                    let victims = self.cache.discard(found.handle).unwrap();
                    self.confirm(&victims);
                    self.live.remove(&(key, ByteRange::Full));
                }
            }
            Step::Tick(millis) => self.now += millis,
        }
    }

    fn check(&self) {
        self.cache.validate().unwrap();
        let keys: Vec<&str> = self.absent.iter().map(|(key, _)| *key).collect();
        assert_eq!(self.cache.absent_keys().unwrap(), keys);
        assert_eq!(self.cache.absences(), keys.len() as u64);
        assert_eq!(self.cache.tally().absences(), keys.len() as u64);
        assert_eq!(self.cache.len(), self.live.len() as u64);
        let unique: HashSet<&str> = self.live.keys().map(|(key, _)| *key).collect();
        for prefix in PREFIXES {
            let (found, rest) = self
                .cache
                .next_keys(prefix, self.cache.first_keys(), |_| self.now.into())
                .unwrap();
            let below = |key: &&&str| is_below(key, prefix.trim_end_matches('/'));
            let expected = unique.iter().filter(below).count();
            assert_eq!((found.len(), rest), (expected, None));
            assert!(found.iter().all(|key| unique.contains(key.as_str())));
        }
    }
}

proptest! {
    #[test]
    fn absences_any_steps_equal_the_model(steps in prop::collection::vec(steps(), 1..120)) {
        let mut world = World {
            cache: Cache::new(Heap::default(), limits(u64::MAX), 7).unwrap(),
            now: 1000,
            flights: Vec::new(),
            writing: Vec::new(),
            absent: Vec::new(),
            numbers: HashMap::new(),
            made: 0,
            live: HashMap::new(),
        };
        for step in steps {
            world.apply(step);
            world.check();
        }
    }
}

fn miss(cache: &mut Cache<Heap, u32>, key: &str) {
    let Joined::Lead(ticket) = cache.join(key, ByteRange::Full, 0, 1000, false).unwrap() else {
        panic!("another reader reads it");
    };
    cache.commit_absence(key, ticket, 1000, 1000, true).unwrap();
}

#[test]
fn absences_of_a_long_scan_stay_within_their_bound_and_their_memory() {
    let mut cache = Cache::new(Heap::default(), limits(1_000_000), 7).unwrap();
    let most = cache.max_absences();
    assert_eq!(most, 1_000_000 / 256);
    let mut memory = 0;
    for n in 0..200_000u64 {
        miss(
            &mut cache,
            &format!("scan/{}/of a dataset/c/{n}/0", n / 100),
        );
        assert!(cache.absences() <= most);
        if n == 20_000 {
            memory = cache.memory();
        }
    }
    assert_eq!(cache.absences(), most);
    assert!(
        cache.memory() <= memory,
        "{} after {memory}",
        cache.memory()
    );
    assert_eq!(cache.current_size(), 0);
    cache.validate().unwrap();
    let mut rest = Some(START);
    while let Some(at) = rest {
        rest = cache.drain_absences("", at).unwrap();
    }
    assert_eq!(cache.absences(), 0);
    cache.validate().unwrap();
}

#[test]
fn absences_of_a_smaller_bound_are_fewer() {
    let mut cache = Cache::new(Heap::default(), limits(10_000_000), 7).unwrap();
    for n in 0..5000 {
        miss(&mut cache, &format!("c/{n}"));
    }
    assert_eq!(cache.absences(), 5000);
    cache.set_limits(1000, None, Verify::Never);
    for n in 0..10 {
        miss(&mut cache, &format!("d/{n}"));
    }
    assert_eq!(cache.absences(), FEW_ABSENCES);
    cache.set_limits(0, None, Verify::Never);
    miss(&mut cache, "e");
    assert!(!cache.absent_keys().unwrap().contains(&"e".to_owned()));
    cache.validate().unwrap();
}

#[test]
fn absence_of_an_earlier_read_leaves_a_later_value() {
    let mut cache: Cache<Heap, u32> = Cache::new(Heap::default(), limits(u64::MAX), 7).unwrap();
    let mut lead = |range, now| match cache.join("a", range, 0, now, false).unwrap() {
        Joined::Lead(ticket) => ticket,
        other => panic!("{other:?}"),
    };
    // A range is asked for; another process makes the key, and all of it is read.
    let (early, late) = (lead(RANGE, 1000), lead(ByteRange::Full, 1001));
    let Reserve::Granted(id) = cache.reserve("a", ByteRange::Full, 4, late, 1001).unwrap() else {
        panic!("there is room");
    };
    cache.commit(id, None, 1001).unwrap();
    let (victims, _) = cache.commit_absence("a", early, 1000, 1002, true).unwrap();
    assert_eq!((victims.len(), cache.absences(), cache.len()), (0, 0, 1));
    cache.validate().unwrap();
}

#[test]
fn absences_of_a_row_of_very_many_chunks_end_and_no_others() {
    let mut cache = Cache::new(Heap::default(), limits(u64::MAX), 7).unwrap();
    let names: Vec<String> = (0..10_000)
        .map(|n| format!("a/c/{}/{}", n % 100, n / 100))
        .collect();
    for name in &names {
        miss(&mut cache, name);
    }
    let (mut rest, mut steps) = (Some(START), 0);
    while let Some(at) = rest {
        rest = cache.drain_absences("a/c/7", at).unwrap();
        steps += 1;
    }
    assert!(steps > 2, "{steps}");
    let left: HashSet<String> = cache.absent_keys().unwrap().into_iter().collect();
    let others = names.iter().filter(|name| !name.starts_with("a/c/7/"));
    assert_eq!(left, others.cloned().collect());
    cache.validate().unwrap();
}
