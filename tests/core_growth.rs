//! Growth: many keys, so that segments split and the directory doubles; removal and return of
//! half of them; and memory that gives out at any point of it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

#[path = "core/blocks.rs"]
#[allow(dead_code, reason = "shared with tests that do damage")]
mod blocks;

use std::rc::Rc;

use blocks::{Plan, Refuse, Vectors};
use zcache::block::{Block, Heap};
use zcache::cache::{Cache, Joined, Limits, Refusal, Room, Verify};
use zcache::key::Span;

const UNBOUNDED: Limits = Limits {
    max_size: u64::MAX,
    max_age: None,
    lenient: false,
    flat: true,
    verify: Verify::Never,
};

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

/// Why a fill was refused, if it was.
fn fill<B: Block>(cache: &mut Cache<B, ()>, key: &str, span: Span, size: u64) -> Option<Refusal> {
    let Joined::Lead(ticket) = cache.join(key, span, (), 1, false).unwrap() else {
        panic!("{key} is there already")
    };
    let refused = match cache.reserve(key, span, size, ticket, 1).unwrap() {
        Room::Granted(id) => {
            let done = cache.finish(id, Some(0), 1).unwrap().unwrap();
            assert!(done.victims.is_empty());
            None
        }
        Room::Refused(refusal) => Some(refusal),
        Room::Evict(..) => panic!("there is room for everything"),
    };
    cache.land(key, ticket);
    refused
}

fn remove<B: Block>(cache: &mut Cache<B, ()>, key: &str) {
    let victims = cache.forget(key).unwrap();
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    cache.settled(&cells, &[]).unwrap();
}

fn chunk(n: u64) -> String {
    let array = ["era5/2m_temperature", "era5/wind", "labels/0"][(n % 3) as usize];
    format!("{array}/c/{}/{}/{}", n / 3 % 40, n / 120 % 50, n / 6000)
}

#[test]
fn many_keys_come_and_go() {
    const KEYS: u64 = 120_000;
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 42).unwrap();
    let mut random = Random(88_172_645_463_325_252);
    let mut keys: Vec<u64> = (0..KEYS).collect();
    random.shuffle(&mut keys);
    for &n in &keys {
        assert_eq!(fill(&mut cache, &chunk(n), Span::Full, n), None);
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
        let found = cache.peek(&chunk(n), Span::Full, 1).unwrap();
        found.map(|found| found.size)
    };
    assert!(gone.iter().all(|n| there(&cache, *n).is_none()));
    assert!(left.iter().all(|n| there(&cache, *n) == Some(*n)));

    let memory = cache.memory();
    for &n in gone {
        assert_eq!(fill(&mut cache, &chunk(n), Span::Full, n), None);
    }
    assert_eq!(
        cache.memory(),
        memory,
        "cells that were freed are used again"
    );
    assert!(keys.iter().all(|n| there(&cache, *n) == Some(*n)));

    let mut swept = 0;
    loop {
        let victims = cache.sweep("era5").unwrap();
        if victims.is_empty() {
            break;
        }
        swept += victims.len() as u64;
        let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        cache.settled(&cells, &[]).unwrap();
    }
    assert_eq!((swept, cache.len()), (KEYS / 3 * 2, KEYS / 3));
    cache.validate().unwrap();
}

/// Whatever cannot grow, whenever: the value stays uncached, the books stay right, and once there
/// is memory again everything goes on.
#[test]
fn memory_gives_out() {
    let plan = Rc::new(Plan::default());
    let mut cache = Cache::new(Vectors::new(&plan), UNBOUNDED, 3).unwrap();
    let mut random = Random(1);
    let mut refused = 0;
    let mut held = 0;
    for n in 0..14_000u64 {
        if n % 50 == 0 {
            let bits = random.next();
            plan.refuse.set(Refuse {
                cells: bits & 1 == 0,
                slots: bits & 2 == 0,
                directory: bits & 4 == 0,
                texts: bits & 8 == 0,
            });
        }
        let (key, span) = match n % 5 {
            0 => (format!("dir{n}/a/b/zarr.json"), Span::Full),
            1 => (format!("long{}{n}/c/{n}", "x".repeat(90)), Span::Offset(n)),
            2 => (format!("{n}"), Span::Suffix(u64::MAX - n)),
            3 => (format!("~{n}{}", "x".repeat(n as usize % 700)), Span::Full),
            _ => (chunk(n), Span::Full),
        };
        match fill(&mut cache, &key, span, n) {
            None => held += 1,
            Some(Refusal::Full) => {
                refused += 1;
                assert_eq!(cache.in_flight(), (0, 0));
                if refused % 200 == 1 {
                    cache.validate().unwrap();
                }
            }
            Some(other) => panic!("{other:?}"),
        }
        assert_eq!(cache.len(), held);
    }
    cache.validate().unwrap();
    assert!(refused > 500, "{refused} refusals show little");
}

/// Each directory that is missing costs its own look-up, so a key of slashes takes no longer than
/// its length says.
#[test]
fn a_key_of_slashes() {
    let limits = Limits {
        flat: false,
        ..UNBOUNDED
    };
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), limits, 0).unwrap();
    let deep = "/".repeat(1000);
    let coordinates = "a/c".to_owned() + &"/1".repeat(2000);
    for key in [&deep, &coordinates] {
        for span in [Span::Suffix(u64::MAX), Span::Full] {
            assert_eq!(fill(&mut cache, key, span, 1), None);
        }
    }
    cache.validate().unwrap();
    for key in [&deep, &coordinates] {
        assert!(cache.peek(key, Span::Full, 1).unwrap().is_some());
        remove(&mut cache, key);
    }
    cache.validate().unwrap();
    assert!(cache.entries().unwrap().is_empty());
}
