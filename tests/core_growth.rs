//! Growth: many keys, so that segments split and the directory doubles; removal and return of
//! half of them; and memory that runs out at any point.

use std::rc::Rc;

use crate::faulty_storage::{Plan, Refuse, Vectors};
use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Peers, RejectReason, Reserve, START};
use zcache::key::ByteRange;

const UNBOUNDED: Limits = Limits::bounded(u64::MAX);

/// A generator that needs no crate: the same numbers each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.next() as usize % (i + 1));
        }
    }
}

/// Why a fill was rejected, if it was.
fn fill<S: Peers>(
    cache: &mut Cache<S, ()>,
    key: &str,
    range: ByteRange,
    size: u64,
) -> Option<RejectReason> {
    let Joined::Lead(ticket) = cache.join(key, range, (), 1, false).unwrap() else {
        panic!("{key} is there already")
    };
    let refused = match cache.reserve(key, range, size, ticket, 1).unwrap() {
        Reserve::Granted(id) => {
            let done = cache.commit(id, Some(0), 1).unwrap().unwrap();
            assert!(done.victims.is_empty());
            None
        }
        Reserve::Rejected(reason) => Some(reason),
        Reserve::NeedsEviction(..) => panic!("nothing needs evicting"),
    };
    cache.complete_flight(key, ticket);
    refused
}

fn remove<S: Peers>(cache: &mut Cache<S, ()>, key: &str) {
    let victims = cache.drop_missing(key).unwrap();
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    cache.deletes_done(&cells, &[]).unwrap();
}

fn chunk(n: u64) -> String {
    let array = ["era5/2m_temperature", "era5/wind", "labels/0"][(n % 3) as usize];
    format!("{array}/c/{}/{}/{}", n / 3 % 40, n / 120 % 50, n / 6000)
}

#[test]
fn index_many_keys_come_and_go_reuses_memory() {
    const KEYS: u64 = 120_000;
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 42).unwrap();
    let mut random = Random(88_172_645_463_325_252);
    let mut keys: Vec<u64> = (0..KEYS).collect();
    random.shuffle(&mut keys);
    for &n in &keys {
        assert_eq!(fill(&mut cache, &chunk(n), ByteRange::Full, n), None);
    }
    assert_eq!(cache.len(), KEYS);
    assert_eq!(cache.current_size(), KEYS * (KEYS - 1) / 2);
    cache.validate().unwrap();
    // 56 bytes of cell and at most 9.2 of table.
    assert!(cache.memory() < KEYS * 66, "{} bytes", cache.memory());

    random.shuffle(&mut keys);
    let (gone, left) = keys.split_at(keys.len() / 2);
    for &n in gone {
        remove(&mut cache, &chunk(n));
    }
    cache.validate().unwrap();
    let there = |cache: &Cache<Heap, ()>, n: u64| {
        let found = cache.peek(&chunk(n), ByteRange::Full, 1).unwrap();
        found.map(|found| found.size)
    };
    assert!(gone.iter().all(|n| there(&cache, *n).is_none()));
    assert!(left.iter().all(|n| there(&cache, *n) == Some(*n)));

    let memory = cache.memory();
    for &n in gone {
        assert_eq!(fill(&mut cache, &chunk(n), ByteRange::Full, n), None);
    }
    assert_eq!(
        cache.memory(),
        memory,
        "cells that were freed are used again"
    );
    assert!(keys.iter().all(|n| there(&cache, *n) == Some(*n)));

    let mut drained = 0;
    let mut rest = Some(START);
    while let Some(at) = rest {
        let victims;
        (victims, rest) = cache.drain_prefix("era5", at).unwrap();
        drained += victims.len() as u64;
        let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        cache.deletes_done(&cells, &[]).unwrap();
    }
    assert_eq!((drained, cache.len()), (KEYS / 3 * 2, KEYS / 3));
    cache.validate().unwrap();
}

/// Whatever cannot grow, at any point: the value stays uncached, the counters stay right, and with
/// memory again fills succeed.
#[test]
fn fill_growth_refused_leaves_value_uncached() {
    let plan = Rc::new(Plan::default());
    let mut cache = Cache::new(Vectors::new(&plan), UNBOUNDED, 3).unwrap();
    let mut random = Random(1);
    let mut rejected = 0;
    let mut held = 0;
    for n in 0..14_000u64 {
        if n % 50 == 0 {
            let bits = random.next();
            plan.refuse.set(Refuse {
                cells: bits & 1 == 0,
                slots: bits & 2 == 0,
                directory: bits & 4 == 0,
                strings: bits & 8 == 0,
            });
        }
        let (key, range) = match n % 5 {
            0 => (format!("dir{n}/a/b/zarr.json"), ByteRange::Full),
            1 => (
                format!("long{}{n}/c/{n}", "x".repeat(90)),
                ByteRange::Offset(n),
            ),
            2 => (format!("{n}"), ByteRange::Suffix(u64::MAX - n)),
            3 => (
                format!("~{n}{}", "x".repeat(n as usize % 100)),
                ByteRange::Full,
            ),
            _ => (chunk(n), ByteRange::Full),
        };
        match fill(&mut cache, &key, range, n) {
            None => held += 1,
            Some(RejectReason::IndexFull) => {
                rejected += 1;
                assert_eq!(cache.in_flight(), (0, 0));
                if rejected % 200 == 1 {
                    cache.validate().unwrap();
                }
            }
            Some(other) => panic!("{other:?}"),
        }
        assert_eq!(cache.len(), held);
    }
    cache.validate().unwrap();
    assert!(rejected > 500, "{rejected} rejections show little");
}

/// Each directory that is missing costs its own look-up, so a key of slashes takes no longer than
/// its length says.
#[test]
fn insert_deep_key_takes_linear_time() {
    let limits = Limits {
        flat_namespace: false,
        ..UNBOUNDED
    };
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), limits, 0).unwrap();
    let deep = "/".repeat(1000);
    let coordinates = "a".to_owned() + &"/1".repeat(2000);
    for key in [&deep, &coordinates] {
        for range in [ByteRange::Suffix(u64::MAX), ByteRange::Full] {
            assert_eq!(fill(&mut cache, key, range, 1), None);
        }
    }
    cache.validate().unwrap();
    for key in [&deep, &coordinates] {
        assert!(cache.peek(key, ByteRange::Full, 1).unwrap().is_some());
        remove(&mut cache, key);
    }
    cache.validate().unwrap();
    assert!(cache.entries().unwrap().is_empty());
}

#[test]
fn count_folders_removal_told_before_the_making_is_not_lost() {
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 0).unwrap();
    cache.set_unit(4096);
    cache.count_folders(-8192);
    assert_eq!(cache.current_size(), 0);
    cache.count_folders(8192);
    assert_eq!(cache.current_size(), 0);
    cache.count_folders(4096);
    assert_eq!(cache.current_size(), 4096);
}
