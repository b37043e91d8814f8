//! What is too old for all who have its source open goes first, by the ages of each source.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread::sleep;

use proptest::prelude::*;
use zcache::arena::{Heap, State};
use zcache::cache::{Cache, Freshness, Joined, Limits, Peers, Reserve, SOURCES, START, SourceAge};
use zcache::error::Result;
use zcache::key::ByteRange::Full;
use zcache::policy::{Minimise, PolicyKind};
use zcache::shared::{Mapped, Opening, SharedIndex};

const BOUND: u64 = 8;
const NOW: u64 = 10_000;
type Shared = SharedIndex<()>;

/// The label of a source.
fn label(source: usize) -> String {
    format!("{:032x}", source + 1)
}

fn key(source: usize, n: usize) -> String {
    format!("{}/a/{n}", label(source))
}

fn ages(ages: &[(usize, Option<u64>)]) -> Vec<SourceAge> {
    let each = ages.iter();
    each.map(|(source, age)| SourceAge::of(&label(*source), *age).unwrap())
        .collect()
}

/// Reads a value of one byte and fills it; whether it is kept, and what was evicted for it.
fn fill<S: Peers>(cache: &mut Cache<S, ()>, key: &str, now: u64) -> Result<(bool, Vec<String>)> {
    let Joined::Lead(ticket) = cache.join(key, Full, (), now, true)? else {
        panic!("another flight");
    };
    let mut gone = Vec::new();
    let mut answer = cache.reserve(key, Full, 1, ticket, now)?;
    while let Reserve::NeedsEviction(id, victims) = answer {
        gone.extend(victims.into_iter().map(|victim| victim.cache_key));
        answer = cache.all_evicted(id, now)?;
    }
    let Reserve::Granted(id) = answer else {
        cache.complete_flight(key, ticket);
        return Ok((false, gone));
    };
    cache.commit(id, None, now)?;
    cache.validate()?;
    Ok((true, gone))
}

fn held<S: Peers>(cache: &Cache<S, ()>) -> Result<Vec<String>> {
    let entries = cache.entries()?.into_iter();
    let live = entries.filter(|entry| entry.state == State::Live);
    let mut keys: Vec<String> = live.map(|entry| entry.key).collect();
    keys.sort_unstable();
    Ok(keys)
}

