//! The seam for eviction policies: a cache goes by whichever policy it has, and who may choose the one of a shared index.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::thread::sleep;

use crate::place::{Place, is_damaged};
use proptest::prelude::*;
use zcache::arena::{End, Heap, List};
use zcache::cache::{Cache, Joined, Limits, Reserve};
use zcache::error::Result;
use zcache::key::ByteRange;
use zcache::policy::{Entries, Eviction, Lru, Minimise, PolicyKind};
use zcache::shared::{Opening, SharedIndex};

/// First in, first out: reads change nothing.
#[derive(Debug, Default)]
struct Fifo;

impl Eviction for Fifo {
    fn insert<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        entries.enter(entry, 0)
    }
    fn touch<E: Entries>(&mut self, _: &mut E, _: u32) -> Result<()> {
        Ok(())
    }
    fn remove<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        entries.leave(entry)
    }
    fn victim<E: Entries>(&mut self, entries: &mut E) -> Result<Option<u32>> {
        entries.end(List::Recency, End::First)
    }
    fn order<E: Entries>(&self, entries: &E) -> Result<Vec<u32>> {
        entries.all_of(List::Recency)
    }
    fn reset(&mut self) {}
}

/// Fills three of the keys `a` to `d`, reads `a`, and fills the fourth; returns what is cached, next
/// victim first.
fn evict_one<P: Eviction>() -> Vec<String> {
    let limits = Limits::bounded(3);
    let mut cache: Cache<Heap, (), P> = Cache::new(Heap::default(), limits, 1).unwrap();
    for key in ["a", "b", "c", "d"] {
        if key == "d" {
            assert!(cache.lookup("a", ByteRange::Full, 1).unwrap().is_some());
        }
        let Joined::Lead(ticket) = cache.join(key, ByteRange::Full, (), 1, false).unwrap() else {
            panic!("{key} is cached already");
        };
        let mut answer = cache.reserve(key, ByteRange::Full, 1, ticket, 1).unwrap();
        if let Reserve::NeedsEviction(id, victims) = answer {
            assert_eq!(victims.len(), 1);
            answer = cache.all_evicted(id, 1).unwrap();
        }
        let Reserve::Granted(id) = answer else {
            panic!("{answer:?}");
        };
        cache.commit(id, Some(0), 1).unwrap().unwrap();
        cache.validate().unwrap();
    }
    let order = cache.recency().unwrap();
    order.into_iter().map(|(key, _)| key).collect()
}

#[test]
fn lru_entry_that_was_read_is_kept() {
    assert_eq!(evict_one::<Lru>(), ["c", "a", "d"]);
}

#[test]
fn other_policy_decides_for_the_whole_cache() {
    assert_eq!(evict_one::<Fifo>(), ["b", "c", "d"]);
}

type Index = SharedIndex<u32>;

/// What one of three participants does.
#[derive(Clone, Copy, Debug)]
enum Choice {
    /// Opens the index, unless it has. Anything goes until it asks.
    Open(PolicyKind),
    /// Asks for a policy, and uses the one that is in force then.
    Ask(PolicyKind),
    /// Is content with any.
    Leave,
    /// Dies, between two steps.
    Die,
    /// Finds that another one has died in a step.
    Rebuild,
}

fn choices() -> impl Strategy<Value = Vec<(usize, Choice)>> {
    let kind = || prop::sample::select(&PolicyKind::ALL[..]);
    let choice = prop_oneof![
        4 => kind().prop_map(Choice::Open),
        6 => kind().prop_map(Choice::Ask),
        2 => Just(Choice::Leave),
        2 => Just(Choice::Die),
        1 => Just(Choice::Rebuild),
    ];
    prop::collection::vec((0..3usize, choice), 1..30)
}

fn policy(index: &mut Index) -> PolicyKind {
    index.step(sleep, |cache| Ok(cache.policy())).unwrap().0
}

fn ask(index: &mut Index, kind: PolicyKind) -> PolicyKind {
    let answer = index.step(
        sleep,
        |cache| Ok(cache.set_policy(kind, Minimise::Requests)),
    );
    answer.unwrap().0
}

fn open(place: &Place, kind: PolicyKind) -> Index {
    let opening = Opening {
        policy: (kind, Minimise::Requests),
        ..Opening::new(Limits::bounded(1000), 1)
    };
    let (mut index, fresh) = Index::open(&place.0, &opening).unwrap();
    if fresh {
        index.complete().unwrap();
    }
    index
}

fn die_in_a_step(place: &Place) {
    let head = OpenOptions::new().write(true).open(place.at("head"));
    head.unwrap().write_all_at(&[9], 8).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn who_uses_the_policy_in_force_keeps_it_for_all(steps in choices()) {
        let place = Place::new("choice");
        // Each with whether it uses the policy.
        let mut open_ones: BTreeMap<usize, (Index, bool)> = BTreeMap::new();
        let mut in_force = PolicyKind::default();
        for (n, choice) in steps {
            let is_free = !open_ones.iter().any(|(other, (_, uses))| *other != n && *uses);
            match (choice, open_ones.get_mut(&n)) {
                (Choice::Open(kind), None) => {
                    open_ones.insert(n, (open(&place, kind), false));
                    if is_free {
                        in_force = kind;
                    }
                }
                (Choice::Ask(kind), Some((index, uses))) => {
                    if is_free {
                        in_force = kind;
                    }
                    prop_assert_eq!(ask(index, kind), in_force);
                    *uses = true;
                }
                (Choice::Leave, Some((index, uses))) => {
                    let left = index.step(sleep, |cache| { cache.use_policy(false); Ok(()) });
                    left.unwrap();
                    *uses = false;
                }
                (Choice::Die, Some(_)) => {
                    open_ones.remove(&n);
                }
                (Choice::Rebuild, Some((index, uses))) => {
                    die_in_a_step(&place);
                    is_damaged(index.step(sleep, |cache| Ok(cache.len())));
                    prop_assert!(index.restart(7).unwrap());
                    index.complete().unwrap();
                    if is_free && !*uses {
                        in_force = policy(index);
                    }
                }
                _ => {}
            }
            for (index, _) in open_ones.values_mut() {
                prop_assert_eq!(policy(index), in_force);
                index.step(sleep, |cache| cache.validate()).unwrap();
            }
        }
    }
}

#[test]
fn who_comes_back_to_new_files_still_uses_the_policy() {
    let place = Place::new("choice-files");
    let mut one = open(&place, PolicyKind::Lru);
    ask(&mut one, PolicyKind::Adaptive);
    for name in ["lock", "owner", "s0"] {
        std::fs::remove_file(place.at(name)).unwrap();
    }
    let again = one.restart(7).unwrap();
    assert!(again);
    one.complete().unwrap();
    let mut other = open(&place, PolicyKind::None);
    assert_eq!(ask(&mut other, PolicyKind::None), PolicyKind::Adaptive);
    drop(one);
    assert_eq!(ask(&mut other, PolicyKind::None), PolicyKind::None);
}