#[test]
fn label_of_anything_but_32_digits_is_none() {
    assert!(SourceAge::of("0", None).is_none());
    assert!(SourceAge::of(&label(10), None).is_some());
    for digit in ["A", "g", "/", "é"] {
        let text = label(0).replace('1', digit);
        assert!(SourceAge::of(&text, None).is_none(), "{text}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Fill(usize, usize),
    Delete(usize, usize),
    Tick(u64),
    SetBack(u64),
    Ages(Vec<(usize, Option<u64>)>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let age = || prop::option::of(1u64..20);
    let step = prop_oneof![
        8 => (0usize..4, 0usize..5).prop_map(|(source, n)| Step::Fill(source, n)),
        1 => (0usize..4, 0usize..5).prop_map(|(source, n)| Step::Delete(source, n)),
        3 => (0u64..15).prop_map(Step::Tick),
        1 => (1u64..4000).prop_map(Step::SetBack),
        1 => prop::collection::vec((0usize..4, age()), 0..4).prop_map(Step::Ages),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn ages_of_each_source_under_each_policy_too_old_goes_first(
        steps in steps(),
        policy in prop::sample::select(PolicyKind::ALL.to_vec()),
    ) {
        let heap = Heap::default().with_sources();
        let mut cache: Cache<Heap, ()> = Cache::new(heap, Limits::bounded(BOUND), 1).unwrap();
        cache.set_policy(policy, Minimise::Requests);
        let mut now = NOW;
        let mut limits: BTreeMap<usize, Option<u64>> = BTreeMap::new();
        // Source and fetch of each entry.
        let mut entries: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Tick(passed) => now += passed,
                Step::SetBack(by) => now -= by.min(now - 1),
                Step::Ages(given) => {
                    limits.clear();
                    for (source, age) in &given {
                        let longest = limits.entry(*source).or_insert(*age);
                        *longest = longest.zip(*age).map(|(a, b)| a.max(b));
                    }
                    cache.set_ages(ages(&given));
                }
                Step::Delete(source, n) => {
                    let key = key(source, n);
                    cache.invalidate_prefix(&key);
                    let (victims, _) = cache.drain_prefix(&key, START).unwrap();
                    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
                    cache.deletes_done(&cells, &[]).unwrap();
                    entries.remove(&key);
                }
                Step::Fill(source, n) => {
                    let name = key(source, n);
                    if entries.contains_key(&name) {
                        continue;
                    }
                    let useless: Vec<String> = entries
                        .iter()
                        .filter(|(_, (source, fetched))| {
                            let max_age = limits.get(source).copied().flatten();
                            Freshness { now, max_age }.is_stale(*fetched)
                        })
                        .map(|(key, _)| key.clone())
                        .collect();
                    let is_full = entries.len() as u64 == BOUND;
                    let before = cache.stats().expirations;
                    let (is_kept, gone) = fill(&mut cache, &name, now).unwrap();
                    if is_full && !useless.is_empty() {
                        prop_assert!(is_kept);
                        prop_assert_eq!(gone.len(), 1);
                        prop_assert!(useless.contains(&gone[0]));
                        prop_assert_eq!(cache.stats().expirations, before + 1);
                    } else {
                        prop_assert_eq!(cache.stats().expirations, before);
                    }
                    for key in gone {
                        prop_assert!(entries.remove(&key).is_some());
                    }
                    if is_kept {
                        // Those of the same source that are from the future are of an unknown time from now on.
                        for (other, fetched) in entries.values_mut() {
                            if *other == source && *fetched > now + 1000 {
                                *fetched = 0;
                            }
                        }
                        entries.insert(name, (source, now));
                    }
                }
            }
            cache.validate().unwrap();
            prop_assert_eq!(held(&cache).unwrap(), entries.keys().cloned().collect::<Vec<_>>());
        }
    }
}

// ------------------------------------------------------------------------- participants

/// Indexes of the pool in a directory.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let root =
            std::env::temp_dir().join(format!("zcache-expiry-{}-{name}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        Dir(root)
    }

    fn open(&self) -> Shared {
        let opening = Opening {
            with_places: true,
            policy: (PolicyKind::None, Minimise::Requests),
            ..Opening::new(Limits::bounded(u64::MAX), 1)
        };
        let (mut index, fresh) = Shared::open(&self.0, &opening).unwrap();
        if fresh {
            index.complete().unwrap();
        }
        index
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn step<R>(index: &mut Shared, work: impl FnOnce(&mut Cache<Mapped, ()>) -> Result<R>) -> R {
    index.step(sleep, work).unwrap()
}

fn set(index: &mut Shared, given: &[(usize, Option<u64>)]) {
    step(index, |cache| {
        cache.set_ages(ages(given));
        Ok(())
    });
}

/// Makes room for one value; what had to go, and whether that was too old.
fn evicted(index: &mut Shared, now: u64) -> (String, bool) {
    step(index, |cache| {
        let before = cache.stats().expirations;
        let victims = cache.evict(1, now)?;
        assert_eq!(victims.len(), 1);
        let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        cache.deletes_done(&cells, &[])?;
        cache.validate()?;
        let is_expired = cache.stats().expirations > before;
        Ok((victims[0].cache_key.clone(), is_expired))
    })
}

#[test]
fn age_of_a_source_is_the_longest_of_all_participants() {
    let dir = Dir::new("longest");
    let (mut a, mut b) = (dir.open(), dir.open());
    set(&mut a, &[(0, Some(10)), (1, None)]);
    set(&mut b, &[(0, Some(20))]);
    for (source, now) in [(1, 0), (0, 1), (1, 2)] {
        let at = NOW + now;
        step(&mut a, |cache| fill(cache, &key(source, now as usize), at));
    }
    // Under "none" the last one that came goes first, unless one is too old.
    for index in [&mut a, &mut b] {
        step(index, |cache| fill(cache, &key(1, 3), NOW + 3));
        assert_eq!(evicted(index, NOW + 20), (key(1, 3), false));
    }
    for index in [&mut a, &mut b] {
        assert_eq!(evicted(index, NOW + 21), (key(0, 1), true));
        step(index, |cache| fill(cache, &key(0, 1), NOW + 1));
    }
    // One that does not have the source open knows it as well, until no one has.
    set(&mut a, &[]);
    assert_eq!(evicted(&mut a, NOW + 21), (key(0, 1), true));
    step(&mut a, |cache| fill(cache, &key(0, 1), NOW + 1));
    drop(b);
    a.reap().unwrap();
    step(&mut a, |cache| fill(cache, &key(1, 3), NOW + 3));
    assert_eq!(evicted(&mut a, NOW + 1000), (key(1, 3), false));
}

#[test]
fn more_sources_than_are_told_count_by_the_longest_age_of_the_others() {
    let dir = Dir::new("many");
    let (mut a, mut b) = (dir.open(), dir.open());
    let last = 2 * SOURCES;
    let many: Vec<_> = (0..=last)
        .map(|n| (n, Some(if n == last { 50 } else { 10 })))
        .collect();
    set(&mut a, &many);
    step(&mut a, |cache| fill(cache, &key(last, 0), NOW));
    step(&mut a, |cache| fill(cache, &key(0, 0), NOW));
    set(&mut b, &[(last, Some(5))]);
    // The one that is told is at its own age of 10, the other one may be at 50.
    assert_eq!(evicted(&mut b, NOW + 10), (key(0, 0), true));
    step(&mut a, |cache| fill(cache, &key(0, 0), NOW + 20));
    assert_eq!(evicted(&mut b, NOW + 21), (key(0, 0), false));
    assert_eq!(evicted(&mut b, NOW + 50), (key(last, 0), true));
}

#[test]
fn ages_outlive_an_index_that_is_emptied_or_made_anew() {
    let dir = Dir::new("emptied");
    let (mut a, mut b) = (dir.open(), dir.open());
    set(&mut a, &[(0, Some(10))]);
    set(&mut b, &[(1, Some(10))]);
    for is_removed in [false, true] {
        if is_removed {
            for name in ["lock", "head", "table", "cells", "texts", "places"] {
                fs::remove_file(dir.0.join(name)).unwrap();
            }
        } else {
            // A participant has died in a step.
            let head = OpenOptions::new().write(true).open(dir.0.join("head"));
            head.unwrap().write_all_at(&[9], 8).unwrap();
        }
        assert!(a.restart(2).unwrap());
        a.complete().unwrap();
        assert!(!b.restart(3).unwrap());
        for source in 0..2 {
            step(&mut a, |cache| fill(cache, &key(source, 0), NOW));
        }
        let mut gone = [evicted(&mut a, NOW + 10), evicted(&mut a, NOW + 10)];
        gone.sort();
        assert_eq!(gone, [(key(0, 0), true), (key(1, 0), true)]);
    }
}
